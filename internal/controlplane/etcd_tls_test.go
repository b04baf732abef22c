package controlplane

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestEtcdTLS: what the three keys mean, and what is wrong with bad files.
func TestEtcdTLS(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return path
	}
	cert, keyFile := write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", keyDER)

	if cfg, err := (Etcd{}).tlsConfig(); cfg != nil || err != nil {
		t.Errorf("no files: %v, %v; want plain TCP", cfg, err)
	}
	cfg, err := Etcd{CAFile: cert, CertFile: cert, KeyFile: keyFile}.tlsConfig()
	require.NoError(t, err)
	if cfg.RootCAs == nil || len(cfg.Certificates) != 1 || cfg.InsecureSkipVerify {
		t.Errorf("all files: %+v", cfg)
	}
	for want, e := range map[string]Etcd{
		"none.pem":             {CAFile: filepath.Join(dir, "none.pem")},
		"holds no certificate": {CAFile: keyFile},
		"etcd.certFile":        {CertFile: cert, KeyFile: cert},
	} {
		if _, err := e.tlsConfig(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want an error that says %q", e, err, want)
		}
	}
}
