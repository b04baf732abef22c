package agent

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/stretchr/testify/require"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

// factory is another PKI.
type factory struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newFactory(t *testing.T) *factory {
	t.Helper()
	key, _, err := newKey()
	require.NoError(t, err)
	f := &factory{key: key}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "factory"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(2400 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	f.root, err = x509.ParseCertificate(der)
	require.NoError(t, err)
	return f
}

// issue writes a certificate and its key.
func (f *factory) issue(t *testing.T, dir, name string) EvidenceConfig {
	t.Helper()
	key, _, err := newKey()
	require.NoError(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(2400 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, f.root, key.Public(), f.key)
	require.NoError(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	e := EvidenceConfig{Kind: kindX509Pop, CertFile: filepath.Join(dir, name+".pem"), KeyFile: filepath.Join(dir, name+".key")}
	writePEM(t, e.CertFile, "CERTIFICATE", der)
	writePEM(t, e.KeyFile, "PRIVATE KEY", pkcs8)
	return e
}

func writePEM(t *testing.T, path, kind string, der ...[]byte) {
	t.Helper()
	var out []byte
	for _, d := range der {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: d})...)
	}
	require.NoError(t, os.WriteFile(path, out, 0o600))
}

// Each kind is read as it is at the moment and sent as what it is.
func TestEvidenceIsReadAnew(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	for _, c := range []struct {
		cfg  EvidenceConfig
		sent func(*sallyportv1.Hello) (token, issuer string)
	}{
		{EvidenceConfig{Kind: kindKubernetes, TokenFile: file, Cluster: "prod"}, func(h *sallyportv1.Hello) (string, string) {
			return h.GetKubernetes().GetToken(), h.GetKubernetes().GetIssuer()
		}},
		{EvidenceConfig{Kind: kindOIDC, TokenFile: file, Issuer: "prod"}, func(h *sallyportv1.Hello) (string, string) {
			return h.GetOidc().GetToken(), h.GetOidc().GetIssuer()
		}},
	} {
		names := map[string]bool{}
		for _, token := range []string{"a.b.c", "d.e.f"} {
			require.NoError(t, os.WriteFile(file, []byte(token+"\n"), 0o600))
			p, err := c.cfg.read()
			require.NoError(t, err)
			var h sallyportv1.Hello
			p.fill(&h)
			if got, issuer := c.sent(&h); got != token || issuer != "prod" || p.again || p.key != nil {
				t.Errorf("%s: sent %q of %q", c.cfg.Kind, got, issuer)
			}
			if names[p.name] = true; strings.Contains(p.name, token) {
				t.Errorf("%s: the token is in its name", c.cfg.Kind)
			}
		}
		if len(names) != 2 {
			t.Errorf("%s: two tokens have one name", c.cfg.Kind)
		}
	}
	f := newFactory(t)
	cert := f.issue(t, dir, "a.example")
	p, err := cert.read()
	require.NoError(t, err)
	var h sallyportv1.Hello
	p.fill(&h)
	if len(h.GetX509Pop().GetChain()) != 1 || !p.again || p.key == nil {
		t.Errorf("x509pop: %+v", p)
	}
	mixed := cert
	mixed.KeyFile = f.issue(t, dir, "b.example").KeyFile
	for name, bad := range map[string]EvidenceConfig{
		"a key of another certificate": mixed,
		"no certificate":               {Kind: kindX509Pop, CertFile: file, KeyFile: cert.KeyFile},
		"no such file":                 {Kind: kindOIDC, TokenFile: filepath.Join(dir, "none")},
		"not a token":                  {Kind: kindOIDC, TokenFile: cert.KeyFile},
		"too large":                    {Kind: kindKubernetes, TokenFile: big12K(t, dir)},
	} {
		_, err := bad.read()
		if err == nil || strings.Contains(err.Error(), "PRIVATE KEY-----") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func big12K(t *testing.T, dir string) string {
	path := filepath.Join(dir, "big")
	require.NoError(t, os.WriteFile(path, []byte("a.b."+strings.Repeat("x", maxBearer)), 0o600))
	return path
}

func TestReadTrustBundle(t *testing.T) {
	dir := t.TempDir()
	f, g := newFactory(t), newFactory(t)
	two := filepath.Join(dir, "roots.pem")
	writePEM(t, two, "CERTIFICATE", f.root.Raw, g.root.Raw)
	doc := filepath.Join(dir, "bundle.json")
	b, err := spiffebundle.FromX509Authorities(td, []*x509.Certificate{f.root, g.root}).Marshal()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(doc, b, 0o600))
	for _, path := range []string{two, doc} {
		roots, err := readTrustBundle(path)
		if err != nil || len(roots) != 2 || !roots[1].Equal(g.root) && !roots[0].Equal(g.root) {
			t.Errorf("%s: got %d roots, %v", path, len(roots), err)
		}
	}
	empty, key := filepath.Join(dir, "empty"), f.issue(t, dir, "x").KeyFile
	require.NoError(t, os.WriteFile(empty, nil, 0o600))
	jwks := filepath.Join(dir, "jwks")
	require.NoError(t, os.WriteFile(jwks, []byte(`{"keys":[]}`), 0o600))
	for path, want := range map[string]string{
		"": "trustBundle is required", empty: "no certificate", key: "only certificates belong there",
		jwks: "no certificate", filepath.Join(dir, "none"): "no such file",
	} {
		if _, err := readTrustBundle(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
}
