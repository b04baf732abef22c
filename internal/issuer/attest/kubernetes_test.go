package attest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestKubernetesSelectors(t *testing.T) {
	i := newIssuer(t)
	kube := func(v map[string]any) map[string]any {
		v["namespace"] = "shop"
		v["serviceaccount"] = map[string]string{"name": "payments", "uid": "a"}
		return map[string]any{"kubernetes.io": v}
	}
	pod := map[string]string{"name": "payments-0", "uid": "b-1"}
	ways := i.verifiers()
	for name, c := range map[string]struct {
		claims  map[string]any
		extra   map[string][]string
		want    Selectors
		subject string
	}{
		"pod on a node": {
			kube(map[string]any{"pod": pod, "node": map[string]string{"name": "n1", "uid": "c"}}),
			map[string][]string{extraPodName: {"payments-0"}, extraPodUID: {"b-1"}, extraNodeName: {"n1"}, "x": {"1", "2"}},
			Selectors{"namespace": {"shop"}, "serviceAccount": {"payments"}, "podName": {"payments-0"}, "podUID": {"b-1"}, "node": {"n1"}},
			"system:serviceaccount:shop:payments, pod payments-0 (b-1), node n1",
		},
		"pod without a node": {
			kube(map[string]any{"pod": pod}), map[string][]string{extraPodName: {"payments-0"}, extraPodUID: {"b-1"}},
			Selectors{"namespace": {"shop"}, "serviceAccount": {"payments"}, "podName": {"payments-0"}, "podUID": {"b-1"}},
			"system:serviceaccount:shop:payments, pod payments-0 (b-1)",
		},
		"bound to nothing": {
			kube(map[string]any{}), nil,
			Selectors{"namespace": {"shop"}, "serviceAccount": {"payments"}},
			"system:serviceaccount:shop:payments",
		},
	} {
		i.mu.Lock()
		i.review = func(spec tokenReviewSpec) (int, any, bool) {
			answer := reviewed(spec)
			answer["status"].(map[string]any)["user"].(map[string]any)["extra"] = c.extra
			return http.StatusCreated, answer, true
		}
		i.mu.Unlock()
		for _, way := range []string{"jwksURL", "jwksFile", "tokenReview"} {
			got, err := ways[way].Verify(t.Context(), i.token(c.claims))
			if err != nil || !reflect.DeepEqual(got.Selectors, c.want) || got.Subject != c.subject || got.Kind != KindKubernetes {
				t.Errorf("%s, %s: got %+v, %v", way, name, got, err)
			}
		}
	}
}

func TestKubernetesRefusesClaims(t *testing.T) {
	i := newIssuer(t)
	account := func(namespace, name string, more ...string) map[string]any {
		k := map[string]any{"namespace": namespace, "serviceaccount": map[string]string{"name": name}}
		if len(more) > 0 {
			k["pod"] = map[string]string{"name": more[0], "uid": "1"}
		}
		return map[string]any{"sub": "system:serviceaccount:" + namespace + ":" + name, "kubernetes.io": k}
	}
	v := i.verifiers()["jwksFile"]
	for name, changes := range map[string]map[string]any{
		"none of Kubernetes":   {"kubernetes.io": nil},
		"not an object":        {"kubernetes.io": "shop"},
		"another sub":          {"sub": "system:serviceaccount:shop:admin"},
		"no sub":               {"sub": nil},
		"no namespace":         account("", "payments"),
		"no account":           account("shop", ""),
		"slash in a name":      account("shop", "a/b"),
		"colon in a name":      account("shop", "a:b"),
		"capitals":             account("Shop", "payments"),
		"pod with a line":      account("shop", "payments", "a\nb"),
		"pod with a long name": account("shop", "payments", strings.Repeat("a", 254)),
	} {
		if _, err := v.Verify(t.Context(), i.token(changes)); !errors.Is(err, ErrBadEvidence) {
			t.Errorf("%s: got %v, want ErrBadEvidence", name, err)
		}
	}
	if _, err := v.Verify(t.Context(), i.token(account("shop", "payments", "p"))); err != nil {
		t.Error(err)
	}
}

