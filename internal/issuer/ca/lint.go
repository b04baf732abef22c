package ca

import (
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// The linter reads a certificate back as any peer would and holds it to the
// X509-SVID standard before it is released. It shares no code with the templates
// that it checks. Numbers in brackets are sections of that standard.

var (
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
)

// lintSVID checks a leaf against the request and the bundle it goes out with.
func (c *CA) lintSVID(issued *Issued, req Request, now time.Time) error {
	leaf, issuer := issued.Chain[0], issued.Chain[1]
	if err := lintNames(leaf, req.ID, req.names...); err != nil {
		return err
	}
	if err := lintLeafUsage(leaf); err != nil {
		return err
	}
	if err := lintTimes(leaf, issuer, now, c.cfg.SVIDTTL); err != nil {
		return err
	}
	if req.TTL != 0 && leaf.NotAfter.After(now.Add(req.TTL)) {
		return fmt.Errorf("valid until %s, longer than the %v asked for", leaf.NotAfter, req.TTL)
	}
	if key, ok := req.Key.(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(leaf.PublicKey) {
		return errors.New("not for the requested key")
	}
	if Instance(leaf) != req.Instance {
		return errors.New("not for the requested instance")
	}
	bundle := x509bundle.FromX509Authorities(c.td, issued.Bundle)
	if _, err := identity.Verify(issued.Chain, bundle, now); err != nil {
		return fmt.Errorf("a peer would refuse it: %w", err)
	}
	return nil
}

// lintNames: exactly one URI SAN [2] and no other names than those asked for, with SAN critical where
// there is no subject [3.1, RFC 5280 section 4.2.1.6].
func lintNames(cert *x509.Certificate, id spiffeid.ID, names ...string) error {
	others := slices.Clone(cert.DNSNames)
	for _, ip := range cert.IPAddresses {
		others = append(others, ip.String())
	}
	switch {
	case len(cert.URIs) != 1:
		return fmt.Errorf("%d URI SANs, want one", len(cert.URIs))
	case cert.URIs[0].String() != id.String():
		return fmt.Errorf("names %s, not %s", cert.URIs[0], id)
	case len(cert.EmailAddresses) != 0 || !slices.Equal(slices.Sorted(slices.Values(others)), slices.Sorted(slices.Values(names))):
		return errors.New("a SAN that is not asked for")
	case cert.Subject.CommonName != "" && !cert.IsCA:
		return errors.New("a common name")
	case len(cert.Subject.Names) == 0 && !critical(cert, oidSubjectAltName):
		return errors.New("neither a subject nor a critical SAN")
	}
	return nil
}

// lintLeafUsage: no CA [4.1], digitalSignature and nothing that signs
// certificates, critical [4.3], server and client [4.4].
func lintLeafUsage(leaf *x509.Certificate) error {
	switch {
	case !leaf.BasicConstraintsValid || leaf.IsCA:
		return errors.New("basic constraints do not say cA false")
	case leaf.KeyUsage != x509.KeyUsageDigitalSignature || !critical(leaf, oidKeyUsage):
		return errors.New("key usage is not digitalSignature alone, critical")
	case len(leaf.UnknownExtKeyUsage) != 0 || len(leaf.ExtKeyUsage) != 2,
		leaf.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth || leaf.ExtKeyUsage[1] != x509.ExtKeyUsageClientAuth:
		return errors.New("extended key usage is not serverAuth and clientAuth")
	}
	return nil
}

// lintCA: an ID without path [3.2], cA true [4.1], keyCertSign, critical [4.3].
func lintCA(cert, issuer *x509.Certificate, td spiffeid.TrustDomain, now time.Time, ttl time.Duration) error {
	if err := lintNames(cert, td.ID()); err != nil {
		return err
	}
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA || !critical(cert, oidBasicConstraints):
		return errors.New("basic constraints do not say cA true, critical")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0 || cert.KeyUsage&x509.KeyUsageDigitalSignature != 0 || !critical(cert, oidKeyUsage):
		return errors.New("key usage is not keyCertSign, critical")
	case len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) != 0:
		return errors.New("an extended key usage")
	case cert.Subject.CommonName == "":
		return errors.New("no subject")
	}
	if err := cert.CheckSignatureFrom(issuer); err != nil {
		return fmt.Errorf("checking the signature: %w", err)
	}
	return lintTimes(cert, issuer, now, ttl)
}

// lintTimes: valid now, not older than promised, never outliving the issuer.
func lintTimes(cert, issuer *x509.Certificate, now time.Time, ttl time.Duration) error {
	switch {
	case cert.NotBefore.After(now) || !cert.NotAfter.After(now):
		return fmt.Errorf("not valid now (%s to %s)", cert.NotBefore, cert.NotAfter)
	case now.Sub(cert.NotBefore) > Backdate+time.Second:
		return fmt.Errorf("backdated to %s", cert.NotBefore)
	case cert.NotAfter.After(now.Add(ttl)):
		return fmt.Errorf("valid until %s, longer than %v", cert.NotAfter, ttl)
	case cert.NotAfter.After(issuer.NotAfter):
		return fmt.Errorf("outlives its issuer, which ends at %s", issuer.NotAfter)
	}
	return nil
}

func critical(cert *x509.Certificate, oid asn1.ObjectIdentifier) bool {
	for _, e := range cert.Extensions {
		if e.Id.Equal(oid) {
			return e.Critical
		}
	}
	return false
}
