package attest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"maps"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"
)

func with(h how, header map[string]any) how {
	h.header = maps.Clone(h.header)
	maps.Copy(h.header, header)
	return h
}

// reencode changes one part of a token and leaves the others as they are.
func reencode(t testing.TB, token string, part int, change func([]byte) []byte) string {
	t.Helper()
	parts := strings.Split(token, ".")
	raw, err := base64url.DecodeString(parts[part])
	require.NoError(t, err)
	parts[part] = base64url.EncodeToString(change(raw))
	return strings.Join(parts, ".")
}

func TestE1_GoodTokensOfEveryAlgorithm(t *testing.T) {
	i := newIssuer(t)
	ec := map[jose.SignatureAlgorithm]elliptic.Curve{jose.ES384: elliptic.P384(), jose.ES512: elliptic.P521()}
	signers := map[jose.SignatureAlgorithm]how{jose.ES256: i.es256()}
	for _, alg := range []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512} {
		signers[alg] = how{alg, i.rsa, map[string]any{"kid": "r1"}}
	}
	set := i.keys
	for alg, curve := range ec {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		require.NoError(t, err)
		set = append(set, jose.JSONWebKey{Key: key.Public(), KeyID: string(alg)})
		signers[alg] = how{alg, key, map[string]any{"kid": string(alg)}}
	}
	i.set(set...)
	for way, v := range i.verifiers() {
		for alg, h := range signers {
			token := sign(t, h, i.claims(nil))
			got, err := v.Verify(t.Context(), token)
			if err != nil {
				t.Errorf("%s, %s: %v", way, alg, err)
				continue
			}
			if want := i.clock().Add(time.Hour); !got.Expires.Equal(want) || len(got.Once) != 64 || got.Issuer != "i" {
				t.Errorf("%s, %s: got %+v, want it to expire at %v", way, alg, got, want)
			}
			if again, err := v.Verify(t.Context(), token+"\n"); err != nil || again.Once != got.Once {
				t.Errorf("%s, %s: with a line break got %q, %v, want %q", way, alg, again.Once, err, got.Once)
			}
		}
	}
}

