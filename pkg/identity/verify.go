package identity

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Limits on what a peer presents. They hold before any signature is checked, so
// that a stranger cannot make us work.
const (
	maxChain   = 8        // certificates
	maxDER     = 16 << 10 // bytes of one certificate
	maxSANs    = 16       // names in one certificate
	minRSABits = 2048
	maxRSABits = 4096
)

// Object identifiers of RFC 5280 sections 4.2.1.3 and 4.2.1.6.
var (
	oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSAN      = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// Verify checks an X509-SVID, leaf first, against the bundle of the leaf's own
// trust domain and no other, and returns whose it is. It does what X509-SVID
// sections 5.1 and 5.2 ask and also holds the leaf to the profile of sections 2
// to 4: exactly one URI SAN, spelt exactly as the SPIFFE ID, with a path; key
// usage critical, for signatures and not for signing certificates; extended key
// usage, if any, for both client and server. Chains of more than 8 certificates,
// certificates of more than 16 KiB or 16 names, and RSA keys outside 2048 to 4096
// bits are refused before any signature is checked.
func Verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (Peer, error) {
	if len(chain) == 0 {
		return Peer{}, ErrAnonymous
	}
	if err := withinLimits(chain); err != nil {
		return Peer{}, err
	}
	peer, err := peerFrom(chain)
	if err != nil {
		return Peer{}, err
	}
	if err := checkProfile(chain); err != nil {
		return Peer{}, fmt.Errorf("certificate of %s: %w", peer.ID, err)
	}
	if _, _, err := x509svid.Verify(chain, bundles, x509svid.WithTime(now)); err != nil {
		if late := clockError(peer.ID, chain, now); late != nil {
			return Peer{}, late
		}
		return Peer{}, fmt.Errorf("verifying certificate of %s: %w", peer.ID, err)
	}
	return peer, nil
}

func withinLimits(chain []*x509.Certificate) error {
	if len(chain) > maxChain {
		return fmt.Errorf("certificate chain of %d, at most %d accepted", len(chain), maxChain)
	}
	for _, c := range chain {
		if len(c.Raw) > maxDER {
			return fmt.Errorf("certificate of %d bytes, at most %d accepted", len(c.Raw), maxDER)
		}
		if n := len(c.DNSNames) + len(c.EmailAddresses) + len(c.IPAddresses) + len(c.URIs); n > maxSANs {
			return fmt.Errorf("certificate with %d names, at most %d accepted", n, maxSANs)
		}
		if key, ok := c.PublicKey.(*rsa.PublicKey); ok {
			if n := key.N.BitLen(); n < minRSABits || n > maxRSABits {
				return fmt.Errorf("certificate with an RSA key of %d bits, %d to %d accepted", n, minRSABits, maxRSABits)
			}
		}
	}
	return nil
}

// leafID reads the SPIFFE ID of a leaf. Package net/url, which stands between
// the certificate and go-spiffe, lowers the scheme's case and drops an empty
// fragment; comparing with the bytes in the certificate undoes that leniency.
func leafID(leaf *x509.Certificate) (spiffeid.ID, error) {
	id, err := x509svid.IDFromCert(leaf)
	switch {
	case err != nil:
		return spiffeid.ID{}, fmt.Errorf("reading SPIFFE ID: %w", err)
	case len(id.String()) > MaxIDLength:
		return spiffeid.ID{}, fmt.Errorf("reading SPIFFE ID: longer than %d bytes", MaxIDLength)
	case id.Path() == "":
		return spiffeid.ID{}, fmt.Errorf("certificate of %s: an ID without a path names a trust domain and never authenticates", id)
	}
	raw, err := rawURI(leaf)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("reading SPIFFE ID: %w", err)
	}
	if !bytes.Equal(raw, []byte(id.String())) {
		return spiffeid.ID{}, fmt.Errorf("reading SPIFFE ID: %s is not canonical, want %s", quote(string(raw)), id)
	}
	return id, nil
}

// rawURI returns the bytes of the first URI SAN (RFC 5280 section 4.2.1.6, tag
// 6).
func rawURI(c *x509.Certificate) ([]byte, error) {
	ext, ok := extension(c, oidSAN)
	if !ok {
		return nil, errors.New("certificate contains no SAN")
	}
	var names []asn1.RawValue
	if _, err := asn1.Unmarshal(ext.Value, &names); err != nil {
		return nil, err
	}
	for _, n := range names {
		if n.Class == asn1.ClassContextSpecific && n.Tag == 6 {
			return n.Bytes, nil
		}
	}
	return nil, errors.New("certificate contains no URI SAN")
}

// checkProfile holds the chain to the parts of the X509-SVID profile that
// x509svid.Verify leaves out. Sections in brackets.
func checkProfile(chain []*x509.Certificate) error {
	leaf := chain[0]
	usage, ok := extension(leaf, oidKeyUsage)
	switch {
	case !ok || !usage.Critical: // [4.3]
		return errors.New("key usage missing or not critical")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0: // [4.3]
		return errors.New("key usage lacks digital signature")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0: // [5.2]
		return errors.New("key usage allows signing certificates")
	case leaf.IsCA: // [4.1, 5.2]
		return errors.New("a certificate authority never authenticates")
	}
	if n := len(leaf.ExtKeyUsage) + len(leaf.UnknownExtKeyUsage); n > 0 { // [4.4]
		if !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) ||
			!slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
			return errors.New("extended key usage lacks server or client authentication")
		}
	}
	if len(leaf.Subject.Names) == 0 { // RFC 5280 section 4.2.1.6
		if san, ok := extension(leaf, oidSAN); !ok || !san.Critical {
			return errors.New("empty subject, and SAN not critical")
		}
	}
	for _, signer := range chain[1:] { // [3.2]
		for _, uri := range signer.URIs {
			if uri.Scheme == "spiffe" && uri.Path != "" {
				return errors.New("an issuer's SPIFFE ID has a path")
			}
		}
	}
	return nil
}

func extension(c *x509.Certificate, oid asn1.ObjectIdentifier) (pkix.Extension, bool) {
	for _, e := range c.Extensions {
		if e.Id.Equal(oid) {
			return e, true
		}
	}
	return pkix.Extension{}, false
}

// clockError explains a refusal that a wrong clock, here or there, may have
// caused. crypto/x509 reports an expired issuer as an unknown one.
func clockError(id spiffeid.ID, chain []*x509.Certificate, now time.Time) error {
	for i, c := range chain {
		what := fmt.Sprintf("certificate of %s", id)
		if i > 0 {
			what = fmt.Sprintf("issuer %s of %s", quote(c.Subject.String()), id)
		}
		if d := c.NotBefore.Sub(now); d > 0 {
			return fmt.Errorf("%s not yet valid: this clock is %s behind", what, round(d))
		}
		if d := now.Sub(c.NotAfter); d > 0 {
			return fmt.Errorf("%s expired %s ago; clock skew?", what, round(d))
		}
	}
	return nil
}

// round gives whole seconds, never less than one.
func round(d time.Duration) time.Duration {
	return max(d.Round(time.Second), time.Second)
}
