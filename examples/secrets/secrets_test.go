package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
	"github.com/sallyport-mesh/sallyport/internal/sidecar"
)

const password = "correct horse battery staple"

func workloadDoc(name string) string {
	return fmt.Sprintf("apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: %s}\nspec:\n  attest: [{kind: join-token}]\n---\n", name)
}

// world is a mesh that issues JWT-SVIDs and a store that believes them.
type world struct {
	t     *testing.T
	mesh  *meshtest.Mesh
	store *store
	url   string // the store's
}

func newWorld(t *testing.T) *world {
	t.Helper()
	certFile, keyFile := webCert(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0") // the issuer's URL has to be known before it listens
	require.NoError(t, err)
	web := ln.Addr().String()
	require.NoError(t, ln.Close())
	w := &world{t: t}
	w.mesh = meshtest.New(t, meshtest.Config{
		Files: map[string]string{"w.yaml": workloadDoc("payments") + workloadDoc("intruder")},
		Change: func(c *controlplane.Config) {
			c.Listen.Web, c.JWTIssuer = web, "https://"+web
			c.Web = controlplane.Web{CertFile: certFile, KeyFile: keyFile}
		},
	})
	secret := filepath.Join(t.TempDir(), "secret.json")
	require.NoError(t, os.WriteFile(secret, []byte(`{"password": "`+password+`"}`), 0o600))
	w.store, err = newStore(storeConfig{
		issuer: "https://" + web, issuerCA: certFile, role: "payments", audience: "vault",
		subject: "spiffe://test.example/payments", path: "secret/data/payments/db", file: secret,
	})
	require.NoError(t, err)
	srv := httptest.NewServer(w.store)
	t.Cleanup(srv.Close)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	w.url = srv.URL
	return w
}

func webCert(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(240 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "web.pem"), filepath.Join(dir, "web.key")
	require.NoError(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	require.NoError(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600))
	return certFile, keyFile
}

// socket starts a sidecar of a workload and returns its Workload API.
func (w *world) socket(name string) string {
	w.t.Helper()
	dir, err := os.MkdirTemp("", "sp") // short: socket paths are limited
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	text := fmt.Sprintf("controlPlane: %s\ntokenFile: token\ntunnel: {listen: \"127.0.0.1:0\"}\nadmin: {listen: \"127.0.0.1:0\", socket: admin.sock}\nworkloadAPI: {socket: api.sock}\n", w.mesh.GRPC)
	require.NoError(w.t, os.WriteFile(filepath.Join(dir, "proxy.yaml"), []byte(text), 0o600))
	require.NoError(w.t, os.WriteFile(filepath.Join(dir, "token"), []byte(w.mesh.Token(name)+"\n"), 0o600))
	cfg, err := sidecar.Load(filepath.Join(dir, "proxy.yaml"))
	require.NoError(w.t, err)
	s, err := sidecar.New(w.t.Context(), cfg, sidecar.Options{Log: meshtest.Log(w.t), Version: "test"})
	require.NoError(w.t, err)
	meshtest.Go(w.t, "sidecar of "+name, s.Run)
	return "unix://" + filepath.Join(dir, "api.sock")
}

func (w *world) app(socket string) *app {
	return &app{socket: socket, vault: w.url, audience: "vault", role: "payments", path: "secret/data/payments/db"}
}

// TestPasswordByIdentityAlone: payments reads its password with nothing but its
// identity; nobody else does, and payments nothing else.
func TestPasswordByIdentityAlone(t *testing.T) {
	w := newWorld(t)
	payments, intruder := w.socket("payments"), w.socket("intruder")
	if got, err := w.app(payments).password(t.Context()); err != nil || got != password {
		t.Fatalf("payments: %q, %v", got, err)
	}
	for name, tt := range map[string]struct {
		socket  string
		change  func(*app)
		problem string
	}{
		"another workload":      {intruder, func(*app) {}, "bound subject"},
		"for another audience":  {payments, func(a *app) { a.audience = "billing" }, "audience"},
		"another role":          {payments, func(a *app) { a.role = "admin" }, "role"},
		"another secret":        {payments, func(a *app) { a.path = "secret/data/root" }, "permission denied"},
		"nobody at the socket":  {"unix:///nowhere/api.sock", func(*app) {}, "fetching a JWT-SVID"},
		"a store that is away":  {payments, func(a *app) { a.vault = "http://127.0.0.1:1" }, "logging in"},
		"a path that is a hole": {payments, func(a *app) { a.path = "secret/data/payments/db/../../root" }, "permission denied"},
	} {
		a := w.app(tt.socket)
		tt.change(a)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		got, err := a.password(ctx)
		cancel()
		if err == nil || !strings.Contains(err.Error(), tt.problem) || got != "" {
			t.Errorf("%s: %q, %v; want an error with %q", name, got, err, tt.problem)
		}
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"app", "-socket", payments, "-vault", w.url}, &stdout, &stderr); code != 0 || stdout.String() != "received the password of secret/data/payments/db: 28 characters\n" {
		t.Errorf("secrets app: %d, %q %q", code, stdout.String(), stderr.String())
	}
}

