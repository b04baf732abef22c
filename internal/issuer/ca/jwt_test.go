package ca

import (
	"context"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

func issueJWT(t *testing.T, c *CA) string {
	t.Helper()
	issued, err := c.IssueJWT(t.Context(), JWTRequest{ID: payments, Audience: []string{"vault"}})
	require.NoError(t, err)
	return issued.Token
}

// verifyJWT does what jwtsvid.ParseAndValidate does, at another time.
func verifyJWT(token string, bundle *spiffebundle.Bundle, now time.Time) error {
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return err
	}
	key, ok := bundle.FindJWTAuthority(parsed.Headers[0].KeyID)
	if !ok {
		return fmt.Errorf("unknown key %s", parsed.Headers[0].KeyID)
	}
	var claims jwt.Claims
	if err := parsed.Claims(key, &claims); err != nil {
		return err
	}
	return claims.ValidateWithLeeway(jwt.Expected{Subject: payments.String(), AnyAudience: []string{"vault"}, Time: now}, 0)
}

func part(t *testing.T, token string, i int) map[string]any {
	t.Helper()
	parts := strings.Split(token, ".")
	require.Len(t, parts, 3)
	raw, err := base64.RawURLEncoding.DecodeString(parts[i])
	require.NoError(t, err)
	m := map[string]any{}
	require.NoError(t, json.Unmarshal(raw, &m))
	return m
}

func TestIssueJWTKeepsTheJWTSVIDProfile(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	cfg.JWTIssuer = "https://identity.shop.example"
	c := open(t, cfg)
	issued, err := c.IssueJWT(t.Context(), JWTRequest{ID: payments, Audience: []string{"vault", "https://db.example"}})
	require.NoError(t, err)
	header, claims := part(t, issued.Token, 0), part(t, issued.Token, 1)
	kids := c.Bundle().JWTAuthorities()
	if len(header) != 3 || header["alg"] != "ES256" || header["typ"] != "JWT" || kids[header["kid"].(string)] == nil {
		t.Errorf("J 2, 2.1, 2.3: got header %v, want alg, typ and one kid of %v", header, kids)
	}
	for kid, key := range kids { // RFC 7638
		sum, err := (&jose.JSONWebKey{Key: key}).Thumbprint(crypto.SHA256)
		require.NoError(t, err)
		if want := base64.RawURLEncoding.EncodeToString(sum); kid != want {
			t.Errorf("got kid %s, want %s", kid, want)
		}
	}
	iat := float64(clk.Now().Unix())
	want := map[string]any{
		"sub": payments.String(), "aud": []any{"vault", "https://db.example"}, "iat": iat, "exp": iat + 300,
		"iss": cfg.JWTIssuer, "jti": issued.ID,
	}
	if fmt.Sprint(claims) != fmt.Sprint(want) {
		t.Errorf("J 3: got %v, want %v", claims, want)
	}
	if got := issued.Expires.Sub(issued.Issued); got != 5*time.Minute || issued.ID == "" {
		t.Errorf("got %v, serial %q", got, issued.ID)
	}
	again, err := c.IssueJWT(t.Context(), JWTRequest{ID: payments, Audience: []string{"vault"}})
	require.NoError(t, err)
	if again.ID == issued.ID {
		t.Error("two tokens with one jti")
	}
}

// The library that our peers use reads the same tokens and the same bundle, from
// its wire form.
func TestGoSPIFFEAcceptsOurTokens(t *testing.T) {
	cfg := config(t, nil)
	cfg.Now = time.Now
	c := open(t, cfg)
	doc, err := c.Bundle().Marshal()
	require.NoError(t, err)
	if !strings.Contains(string(doc), `"use":"jwt-svid"`) {
		t.Errorf("J 6: got %s", doc)
	}
	bundle, err := spiffebundle.Parse(td, doc)
	require.NoError(t, err)
	for _, issuer := range []string{"", "https://identity.shop.example"} {
		c.cfg.JWTIssuer = issuer
		svid, err := jwtsvid.ParseAndValidate(issueJWT(t, c), bundle, []string{"vault"})
		require.NoError(t, err)
		if svid.ID != payments {
			t.Errorf("got %s", svid.ID)
		}
		if _, ok := svid.Claims["iss"]; ok != (issuer != "") {
			t.Errorf("issuer %q: got claims %v", issuer, svid.Claims)
		}
		if _, err := jwtsvid.ParseAndValidate(issueJWT(t, c), bundle, []string{"db"}); err == nil {
			t.Error("accepted for another audience")
		}
	}
	other := open(t, config(t, newClock())) // same trust domain, other keys
	if _, err := jwtsvid.ParseAndValidate(issueJWT(t, c), other.Bundle(), []string{"vault"}); err == nil {
		t.Error("E 1: accepted with the keys of another mesh")
	}
}