// TestE1_RefusedForms: tokens that the issuer did not sign, or that want to say
// how they are checked. The TokenReview here believes everything, so that what it
// refuses never reached it.
func TestE1_RefusedForms(t *testing.T) {
	i, foreign := newIssuer(t), newIssuer(t)
	good := i.token(nil)
	public, err := x509.MarshalPKIXPublicKey(i.rsa.Public())
	require.NoError(t, err)
	secret := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	own := jose.JSONWebKey{Key: foreign.ec.Public(), KeyID: "e1", Algorithm: "ES256"}
	parts := strings.Split(good, ".")
	full, err := jose.ParseSignedCompact(good, algorithms())
	require.NoError(t, err)
	none := base64url.EncodeToString([]byte(`{"alg":"none","kid":"e1"}`)) + "." + parts[1] + "."
	admin := strings.NewReplacer(`"payments"`, `"admin"`, ":payments", ":admin")
	refused := map[string]string{
		"none":                  none,
		"none with a signature": none + parts[2],
		"None":                  base64url.EncodeToString([]byte(`{"alg":"None","kid":"e1"}`)) + "." + parts[1] + ".",
		"no alg":                base64url.EncodeToString([]byte(`{"kid":"e1"}`)) + "." + parts[1] + "." + parts[2],
		"HS256 by the public key": sign(t, how{jose.HS256, secret, map[string]any{"kid": "r1"}},
			i.claims(nil)),
		"HS512":              sign(t, how{jose.HS512, secret, map[string]any{"kid": "r1"}}, i.claims(nil)),
		"EdDSA":              sign(t, how{jose.EdDSA, newEd25519(t), map[string]any{"kid": "e1"}}, i.claims(nil)),
		"jwk":                sign(t, how{jose.ES256, foreign.ec, map[string]any{"kid": "e1", "jwk": own}}, i.claims(nil)),
		"jwk, really signed": sign(t, with(i.es256(), map[string]any{"jwk": own}), i.claims(nil)),
		"jku":                sign(t, with(i.es256(), map[string]any{"jku": foreign.url + "/keys"}), i.claims(nil)),
		"x5u":                sign(t, with(i.es256(), map[string]any{"x5u": foreign.url + "/keys"}), i.claims(nil)),
		"x5c":                sign(t, with(i.es256(), map[string]any{"x5c": []string{"AA=="}}), i.claims(nil)),
		"X5U":                sign(t, with(i.es256(), map[string]any{"X5U": foreign.url}), i.claims(nil)),
		"crit":               sign(t, with(i.es256(), map[string]any{"crit": []string{"b64"}, "b64": true}), i.claims(nil)),
		"no kid":             sign(t, how{jose.ES256, i.ec, nil}, i.claims(nil)),
		"long kid":           sign(t, with(i.es256(), map[string]any{"kid": strings.Repeat("k", 257)}), i.claims(nil)),
		"more than 12 KiB":   i.token(map[string]any{"x": strings.Repeat("x", 10<<10)}),
		"JSON form":          full.FullSerialize(),
		"white space inside": parts[0] + "." + parts[1] + " ." + parts[2],
		"line break inside":  parts[0] + ".\n" + parts[1] + "." + parts[2],
		"padding":            good + "=",
		"another spelling":   good[:len(good)-1] + string(good[len(good)-1]+1),
		"four parts":         good + "." + parts[0],
		"empty":              "",
		"claims no object":   sign(t, i.es256(), []string{"x"}),
		"claims null":        sign(t, i.es256(), nil),
		"AUD":                i.token(map[string]any{"AUD": "mesh", "aud": nil}),
		"Iss":                i.token(map[string]any{"Iss": i.url}),
	}
	// A TokenReview is what looks at signatures there.
	signature := map[string]string{
		"another issuer's key":  sign(t, how{jose.ES256, foreign.ec, map[string]any{"kid": "e1"}}, i.claims(nil)),
		"kid of another key":    sign(t, how{jose.ES256, i.ec, map[string]any{"kid": "r1"}}, i.claims(nil)),
		"unknown kid":           sign(t, how{jose.ES256, i.ec, map[string]any{"kid": "zz"}}, i.claims(nil)),
		"altered claims":        reencode(t, good, 1, func(b []byte) []byte { return []byte(admin.Replace(string(b))) }),
		"altered header":        reencode(t, good, 0, func(b []byte) []byte { return append(b, ' ') }),
		"altered signature":     reencode(t, good, 2, func(b []byte) []byte { b[5] ^= 1; return b }),
		"no signature":          parts[0] + "." + parts[1] + ".",
		"not the key's own alg": sign(t, how{jose.RS256, i.rsa, map[string]any{"kid": "r2"}}, i.claims(nil)),
	}
	i.set(append(i.keys, jose.JSONWebKey{Key: i.rsa.Public(), KeyID: "r2", Algorithm: "PS256"})...)
	for way, v := range i.verifiers() {
		all := maps.Clone(refused)
		if way != "tokenReview" {
			maps.Copy(all, signature)
		}
		for name, token := range all {
			i.pass(keysPause) // an unknown kid may be asked for
			if _, err := v.Verify(t.Context(), token); !errors.Is(err, ErrBadEvidence) {
				t.Errorf("%s, %s: got %v, want ErrBadEvidence", way, name, err)
			} else if len(token) > 40 && strings.Contains(err.Error(), token[len(token)-40:]) || len(err.Error()) > 500 {
				t.Errorf("%s, %s: the error shows the token: %v", way, name, quote(err))
			}
		}
		if _, err := v.Verify(t.Context(), i.token(nil)); err != nil {
			t.Errorf("%s: the good token: %v", way, err)
		}
	}
}

