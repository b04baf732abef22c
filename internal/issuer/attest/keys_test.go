package attest

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"
)

// remote gives the ways that fetch keys, with the path that each fetches.
func (i *issuer) remote() map[string]verifier {
	all := i.verifiers()
	return map[string]verifier{"oidc": all["oidc"], "jwksURL": all["jwksURL"]}
}

func TestE3_NoKeysFailsClosed(t *testing.T) {
	i, elsewhere := newIssuer(t), newIssuer(t)
	elsewhere.set(i.keys...)
	plain := httptest.NewServer(http.HandlerFunc(i.good))
	t.Cleanup(plain.Close)
	answers := map[string]http.HandlerFunc{
		"error":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) },
		"denied":  func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) },
		"garbage": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"no keys": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"keys": []}`) },
		"null":    func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `null`) },
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.url+r.URL.Path, http.StatusFound)
		},
		"too long": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, strings.Repeat(" ", maxAnswer))
			i.good(w, r)
		},
		"too many keys": func(w http.ResponseWriter, _ *http.Request) {
			writeJSON(w, http.StatusOK, map[string]any{"issuer": i.url, "jwks_uri": i.url, "keys": make([]struct{}, maxKeys+1)})
		},
		"another issuer's discovery": func(w http.ResponseWriter, _ *http.Request) {
			writeJSON(w, http.StatusOK, map[string]any{"issuer": elsewhere.url, "jwks_uri": elsewhere.url + "/keys"})
		},
		"keys over http": func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/keys" { // asked directly
				http.Error(w, "", http.StatusNotFound)
				return
			}
			writeJSON(w, http.StatusOK, map[string]any{"issuer": i.url, "jwks_uri": plain.URL + "/keys"})
		},
	}
	for name, answer := range answers {
		for way, v := range i.remote() {
			i.respond(answer)
			token := i.token(nil)
			if _, err := v.Verify(t.Context(), token); !errors.Is(err, ErrUnreachable) {
				t.Errorf("%s, %s: got %v, want ErrUnreachable", way, name, err)
			}
			i.respond(nil)
			if _, err := v.Verify(t.Context(), token); !errors.Is(err, ErrUnreachable) {
				t.Errorf("%s, %s: asked again at once: %v", way, name, err)
			}
			i.pass(keysPause)
			if _, err := v.Verify(t.Context(), token); err != nil {
				t.Errorf("%s, %s: the issuer is back: %v", way, name, err)
			}
			// What was had serves while no more can be had, for a time.
			i.respond(answer)
			i.pass(keysLast)
			if _, err := v.Verify(t.Context(), i.token(nil)); err != nil {
				t.Errorf("%s, %s: with cached keys: %v", way, name, err)
			}
			i.pass(keysPause)
			if _, err := v.Verify(t.Context(), i.token(nil)); !errors.Is(err, ErrUnreachable) {
				t.Errorf("%s, %s: with keys too old: %v", way, name, err)
			}
		}
	}
	if n := elsewhere.requests("/keys") + elsewhere.requests("/.well-known/openid-configuration"); n > 0 {
		t.Errorf("elsewhere was asked %d times", n)
	}
}

func TestE3_UntrustedServer(t *testing.T) {
	i := newIssuer(t)
	require.NoError(t, os.WriteFile(i.caFile, mustRead(t, newPKI(t).file), 0o600))
	good := i.remote()
	ways := i.verifiers()
	for way, v := range map[string]verifier{"oidc": good["oidc"], "jwksURL": good["jwksURL"], "tokenReview": ways["tokenReview"]} {
		if _, err := v.Verify(t.Context(), i.token(nil)); !errors.Is(err, ErrUnreachable) {
			t.Errorf("%s: got %v, want ErrUnreachable", way, err)
		}
	}
	// The CA file is renewed in place; while it is away the last good one serves.
	i.writeCA(i.server)
	i.pass(keysPause)
	for way, v := range good {
		if _, err := v.Verify(t.Context(), i.token(nil)); err != nil {
			t.Errorf("%s: with the right CA: %v", way, err)
		}
	}
	require.NoError(t, os.Remove(i.caFile))
	if _, err := ways["tokenReview"].Verify(t.Context(), i.token(nil)); !errors.Is(err, ErrUnreachable) {
		t.Errorf("tokenReview, which never saw the right CA: %v", err)
	}
	i.pass(keysFresh)
	n := i.requests("/keys")
	for way, v := range good {
		if _, err := v.Verify(t.Context(), i.token(nil)); err != nil {
			t.Errorf("%s: without the file: %v", way, err)
		}
	}
	i.pass(keysPause)
	for _, v := range good {
		_, _ = v.Verify(t.Context(), i.token(nil))
	}
	if i.requests("/keys") == n {
		t.Error("the keys were not fetched without the CA file")
	}
}

func mustRead(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	return data
}

func TestUnknownKeyIsAskedForSeldom(t *testing.T) {
	i := newIssuer(t)
	file := i.keyFile()
	byFile, err := NewKubernetes(KubernetesConfig{Name: "f", Issuer: i.url, Audience: "mesh", JWKSFile: file, Now: i.clock})
	require.NoError(t, err)
	ways := i.remote()
	ways["jwksFile"] = byFile
	for way, v := range ways {
		old := i.keys
		_, err := v.Verify(t.Context(), i.token(nil))
		require.NoError(t, err)
		before := i.requests("/keys")
		forged := func(n int) string {
			return sign(t, how{jose.ES256, i.ec, map[string]any{"kid": fmt.Sprint(n)}}, i.claims(nil))
		}
		i.pass(keysPause)
		var wg sync.WaitGroup
		tokens := make([]string, 50)
		for n := range tokens {
			tokens[n] = forged(n)
		}
		for _, token := range tokens {
			wg.Go(func() {
				if _, err := v.Verify(t.Context(), token); !errors.Is(err, ErrBadEvidence) && !errors.Is(err, ErrUnreachable) {
					t.Errorf("%s: got %v", way, err)
				}
			})
		}
		wg.Wait()
		if n := i.requests("/keys") - before; way != "jwksFile" && n != 1 {
			t.Errorf("%s: %d fetches for 50 invented key IDs, want 1", way, n)
		}
		// A rotated key is found after the pause, and the withdrawn one is not
		// accepted for longer than keysFresh.
		rotated := jose.JSONWebKey{Key: i.rsa.Public(), KeyID: "r9"}
		i.set(rotated)
		data, err := json.Marshal(jose.JSONWebKeySet{Keys: i.keys})
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(file, data, 0o600))
		fresh := sign(t, how{jose.RS256, i.rsa, map[string]any{"kid": "r9"}}, i.claims(nil))
		if _, err := v.Verify(t.Context(), fresh); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "try again") {
			t.Errorf("%s: a new key within the pause: %v", way, err)
		}
		i.pass(keysPause)
		if _, err := v.Verify(t.Context(), fresh); err != nil {
			t.Errorf("%s: a new key: %v", way, err)
		}
		i.pass(keysPause)
		if _, err := v.Verify(t.Context(), i.token(nil)); !errors.Is(err, ErrBadEvidence) {
			t.Errorf("%s: the withdrawn key: %v", way, err)
		}
		i.set(old...)
		data, err = json.Marshal(jose.JSONWebKeySet{Keys: old})
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(file, data, 0o600))
		i.pass(keysPause)
	}
}

func TestWithdrawnKeyEnds(t *testing.T) {
	i := newIssuer(t)
	for way, v := range i.remote() {
		old := i.keys
		_, err := v.Verify(t.Context(), i.token(nil))
		require.NoError(t, err)
		i.set(old[0])
		i.pass(keysFresh)
		if _, err := v.Verify(t.Context(), i.token(nil)); err != nil {
			t.Errorf("%s: within keysFresh: %v", way, err)
		}
		i.pass(time.Second)
		if _, err := v.Verify(t.Context(), i.token(nil)); !errors.Is(err, ErrBadEvidence) {
			t.Errorf("%s: after keysFresh: %v", way, err)
		}
		i.set(old...)
		i.pass(keysPause)
	}
}

// TestSlowIssuerHoldsNobodyBack: whoever waits can leave; who has a cached key
// does not wait for another's fetch.
func TestSlowIssuerHoldsNobodyBack(t *testing.T) {
	arrived, release := make(chan struct{}, 1), make(chan struct{})
	i := newIssuer(t)
	now := i.clock
	slow := false
	document, err := json.Marshal(jose.JSONWebKeySet{Keys: i.keys})
	require.NoError(t, err)
	k := newKeys(now, func(context.Context) ([]byte, error) {
		if slow {
			arrived <- struct{}{}
			<-release
		}
		return document, nil
	})
	_, err = k.find(t.Context(), "e1")
	require.NoError(t, err)
	i.pass(keysFresh + time.Second)
	slow = true
	done := make(chan error, 1)
	go func() {
		_, err := k.find(t.Context(), "e1")
		done <- err
	}()
	select {
	case <-arrived:
	case err := <-done:
		t.Fatalf("old keys were not asked for: %v", err)
	}
	if _, err := k.find(t.Context(), "e1"); err != nil {
		t.Errorf("with a cached key: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.find(ctx, "zz"); !errors.Is(err, ErrUnreachable) || !errors.Is(err, context.Canceled) {
		t.Errorf("who left: %v", err)
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestWhoLeavesDoesNotStopTheFetch: otherwise strangers could use up each attempt.
func TestWhoLeavesDoesNotStopTheFetch(t *testing.T) {
	i := newIssuer(t)
	document, err := json.Marshal(jose.JSONWebKeySet{Keys: i.keys})
	require.NoError(t, err)
	ctx, leave := context.WithCancel(t.Context())
	k := newKeys(i.clock, func(ctx context.Context) ([]byte, error) {
		leave()
		return document, ctx.Err()
	})
	if _, err := k.find(ctx, "e1"); err != nil {
		t.Error(err)
	}
}

func TestKeySetIsBounded(t *testing.T) {
	i := newIssuer(t)
	for n, good := range map[int]bool{maxKeys: true, maxKeys + 1: false} {
		set := jose.JSONWebKeySet{}
		for range n {
			set.Keys = append(set.Keys, i.keys[1])
		}
		document, err := json.Marshal(set)
		require.NoError(t, err)
		if _, err := parseKeys(document); (err == nil) != good {
			t.Errorf("%d keys: %v", n, err)
		}
	}
}

func TestParseKeys(t *testing.T) {
	i := newIssuer(t)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	require.NoError(t, err)
	for name, key := range map[string]any{
		"symmetric": jose.JSONWebKey{Key: []byte("0123456789abcdef0123456789abcdef"), KeyID: "a"},
		"private":   jose.JSONWebKey{Key: i.ec, KeyID: "a"},
		"weak":      jose.JSONWebKey{Key: weak.Public(), KeyID: "a"},
		"no kid":    jose.JSONWebKey{Key: i.ec.Public()},
		"encrypts":  jose.JSONWebKey{Key: i.ec.Public(), KeyID: "a", Use: "enc"},
		"Ed25519":   jose.JSONWebKey{Key: newEd25519(t).Public(), KeyID: "a"},
		"new type":  map[string]string{"kty": "AKP", "kid": "a"},
		"off curve": map[string]string{"kty": "EC", "crv": "P-256", "kid": "a", "x": strings.Repeat("A", 43), "y": strings.Repeat("A", 43)},
	} {
		document, err := json.Marshal(map[string]any{"keys": []any{key}})
		require.NoError(t, err)
		if got, err := parseKeys(document); err == nil {
			t.Errorf("%s: got %v", name, got)
		}
		// Beside a good one it does no harm.
		document, err = json.Marshal(map[string]any{"keys": []any{key, i.keys[0]}})
		require.NoError(t, err)
		if got, err := parseKeys(document); err != nil || len(got) != 1 {
			t.Errorf("%s beside a good one: got %v, %v", name, got, err)
		}
	}
}

func FuzzParseKeys(f *testing.F) {
	i := newIssuer(f)
	good, err := json.Marshal(jose.JSONWebKeySet{Keys: i.keys})
	require.NoError(f, err)
	f.Add(good)
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AA","kid":"a"}]}`))
	f.Fuzz(func(t *testing.T, document []byte) {
		byID, err := parseKeys(document)
		for id, found := range byID {
			for _, k := range found {
				if err != nil || id == "" || k.KeyID != id || !k.IsPublic() {
					t.Errorf("%q: got %v, %v", document, k, err)
				}
			}
		}
	})
}
