package endpoint

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// validate asks the endpoint about a token for the audience db.
func (o *office) validate(t *testing.T, name, token string, want codes.Code) {
	t.Helper()
	_, err := o.raw(me()).ValidateJWTSVID(called(t), &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: token})
	wantCode(t, name, err, want)
}

// J 1, 5.1: the compact serialisation only.
func TestJ1_CompactOnly(t *testing.T) {
	o := open(t)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: o.authority.key, KeyID: o.authority.kid}}, nil)
	require.NoError(t, err)
	payload, err := json.Marshal(claimsOf(aliceID, "db"))
	require.NoError(t, err)
	signed, err := signer.Sign(payload)
	require.NoError(t, err)
	compact, err := signed.CompactSerialize()
	require.NoError(t, err)
	detached, err := signed.DetachedCompactSerialize()
	require.NoError(t, err)
	o.validate(t, "compact", compact, codes.OK)
	o.validate(t, "JSON", signed.FullSerialize(), codes.InvalidArgument)
	o.validate(t, "detached", detached, codes.InvalidArgument)
	o.validate(t, "a fourth part", compact+".AAAA", codes.InvalidArgument)
	o.validate(t, "two in one", compact+","+compact, codes.InvalidArgument)
	o.validate(t, "a space behind", compact+" ", codes.InvalidArgument)
}

// J 2: alg, kid and typ, and no other header.
func TestJ2_HeadersAllowed(t *testing.T) {
	o := open(t)
	o.validate(t, "these alone", o.authority.token(t, claimsOf(aliceID, "db"), nil), codes.OK)
	for name, value := range map[jose.HeaderKey]any{
		"jku": "https://a.example/keys", "x5u": "https://a.example/keys", "x5t": "AAAA", "cty": "JWT",
		"crit": []string{"exp"}, "b64": true, "foo": "bar", "jwk": map[string]string{"kty": "EC"}, "x5c": []string{"AAAA"},
	} {
		options := (&jose.SignerOptions{}).WithType("JWT").WithHeader(name, value)
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: o.authority.key, KeyID: o.authority.kid}}, options)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		token, err := jwt.Signed(signer).Claims(claimsOf(aliceID, "db")).Serialize()
		require.NoError(t, err)
		o.validate(t, string(name), token, codes.InvalidArgument)
	}
}

// J 2.1: RS, ES and PS, 256, 384 and 512, and no other algorithm.
func TestJ2_1_Algorithms(t *testing.T) {
	o := open(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	curve := func(c elliptic.Curve) crypto.Signer {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		require.NoError(t, err)
		return key
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	keys := map[jose.SignatureAlgorithm]crypto.Signer{
		jose.RS256: rsaKey, jose.RS384: rsaKey, jose.RS512: rsaKey, jose.PS256: rsaKey, jose.PS384: rsaKey, jose.PS512: rsaKey,
		jose.ES256: curve(elliptic.P256()), jose.ES384: curve(elliptic.P384()), jose.ES512: curve(elliptic.P521()),
		jose.EdDSA: ed,
	}
	b := spiffebundle.FromX509Authorities(shop, o.bundles[shop].X509Authorities())
	for alg, key := range keys {
		require.NoError(t, b.AddJWTAuthority("key for "+string(alg), key.Public()))
	}
	o.feed.Set(&Holding{SVIDs: o.svids, Bundles: identity.Bundles{shop: b}})
	for alg, key := range keys {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: "key for " + string(alg)}}, nil)
		require.NoError(t, err)
		token, err := jwt.Signed(signer).Claims(claimsOf(aliceID, "db")).Serialize()
		require.NoError(t, err)
		want := codes.OK
		if alg == jose.EdDSA {
			want = codes.InvalidArgument
		}
		o.validate(t, string(alg), token, want)
	}
	for _, alg := range []jose.SignatureAlgorithm{jose.HS256, jose.HS384, jose.HS512} {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: make([]byte, 64), KeyID: "key for RS256"}}, nil)
		require.NoError(t, err)
		token, err := jwt.Signed(signer).Claims(claimsOf(aliceID, "db")).Serialize()
		require.NoError(t, err)
		o.validate(t, string(alg), token, codes.InvalidArgument)
	}
}

