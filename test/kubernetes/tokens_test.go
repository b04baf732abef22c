//go:build kubernetes

package kubernetes

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

const audience = "sallyport"

// shop is a cluster with a pod in it, and every way to check the pod's tokens.
type shop struct {
	*Cluster
	podUID string
	own    string // the control plane's token file
	skew   time.Duration
	ways   map[string]*attest.Kubernetes
}

func newShop(t *testing.T) *shop {
	t.Helper()
	s := &shop{Cluster: Start(t)}
	s.Namespace("shop")
	s.Account("shop", "payments")
	s.Node("n1")
	s.podUID = s.Pod("shop", "payments-0", "payments", "n1")
	s.own = s.OwnToken()
	file := filepath.Join(t.TempDir(), "keys.json")
	require.NoError(t, os.WriteFile(file, s.Do(http.MethodGet, "/openid/v1/jwks", nil), 0o600))
	s.ways = map[string]*attest.Kubernetes{}
	for way, cfg := range map[string]attest.KubernetesConfig{
		"jwksFile":    {JWKSFile: file},
		"jwksURL":     {JWKSURL: s.URL + "/openid/v1/jwks", CAFile: s.CAFile, TokenFile: s.own},
		"tokenReview": {TokenReview: attest.TokenReviewConfig{Server: s.URL, CAFile: s.CAFile, TokenFile: s.own}},
	} {
		cfg.Name, cfg.Audience, cfg.Issuer = "prod", audience, s.Issuer
		cfg.Now = func() time.Time { return time.Now().Add(s.skew) }
		v, err := attest.NewKubernetes(cfg)
		require.NoError(t, err)
		s.ways[way] = v
	}
	return s
}

func (s *shop) podToken() string {
	s.T.Helper()
	return s.Token("shop", "payments", audience, "payments-0", s.podUID)
}

// TestKubernetesTokens: the tokens of a real API server, checked in each way.
func TestKubernetesTokens(t *testing.T) {
	s := newShop(t)
	t.Run("Accepted", s.accepted)
	t.Run("E1_Altered", s.altered)
	t.Run("E3_NotForUs", s.notForUs)
	t.Run("E3_NotAllowedToAsk", s.notAllowed)
	t.Run("Anonymous", s.anonymous)
	t.Run("Deleted", s.deleted) // last: it takes the shop apart
}

func (s *shop) accepted(t *testing.T) {
	pod := attest.Selectors{"namespace": {"shop"}, "serviceAccount": {"payments"}, "podName": {"payments-0"}, "podUID": {s.podUID}, "node": {"n1"}}
	bare := attest.Selectors{"namespace": {"shop"}, "serviceAccount": {"payments"}}
	for name, c := range map[string]struct {
		token string
		want  attest.Selectors
	}{"of a pod": {s.podToken(), pod}, "bound to nothing": {s.Token("shop", "payments", audience, "", ""), bare}} {
		once := map[string]bool{}
		for way, v := range s.ways {
			got, err := v.Verify(t.Context(), c.token)
			if err != nil || !reflect.DeepEqual(got.Selectors, c.want) {
				t.Errorf("%s, %s: got %v, %v; want %v", name, way, got.Selectors, err, c.want)
			}
			if left := time.Until(got.Expires); left < 50*time.Minute || left > time.Hour || got.Issuer != "prod" {
				t.Errorf("%s, %s: got %+v", name, way, got)
			}
			once[got.Once] = true
		}
		if len(once) != 1 || once[""] {
			t.Errorf("%s: names for one token: %v", name, once)
		}
	}
}

func (s *shop) altered(t *testing.T) {
	foreign, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	token := s.podToken()
	parts := strings.Split(token, ".")
	other := strings.Split(s.Token("shop", "payments", audience, "", ""), ".")
	header, claims := opened(t, token)
	claims["kubernetes.io"].(Object)["namespace"] = "bank"
	claims["sub"] = "system:serviceaccount:bank:payments"
	refused := map[string]string{
		"another key":         sign(t, foreign, header, claims),
		"another's signature": parts[0] + "." + parts[1] + "." + other[2],
		"another's claims":    parts[0] + "." + other[1] + "." + parts[2],
		"unknown kid":         sign(t, foreign, Object{"kid": "zz"}, claims),
		"none":                "eyJhbGciOiJub25lIiwia2lkIjoiYSJ9." + parts[1] + ".",
	}
	for way, v := range s.ways {
		for name, token := range refused {
			// An unknown key ID may be asked for again only after a while.
			if _, err := v.Verify(t.Context(), token); !errors.Is(err, attest.ErrBadEvidence) && !(name == "unknown kid" && errors.Is(err, attest.ErrUnreachable)) {
				t.Errorf("%s, %s: got %v, want ErrBadEvidence", way, name, err)
			}
		}
	}
}