func TestE3_TokenReviewAnswers(t *testing.T) {
	i := newIssuer(t)
	v := i.verifiers()["tokenReview"]
	token := i.token(nil)
	change := func(path string, value any) func(tokenReviewSpec) (int, any, bool) {
		return func(spec tokenReviewSpec) (int, any, bool) {
			answer := reviewed(spec)
			at := answer
			steps := strings.Split(path, ".")
			for _, s := range steps[:len(steps)-1] {
				at = at[s].(map[string]any)
			}
			at[steps[len(steps)-1]] = value
			return http.StatusCreated, answer, true
		}
	}
	status := func(code int) func(tokenReviewSpec) (int, any, bool) {
		return func(spec tokenReviewSpec) (int, any, bool) { return code, reviewed(spec), true }
	}
	for name, c := range map[string]struct {
		review func(tokenReviewSpec) (int, any, bool)
		want   error
		says   string
	}{
		"not authenticated":       {change("status.authenticated", false), ErrBadEvidence, "refuses the token"},
		"with a reason":           {change("status", map[string]any{"error": "the token " + token + " is gone"}), ErrBadEvidence, "(the token) is gone"},
		"no status":               {change("status", nil), ErrBadEvidence, ""},
		"no audiences":            {change("status.audiences", nil), ErrBadEvidence, "audience"},
		"another audience":        {change("status.audiences", []string{"mesh2"}), ErrBadEvidence, "audience"},
		"a person":                {change("status.user.username", "alice"), ErrBadEvidence, "alice"},
		"a name like a pod's":     {change("status.user.username", "shop:payments"), ErrBadEvidence, ""},
		"a node":                  {change("status.user.username", "system:node:n1"), ErrBadEvidence, ""},
		"no name":                 {change("status.user.username", "system:serviceaccount:shop:"), ErrBadEvidence, ""},
		"too many parts":          {change("status.user.username", "system:serviceaccount:shop:a:b"), ErrBadEvidence, ""},
		"two pods":                {change("status.user.extra", map[string][]string{extraPodName: {"a", "b"}}), ErrBadEvidence, "2 values"},
		"another kind":            {change("kind", "Status"), ErrUnreachable, "not a TokenReview"},
		"denied to the mesh":      {func(tokenReviewSpec) (int, any, bool) { return 0, nil, false }, ErrUnreachable, "system:auth-delegator"},
		"forbidden to the mesh":   {status(http.StatusForbidden), ErrUnreachable, "system:auth-delegator"},
		"error":                   {status(http.StatusInternalServerError), ErrUnreachable, "500"},
		"accepted without a word": {status(http.StatusAccepted), ErrUnreachable, "202"},
	} {
		i.mu.Lock()
		i.review = c.review
		i.mu.Unlock()
		_, err := v.Verify(t.Context(), token)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), token) {
			t.Errorf("%s: got %v, want %v with %q", name, err, c.want, c.says)
		}
	}
	for name, answer := range map[string]http.HandlerFunc{
		"garbage": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusCreated)
			fmt.Fprint(w, "<html>")
		},
		"nothing": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) },
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, i.url+"/x", http.StatusTemporaryRedirect)
		},
	} {
		i.respond(answer)
		if _, err := v.Verify(t.Context(), token); !errors.Is(err, ErrUnreachable) {
			t.Errorf("%s: got %v, want ErrUnreachable", name, err)
		}
	}
	if i.requests("/x") > 0 {
		t.Error("the redirect was followed")
	}
}

// TestTokenReviewSeesNoJunk: what anybody can write costs the API server nothing.
func TestTokenReviewSeesNoJunk(t *testing.T) {
	i := newIssuer(t)
	v := i.verifiers()["tokenReview"]
	for _, token := range []string{"", "own", i.token(map[string]any{"aud": "other"}), i.token(map[string]any{"exp": 1}), i.token(map[string]any{"iss": "x"})} {
		if _, err := v.Verify(t.Context(), token); !errors.Is(err, ErrBadEvidence) {
			t.Errorf("got %v", err)
		}
	}
	if n := i.requests("/apis/authentication.k8s.io/v1/tokenreviews"); n != 0 {
		t.Errorf("the API server was asked %d times", n)
	}
}

