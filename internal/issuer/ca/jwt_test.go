package ca

import (
	"encoding/base64"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/stretchr/testify/require"
)

func issueJWT(t *testing.T, c *CA) JWT {
	t.Helper()
	out, err := c.IssueJWT(t.Context(), JWTRequest{ID: payments, Audience: []string{"vault", "db"}})
	require.NoError(t, err)
	return out
}

// part decodes the header or the claims of a compact JWS.
func part(t *testing.T, token string, n int) map[string]any {
	t.Helper()
	parts := strings.Split(token, ".")
	require.Len(t, parts, 3)
	raw, err := base64.RawURLEncoding.DecodeString(parts[n])
	require.NoError(t, err)
	var out map[string]any
	require.NoError(t, json.Unmarshal(raw, &out))
	return out
}

// TestJWTSVIDProfile: JWT-SVID sections 2 and 3. The clock is the real one, which
// go-spiffe's validator reads.
func TestJWTSVIDProfile(t *testing.T) {
	clk := newClock()
	clk.now = time.Now()
	cfg := config(t, clk)
	cfg.JWTIssuer = "https://issuer.example"
	c := open(t, cfg)
	out := issueJWT(t, c)
	header := part(t, out.Token, 0)
	if len(header) != 3 || header["alg"] != "ES256" || header["typ"] != "JWT" || header["kid"] == "" {
		t.Errorf("header %v", header)
	}
	claims := part(t, out.Token, 1)
	if claims["sub"] != payments.String() || claims["iss"] != cfg.JWTIssuer || claims["jti"] != out.ID || len(claims["aud"].([]any)) != 2 {
		t.Errorf("claims %v", claims)
	}
	if life := claims["exp"].(float64) - claims["iat"].(float64); life <= 0 || life > JWTTTL.Seconds() {
		t.Errorf("lives %v s", life)
	}
	svid, err := jwtsvid.ParseAndValidate(out.Token, c.Bundle(), []string{"vault"})
	require.NoError(t, err)
	if svid.ID != payments {
		t.Errorf("got %s", svid.ID)
	}
	if _, err := jwtsvid.ParseAndValidate(out.Token, c.Bundle(), []string{"other"}); err == nil {
		t.Error("another audience accepts it")
	}
	if _, err := jwtsvid.ParseAndValidate(out.Token, spiffebundle.New(td), []string{"vault"}); err == nil {
		t.Error("a bundle without the key accepts it")
	}
	if plain := part(t, issueJWT(t, open(t, config(t, clk))).Token, 1); plain["iss"] != nil {
		t.Errorf("an issuer where none is configured: %v", plain)
	}
}

func TestIssueJWTRefuses(t *testing.T) {
	c := open(t, config(t, newClock()))
	many := make([]string, MaxAudiences+1)
	for i := range many {
		many[i] = "a"
	}
	for name, req := range map[string]JWTRequest{
		"no audience":        {ID: payments},
		"empty audience":     {ID: payments, Audience: []string{"a", " "}},
		"many audiences":     {ID: payments, Audience: many},
		"long audience":      {ID: payments, Audience: []string{strings.Repeat("a", MaxAudience+1)}},
		"no ID":              {Audience: []string{"a"}},
		"trust domain's ID":  {ID: td.ID(), Audience: []string{"a"}},
		"other trust domain": {ID: spiffeid.RequireFromString("spiffe://other.example/x"), Audience: []string{"a"}},
		"reserved":           {ID: spiffeid.RequireFromPath(td, "/sallyport/controlplane"), Audience: []string{"a"}},
	} {
		if out, err := c.IssueJWT(t.Context(), req); err == nil {
			t.Errorf("%s: got %s", name, out.Token)
		}
	}
}

// TestLintJWTWithholds: what a validator would refuse, or the request did not ask
// for, is not released.
func TestLintJWTWithholds(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	req := JWTRequest{ID: payments, Audience: []string{"vault"}}
	good, err := c.signJWT(req)
	require.NoError(t, err)
	require.NoError(t, c.lintJWT(good, req))
	stranger := open(t, config(t, clk))
	foreign, err := stranger.signJWT(req)
	require.NoError(t, err)
	for name, bad := range map[string]struct {
		token JWT
		req   JWTRequest
	}{
		"other subject":  {good, JWTRequest{ID: spiffeid.RequireFromPath(td, "/other"), Audience: req.Audience}},
		"other audience": {good, JWTRequest{ID: payments, Audience: []string{"db"}}},
		"other key":      {foreign, req},
		"cut":            {JWT{Token: good.Token[:len(good.Token)-4]}, req},
		"unsigned":       {JWT{Token: strings.Join(strings.Split(good.Token, ".")[:2], ".") + "."}, req},
	} {
		if err := c.lintJWT(bad.token, bad.req); err == nil {
			t.Errorf("%s: released", name)
		}
	}
	clk.Add(JWTTTL)
	if err := c.lintJWT(good, req); err == nil {
		t.Error("expired: released")
	}
}

// TestJWTKeyRotation: F 4.1: a key is published before it signs, for at least a
// twelfth of its life, and stays until nothing that it signed can be valid.
func TestJWTKeyRotation(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	cfg.JWTKeyTTL = 120 * time.Hour
	c := open(t, cfg)
	published := map[string]time.Time{} // :: kid → when
	used := map[string]time.Time{}      // :: kid → last use
	first := ""
	var last uint64
	var content *spiffebundle.Bundle
	for range 12 * 30 {
		require.NoError(t, c.Advance(t.Context()))
		b := c.Bundle()
		seq, ok := b.SequenceNumber()
		if !ok || seq < last || content != nil && seq == last && !content.Equal(b) {
			t.Fatalf("B 4.1.1: sequence %d after %d, and the content changed", seq, last)
		}
		last, content = seq, b
		if hint, ok := b.RefreshHint(); !ok || hint <= 0 || hint%time.Second != 0 {
			t.Fatalf("B 4.1.2: refresh hint %v", hint)
		}
		for kid := range b.JWTAuthorities() {
			if _, known := published[kid]; !known {
				published[kid] = clk.Now()
			}
		}
		kid := part(t, issueJWT(t, c).Token, 0)["kid"].(string)
		if first == "" {
			first = kid
		}
		if since := clk.Now().Sub(published[kid]); kid != first && since < cfg.JWTKeyTTL/12 {
			t.Fatalf("signs %v after it was published", since)
		}
		used[kid] = clk.Now()
		for kid, at := range used {
			if !b.HasJWTAuthority(kid) && clk.Now().Sub(at) < JWTTTL {
				t.Fatal("withdrawn while its tokens are valid")
			}
		}
		clk.Add(2 * time.Hour)
	}
	if len(used) < 5 {
		t.Errorf("%d keys in 30 days of 5-day keys", len(used))
	}
}

// TestJWTKeysAreShared: a second replica, and the same one after a restart, sign
// with the same keys.
func TestJWTKeysAreShared(t *testing.T) {
	cfg := config(t, newClock())
	kid := func(c *CA) any { return part(t, issueJWT(t, c).Token, 0)["kid"] }
	first := open(t, cfg)
	other := cfg
	other.Replica = "b"
	if a, b, c := kid(first), kid(open(t, cfg)), kid(open(t, other)); a != b || a != c {
		t.Errorf("got %v, %v, %v", a, b, c)
	}
	files, err := filepath.Glob(filepath.Join(cfg.KeyDir, "jwt-*.pem"))
	require.NoError(t, err)
	if len(files) != 1 {
		t.Errorf("key files: %v", files)
	}
}
