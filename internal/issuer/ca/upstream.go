package ca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// Upstream is an intermediate that a CA elsewhere, perhaps offline, has signed.
// This CA then has no root of its own: it publishes those of the bundle file and
// signs SVIDs with the intermediate. Files are read again whenever Run looks, so
// that replacing them is all that a new intermediate needs. The zero value: none.
//
// Each replica has a certificate and key of its own; `sallyport ca csr` makes the
// request for one.
type Upstream struct {
	CertFile   string // PEM: the intermediate, then those above it, without root
	KeyFile    string // PEM: its ECDSA P-256 key, PKCS#8, 0600
	BundleFile string // PEM: the roots to trust
}

// settle is how long a root of the bundle file is published before an
// intermediate under it takes over from a good one: replace the bundle first.
const settle = time.Hour

// followUpstream returns what advanceUpstream returns, or goes on with the present
// intermediate while that fails, or while a new root is too new.
func (c *CA) followUpstream(ctx context.Context, b *book, now time.Time) (*authority, *anchor, error) {
	fresh, root, err := c.advanceUpstream(ctx, b, now)
	var have *authority
	if s := c.state.Load(); s != nil {
		have = s.signer
	}
	old := b.stillGood(have, now)
	switch wait := time.Duration(0); {
	case errors.Is(err, store.ErrConflict) || old == nil:
		return fresh, root, err
	case err == nil && fresh.cert.Equal(have.cert):
		return fresh, root, nil
	case err == nil:
		if wait = root.published.Add(settle).Sub(now); wait <= 0 || root.cert.Equal(old.cert) {
			return fresh, root, nil
		}
		err = fmt.Errorf("the intermediate in %s takes over in %v, when its root has been published for %v", c.cfg.Signer.Upstream.CertFile, wait.Round(time.Second), settle)
	}
	b.problems = append(b.problems, err)
	return have, old, nil
}

// advanceUpstream publishes the roots of the bundle file and returns the
// intermediate of the files with the root above it. Roots that leave the file
// stay in the bundle until they expire or are tainted.
func (c *CA) advanceUpstream(ctx context.Context, b *book, now time.Time) (*authority, *anchor, error) {
	roots, err := readCerts(c.cfg.Signer.Upstream.BundleFile)
	if err != nil {
		return nil, nil, err
	}
	for _, cert := range roots {
		if err := c.publishUpstream(ctx, b, cert, now); err != nil {
			return nil, nil, err
		}
	}
	return c.loadUpstream(b, now)
}

func (c *CA) publishUpstream(ctx context.Context, b *book, cert *x509.Certificate, now time.Time) error {
	file := c.cfg.Signer.Upstream.BundleFile
	switch {
	case b.tainted[keyHash(cert)] != nil || !now.Before(cert.NotAfter) || b.anchors[rootLine][rootLine.name(cert)] != nil:
		return nil
	case !cert.IsCA || !cert.BasicConstraintsValid:
		return fmt.Errorf("bundle file %s: %q is no CA certificate", file, cert.Subject)
	case len(cert.URIs) > 1 || len(cert.URIs) == 1 && cert.URIs[0].String() != c.td.IDString():
		return fmt.Errorf("bundle file %s: %q is the root of %v, not of %s", file, cert.Subject, cert.URIs, c.td.IDString())
	case cert.CheckSignatureFrom(cert) != nil:
		return fmt.Errorf("bundle file %s: %q has not signed itself: only roots belong there", file, cert.Subject)
	}
	return c.publish(ctx, b, rootLine, &anchor{cert: cert}, now)
}

func (c *CA) loadUpstream(b *book, now time.Time) (*authority, *anchor, error) {
	cfg := c.cfg.Signer.Upstream
	chain, err := readCerts(cfg.CertFile)
	if err != nil {
		return nil, nil, err
	}
	key, err := readKey(cfg.KeyFile)
	if err != nil {
		return nil, nil, err
	}
	cert := chain[0]
	switch {
	case !key.PublicKey.Equal(cert.PublicKey):
		return nil, nil, fmt.Errorf("key file %s is not the key of %s: they belong together", cfg.KeyFile, cfg.CertFile)
	case !now.Before(cert.NotAfter):
		return nil, nil, fmt.Errorf("the intermediate in %s expired at %s: have a new one signed", cfg.CertFile, cert.NotAfter.Format(time.RFC3339))
	case b.tainted[keyHash(cert)] != nil:
		return nil, nil, fmt.Errorf("the intermediate in %s is tainted: have one signed for a new key", cfg.CertFile)
	}
	if err := lintUpstream(cert, c.td.IDString()); err != nil {
		return nil, nil, fmt.Errorf("the intermediate in %s: %w; `sallyport ca csr` asks for the right profile", cfg.CertFile, err)
	}
	a := &authority{cert: cert, signer: key, above: chain[1:]}
	root := a.rootAmong(b.of(rootLine), now)
	if root == nil {
		return nil, nil, fmt.Errorf("the intermediate in %s: no root of %s has signed it, or it is not valid now", cfg.CertFile, cfg.BundleFile)
	}
	return a, root, nil
}

// rootAmong returns the believed anchor that an intermediate leads to, or nil.
func (a *authority) rootAmong(roots []*anchor, now time.Time) *anchor {
	pool := x509.NewCertPool()
	for _, cert := range a.above {
		pool.AddCert(cert)
	}
	for _, r := range roots {
		if r.taint != nil {
			continue
		}
		only := x509.NewCertPool()
		only.AddCert(r.cert)
		opts := x509.VerifyOptions{Roots: only, Intermediates: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
		if _, err := a.cert.Verify(opts); err == nil {
			return r
		}
	}
	return nil
}

// lintUpstream: an ID without path [3.2], cA true [4.1], keyCertSign, critical
// [4.3]. What it signs is checked again, each time.
func lintUpstream(cert *x509.Certificate, id string) error {
	switch {
	case len(cert.URIs) != 1 || cert.URIs[0].String() != id:
		return fmt.Errorf("its URI SAN is %v, not %s", cert.URIs, id)
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return errors.New("basic constraints do not say cA true")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0 || !critical(cert, oidKeyUsage):
		return errors.New("key usage is not keyCertSign, critical")
	}
	return nil
}

func readCerts(path string) (certs []*x509.Certificate, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the upstream CA's files: %w", err)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: a %s among the certificates", path, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%s: holds no certificate (PEM)", path)
	}
	return certs, nil
}

func readKey(path string) (*ecdsa.PrivateKey, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("reading the upstream CA's files: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("CA key file %s has mode %04o and can be read by other users: run chmod 600 %[1]s", path, st.Mode().Perm())
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the upstream CA's files: %w", err)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != blockPrivateKey || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("%s: want one PRIVATE KEY block (PKCS#8, PEM)", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || CheckKey(ec.Public()) != nil {
		return nil, fmt.Errorf("%s: want an ECDSA key, P-256 or P-384", path)
	}
	return ec, nil
}