func (s *shop) notForUs(t *testing.T) {
	header, claims := opened(t, s.podToken())
	resigned := func(name string, value any) string {
		c := maps.Clone(claims)
		if c[name] = value; value == nil {
			delete(c, name)
		}
		return sign(t, s.SigningKey, header, c)
	}
	hourAgo := time.Now().Add(-time.Hour).Unix()
	for name, c := range map[string]struct {
		token string
		skew  time.Duration // of the control plane's clock; so the API server's is asked
		good  bool
	}{
		"as it is":                  {token: resigned("jti", claims["jti"]), good: true},
		"the API server's audience": {token: s.Token("shop", "payments", s.Issuer, "payments-0", s.podUID)},
		"another audience":          {token: s.Token("shop", "payments", "vault", "payments-0", s.podUID)},
		"another issuer":            {token: resigned("iss", "https://issuer.example")},
		"no expiry":                 {token: resigned("exp", nil)},
		"expired":                   {token: resigned("exp", hourAgo)},
		"not yet valid":             {token: resigned("nbf", time.Now().Add(time.Hour).Unix())},
		"after an hour":             {token: s.podToken(), skew: 61 * time.Minute},
	} {
		s.skew = c.skew
		for way, v := range s.ways {
			if _, err := v.Verify(t.Context(), c.token); (err == nil) != c.good || err != nil && !errors.Is(err, attest.ErrBadEvidence) {
				t.Errorf("%s, %s: got %v, want good: %v", way, name, err, c.good)
			}
		}
	}
	// What the control plane's own checks let pass, the API server refuses.
	s.skew = -2 * time.Hour
	claims["nbf"] = time.Now().Add(-3 * time.Hour).Unix()
	if _, err := s.ways["tokenReview"].Verify(t.Context(), resigned("exp", hourAgo)); !errors.Is(err, attest.ErrBadEvidence) || !strings.Contains(err.Error(), "API server") {
		t.Errorf("an expired token, seen by a clock that is late: %v", err)
	}
	s.skew = 0
}

func (s *shop) notAllowed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte(s.Token("shop", "payments", s.Issuer, "", "")), 0o600))
	for way, cfg := range map[string]attest.KubernetesConfig{
		"system:auth-delegator": {TokenReview: attest.TokenReviewConfig{Server: s.URL, CAFile: s.CAFile, TokenFile: file}},
		// Without RBAC for it nobody reads the keys anonymously.
		"system:service-account-issuer-discovery": {JWKSURL: s.URL + "/openid/v1/jwks", CAFile: s.CAFile},
	} {
		cfg.Name, cfg.Audience, cfg.Issuer = "prod", audience, s.Issuer
		v, err := attest.NewKubernetes(cfg)
		require.NoError(t, err)
		if _, err := v.Verify(t.Context(), s.podToken()); !errors.Is(err, attest.ErrUnreachable) || !strings.Contains(err.Error(), way) {
			t.Errorf("got %v, want it to name %s", err, way)
		}
	}
}

// anonymous: with RBAC for it, no token is needed to read the keys.
func (s *shop) anonymous(t *testing.T) {
	s.Grant("system:service-account-issuer-discovery", "", "system:unauthenticated")
	v, err := attest.NewKubernetes(attest.KubernetesConfig{
		Name: "prod", Audience: audience, Issuer: s.Issuer, JWKSURL: s.URL + "/openid/v1/jwks", CAFile: s.CAFile,
		Now: clock(),
	})
	require.NoError(t, err)
	// The API server takes a moment to notice the grant, and the keys are asked
	// for every ten seconds.
	realmesh.Eventually(t, "keys read anonymously", func() error {
		_, err := v.Verify(t.Context(), s.podToken())
		return err
	})
}

// clock passes eleven seconds each time it is read.
func clock() func() time.Time {
	n := 0
	return func() time.Time {
		n++
		return time.Now().Add(time.Duration(n) * 11 * time.Second)
	}
}

// deleted: the API server refuses the tokens of what is gone. Its keys cannot
// know: there a token lives until it expires.
func (s *shop) deleted(t *testing.T) {
	pod, bare := s.podToken(), s.Token("shop", "payments", audience, "", "")
	gone := func(what, token string) {
		t.Helper()
		realmesh.Eventually(t, what+" noticed", func() error {
			_, err := s.ways["tokenReview"].Verify(t.Context(), token)
			if !errors.Is(err, attest.ErrBadEvidence) {
				return errors.New("still accepted")
			}
			return nil
		})
		for _, way := range []string{"jwksFile", "jwksURL"} {
			if _, err := s.ways[way].Verify(t.Context(), token); err != nil {
				t.Errorf("%s: %s: %v", way, what, err)
			}
		}
	}
	s.Delete("/api/v1/namespaces/shop/pods/payments-0")
	gone("deleted pod", pod)
	if _, err := s.ways["tokenReview"].Verify(context.Background(), bare); err != nil {
		t.Errorf("the account is still there: %v", err)
	}
	s.Delete("/api/v1/namespaces/shop/serviceaccounts/payments")
	gone("deleted service account", bare)
}

// opened reads a token without checking it.
func opened(t *testing.T, token string) (header, claims Object) {
	t.Helper()
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256, jose.RS256})
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(jws.UnsafePayloadWithoutVerification(), &claims))
	return Object{"kid": jws.Signatures[0].Protected.KeyID}, claims
}

func sign(t *testing.T, key *ecdsa.PrivateKey, header, claims Object) string {
	t.Helper()
	o := &jose.SignerOptions{}
	for name, v := range header {
		o.WithHeader(jose.HeaderKey(name), v)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, o)
	require.NoError(t, err)
	payload, err := json.Marshal(claims)
	require.NoError(t, err)
	jws, err := s.Sign(payload)
	require.NoError(t, err)
	token, err := jws.CompactSerialize()
	require.NoError(t, err)
	return token
}
