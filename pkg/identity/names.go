package identity

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ControlPlanePath is the path of the control plane's own SPIFFE ID.
const ControlPlanePath = reservedPath + "/controlplane"

const (
	reservedPath = "/sallyport"
	meshSuffix   = ".mesh"
	maxName      = 253 // bytes of a DNS name, RFC 1035 section 2.3.4
	maxLabel     = 63  // bytes of a DNS label
)

// Reserved reports whether id lies at or under /sallyport, which belongs to
// Sallyport itself: no workload may have such an ID.
func Reserved(id spiffeid.ID) bool {
	path := id.Path()
	return path == reservedPath || strings.HasPrefix(path, reservedPath+"/")
}

// MeshName returns the name by which callers inside id's own trust domain know
// it: the path's segments in reverse and ".mesh", so that /shop/payments is
// payments.shop.mesh. It is false for an ID without a path, with a segment that
// is not a lower-case DNS label, or whose name would exceed 253 bytes. Different
// IDs of one trust domain never share a name.
func MeshName(id spiffeid.ID) (string, bool) {
	path := id.Path()
	if path == "" || len(path)-1+len(meshSuffix) > maxName {
		return "", false
	}
	segments := strings.Split(path[1:], "/")
	for _, s := range segments {
		if !isLabel(s) {
			return "", false
		}
	}
	slices.Reverse(segments)
	return strings.Join(segments, ".") + meshSuffix, true
}

// ForeignMeshName is [MeshName] for an ID of another trust domain, whose alias
// stands before ".mesh": with the alias partner, /shop/payments is
// payments.shop.partner.mesh. It is false where MeshName would be, and for an
// alias that is not a lower-case DNS label.
func ForeignMeshName(id spiffeid.ID, alias string) (string, bool) {
	name, ok := MeshName(id)
	if !ok || !isLabel(alias) || len(name)+1+len(alias) > maxName {
		return "", false
	}
	return strings.TrimSuffix(name, meshSuffix) + "." + alias + meshSuffix, true
}

// ParseRef reads the ways in which a user may name a workload of trust domain
// td: "spiffe://shop.example/shop/payments" (any trust domain),
// "/shop/payments", "payments.shop.mesh", "payments.shop" and "payments", which
// is /payments. A last label "mesh" after another is always the suffix. An ID
// without a path names no workload and is refused.
func ParseRef(td spiffeid.TrustDomain, s string) (spiffeid.ID, error) {
	id, err := parseRef(td, s)
	if err == nil && len(id.String()) > MaxIDLength {
		err = fmt.Errorf("longer than %d bytes", MaxIDLength)
	}
	if err == nil && id.Path() == "" {
		err = errors.New("names a trust domain, not a workload")
	}
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("parsing workload reference %s: %w", quote(s), err)
	}
	return id, nil
}

func parseRef(td spiffeid.TrustDomain, s string) (spiffeid.ID, error) {
	switch {
	case s == "":
		return spiffeid.ID{}, errors.New("empty")
	case strings.Contains(s, "://"):
		return spiffeid.FromString(s)
	case s[0] == '/':
		return spiffeid.FromPath(td, s)
	}
	labels := strings.Split(strings.TrimSuffix(s, meshSuffix), ".")
	for _, l := range labels {
		if !isLabel(l) {
			return spiffeid.ID{}, fmt.Errorf("%s is not a lower-case DNS label; write the path (/shop/payments) instead", quote(l))
		}
	}
	slices.Reverse(labels)
	return spiffeid.FromSegments(td, labels...)
}

// isLabel reports whether s is a lower-case host name label (RFC 1123 section
// 2.1).
func isLabel(s string) bool {
	if s == "" || len(s) > maxLabel || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
