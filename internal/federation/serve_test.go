package federation

import (
	"crypto/tls"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
)

// client trusts cfg's roots and keeps no connection.
func client(t *testing.T, cfg *tls.Config) *http.Client {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: deadline}
}

func do(t *testing.T, c *http.Client, method, url string, header http.Header) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, http.NoBody)
	require.NoError(t, err)
	if header != nil {
		req.Header = header
	}
	resp, err := c.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp, string(body)
}

// TestF5_2_2_3_Server: the https_spiffe endpoint presents its SVID, never asks
// the client for a certificate, gives application/json and always the newest
// bundle, to a stock client.
func TestF5_2_2_3_Server(t *testing.T) {
	i := newIssuer(t, own)
	e := spiffeEndpoint(t, i, i, "spiffe://own.example/sallyport/controlplane")
	fetch := func() *spiffebundle.Bundle {
		b, err := federation.FetchBundle(t.Context(), own, e.URL, federation.WithSPIFFEAuth(i.bundle(), spiffeid.RequireFromString("spiffe://own.example/sallyport/controlplane")))
		require.NoError(t, err)
		return b
	}
	if got := fetch(); !got.Equal(i.bundle()) {
		t.Errorf("go-spiffe reads another bundle")
	}
	i.addRoot()
	e.live.SetSVID(i.svid("spiffe://own.example/sallyport/controlplane"))
	if got := fetch(); !got.Equal(i.bundle()) {
		t.Errorf("not the newest bundle")
	}
	asked := false
	c := client(t, &tls.Config{InsecureSkipVerify: true, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		asked = true
		return &tls.Certificate{}, nil
	}})
	resp, body := do(t, c, http.MethodGet, e.URL, nil)
	if asked {
		t.Error("the server asks for a client certificate")
	}
	if got := resp.Header.Get("Content-Type"); got != "application/json" || resp.StatusCode != http.StatusOK || resp.TLS.Version != tls.VersionTLS13 {
		t.Errorf("%d, %s, TLS %x", resp.StatusCode, got, resp.TLS.Version)
	}
	if !strings.Contains(body, "spiffe_sequence") || !strings.Contains(body, "spiffe_refresh_hint") {
		t.Errorf("no sequence or hint: %s", body)
	}
}

// TestBundleHandler: GET and HEAD only, one path, 304 while nothing changes.
func TestBundleHandler(t *testing.T) {
	i := newIssuer(t, own)
	e, roots := webEndpoint(t, i, "127.0.0.1")
	c := client(t, &tls.Config{RootCAs: roots})
	first, _ := do(t, c, http.MethodGet, e.URL, nil)
	tag := first.Header.Get("ETag")
	for _, tt := range []struct {
		method, path string
		header       http.Header
		want         int
	}{
		{http.MethodHead, "", nil, http.StatusOK},
		{http.MethodPost, "", nil, http.StatusMethodNotAllowed},
		{http.MethodPut, "", nil, http.StatusMethodNotAllowed},
		{http.MethodDelete, "", nil, http.StatusMethodNotAllowed},
		{http.MethodGet, "other", nil, http.StatusNotFound},
		{http.MethodGet, "", http.Header{"If-None-Match": {tag}}, http.StatusNotModified},
	} {
		if resp, _ := do(t, c, tt.method, e.URL+tt.path, tt.header); resp.StatusCode != tt.want {
			t.Errorf("%s /%s: %d, want %d", tt.method, tt.path, resp.StatusCode, tt.want)
		}
	}
	i.addRoot()
	if resp, _ := do(t, c, http.MethodGet, e.URL, http.Header{"If-None-Match": {tag}}); resp.StatusCode != http.StatusOK {
		t.Errorf("a changed bundle: %d, want 200", resp.StatusCode)
	}
	e.answer(BundleHandler(func() *spiffebundle.Bundle { return nil }))
	if resp, _ := do(t, c, http.MethodGet, e.URL, nil); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("no bundle yet: %d, want 503", resp.StatusCode)
	}
}