// TestE3_RefusedClaims: tokens that the issuer signed, but not for this mesh, not
// as this issuer, or not for now.
func TestE3_RefusedClaims(t *testing.T) {
	i, foreign := newIssuer(t), newIssuer(t)
	at := func(d time.Duration) int64 { return i.clock().Add(d).Unix() }
	refused := map[string]map[string]any{
		"other issuer":          {"iss": foreign.url},
		"issuer with a slash":   {"iss": i.url + "/"},
		"no issuer":             {"iss": nil},
		"other audience":        {"aud": "other"},
		"audience as prefix":    {"aud": "mesh2"},
		"audience in capitals":  {"aud": "MESH"},
		"no audience":           {"aud": nil},
		"unfit for a log":       {"iss": "a\n\x1b[31m" + strings.Repeat("x", 5000)},
		"empty audience":        {"aud": []string{}},
		"expired":               {"exp": at(-time.Second)},
		"no expiry":             {"exp": nil},
		"expiry null":           {"exp": json.RawMessage("null")},
		"expiry as text":        {"exp": "tomorrow"},
		"valid in ten minutes":  {"nbf": at(10 * time.Minute)},
		"valid from long hence": {"nbf": at(24 * time.Hour), "exp": at(48 * time.Hour)},
	}
	for way, v := range i.verifiers() {
		for name, changes := range refused {
			if _, err := v.Verify(t.Context(), i.token(changes)); !errors.Is(err, ErrBadEvidence) {
				t.Errorf("%s, %s: got %v, want ErrBadEvidence", way, name, err)
			} else if s := err.Error(); len(s) > 400 || strings.ContainsAny(s, "\n\x1b") {
				t.Errorf("%s, %s: unfit for a log: %s", way, name, quote(s))
			}
		}
		token := i.token(nil)
		if _, err := v.Verify(t.Context(), token); err != nil {
			t.Errorf("%s: %v", way, err)
		}
		i.pass(time.Hour + time.Second)
		if _, err := v.Verify(t.Context(), token); !errors.Is(err, ErrBadEvidence) || !strings.Contains(err.Error(), "expired") {
			t.Errorf("%s: after an hour got %v", way, err)
		}
		i.pass(-time.Hour - time.Second)
	}
}

// TestOnceNamesWhatIsSigned: for each ECDSA signature (r, s) there is a second
// one, (r, -s), that is as good. It must not make a second token.
func TestOnceNamesWhatIsSigned(t *testing.T) {
	i := newIssuer(t)
	token := i.token(nil)
	twin := reencode(t, token, 2, func(sig []byte) []byte {
		s := new(big.Int).SetBytes(sig[32:])
		s.Sub(elliptic.P256().Params().N, s).FillBytes(sig[32:])
		return sig
	})
	require.NotEqual(t, token, twin)
	for way, v := range i.verifiers() {
		a, err := v.Verify(t.Context(), token)
		require.NoError(t, err)
		b, err := v.Verify(t.Context(), twin)
		if err != nil || a.Once != b.Once {
			t.Errorf("%s: got %q and %q, %v", way, a.Once, b.Once, err)
		}
		c, err := v.Verify(t.Context(), i.token(map[string]any{"jti": "2"}))
		if err != nil || c.Once == a.Once {
			t.Errorf("%s: another token got the same name, %v", way, err)
		}
	}
}

func FuzzReadBearer(f *testing.F) {
	f.Add("e30.e30.AA")
	f.Add(base64url.EncodeToString([]byte(`{"alg":"ES256","kid":"a"}`)) + "." + base64url.EncodeToString([]byte(`{"iss":"a"}`)) + ".AAAA")
	f.Add(base64url.EncodeToString([]byte(`{"alg":"none","kid":"a"}`)) + "." + base64url.EncodeToString([]byte(`{}`)) + ".")
	f.Fuzz(func(t *testing.T, s string) {
		b, err := readBearer(s)
		if err != nil {
			return
		}
		if b.kid == "" || !json.Valid(b.payload) || strings.HasPrefix(b.alg, "HS") || b.alg == "none" {
			t.Errorf("%q: got %+v", s, b)
		}
		// It has one spelling.
		parts := strings.Split(b.token, ".")
		for n, p := range parts {
			raw, err := base64url.DecodeString(p)
			if err != nil || base64url.EncodeToString(raw) != p {
				t.Errorf("%q: part %d has another spelling", s, n)
			}
		}
		e := expected{audience: "mesh", now: time.Now}
		_, _ = b.claim(t.Context(), e)
		if _, err := b.verify(t.Context(), nil, e); err == nil {
			t.Errorf("%q: verified without a key", s)
		}
	})
}
