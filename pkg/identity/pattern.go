package identity

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxIDLength is the length in bytes beyond which a SPIFFE ID or a pattern is
// refused (SPIFFE-ID 2.3).
const MaxIDLength = 2048

const scheme = "spiffe://"

// Pattern matches SPIFFE IDs of one trust domain by path segment: "*" stands for
// exactly one segment, a final "**" for one or more; every other segment is
// literal. There are no regular expressions and the trust domain is always
// literal. Patterns are comparable with ==. The zero Pattern matches nothing.
type Pattern struct {
	text string // the full form; "" in the zero Pattern
	path int    // where the path begins in text
	wild bool   // some segment is "*" or "**"
}

// ParsePattern reads the full form, as in "spiffe://shop.example/db/*/**". It
// refuses a wildcard that is only a part of a segment, a "**" that is not last,
// more than [MaxIDLength] bytes, and whatever SPIFFE-ID section 2 refuses.
func ParsePattern(s string) (Pattern, error) {
	p, err := parsePattern(s)
	if err != nil {
		return Pattern{}, fmt.Errorf("parsing SPIFFE ID pattern %s: %w", quote(s), err)
	}
	return p, nil
}

func parsePattern(s string) (Pattern, error) {
	if len(s) > MaxIDLength {
		return Pattern{}, fmt.Errorf("longer than %d bytes", MaxIDLength)
	}
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return Pattern{}, errors.New("want spiffe://TRUST-DOMAIN/PATH")
	}
	td, path, hasPath := strings.Cut(rest, "/")
	if strings.Contains(td, "*") {
		return Pattern{}, errors.New("the trust domain cannot hold a wildcard")
	}
	if _, err := spiffeid.TrustDomainFromString(td); err != nil {
		return Pattern{}, err
	}
	p := Pattern{text: s, path: len(scheme) + len(td)}
	for hasPath {
		var seg string
		seg, path, hasPath = strings.Cut(path, "/")
		switch {
		case seg == "*":
			p.wild = true
		case seg == "**" && hasPath:
			return Pattern{}, errors.New(`"**" must be the last segment`)
		case seg == "**":
			p.wild = true
		case strings.Contains(seg, "*"):
			return Pattern{}, fmt.Errorf("segment %q: a wildcard stands for a whole segment", seg)
		default:
			if err := spiffeid.ValidatePathSegment(seg); err != nil {
				return Pattern{}, err
			}
		}
	}
	return p, nil
}

// ExactPattern returns the pattern that matches id and nothing else. The zero ID
// gives the zero Pattern.
func ExactPattern(id spiffeid.ID) Pattern {
	return Pattern{text: id.String(), path: len(id.String()) - len(id.Path())}
}

// Match reports whether id matches. It does not allocate.
func (p Pattern) Match(id spiffeid.ID) bool {
	s := id.String()
	switch {
	case p.text == "" || s == "":
		return false
	case !p.wild:
		return p.text == s
	case len(s) <= p.path || s[:p.path] != p.text[:p.path]:
		return false
	}
	return matchPath(p.text[p.path:], s[p.path:])
}

// matchPath walks both paths segment by segment. pattern begins with a slash.
func matchPath(pattern, path string) bool {
	for pattern != "" {
		if path == "" || path[0] != '/' {
			return false
		}
		if pattern == "/**" {
			return true
		}
		var want, got string
		want, pattern = segment(pattern)
		got, path = segment(path)
		if want != "*" && want != got {
			return false
		}
	}
	return path == ""
}

// segment splits "/a/b" into "a" and "/b".
func segment(path string) (seg, rest string) {
	if i := strings.IndexByte(path[1:], '/'); i >= 0 {
		return path[1 : i+1], path[i+1:]
	}
	return path[1:], ""
}

// Exact returns the only ID that p matches; false when p holds a wildcard or is
// zero.
func (p Pattern) Exact() (spiffeid.ID, bool) {
	if p.wild || p.text == "" {
		return spiffeid.ID{}, false
	}
	id, err := spiffeid.FromString(p.text)
	return id, err == nil
}

// TrustDomain returns the trust domain of every ID that p can match; zero for
// the zero Pattern.
func (p Pattern) TrustDomain() spiffeid.TrustDomain {
	if p.text == "" {
		return spiffeid.TrustDomain{}
	}
	td, err := spiffeid.TrustDomainFromString(p.text[len(scheme):p.path])
	if err != nil {
		return spiffeid.TrustDomain{}
	}
	return td
}

// String gives the form that [ParsePattern] reads, or "" for the zero Pattern.
func (p Pattern) String() string { return p.text }

// IsZero reports whether p is the zero Pattern, which matches nothing.
func (p Pattern) IsZero() bool { return p.text == "" }

// quote shortens and escapes untrusted text for an error message.
func quote(s string) string {
	const limit = 128
	if len(s) > limit {
		return fmt.Sprintf("%q…", s[:limit])
	}
	return fmt.Sprintf("%q", s)
}
