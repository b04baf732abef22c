package endpoint

import (
	"crypto/x509"
	"encoding/base64"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
)

// WA 6.2.1: the audience is in the token; no spiffe_id is all identities, the
// first being the default.
func TestWA6_2_1_JWTSVID(t *testing.T) {
	o := open(t)
	c := o.client(me())
	all, err := c.FetchJWTSVIDs(called(t), jwtsvid.Params{Audience: "db", ExtraAudiences: []string{"cache"}})
	require.NoError(t, err)
	if len(all) != 2 || all[0].ID != ownID || all[1].ID != otherID || len(all[0].Audience) != 2 || all[0].Audience[0] != "db" {
		t.Errorf("got %+v", all)
	}
	one, err := c.FetchJWTSVIDs(called(t), jwtsvid.Params{Audience: "db", Subject: otherID})
	require.NoError(t, err)
	if len(one) != 1 || one[0].ID != otherID {
		t.Errorf("got %+v", one)
	}
	src, err := workloadapi.NewJWTSource(called(t), workloadapi.WithClient(c))
	require.NoError(t, err)
	defer src.Close()
	svid, err := src.FetchJWTSVID(called(t), jwtsvid.Params{Audience: "db"})
	require.NoError(t, err)
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), src, []string{"db"}); err != nil {
		t.Errorf("the source's own bundles refuse its token: %v", err)
	}
}

func TestWA6_2_1_EmptyAudience(t *testing.T) {
	o := open(t)
	for _, aud := range [][]string{nil, {""}, {"a", ""}} {
		_, err := o.raw(me()).FetchJWTSVID(called(t), &workload.JWTSVIDRequest{Audience: aud})
		wantCode(t, "audience", err, codes.InvalidArgument)
	}
	_, err := o.raw(me()).FetchJWTSVID(called(t), &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "https://x"})
	wantCode(t, "a malformed ID", err, codes.InvalidArgument)
	_, err = o.raw(me()).FetchJWTSVID(called(t), &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: aliceID.String()})
	wantCode(t, "another's ID", err, codes.PermissionDenied)
}

// WA 6.2.3: ID and claims are returned; the validation is complete.
func TestWA6_2_3_Validate(t *testing.T) {
	o := open(t)
	claims := claimsOf(aliceID, "db")
	claims["shelf"] = 7
	good := o.authority.token(t, claims, nil)
	resp, err := o.raw(me()).ValidateJWTSVID(called(t), &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: good})
	require.NoError(t, err)
	if resp.SpiffeId != aliceID.String() || resp.Claims.GetFields()["shelf"].GetNumberValue() != 7 {
		t.Errorf("got %v", resp)
	}
	if svid, err := o.client(me()).ValidateJWTSVID(called(t), good, "db"); err != nil || svid.ID != aliceID {
		t.Errorf("go-spiffe: got %v, %v", svid, err)
	}

	old, none, noSubject := claimsOf(aliceID, "db"), claimsOf(aliceID, "db"), claimsOf(aliceID, "db")
	old["exp"] = time.Now().Add(-5 * time.Minute).Unix()
	delete(none, "exp")
	delete(noSubject, "sub")
	bad := map[string]string{
		"expired": o.authority.token(t, old, nil), "no expiry": o.authority.token(t, none, nil),
		"no subject": o.authority.token(t, noSubject, nil), "another audience": o.authority.token(t, claimsOf(aliceID, "cache"), nil),
		"no token": "a.b.c", "changed": good[:len(good)-8] + "AAAAAAAA",
		"another type": o.authority.token(t, claimsOf(aliceID, "db"), (&jose.SignerOptions{}).WithType("at+jwt")),
	}
	for name, token := range bad {
		_, err := o.raw(me()).ValidateJWTSVID(called(t), &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: token})
		wantCode(t, name, err, codes.InvalidArgument)
	}
	for _, req := range []*workload.ValidateJWTSVIDRequest{{Svid: good}, {Audience: "db"}} {
		_, err := o.raw(me()).ValidateJWTSVID(called(t), req)
		wantCode(t, "a field is missing", err, codes.InvalidArgument)
	}
}

// E1: no algorithm, a symmetric one, a token that brings its own key.
func TestE1Tokens(t *testing.T) {
	o := open(t)
	sign := func(key jose.SigningKey, options *jose.SignerOptions) string {
		signer, err := jose.NewSigner(key, options)
		require.NoError(t, err)
		token, err := jwt.Signed(signer).Claims(claimsOf(aliceID, "db")).Serialize()
		require.NoError(t, err)
		return token
	}
	public, err := x509.MarshalPKIXPublicKey(o.authority.key.Public())
	require.NoError(t, err)
	mine := newKey(t)
	b64 := base64.RawURLEncoding.EncodeToString
	bad := map[string]string{
		"none":               b64([]byte(`{"alg":"none"}`)) + "." + b64([]byte(`{"sub":"`+aliceID.String()+`","aud":["db"],"exp":99999999999}`)) + ".",
		"HS256, public key":  sign(jose.SigningKey{Algorithm: jose.HS256, Key: jose.JSONWebKey{Key: public, KeyID: o.authority.kid}}, nil),
		"jwk":                sign(jose.SigningKey{Algorithm: jose.ES256, Key: mine}, &jose.SignerOptions{EmbedJWK: true}),
		"jku, good key":      o.authority.token(t, claimsOf(aliceID, "db"), (&jose.SignerOptions{}).WithHeader("jku", "https://evil.example/keys")),
		"x5u, good key":      o.authority.token(t, claimsOf(aliceID, "db"), (&jose.SignerOptions{}).WithHeader("x5u", "https://evil.example/keys")),
		"unknown kid":        sign(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: mine, KeyID: "other"}}, nil),
		"right kid, own key": sign(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: mine, KeyID: o.authority.kid}}, nil),
	}
	for name, token := range bad {
		_, err := o.raw(me()).ValidateJWTSVID(called(t), &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: token})
		wantCode(t, name, err, codes.InvalidArgument)
	}
}

// WA 6.3: the keys of one trust domain do not speak for another, whatever kid.
func TestWA6_3_SubjectsTrustDomainOnly(t *testing.T) {
	o := open(t)
	foreign := *o.foreign
	foreign.kid = o.authority.kid
	for name, token := range map[string]string{
		"kid of the signer":  o.foreign.token(t, claimsOf(aliceID, "db"), nil),
		"kid of the subject": foreign.token(t, claimsOf(aliceID, "db"), nil),
	} {
		_, err := o.raw(me()).ValidateJWTSVID(called(t), &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: token})
		wantCode(t, name, err, codes.InvalidArgument)
	}
}

// A token from before its subject was revoked is refused, and so is one that does
// not say when it was issued.
func TestRevokedTokensAreRefused(t *testing.T) {
	o := open(t)
	now := time.Now()
	o.revoked.Store(now.Unix())
	issued := func(id spiffeid.ID, at time.Time) string {
		claims := claimsOf(id, "db")
		if !at.IsZero() {
			claims["iat"] = at.Unix()
		}
		return o.authority.token(t, claims, nil)
	}
	for name, c := range map[string]struct {
		token string
		want  codes.Code
	}{
		"before":           {issued(aliceID, now.Add(-time.Minute)), codes.InvalidArgument},
		"without a moment": {issued(aliceID, time.Time{}), codes.InvalidArgument},
		"after":            {issued(aliceID, now), codes.OK},
		"another's":        {issued(ownID, now.Add(-time.Minute)), codes.OK},
	} {
		_, err := o.raw(me()).ValidateJWTSVID(called(t), &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: c.token})
		wantCode(t, name, err, c.want)
	}
}
