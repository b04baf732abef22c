package attest

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestOIDCSelectors(t *testing.T) {
	i := newIssuer(t)
	got, err := i.verifiers()["oidc"].Verify(t.Context(), i.token(map[string]any{
		"sub": "repo:acme/shop:ref:refs/heads/main", "kubernetes.io": nil,
		"repository": "acme/shop", "repository_id": 74, "big": json.Number("12345678901234567890"), "part": json.Number("1.50"),
		"email_verified": true, "fork": false, "nothing": nil, "empty": "", "null": json.RawMessage("null"),
		"groups": []any{"a", 7, true, nil, []any{"in"}, map[string]any{"x": "y"}},
		"google": map[string]any{"compute_engine": map[string]any{"project_id": "p", "licenses": []string{"1", "2"}}},
	}))
	require.NoError(t, err)
	want := Selectors{
		"claims.iss": {i.url}, "claims.sub": {"repo:acme/shop:ref:refs/heads/main"}, "claims.aud": {"other", "mesh"},
		"claims.repository": {"acme/shop"}, "claims.repository_id": {"74"}, "claims.big": {"12345678901234567890"}, "claims.part": {"1.50"},
		"claims.email_verified": {"true"}, "claims.fork": {"false"}, "claims.groups": {"a", "7", "true"},
		"claims.google.compute_engine.project_id": {"p"}, "claims.google.compute_engine.licenses": {"1", "2"},
	}
	if !reflect.DeepEqual(got.Selectors, want) {
		t.Errorf("got %v\nwant %v", got.Selectors, want)
	}
	if got.Kind != KindOIDC || got.Subject != "repo:acme/shop:ref:refs/heads/main, issuer "+i.url {
		t.Errorf("got %+v", got)
	}
}

func TestOIDCBoundsClaims(t *testing.T) {
	i := newIssuer(t)
	v := i.verifiers()["oidc"]
	deep := map[string]any{"x": "y"}
	for range maxClaimDepth {
		deep = map[string]any{"d": deep}
	}
	for name, changes := range map[string]map[string]any{
		"deep":               deep,
		"long name":          {strings.Repeat("n", maxClaimName): "x"},
		"long value":         {"x": strings.Repeat("v", maxClaimValue+1)},
		"many values":        {"x": make([]int, maxClaimValues)},
		"one forges another": {"a.b": "forged", "a": map[string]any{"b": "true"}},
	} {
		if _, err := v.Verify(t.Context(), i.token(changes)); !errors.Is(err, ErrBadEvidence) {
			t.Errorf("%s: got %v, want ErrBadEvidence", name, err)
		}
	}
	if _, err := v.Verify(t.Context(), i.token(map[string]any{"x": strings.Repeat("v", maxClaimValue)})); err != nil {
		t.Error(err)
	}
}

func TestOIDCSubjectIsFitForALog(t *testing.T) {
	i := newIssuer(t)
	got, err := i.verifiers()["oidc"].Verify(t.Context(), i.token(map[string]any{"sub": "a\nb\x1b[31m" + strings.Repeat("c", 500)}))
	require.NoError(t, err)
	if strings.ContainsAny(got.Subject, "\n\x1b") || len(got.Subject) > 400 {
		t.Errorf("got %q", got.Subject)
	}
}

func TestOIDCPresets(t *testing.T) {
	const tenant = "0a1b2c3d-0000-4000-8000-00000000000f"
	for _, c := range []struct {
		cfg  OIDCConfig
		want string // the issuer, or what the error says
	}{
		{OIDCConfig{Preset: "github"}, "https://token.actions.githubusercontent.com"},
		{OIDCConfig{Preset: "gitlab"}, "https://gitlab.com"},
		{OIDCConfig{Preset: "gitlab", Issuer: "https://git.acme.example"}, "https://git.acme.example"},
		{OIDCConfig{Preset: "google"}, "https://accounts.google.com"},
		{OIDCConfig{Preset: "azure", Tenant: tenant}, "https://sts.windows.net/" + tenant + "/"},
		{OIDCConfig{Preset: "azure", Issuer: "https://login.microsoftonline.com/" + tenant + "/v2.0"}, "https://login.microsoftonline.com/" + tenant + "/v2.0"},
		{OIDCConfig{Issuer: "https://issuer.example"}, "https://issuer.example"},
		{OIDCConfig{Preset: "azure"}, "error: tenant"},
		{OIDCConfig{Preset: "azure", Tenant: "acme.example"}, "error: tenant"},
		{OIDCConfig{Preset: "azure", Tenant: "common/" + tenant[7:]}, "error: tenant"},
		{OIDCConfig{Preset: "github", Tenant: tenant}, "error: tenant"},
		{OIDCConfig{Preset: "GitHub"}, "error: want github, gitlab, google or azure"},
		{OIDCConfig{}, "error: want an issuer"},
		{OIDCConfig{Issuer: "http://issuer.example"}, "error: https"},
		{OIDCConfig{Issuer: "issuer.example"}, "error: https"},
		{OIDCConfig{Preset: "github", CAFile: "/nonexistent"}, "error: /nonexistent"},
	} {
		c.cfg.Name, c.cfg.Audience = "i", "mesh"
		o, err := NewOIDC(c.cfg)
		got := ""
		if err != nil {
			got = "error: " + err.Error()
		} else {
			got = o.cfg.Issuer
		}
		says, wantErr := strings.CutPrefix(c.want, "error: ")
		if wantErr && (err == nil || !strings.Contains(got, says)) || !wantErr && got != c.want {
			t.Errorf("%+v: got %s, want %s", c.cfg, got, c.want)
		}
	}
	if _, err := NewOIDC(OIDCConfig{Preset: "github"}); err == nil || !strings.Contains(err.Error(), "audience") {
		t.Errorf("without an audience: got %v", err)
	}
}

func FuzzClaimSelectors(f *testing.F) {
	f.Add([]byte(`{"a":{"b":[1,true,"x",null,{}]},"a.b":"c","exp":1}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		s, err := claimSelectors(payload)
		if err != nil {
			return
		}
		n := 0
		for key, values := range s {
			n += len(values)
			if !strings.HasPrefix(key, "claims.") || len(key) > maxClaimName {
				t.Errorf("key %q", key)
			}
			for _, v := range values {
				if v == "" || len(v) > maxClaimValue {
					t.Errorf("%q: value %q", key, v)
				}
			}
		}
		if n > maxClaimValues {
			t.Error(fmt.Sprint(n, " values"))
		}
	})
}
