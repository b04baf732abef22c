package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// pki is another PKI: a root in a file and one intermediate.
type pki struct {
	file          string
	root, between *x509.Certificate
	rootKey, key  crypto.Signer // root's and intermediate's
	serial        int64
	now           time.Time
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

func newPKI(t testing.TB) *pki {
	t.Helper()
	p := &pki{rootKey: ecKey(t), key: ecKey(t), now: time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)}
	p.root = p.sign(t, p.authority("factory root"), nil, p.rootKey.Public(), p.rootKey)
	p.between = p.sign(t, p.authority("factory issuer"), p.root, p.key.Public(), p.rootKey)
	p.file = filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(p.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.root.Raw}), 0o600))
	return p
}

func (p *pki) authority(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: p.now.Add(-time.Hour), NotAfter: p.now.Add(1000 * time.Hour),
	}
}

func (p *pki) leaf() *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: "press-7", Organization: []string{"Acme"}, OrganizationalUnit: []string{"Hall 3", "Presses"}},
		URIs:    []*url.URL{{Scheme: "urn", Opaque: "device:7"}}, DNSNames: []string{"press-7.acme.example", "p7.acme.example"},
		EmailAddresses: []string{"hall3@acme.example"}, IPAddresses: []net.IP{net.IPv4(192, 0, 2, 7)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		NotBefore: p.now.Add(-time.Hour), NotAfter: p.now.Add(time.Hour),
	}
}

func (p *pki) sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, by crypto.Signer) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = tmpl
	}
	p.serial++
	tmpl.SerialNumber = big.NewInt(p.serial)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, by)
	require.NoError(t, err)
	c, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return c
}

func (p *pki) verifier(t testing.TB) *X509Pop {
	t.Helper()
	v, err := NewX509Pop(X509PopConfig{Name: "factory", CAFile: p.file, Now: func() time.Time { return p.now }})
	require.NoError(t, err)
	return v
}

// show is a certificate as its holder presents it.
type show struct {
	chain      []*x509.Certificate
	nonce, csr []byte
	signature  []byte
}

func (p *pki) show(t testing.TB, leaf *x509.Certificate, key crypto.Signer) *show {
	t.Helper()
	s := &show{nonce: bytes.Repeat([]byte{7}, NonceSize), csr: []byte("csr")}
	s.chain = []*x509.Certificate{p.sign(t, leaf, p.between, key.Public(), p.key), p.between}
	var err error
	s.signature, err = ProveX509Pop(key, s.nonce, s.csr)
	require.NoError(t, err)
	return s
}

func (s *show) to(v *X509Pop) (Verified, error) {
	var chain [][]byte
	for _, c := range s.chain {
		chain = append(chain, c.Raw)
	}
	return v.Verify(chain, s.nonce, s.csr, s.signature)
}

func TestX509PopSelectors(t *testing.T) {
	p := newPKI(t)
	s := p.show(t, p.leaf(), ecKey(t))
	got, err := s.to(p.verifier(t))
	require.NoError(t, err)
	want := Selectors{
		"commonName": {"press-7"}, "organization": {"Acme"}, "organizationalUnit": {"Hall 3", "Presses"},
		"dns": {"press-7.acme.example", "p7.acme.example"}, "uri": {"urn:device:7"}, "ip": {"192.0.2.7"}, "email": {"hall3@acme.example"},
		"fingerprint": {fingerprint(s.chain[0])}, "issuerFingerprint": {fingerprint(p.between)},
	}
	if !reflect.DeepEqual(got.Selectors, want) {
		t.Errorf("got %v\nwant %v", got.Selectors, want)
	}
	if got.Kind != KindX509Pop || got.Issuer != "factory" || got.Once != "" || !strings.Contains(got.Subject, "CN=press-7") {
		t.Errorf("got %+v", got)
	}
}

