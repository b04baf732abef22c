package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
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

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/store"
)

func TestCSRAsksForTheProfileOfASigningCertificate(t *testing.T) {
	keyFile := filepath.Join(t.TempDir(), "ca.key")
	request := func(args ...string) (*x509.CertificateRequest, string) {
		var out, errs bytes.Buffer
		if code := run(t.Context(), append([]string{"ca", "csr", "--key", keyFile}, args...), &out, &errs); code != 0 {
			return nil, errs.String()
		}
		block, rest := pem.Decode(out.Bytes())
		require.NotNil(t, block)
		require.Empty(t, rest)
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		require.NoError(t, err)
		require.NoError(t, csr.CheckSignature())
		return csr, ""
	}
	first, _ := request("--trust-domain", "shop.example")
	if len(first.URIs) != 1 || first.URIs[0].String() != "spiffe://shop.example" || len(first.DNSNames)+len(first.EmailAddresses)+len(first.IPAddresses) != 0 {
		t.Errorf("X 3.2: got %v %v", first.URIs, first.DNSNames)
	}
	// What the extensions mean, crypto/x509 says of a certificate that has them.
	found := map[string][]byte{}
	for _, e := range first.Extensions {
		if e.Critical {
			found[e.Id.String()] = e.Value
		}
	}
	if got := found["2.5.29.19"]; !bytes.Equal(got, []byte{0x30, 6, 1, 1, 0xff, 2, 1, 0}) {
		t.Errorf("X 4.1: basic constraints %x, want cA true, path length 0, critical", got)
	}
	if got := found["2.5.29.15"]; !bytes.Equal(got, []byte{3, 2, 1, 6}) {
		t.Errorf("X 4.3: key usage %x, want keyCertSign and cRLSign, critical", got)
	}
	st, err := os.Stat(keyFile)
	require.NoError(t, err)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("the key has mode %v", st.Mode())
	}
	again, _ := request("--trust-domain", "shop.example", "--replica", "b")
	if !bytes.Equal(again.RawSubjectPublicKeyInfo, first.RawSubjectPublicKeyInfo) || again.Subject.CommonName == first.Subject.CommonName {
		t.Error("want the same key, and a subject that names the replica")
	}
	for _, row := range []struct{ want, args string }{
		{"--trust-domain", "--trust-domain Shop"},
		{"--replica", "--trust-domain shop.example --replica ../x"},
		{"trust-domain", ""},
	} {
		if _, msg := request(strings.Fields(row.args)...); !strings.Contains(msg, row.want) {
			t.Errorf("%q: got %q", row.args, msg)
		}
	}
	require.NoError(t, os.WriteFile(keyFile, []byte("x"), 0o600))
	if _, msg := request("--trust-domain", "shop.example"); !strings.Contains(msg, "PRIVATE KEY") {
		t.Errorf("got %q", msg)
	}
	if data, err := os.ReadFile(keyFile); err != nil || string(data) != "x" {
		t.Error("an existing file was overwritten")
	}
}

// A CA that grants what the request asks for, and nothing else, makes an
// intermediate that the control plane's CA accepts.
func TestCSRLeadsToAnUpstreamIntermediate(t *testing.T) {
	dir := t.TempDir()
	files := ca.Upstream{CertFile: filepath.Join(dir, "ca.pem"), KeyFile: filepath.Join(dir, "ca.key"), BundleFile: filepath.Join(dir, "bundle.pem")}
	var out, errs bytes.Buffer
	code := run(t.Context(), []string{"ca", "csr", "--key", files.KeyFile, "--trust-domain", "shop.example"}, &out, &errs)
	require.Zero(t, code, errs.String())
	block, _ := pem.Decode(out.Bytes())
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	require.NoError(t, err)

	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	sign := func(file string, tmpl, parent *x509.Certificate, pub any) {
		tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(24*time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, rootKey)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "offline root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte{1},
	}
	sign(files.BundleFile, root, root, rootKey.Public())
	sign(files.CertFile, &x509.Certificate{SerialNumber: big.NewInt(2), Subject: csr.Subject, URIs: csr.URIs, ExtraExtensions: csr.Extensions}, root, csr.PublicKey)

	mem := store.NewMemory()
	t.Cleanup(func() { mem.Close() })
	c, err := ca.Open(t.Context(), ca.Config{KeyDir: filepath.Join(dir, "keys"), Store: mem, TrustDomain: spiffeid.RequireTrustDomainFromString("shop.example"), SVIDTTL: time.Hour, Signer: ca.SignerConfig{Upstream: files}})
	require.NoError(t, err)
	svid, err := c.ServerSVID().GetX509SVID()
	require.NoError(t, err)
	if got := svid.Certificates[1].Subject.CommonName; got != csr.Subject.CommonName {
		t.Errorf("signed by %s", got)
	}
	if list := c.Health(); len(list) != 0 {
		t.Errorf("health: %v", list)
	}
}