// TestE1_ForgedTokens: what is not signed by the mesh's JWT keys, in the one
// algorithm, does not log in; a token is good for its life.
func TestE1_ForgedTokens(t *testing.T) {
	w := newWorld(t)
	good, err := sallyportv1.NewEnrollmentClient(w.mesh.Dial(w.mesh.Agent("payments"))).IssueJWT(t.Context(), &sallyportv1.IssueJWTRequest{Audience: []string{"vault"}})
	require.NoError(t, err)
	token := good.GetToken()
	if code := w.login(token); code != http.StatusOK {
		t.Fatalf("the genuine token: %d", code)
	}
	parts := strings.Split(token, ".")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	require.NoError(t, err)
	kid := jws.Signatures[0].Header.KeyID
	forge := func(alg jose.SignatureAlgorithm, key any, opts *jose.SignerOptions) string {
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, opts)
		require.NoError(t, err)
		o, err := s.Sign(jws.UnsafePayloadWithoutVerification())
		require.NoError(t, err)
		out, err := o.CompactSerialize()
		require.NoError(t, err)
		return out
	}
	for name, forged := range map[string]string{
		"alg none":          "eyJhbGciOiJub25lIn0." + parts[1] + ".",
		"HS256":             forge(jose.HS256, bytes.Repeat([]byte("k"), 32), nil),
		"own key, our kid":  forge(jose.ES256, jose.JSONWebKey{Key: key, KeyID: kid}, nil),
		"own key in jwk":    forge(jose.ES256, key, &jose.SignerOptions{EmbedJWK: true}),
		"no signature":      parts[0] + "." + parts[1] + ".",
		"another's payload": parts[0] + "." + parts[1][:len(parts[1])-4] + "AAAA." + parts[2],
		"garbage":           "x",
	} {
		if code := w.login(forged); code != http.StatusBadRequest {
			t.Errorf("%s: %d, want 400", name, code)
		}
	}
	w.store.mu.Lock()
	w.store.verifier = nil // it keeps the clock that it was made with
	w.store.mu.Unlock()
	w.store.now = func() time.Time { return time.Now().Add(time.Hour) }
	if code := w.login(token); code != http.StatusBadRequest {
		t.Errorf("an expired token: %d, want 400", code)
	}
}

func (w *world) login(token string) int {
	w.t.Helper()
	body, err := json.Marshal(map[string]string{"role": "payments", "jwt": token})
	require.NoError(w.t, err)
	resp, err := http.Post(w.url+"/v1/auth/jwt/login", "application/json", bytes.NewReader(body))
	require.NoError(w.t, err)
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	require.NoError(w.t, err)
	return resp.StatusCode
}