func TestX509PopTakesEveryKindOfKey(t *testing.T) {
	p := newPKI(t)
	v := p.verifier(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	require.NoError(t, err)
	for _, key := range []crypto.Signer{rsaKey, edKey, p384} {
		s := p.show(t, p.leaf(), key)
		if _, err := s.to(v); err != nil {
			t.Errorf("%T: %v", key, err)
		}
		s.signature[len(s.signature)/2] ^= 1
		if _, err := s.to(v); !errors.Is(err, ErrBadEvidence) {
			t.Errorf("%T, spoilt: got %v", key, err)
		}
	}
}

func TestX509PopRefuses(t *testing.T) {
	other := newPKI(t)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	require.NoError(t, err)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	require.NoError(t, err)
	resign := func(change func(*x509.Certificate)) func(*testing.T, *pki, *show) {
		return func(t *testing.T, p *pki, s *show) {
			leaf := p.leaf()
			change(leaf)
			*s = *p.show(t, leaf, ecKey(t))
		}
	}
	for name, c := range map[string]struct {
		spoil func(*testing.T, *pki, *show)
		want  string
	}{
		"proof of another key": {func(t *testing.T, _ *pki, s *show) { s.signature, _ = ProveX509Pop(ecKey(t), s.nonce, s.csr) }, "proof"},
		"no proof":             {func(_ *testing.T, _ *pki, s *show) { s.signature = nil }, "proof"},
		"proof of another CSR": {func(_ *testing.T, _ *pki, s *show) { s.csr = []byte("mine") }, "proof"},
		"replayed challenge":   {func(_ *testing.T, _ *pki, s *show) { s.nonce = bytes.Repeat([]byte{8}, NonceSize) }, "proof"},
		"no challenge":         {func(_ *testing.T, _ *pki, s *show) { s.nonce = nil }, "proof"},
		"no chain":             {func(_ *testing.T, _ *pki, s *show) { s.chain = nil }, "chain of 0"},
		"long chain": {func(_ *testing.T, p *pki, s *show) {
			for len(s.chain) <= MaxChain {
				s.chain = append(s.chain, p.root)
			}
		}, "chain of 9"},
		"another CA": {func(t *testing.T, _ *pki, s *show) {
			*s = *other.show(t, other.leaf(), ecKey(t))
		}, "unknown authority"},
		"intermediate left out": {func(_ *testing.T, _ *pki, s *show) { s.chain = s.chain[:1] }, "unknown authority"},
		"out of order":          {func(_ *testing.T, p *pki, s *show) { s.chain = []*x509.Certificate{s.chain[0], p.root} }, "out of order"},
		"one name, two issuers": {func(_ *testing.T, p *pki, s *show) { s.chain = append(s.chain, p.root, p.root) }, "two issuers"},
		"a CA as leaf": {resign(func(c *x509.Certificate) {
			c.IsCA, c.BasicConstraintsValid = true, true
		}), "authority's certificate"},
		"a leaf that may sign":      {resign(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), "authority's certificate"},
		"not for signatures":        {resign(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), "digital signature"},
		"for servers only":          {resign(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), "client authentication"},
		"for anything but named so": {resign(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }), "client authentication"},
		"too many names": {resign(func(c *x509.Certificate) {
			c.DNSNames = strings.Split(strings.Repeat("a.example ", maxSANs)+"b.example", " ")
		}), "names"},
		"expired":         {resign(func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(time.Minute) }), "is valid from"},
		"not yet valid":   {resign(func(c *x509.Certificate) { c.NotBefore = c.NotAfter.Add(-time.Minute) }), "is valid from"},
		"weak RSA":        {func(t *testing.T, p *pki, s *show) { s.chain[0] = p.sign(t, p.leaf(), p.between, weak.Public(), p.key) }, "1024 bits"},
		"P-224":           {func(t *testing.T, p *pki, s *show) { s.chain[0] = p.sign(t, p.leaf(), p.between, p224.Public(), p.key) }, "P-224"},
		"a large unknown": {func(_ *testing.T, _ *pki, s *show) { s.chain[0].Raw = make([]byte, MaxCertificate+1) }, "certificate of 16385 bytes"},
		"noise":           {func(_ *testing.T, _ *pki, s *show) { s.chain[0].Raw = []byte("noise") }, "parsing certificate 1"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPKI(t)
			s := p.show(t, p.leaf(), ecKey(t))
			v := p.verifier(t)
			if _, err := s.to(v); err != nil {
				t.Fatalf("unspoilt: %v", err)
			}
			c.spoil(t, p, s)
			got, err := s.to(v)
			if !errors.Is(err, ErrBadEvidence) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %+v, %v; want %q", got, err, c.want)
			}
		})
	}
}

