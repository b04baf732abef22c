package attest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"
)

// verifier is what all kinds of bearer's evidence have in common.
type verifier interface {
	Verify(ctx context.Context, token string) (Verified, error)
}

// issuer is an OpenID Connect issuer over HTTPS. Its keys are the test's to
// change, and its clock stands still.
type issuer struct {
	t      testing.TB
	server *httptest.Server
	url    string
	caFile string
	rsa    *rsa.PrivateKey   // kid r1
	ec     *ecdsa.PrivateKey // kid e1

	mu     sync.Mutex
	now    time.Time                                   // guarded by mu
	keys   []jose.JSONWebKey                           // guarded by mu
	answer func(http.ResponseWriter, *http.Request)    // guarded by mu: instead of the usual
	asked  map[string]int                              // guarded by mu :: path → requests
	review func(spec tokenReviewSpec) (int, any, bool) // guarded by mu: answers TokenReviews
}

func newIssuer(t testing.TB) *issuer {
	t.Helper()
	i := &issuer{t: t, now: time.Unix(1_900_000_000, 0), asked: map[string]int{}}
	var err error
	i.rsa, err = rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	i.ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	i.keys = []jose.JSONWebKey{
		{Key: i.rsa.Public(), KeyID: "r1", Use: "sig"},
		{Key: i.ec.Public(), KeyID: "e1", Algorithm: "ES256"},
	}
	i.server = httptest.NewUnstartedServer(http.HandlerFunc(i.serve))
	i.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	i.server.StartTLS()
	t.Cleanup(i.server.Close)
	i.url, i.caFile = i.server.URL, filepath.Join(t.TempDir(), "ca.pem")
	i.writeCA(i.server)
	return i
}

func (i *issuer) writeCA(s *httptest.Server) {
	i.t.Helper()
	data := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	require.NoError(i.t, os.WriteFile(i.caFile, data, 0o600))
}

func (i *issuer) serve(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	i.asked[r.URL.Path]++
	answer := i.answer
	i.mu.Unlock()
	if answer == nil {
		answer = i.good
	}
	answer(w, r)
}

// good is the usual answer.
func (i *issuer) good(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	set, review := jose.JSONWebKeySet{Keys: i.keys}, i.review
	i.mu.Unlock()
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		writeJSON(w, http.StatusOK, map[string]string{"issuer": i.url, "jwks_uri": i.url + "/keys"})
	case "/keys":
		writeJSON(w, http.StatusOK, set)
	case "/apis/authentication.k8s.io/v1/tokenreviews":
		var got tokenReview
		if err := json.NewDecoder(r.Body).Decode(&got); err != nil || r.Method != http.MethodPost || review == nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		status, body, ok := review(got.Spec)
		if !ok || r.Header.Get("Authorization") != "Bearer own" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		writeJSON(w, status, body)
	default:
		http.NotFound(w, r)
	}
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

func (i *issuer) clock() time.Time {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.now
}

func (i *issuer) pass(d time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.now = i.now.Add(d)
}

func (i *issuer) set(keys ...jose.JSONWebKey) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = keys
}

func (i *issuer) respond(f http.HandlerFunc) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.answer = f
}

func (i *issuer) requests(path string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.asked[path]
}

// claims are those of a good token of a pod; changes override them, nil removes.
func (i *issuer) claims(changes map[string]any) map[string]any {
	c := map[string]any{
		"iss": i.url, "sub": "system:serviceaccount:shop:payments", "aud": []string{"other", "mesh"},
		"iat": i.clock().Unix(), "nbf": i.clock().Unix(), "exp": i.clock().Add(time.Hour).Unix(), "jti": "1",
		"kubernetes.io": map[string]any{
			"namespace":      "shop",
			"serviceaccount": map[string]string{"name": "payments", "uid": "a"},
			"pod":            map[string]string{"name": "payments-0", "uid": "b-1"},
			"node":           map[string]string{"name": "n1", "uid": "c"},
		},
	}
	for name, v := range changes {
		c[name] = v
		if v == nil {
			delete(c, name)
		}
	}
	return c
}

// how a token is signed.
type how struct {
	alg    jose.SignatureAlgorithm
	key    any
	header map[string]any
}

func (i *issuer) es256() how { return how{jose.ES256, i.ec, map[string]any{"kid": "e1"}} }

func (i *issuer) token(changes map[string]any) string {
	i.t.Helper()
	return sign(i.t, i.es256(), i.claims(changes))
}

func sign(t testing.TB, h how, claims any) string {
	t.Helper()
	o := &jose.SignerOptions{}
	for name, v := range h.header {
		o.WithHeader(jose.HeaderKey(name), v)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: h.alg, Key: h.key}, o)
	require.NoError(t, err)
	payload, err := json.Marshal(claims)
	require.NoError(t, err)
	jws, err := s.Sign(payload)
	require.NoError(t, err)
	token, err := jws.CompactSerialize()
	require.NoError(t, err)
	return token
}

// verifiers gives one of each way to check a token of this issuer, for the
// audience mesh. The TokenReview believes every token it is asked about.
func (i *issuer) verifiers() map[string]verifier {
	i.t.Helper()
	ownToken := filepath.Join(i.t.TempDir(), "own")
	require.NoError(i.t, os.WriteFile(ownToken, []byte("own\n"), 0o600))
	i.mu.Lock()
	i.review = func(spec tokenReviewSpec) (int, any, bool) { return http.StatusCreated, reviewed(spec), true }
	i.mu.Unlock()
	out := map[string]verifier{}
	var err error
	out["oidc"], err = NewOIDC(OIDCConfig{Name: "i", Issuer: i.url, Audience: "mesh", CAFile: i.caFile, Now: i.clock})
	require.NoError(i.t, err)
	k := KubernetesConfig{Name: "i", Issuer: i.url, Audience: "mesh", Now: i.clock}
	url := k
	url.JWKSURL, url.CAFile = i.url+"/keys", i.caFile
	out["jwksURL"], err = NewKubernetes(url)
	require.NoError(i.t, err)
	review := k
	review.TokenReview = TokenReviewConfig{Server: i.url, CAFile: i.caFile, TokenFile: ownToken}
	out["tokenReview"], err = NewKubernetes(review)
	require.NoError(i.t, err)
	file := k
	file.JWKSFile = i.keyFile()
	out["jwksFile"], err = NewKubernetes(file)
	require.NoError(i.t, err)
	return out
}

// keyFile writes the keys to a file.
func (i *issuer) keyFile() string {
	i.t.Helper()
	path := filepath.Join(i.t.TempDir(), "keys.json")
	data, err := json.Marshal(jose.JSONWebKeySet{Keys: i.keys})
	require.NoError(i.t, err)
	require.NoError(i.t, os.WriteFile(path, data, 0o600))
	return path
}

// reviewed is the answer of an API server that believes a token.
func reviewed(spec tokenReviewSpec) map[string]any {
	return map[string]any{
		"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1",
		"status": map[string]any{
			"authenticated": true, "audiences": spec.Audiences,
			"user": map[string]any{
				"username": "system:serviceaccount:shop:payments", "uid": "a",
				"extra": map[string][]string{extraPodName: {"payments-0"}, extraPodUID: {"b-1"}, extraNodeName: {"n1"}},
			},
		},
	}
}

func newEd25519(t testing.TB) crypto.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	return key
}

func quote(v any) string { return fmt.Sprintf("%.200q", fmt.Sprint(v)) }