func TestIssueJWTRefuses(t *testing.T) {
	c := open(t, config(t, newClock()))
	ok := []string{"vault"}
	for name, req := range map[string]JWTRequest{
		"another trust domain": {ID: spiffeid.RequireFromString("spiffe://other.example/a"), Audience: ok},
		"no path":              {ID: td.ID(), Audience: ok},
		"zero ID":              {Audience: ok},
		"control plane":        {ID: spiffeid.RequireFromPath(td, identity.ControlPlanePath), Audience: ok},
		"reserved":             {ID: spiffeid.RequireFromPath(td, "/sallyport/x"), Audience: ok},
		"no audience":          {ID: payments},
		"blank audience":       {ID: payments, Audience: []string{" "}},
		"empty audience":       {ID: payments, Audience: []string{"vault", ""}},
		"long audience":        {ID: payments, Audience: []string{strings.Repeat("a", 1025)}},
		"many audiences":       {ID: payments, Audience: strings.Split(strings.Repeat("a ", 16)+"a", " ")},
		"negative life":        {ID: payments, Audience: ok, TTL: -time.Minute},
		"short life":           {ID: payments, Audience: ok, TTL: time.Millisecond},
	} {
		_, err := c.IssueJWT(t.Context(), req)
		if err == nil || strings.Contains(err.Error(), "withheld") { // by the linter only
			t.Errorf("%s: got %v", name, err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.IssueJWT(ended, JWTRequest{ID: payments, Audience: ok}); err == nil {
		t.Error("issued although the caller has gone")
	}
}

func TestIssueJWTNeverLivesLongerThanAsked(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	for _, row := range []struct{ ttl, want time.Duration }{
		{0, 5 * time.Minute}, {time.Minute, time.Minute}, {time.Second, time.Second}, {time.Hour, 5 * time.Minute},
	} {
		issued, err := c.IssueJWT(t.Context(), JWTRequest{ID: payments, Audience: []string{"vault"}, TTL: row.ttl})
		require.NoError(t, err)
		if got := issued.Expires.Sub(clk.Now()); got != row.want {
			t.Errorf("asked for %v: got %v, want %v", row.ttl, got, row.want)
		}
	}
	clk.Add(120*time.Hour - time.Minute) // the CA did not run meanwhile; its key has a minute left
	issued, err := c.IssueJWT(t.Context(), JWTRequest{ID: payments, Audience: []string{"vault"}})
	require.NoError(t, err)
	if got := issued.Expires.Sub(clk.Now()); got != time.Minute {
		t.Errorf("a token of %v outlives its key, which has a minute", got)
	}
	clk.Add(time.Minute)
	_, err = c.IssueJWT(t.Context(), JWTRequest{ID: payments, Audience: []string{"vault"}})
	require.ErrorContains(t, err, "is the clock right?")
}

func TestLintWithholdsJWT(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	s := c.state.Load()
	req := JWTRequest{ID: payments, Audience: []string{"vault"}, TTL: time.Minute}
	type parts struct {
		alg    jose.SignatureAlgorithm
		key    any
		header map[jose.HeaderKey]any
		claims jwt.Claims
	}
	kid, err := keyID(s.jwt.cert.PublicKey)
	require.NoError(t, err)
	own := jose.JSONWebKey{Key: cryptosigner.Opaque(s.jwt.signer), KeyID: kid}
	later := func(d time.Duration) *jwt.NumericDate { return jwt.NewNumericDate(clk.Now().Add(d)) }
	for name, spoil := range map[string]func(*parts){
		"another subject":   func(p *parts) { p.claims.Subject = "spiffe://shop.example/x" },
		"no subject":        func(p *parts) { p.claims.Subject = "" },
		"another audience":  func(p *parts) { p.claims.Audience = jwt.Audience{"db"} },
		"no audience":       func(p *parts) { p.claims.Audience = nil },
		"more audience":     func(p *parts) { p.claims.Audience = jwt.Audience{"vault", "db"} },
		"no expiry":         func(p *parts) { p.claims.Expiry = nil },
		"expired":           func(p *parts) { p.claims.Expiry = later(0) },
		"longer than asked": func(p *parts) { p.claims.Expiry = later(time.Minute + time.Second) },
		"no iat":            func(p *parts) { p.claims.IssuedAt = nil },
		"iat to come":       func(p *parts) { p.claims.IssuedAt = later(time.Second) },
		"old iat":           func(p *parts) { p.claims.IssuedAt = later(-2 * time.Second) },
		"another issuer":    func(p *parts) { p.claims.Issuer = "https://x.example" },
		"no jti":            func(p *parts) { p.claims.ID = "" },
		"another typ":       func(p *parts) { p.header["typ"] = "at+jwt" },
		"a header more":     func(p *parts) { p.header["jku"] = "https://x.example" },
		"HS256":             func(p *parts) { p.alg, p.key = jose.HS256, jose.JSONWebKey{Key: make([]byte, 32), KeyID: kid} },
		"no kid":            func(p *parts) { p.key = jose.JSONWebKey{Key: cryptosigner.Opaque(s.jwt.signer)} },
		"another kid":       func(p *parts) { p.key = jose.JSONWebKey{Key: newECKey(t), KeyID: "x"} },
		"another key":       func(p *parts) { p.key = jose.JSONWebKey{Key: newECKey(t), KeyID: kid} },
		"nothing":           func(*parts) {},
	} {
		p := parts{jose.ES256, own, map[jose.HeaderKey]any{"typ": "JWT"}, jwt.Claims{
			Subject: payments.String(), Audience: jwt.Audience{"vault"}, Expiry: later(time.Minute), IssuedAt: later(0), ID: "1",
		}}
		spoil(&p)
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: p.alg, Key: p.key}, &jose.SignerOptions{ExtraHeaders: p.header})
		require.NoError(t, err, name)
		token, err := jwt.Signed(signer).Claims(p.claims).Serialize()
		require.NoError(t, err, name)
		if err := c.lintJWT(s, token, req, clk.Now()); (err == nil) != (name == "nothing") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	for _, token := range []string{"", "a.b", "a.b.c", "e30.e30.", issueJWT(t, c) + ".x"} {
		if err := c.lintJWT(s, token, req, clk.Now()); err == nil {
			t.Errorf("released %q", token)
		}
	}
}

func TestF41_JWTKeysArePublishedBeforeTheySign(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	c := open(t, cfg)
	type moment struct {
		at     time.Time
		bundle *spiffebundle.Bundle
	}
	var history []moment
	kids, since := map[string]time.Time{}, time.Time{}
	var tokens []string
	for range 400 {
		require.NoError(t, c.Advance(t.Context()))
		history = append(history, moment{clk.Now(), c.Bundle()})
		token := issueJWT(t, c)
		old := history[0]
		for _, h := range history {
			if clk.Now().Sub(h.at) >= 9*time.Hour { // a twelfth of 120 h is 10 h
				old = h
			}
		}
		if err := verifyJWT(token, old.bundle, clk.Now()); err != nil {
			t.Fatalf("a peer with the bundle of %v ago refuses: %v", clk.Now().Sub(old.at), err)
		}
		kid := part(t, token, 0)["kid"].(string)
		if _, ok := kids[kid]; !ok {
			if d := clk.Now().Sub(since); len(kids) > 0 && (d < 40*time.Hour || d > 110*time.Hour) {
				t.Errorf("a key signed for %v of 120h", d)
			}
			kids[kid], since = clk.Now(), clk.Now()
		}
		tokens = append(tokens, token)
		clk.Add(4 * time.Minute) // the last token is still valid
		require.NoError(t, c.Advance(t.Context()))
		for _, token := range tokens[max(len(tokens)-1, 0):] {
			if err := verifyJWT(token, c.Bundle(), clk.Now()); err != nil {
				t.Fatalf("a valid token is refused with the present bundle: %v", err)
			}
		}
		clk.Add(3*time.Hour - 4*time.Minute)
	}
	if len(kids) < 10 {
		t.Errorf("only %d keys signed in 1200 hours", len(kids))
	}
	if n := len(c.Bundle().JWTAuthorities()); n > 3 {
		t.Errorf("%d JWT keys in the bundle: old ones stay", n)
	}
	files, err := filepath.Glob(filepath.Join(cfg.KeyDir, "jwt-*"))
	require.NoError(t, err)
	if len(files) > 3 {
		t.Errorf("%d key files: old ones stay", len(files))
	}
}

func TestReplicasShareJWTKeys(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	a := open(t, cfg)
	cfg.Replica = "1"
	b := open(t, cfg)
	for range 40 {
		clk.Add(7 * time.Hour)
		require.NoError(t, a.Advance(t.Context()))
		known := a.Bundle() // b has not looked yet
		for _, c := range []*CA{a, b} {
			if err := verifyJWT(issueJWT(t, c), known, clk.Now()); err != nil {
				t.Fatal(err)
			}
		}
		require.NoError(t, b.Advance(t.Context()))
		if !a.Bundle().Equal(b.Bundle()) {
			t.Fatal("replicas publish different bundles")
		}
	}
}