func TestTokenReviewReadsItsOwnTokenAnew(t *testing.T) {
	i := newIssuer(t)
	i.verifiers() // for its TokenReview
	own := filepath.Join(t.TempDir(), "own")
	write := func(s string) { require.NoError(t, os.WriteFile(own, []byte(s), 0o600)) }
	// Without an issuer: the API server knows its own.
	v, err := NewKubernetes(KubernetesConfig{Name: "k", Audience: "mesh", Now: i.clock, TokenReview: TokenReviewConfig{Server: i.url + "/", CAFile: i.caFile, TokenFile: own}})
	require.NoError(t, err)
	for _, c := range []struct{ content, says string }{
		{"stale", "system:auth-delegator"}, {"own\n", ""}, {"", "one token"}, {"two tokens", "one token"}, {"own", ""},
	} {
		write(c.content)
		_, err := v.Verify(t.Context(), i.token(nil))
		if (err == nil) != (c.says == "") || err != nil && (!errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%q: got %v", c.content, err)
		}
	}
	require.NoError(t, os.Remove(own))
	if _, err := v.Verify(t.Context(), i.token(nil)); !errors.Is(err, ErrUnreachable) {
		t.Errorf("without the file: %v", err)
	}
}

func TestNewKubernetesRefuses(t *testing.T) {
	i := newIssuer(t)
	good := KubernetesConfig{Name: "prod", Audience: "mesh", Issuer: i.url, JWKSURL: i.url + "/keys", CAFile: i.caFile}
	_, err := NewKubernetes(good)
	require.NoError(t, err)
	review := TokenReviewConfig{Server: i.url, CAFile: i.caFile, TokenFile: "own"}
	for name, c := range map[string]struct {
		change func(*KubernetesConfig)
		says   string
	}{
		"no audience":        {func(c *KubernetesConfig) { c.Audience = "" }, "audience"},
		"the API's audience": {func(c *KubernetesConfig) { c.Audience = c.Issuer }, "audience"},
		"no issuer":          {func(c *KubernetesConfig) { c.Issuer = "" }, "issuer"},
		"no way":             {func(c *KubernetesConfig) { c.JWKSURL = "" }, "exactly one"},
		"two ways":           {func(c *KubernetesConfig) { c.JWKSFile = "x" }, "exactly one"},
		"three ways":         {func(c *KubernetesConfig) { c.JWKSFile, c.TokenReview = "x", review }, "exactly one"},
		"plain http":         {func(c *KubernetesConfig) { c.JWKSURL = "http://x/keys" }, "https"},
		"user in the URL":    {func(c *KubernetesConfig) { c.JWKSURL = "https://a:b@x/keys" }, "https"},
		"no CA":              {func(c *KubernetesConfig) { c.CAFile = "/nonexistent" }, "/nonexistent"},
		"empty CA":           {func(c *KubernetesConfig) { c.CAFile = "/dev/null" }, "no PEM certificate"},
		"CA beside a file":   {func(c *KubernetesConfig) { c.JWKSURL, c.JWKSFile = "", "x" }, "caFile"},
		"review over http": {func(c *KubernetesConfig) {
			*c = KubernetesConfig{Name: "prod", Audience: "mesh", TokenReview: review}
			c.TokenReview.Server = "http://x"
		}, "https"},
		"review without self": {func(c *KubernetesConfig) {
			*c = KubernetesConfig{Name: "prod", Audience: "mesh", TokenReview: review}
			c.TokenReview.TokenFile = ""
		}, "tokenFile"},
	} {
		cfg := good
		c.change(&cfg)
		if _, err := NewKubernetes(cfg); err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), `"prod"`) {
			t.Errorf("%s: got %v, want it to say %q and \"prod\"", name, err, c.says)
		}
	}
}

func FuzzTokenReview(f *testing.F) {
	good, err := json.Marshal(reviewed(tokenReviewSpec{Audiences: []string{"mesh"}}))
	require.NoError(f, err)
	f.Add(good)
	f.Fuzz(func(t *testing.T, answer []byte) {
		status, err := parseTokenReview(answer)
		if err != nil {
			return
		}
		checkAccount(t)(accountOfUser(status.User.Username, status.User.Extra))
	})
}

func FuzzKubernetesClaims(f *testing.F) {
	f.Add("system:serviceaccount:a:b", []byte(`{"kubernetes.io":{"namespace":"a","serviceaccount":{"name":"b"}}}`))
	f.Fuzz(func(t *testing.T, subject string, payload []byte) {
		checkAccount(t)(accountOfClaims(subject, payload))
	})
}

// checkAccount: what was read stands in one segment of a SPIFFE ID.
func checkAccount(t *testing.T) func(account, error) {
	return func(who account, err error) {
		if err != nil {
			return
		}
		for key, values := range who.selectors() {
			if len(values) != 1 || values[0] == "" || strings.ContainsAny(values[0], "/:%\n ") {
				t.Errorf("%s: got %q", key, values)
			}
		}
		if who.namespace == "" || who.name == "" {
			t.Errorf("got %+v", who)
		}
	}
}