// The root itself and a leaf that stands in the CA file are no evidence.
func TestNewX509PopRefuses(t *testing.T) {
	p := newPKI(t)
	leaf := p.sign(t, p.leaf(), p.root, ecKey(t).Public(), p.rootKey)
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	for name, c := range map[string]struct{ content, want string }{
		"empty":      {"", "no PEM certificate"},
		"noise":      {block("CERTIFICATE", []byte("x")), "x509"},
		"a leaf":     {block("CERTIFICATE", p.root.Raw) + block("CERTIFICATE", leaf.Raw), "no CA certificate"},
		"a key":      {block("PRIVATE KEY", []byte("x")), "only certificates"},
		"very large": {strings.Repeat("x", maxCAFile+1), "at most"},
	} {
		file := filepath.Join(t.TempDir(), "ca.pem")
		require.NoError(t, os.WriteFile(file, []byte(c.content), 0o600))
		if _, err := NewX509Pop(X509PopConfig{Name: "factory", CAFile: file}); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// What stands in a certificate reaches logs printable and short.
func TestX509PopSubjectIsFitForALog(t *testing.T) {
	p := newPKI(t)
	leaf := p.leaf()
	leaf.Subject.CommonName = "x\n[ERROR] forged \x1b[2J" + strings.Repeat("x", 1000)
	got, err := p.show(t, leaf, ecKey(t)).to(p.verifier(t))
	require.NoError(t, err)
	if strings.ContainsAny(got.Subject, "\n\x1b") || len(got.Subject) > 500 {
		t.Errorf("got %q", got.Subject)
	}
}

// A certificate that is refused can still be explained.
func TestX509PopInspect(t *testing.T) {
	p := newPKI(t)
	v := p.verifier(t)
	s := p.show(t, p.leaf(), ecKey(t))
	good, err := v.Inspect([][]byte{s.chain[0].Raw, s.chain[1].Raw})
	if err != nil || len(good.Selectors["issuerFingerprint"]) != 1 {
		t.Errorf("got %+v, %v", good, err)
	}
	p.now = p.now.Add(2 * time.Hour)
	late, err := v.Inspect([][]byte{s.chain[0].Raw, s.chain[1].Raw})
	if !errors.Is(err, ErrBadEvidence) || late.Selectors["commonName"][0] != "press-7" {
		t.Errorf("expired: got %+v, %v", late, err)
	}
}

func FuzzX509PopChain(f *testing.F) {
	p := newPKI(f)
	s := p.show(f, p.leaf(), ecKey(f))
	v := p.verifier(f)
	f.Add(s.chain[0].Raw, p.between.Raw)
	f.Add([]byte{0x30}, []byte{})
	f.Fuzz(func(t *testing.T, leaf, issuer []byte) {
		ver, err := v.Inspect([][]byte{leaf, issuer})
		if err == nil && !bytes.Equal(leaf, s.chain[0].Raw) && !bytes.Equal(leaf, p.between.Raw) {
			t.Errorf("accepted %x as %v", leaf, ver)
		}
		if err == nil && fmt.Sprint(ver.Selectors) == "map[]" {
			t.Error("accepted without a selector")
		}
	})
}
