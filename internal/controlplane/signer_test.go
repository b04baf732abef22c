package controlplane_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
)

// upstreamFiles writes a root and an intermediate of it that was signed ten hours
// ago and has left to live.
func upstreamFiles(t *testing.T, left time.Duration) controlplane.Upstream {
	t.Helper()
	dir := t.TempDir()
	u := controlplane.Upstream{CertFile: filepath.Join(dir, "ca.pem"), KeyFile: filepath.Join(dir, "ca.key"), BundleFile: filepath.Join(dir, "bundle.pem")}
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		require.NoError(t, err)
		return k
	}
	write := func(file, kind string, der []byte) {
		require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	template := func(serial int64, name string, left time.Duration) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
			URIs: []*url.URL{{Scheme: "spiffe", Host: "test.example"}}, KeyUsage: x509.KeyUsageCertSign,
			NotBefore: time.Now().Add(-10 * time.Hour), NotAfter: time.Now().Add(left),
		}
	}
	rootKey, own := key(), key()
	der, err := x509.CreateCertificate(rand.Reader, template(1, "offline root", 100*time.Hour), template(1, "offline root", 100*time.Hour), rootKey.Public(), rootKey)
	require.NoError(t, err)
	write(u.BundleFile, "CERTIFICATE", der)
	root, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	der, err = x509.CreateCertificate(rand.Reader, template(2, "replica 0", left), root, own.Public(), rootKey)
	require.NoError(t, err)
	write(u.CertFile, "CERTIFICATE", der)
	der, err = x509.MarshalPKCS8PrivateKey(own)
	require.NoError(t, err)
	write(u.KeyFile, "PRIVATE KEY", der)
	return u
}

// The control plane signs with an upstream intermediate, and health turns red
// before that ends.
func TestUpstreamIntermediateAndHealth(t *testing.T) {
	for _, row := range []struct {
		left time.Duration
		want admin.Status
	}{{10 * time.Hour, admin.OK}, {time.Hour, admin.Degraded}} {
		m := meshtest.New(t, meshtest.Config{Files: files(), Change: func(c *controlplane.Config) {
			c.CA.Signer, c.CA.Upstream, c.CA.SVIDTTL = "upstream", upstreamFiles(t, row.left), time.Minute
		}})
		var status *sallyportv1.StatusResponse
		meshtest.Eventually(t, "started", func() (err error) {
			status, err = m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
			return err
		})
		var names []string
		for _, a := range status.GetAuthorities() {
			if a.GetKind() != "jwt" {
				names = append(names, a.GetSubject()+" "+a.GetState())
			}
		}
		if got := strings.Join(names, ", "); got != "offline root active, replica 0 active" {
			t.Errorf("authorities: %s", got)
		}
		resp, err := http.Get("http://" + m.HTTP + "/healthz")
		require.NoError(t, err)
		defer resp.Body.Close()
		var report admin.Report
		require.NoError(t, json.NewDecoder(resp.Body).Decode(&report))
		got := report.Components["authority"]
		if got.Status != row.want || (row.want != admin.OK) != strings.Contains(got.Message, "have a new one signed") {
			t.Errorf("%v left: got %v %q, want %v", row.left, got.Status, got.Message, row.want)
		}
	}
}