// TestOIDCDiscovery: a stock relying party finds the keys and accepts a token
// signed with one; X.509 authorities are not among them.
func TestOIDCDiscovery(t *testing.T) {
	for _, path := range []string{"", "/", "/mesh"} {
		i := newIssuer(t, own)
		key := newKey(t)
		i.jwt["signs"] = key.Public()
		certFile, keyFile, roots := webFiles(t, t.TempDir(), "127.0.0.1")
		w, err := LoadWebCert(certFile, keyFile, time.Now, hclog.NewNullLogger())
		require.NoError(t, err)
		e := &endpoint{}
		e.URL = strings.TrimSuffix(serve(t, w.TLS(), e), "/")
		issuer := e.URL + path
		h, err := WebHandler(issuer, i.bundle)
		require.NoError(t, err)
		e.answer(h)
		ctx := oidc.ClientContext(t.Context(), client(t, &tls.Config{RootCAs: roots}))
		provider, err := oidc.NewProvider(ctx, issuer)
		require.NoError(t, err)
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "signs"}}, nil)
		require.NoError(t, err)
		claims, err := json.Marshal(map[string]any{"iss": issuer, "sub": "spiffe://own.example/a", "aud": "vault", "exp": time.Now().Add(time.Minute).Unix()})
		require.NoError(t, err)
		jws, err := signer.Sign(claims)
		require.NoError(t, err)
		token, err := jws.CompactSerialize()
		require.NoError(t, err)
		if got, err := provider.Verifier(&oidc.Config{ClientID: "vault"}).Verify(ctx, token); err != nil || got.Subject != "spiffe://own.example/a" {
			t.Errorf("issuer %q: %v", issuer, err)
		}
		var meta struct {
			JWKS string `json:"jwks_uri"`
		}
		require.NoError(t, provider.Claims(&meta))
		_, body := do(t, client(t, &tls.Config{RootCAs: roots}), http.MethodGet, meta.JWKS, nil)
		var set struct{ Keys []map[string]any }
		require.NoError(t, json.Unmarshal([]byte(body), &set))
		if len(set.Keys) != 2 {
			t.Errorf("keys %s, want two", body)
		}
		for _, k := range set.Keys {
			if k["use"] != "sig" || k["alg"] != "ES256" || k["x5c"] != nil || k["kid"] == "" {
				t.Errorf("key %v", k)
			}
		}
		if b, err := federation.FetchBundle(t.Context(), own, e.URL, federation.WithWebPKIRoots(roots)); err != nil || !b.Equal(i.bundle()) {
			t.Errorf("bundle beside OIDC: %v", err)
		}
	}
}

func TestCheckIssuer(t *testing.T) {
	for _, bad := range []string{"", "http://a.example", "a.example", "https://", "https://a.example?x=1", "https://a.example?", "https://a.example#", "https://u:p@a.example", "https://a.example/{x}", "https://a.example/%2f", "https://a.example/a b"} {
		if CheckIssuer(bad) == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	for _, good := range []string{"https://a.example", "https://a.example:8445/", "https://a.example/mesh"} {
		if err := CheckIssuer(good); err != nil {
			t.Error(err)
		}
	}
}

// TestWebCertIsReadAgain: a new certificate is served once both files have it;
// half of a change, or garbage, leaves the old one.
func TestWebCertIsReadAgain(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile, roots := webFiles(t, dir, "127.0.0.1")
	w, err := LoadWebCert(certFile, keyFile, time.Now, hclog.NewNullLogger())
	require.NoError(t, err)
	i := newIssuer(t, own)
	url := serve(t, w.TLS(), BundleHandler(i.bundle))
	get := func(cfg *tls.Config) error {
		resp, err := client(t, cfg).Get(url)
		if err == nil {
			_ = resp.Body.Close()
		}
		return err
	}
	require.NoError(t, get(&tls.Config{RootCAs: roots}))
	newCert, newKey, newRoots := webFiles(t, t.TempDir(), "127.0.0.1")
	require.NoError(t, os.Rename(newCert, certFile))
	if err := get(&tls.Config{RootCAs: roots}); err != nil {
		t.Errorf("after half of a change: %v", err)
	}
	if w.Problem() == "" {
		t.Error("half of a change is no problem?")
	}
	require.NoError(t, os.Rename(newKey, keyFile))
	if err := get(&tls.Config{RootCAs: newRoots}); err != nil {
		t.Errorf("the new certificate: %v", err)
	}
	require.NoError(t, os.WriteFile(certFile, []byte("garbage"), 0o600))
	if err := get(&tls.Config{RootCAs: newRoots}); err != nil {
		t.Errorf("after garbage: %v", err)
	}
	if got := w.Problem(); !strings.Contains(got, certFile) {
		t.Errorf("problem %q does not name the file", got)
	}
	if _, err := LoadWebCert(certFile, keyFile, time.Now, hclog.NewNullLogger()); err == nil {
		t.Error("garbage was loaded at the start")
	}
}

// TestWebCertProblemBeforeItEnds: the problem shows before anybody is refused.
func TestWebCertProblemBeforeItEnds(t *testing.T) {
	certFile, keyFile, _ := webFiles(t, t.TempDir(), "a.example")
	now := time.Now()
	w, err := LoadWebCert(certFile, keyFile, func() time.Time { return now }, hclog.NewNullLogger())
	require.NoError(t, err)
	if got := w.Problem(); got != "" {
		t.Errorf("problem %q", got)
	}
	now = now.Add(45 * time.Minute) // of two hours an eighth is left
	if got := w.Problem(); !strings.Contains(got, "renew") {
		t.Errorf("problem %q", got)
	}
}
