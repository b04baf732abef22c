package ca

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"time"
)

// made is when a certificate of ours was signed, to the second.
func made(cert *x509.Certificate) time.Time { return cert.NotBefore.Add(Backdate) }

// life is how long a certificate of ours lives from when it was signed.
func life(cert *x509.Certificate) time.Duration { return cert.NotAfter.Sub(made(cert)) }

// newRoot makes a self-signed root with a new key. It writes nothing.
func (c *CA) newRoot(now time.Time) (*authority, *pem.Block, error) {
	return c.newAuthority(nil, c.newRootKey, now, "root", c.cfg.RootTTL)
}

// newIntermediate makes an intermediate with a new key. It writes nothing.
func (c *CA) newIntermediate(parent *authority, now time.Time) (*authority, *pem.Block, error) {
	return c.newAuthority(parent, newFileKey, now, "intermediate "+c.cfg.Replica, c.cfg.IntermediateTTL)
}

// newAuthority gives each authority a subject of its own: with two issuers of
// one subject a verifier would have to try each signature.
func (c *CA) newAuthority(parent *authority, newKey func() (Signer, *pem.Block, error), now time.Time, kind string, ttl time.Duration) (*authority, *pem.Block, error) {
	key, block, err := newKey()
	if err != nil {
		return nil, nil, fmt.Errorf("making the key of a new %s: %w", kind, err)
	}
	tmpl, err := template(c.td.ID(), now, ttl)
	if err != nil {
		return nil, nil, err
	}
	tmpl.Subject = pkix.Name{
		Organization: []string{"Sallyport"},
		CommonName:   fmt.Sprintf("Sallyport %s %x", kind, tmpl.SerialNumber.Bytes()[:8]),
	}
	tmpl.IsCA = true
	tmpl.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	by := parent
	if by == nil {
		by = &authority{signer: key}
	} else {
		tmpl.MaxPathLenZero = true
	}
	cert, err := sign(tmpl, by, key.Public())
	if err != nil {
		return nil, nil, fmt.Errorf("making a new %s: %w", kind, err)
	}
	issuer := by.cert
	if issuer == nil {
		issuer = cert
	}
	if err := lintCA(cert, issuer, c.td, now, ttl); err != nil {
		return nil, nil, fmt.Errorf("making a new %s: certificate withheld: %w", kind, err)
	}
	return &authority{cert: cert, signer: key}, block, nil
}
