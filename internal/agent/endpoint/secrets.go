package endpoint

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Names of secrets beside SPIFFE IDs (the SVID of that ID) and IDs of trust
// domains (the bundle of that domain). They are those that SPIRE serves.
const (
	secretDefault = "default" // the first SVID
	secretOwnRoot = "ROOTCA"  // the bundle of the first SVID's trust domain
	secretAllRoot = "ALL"     // every bundle, each for its own trust domain only

	secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	// spiffeValidator is Envoy's extension that keeps trust domains apart.
	spiffeValidator = "envoy.tls.cert_validator.spiffe"
)

// secret is one resource. The version changes with the content and tells nothing
// of a key.
type secret struct {
	name, version string
	body          *anypb.Any
}

// secretsOf returns those of names that the holding has, in its own order; of no
// names, every SVID and bundle. Names that the caller has no right to are left
// out: to it they do not exist.
func secretsOf(h *Holding, names []string) ([]secret, error) {
	if len(h.SVIDs) == 0 {
		return nil, ErrDenied
	}
	if len(names) == 0 {
		for _, svid := range h.SVIDs {
			names = append(names, svid.ID.String())
		}
		for td := range h.Bundles {
			names = append(names, td.IDString())
		}
	}
	names = slices.Clone(names)
	slices.Sort(names)
	var out []secret
	for _, name := range slices.Compact(names) {
		s, version, err := secretOf(h, name)
		if err != nil {
			return nil, fmt.Errorf("encoding secret %q: %w", name, err)
		}
		if s == nil {
			continue
		}
		s.Name = name
		body, err := anypb.New(s)
		if err != nil {
			return nil, fmt.Errorf("encoding secret %q: %w", name, err)
		}
		out = append(out, secret{name, version, body})
	}
	return out, nil
}

// secretOf returns nil for a name that is none of this holding's.
func secretOf(h *Holding, name string) (*tlsv3.Secret, string, error) {
	switch first := h.SVIDs[0]; name {
	case secretDefault:
		return certificateSecret(first)
	case secretOwnRoot:
		return bundleSecret(h.Bundles[first.ID.TrustDomain()])
	case secretAllRoot:
		return allBundlesSecret(h.Bundles)
	}
	for _, svid := range h.SVIDs {
		if svid.ID.String() == name {
			return certificateSecret(svid)
		}
	}
	if td, err := spiffeid.TrustDomainFromString(name); err == nil && td.IDString() == name {
		return bundleSecret(h.Bundles[td])
	}
	return nil, "", nil
}

func certificateSecret(svid *x509svid.SVID) (*tlsv3.Secret, string, error) {
	chain, key, err := svid.Marshal()
	if err != nil {
		return nil, "", err
	}
	return &tlsv3.Secret{Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(chain), PrivateKey: inline(key),
	}}}, digest(chain), nil
}

func bundleSecret(b *spiffebundle.Bundle) (*tlsv3.Secret, string, error) {
	if b == nil || len(b.X509Authorities()) == 0 {
		return nil, "", nil
	}
	roots := pemOf(b.X509Authorities())
	return &tlsv3.Secret{Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		TrustedCa: inline(roots),
	}}}, digest(roots), nil
}

// allBundlesSecret leaves the choice of the bundle to Envoy's SPIFFE validator,
// which takes that of the peer's trust domain: one pool of all roots would let any
// of them speak for any trust domain (SPIFFE Federation 4.2).
func allBundlesSecret(bundles identity.Bundles) (*tlsv3.Secret, string, error) {
	cfg := &tlsv3.SPIFFECertValidatorConfig{}
	var all []byte
	for td, b := range bundles {
		if len(b.X509Authorities()) > 0 {
			cfg.TrustDomains = append(cfg.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
				Name: td.Name(), TrustBundle: inline(pemOf(b.X509Authorities())),
			})
		}
	}
	slices.SortFunc(cfg.TrustDomains, func(a, b *tlsv3.SPIFFECertValidatorConfig_TrustDomain) int {
		return strings.Compare(a.Name, b.Name)
	})
	for _, td := range cfg.TrustDomains {
		all = fmt.Appendf(all, "%s\n%s", td.Name, td.TrustBundle.GetInlineBytes())
	}
	typed, err := anypb.New(cfg)
	if err != nil {
		return nil, "", err
	}
	return &tlsv3.Secret{Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: typed},
	}}}, digest(all), nil
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func pemOf(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a Buffer takes all
	}
	return b.Bytes()
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}