// J 2.3: typ is JWT or JOSE where it is there.
func TestJ2_3_Type(t *testing.T) {
	o := open(t)
	for typ, want := range map[jose.ContentType]codes.Code{
		"JWT": codes.OK, "JOSE": codes.OK, "at+jwt": codes.InvalidArgument, "JWS": codes.InvalidArgument, "x": codes.InvalidArgument,
	} {
		o.validate(t, string(typ), o.authority.token(t, claimsOf(aliceID, "db"), (&jose.SignerOptions{}).WithType(typ)), want)
	}
	o.validate(t, "none", o.authority.token(t, claimsOf(aliceID, "db"), &jose.SignerOptions{}), codes.OK)
}

// J 3: sub is a SPIFFE ID; aud and exp are there; what is missing, another's or
// over is refused.
func TestJ3_Claims(t *testing.T) {
	o := open(t)
	for name, c := range map[string]struct {
		edit func(map[string]any)
		want codes.Code
	}{
		"good":               {func(map[string]any) {}, codes.OK},
		"one of several":     {func(c map[string]any) { c["aud"] = []string{"cache", "db"} }, codes.OK},
		"audience as text":   {func(c map[string]any) { c["aud"] = "db" }, codes.OK},
		"no subject":         {func(c map[string]any) { delete(c, "sub") }, codes.InvalidArgument},
		"subject is no ID":   {func(c map[string]any) { c["sub"] = "alice" }, codes.InvalidArgument},
		"another scheme":     {func(c map[string]any) { c["sub"] = "https://shop.example/alice" }, codes.InvalidArgument},
		"unknown domain":     {func(c map[string]any) { c["sub"] = "spiffe://nowhere.example/alice" }, codes.InvalidArgument},
		"no audience":        {func(c map[string]any) { delete(c, "aud") }, codes.InvalidArgument},
		"empty audience":     {func(c map[string]any) { c["aud"] = []string{} }, codes.InvalidArgument},
		"another audience":   {func(c map[string]any) { c["aud"] = []string{"dbx"} }, codes.InvalidArgument},
		"no expiry":          {func(c map[string]any) { delete(c, "exp") }, codes.InvalidArgument},
		"expired":            {func(c map[string]any) { c["exp"] = time.Now().Add(-5 * time.Minute).Unix() }, codes.InvalidArgument},
		"expiry is no time":  {func(c map[string]any) { c["exp"] = "tomorrow" }, codes.InvalidArgument},
		"not valid yet":      {func(c map[string]any) { c["nbf"] = time.Now().Add(time.Hour).Unix() }, codes.InvalidArgument},
		"issued in a future": {func(c map[string]any) { c["iat"] = time.Now().Add(time.Hour).Unix() }, codes.InvalidArgument},
	} {
		claims := claimsOf(aliceID, "db")
		c.edit(claims)
		o.validate(t, name, o.authority.token(t, claims, nil), c.want)
	}
}

// J 6: keys for JWT-SVIDs have use jwt-svid and a kid, in what is handed out; a
// token must name its key.
func TestJ6_Keys(t *testing.T) {
	o := open(t)
	stream, err := o.raw(me()).FetchJWTBundles(called(t), &workload.JWTBundlesRequest{})
	require.NoError(t, err)
	resp, err := stream.Recv()
	require.NoError(t, err)
	for td, doc := range resp.GetBundles() {
		var set struct {
			Keys []struct{ Use, Kid, Kty string }
		}
		require.NoError(t, json.Unmarshal(doc, &set))
		if len(set.Keys) != 1 || set.Keys[0].Kid == "" || set.Keys[0].Kty != "EC" {
			t.Errorf("%s: got %+v", td, set.Keys)
		}
		for _, k := range set.Keys {
			if k.Use != "" && k.Use != "jwt-svid" {
				t.Errorf("%s: a key for %q", td, k.Use)
			}
		}
	}
	nameless := *o.authority
	nameless.kid = ""
	o.validate(t, "a token without kid", nameless.token(t, claimsOf(aliceID, "db"), nil), codes.InvalidArgument)
}
