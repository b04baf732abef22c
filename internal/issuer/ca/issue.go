package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Request asks for an X.509-SVID. Nothing else of a CSR reaches a certificate.
type Request struct {
	ID  spiffeid.ID
	Key crypto.PublicKey // see CheckKey
	// Instance, at most 64 printable ASCII characters, becomes the subject's
	// serialNumber, so that the control plane knows which instance of a workload
	// presents the SVID without asking anyone: see [Instance]. It is no part of
	// the SPIFFE ID and no peer may decide by it. Empty: no subject.
	Instance string
	// TTL is how long the SVID is to live: at least a second, and never longer
	// than configured. Zero: as configured.
	TTL time.Duration

	names []string // DNS names and IP addresses beside the ID; the control plane's own only
}

// Issued is an X.509-SVID without its private key, and what to trust.
type Issued struct {
	// Chain is leaf first, then the intermediate and, of an upstream CA, those
	// above it; no root. For a while after a
	// taint the new root follows, signed by the tainted one: see [CA.Taint].
	Chain  []*x509.Certificate
	Bundle []*x509.Certificate // roots of the trust domain
}

// Instance returns what [Request] carried when leaf was issued, or "".
func Instance(leaf *x509.Certificate) string { return leaf.Subject.SerialNumber }

// Issue signs an SVID that lives as the request and the configuration say, or as
// long as its issuer if that is shorter. It refuses IDs of other trust domains, IDs without
// a path and IDs under /sallyport/, and releases nothing that does not pass the
// checks of the X509-SVID standard.
func (c *CA) Issue(ctx context.Context, req Request) (*Issued, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if identity.Reserved(req.ID) {
		return nil, fmt.Errorf("issuing an SVID for %s: reserved for the control plane", req.ID)
	}
	return c.issue(c.state.Load(), req)
}

func (c *CA) issue(s *state, req Request) (*Issued, error) {
	if !req.ID.MemberOf(c.td) || req.ID.Path() == "" {
		return nil, fmt.Errorf("issuing an SVID for %q: not a workload of trust domain %s", req.ID, c.td)
	}
	if err := CheckKey(req.Key); err != nil {
		return nil, fmt.Errorf("issuing an SVID for %s: %w", req.ID, err)
	}
	if !printable(req.Instance) {
		return nil, fmt.Errorf("issuing an SVID for %s: instance %q: at most 64 printable ASCII characters", req.ID, req.Instance)
	}
	if req.TTL != 0 && req.TTL < time.Second {
		return nil, fmt.Errorf("issuing an SVID for %s: a life of %v: at least 1s", req.ID, req.TTL)
	}
	now := c.cfg.Now()
	if !now.Before(s.signer.cert.NotAfter) {
		return nil, fmt.Errorf("issuing an SVID for %s: the signing certificate expired at %s; is the clock right?", req.ID, s.signer.cert.NotAfter.Format(time.RFC3339))
	}
	tmpl, err := template(req.ID, now, c.lifetime(req))
	if err != nil {
		return nil, err
	}
	tmpl.Subject = pkix.Name{SerialNumber: req.Instance}
	tmpl.DNSNames, tmpl.IPAddresses = splitNames(req.names)
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	leaf, err := sign(tmpl, s.signer, req.Key)
	if err != nil {
		return nil, fmt.Errorf("issuing an SVID for %s: %w", req.ID, err)
	}
	issued := &Issued{Chain: slices.Concat([]*x509.Certificate{leaf, s.signer.cert}, s.signer.above, s.cross), Bundle: s.certs()}
	if err := c.lintSVID(issued, req, now); err != nil {
		return nil, fmt.Errorf("issuing an SVID for %s: certificate withheld: %w", req.ID, err)
	}
	return issued, nil
}

func (c *CA) lifetime(req Request) time.Duration {
	if req.TTL == 0 {
		return c.cfg.SVIDTTL
	}
	return min(req.TTL, c.cfg.SVIDTTL)
}

// template returns what leaf and CA certificates have in common.
func template(id spiffeid.ID, now time.Time, ttl time.Duration) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	start := now.UTC().Truncate(time.Second)
	return &x509.Certificate{
		SerialNumber:          serial,
		URIs:                  []*url.URL{id.URL()},
		NotBefore:             start.Add(-Backdate),
		NotAfter:              start.Add(ttl),
		BasicConstraintsValid: true,
	}, nil
}

// newSerial returns 127 random bits, never zero (RFC 5280 section 4.1.2.2).
func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, fmt.Errorf("making a serial number: %w", err)
	}
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b), nil
}

// sign makes the certificate, never outliving its issuer. A nil key makes it
// self-signed.
func sign(tmpl *x509.Certificate, by *authority, pub crypto.PublicKey) (*x509.Certificate, error) {
	parent := by.cert
	if parent == nil {
		parent = tmpl
	}
	if tmpl.NotAfter.After(parent.NotAfter) {
		tmpl.NotAfter = parent.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, by.signer)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading back what was signed: %w", err)
	}
	return cert, nil
}

// CheckKey accepts ECDSA P-256 and P-384, Ed25519, and RSA of 2048 to 4096 bits.
func CheckKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return fmt.Errorf("curve %s: use P-256 or P-384", k.Curve.Params().Name)
		}
	case ed25519.PublicKey:
		if len(k) != ed25519.PublicKeySize {
			return errors.New("malformed Ed25519 key")
		}
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return fmt.Errorf("RSA key of %d bits: use 2048 to 4096", n)
		}
		if k.E < 3 || k.E&1 == 0 {
			return fmt.Errorf("RSA exponent %d", k.E)
		}
	default:
		return fmt.Errorf("key type %T: use ECDSA P-256 or P-384, Ed25519, or RSA", pub)
	}
	return nil
}

// splitNames tells DNS names from IP addresses.
func splitNames(names []string) (dns []string, ips []net.IP) {
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			ips = append(ips, ip)
		} else {
			dns = append(dns, n)
		}
	}
	return dns, ips
}

func printable(s string) bool {
	for _, c := range []byte(s) {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return len(s) <= 64
}
