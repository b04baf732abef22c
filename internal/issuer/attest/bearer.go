package attest

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
)

// MaxBearer is the size limit of a bearer's token in bytes.
const MaxBearer = 12 << 10

// maxKeyID is the size limit of a token's kid in bytes.
const maxKeyID = 256

// algorithms are those of which the checking side holds a public key only, so
// that who can check a token could not have made it.
func algorithms() []jose.SignatureAlgorithm {
	return []jose.SignatureAlgorithm{
		jose.RS256, jose.RS384, jose.RS512,
		jose.ES256, jose.ES384, jose.ES512,
		jose.PS256, jose.PS384, jose.PS512,
	}
}

// bearer is a JWT (RFC 7519) as it was sent. Nothing in it is believed before a
// check.
type bearer struct {
	token   string
	kid     string
	alg     string
	payload []byte // the claims, JSON
}

// readBearer parses a token and refuses what no issuer would be asked about: any
// form but the compact one, a second spelling of the same bytes, a signature
// algorithm without a public key, a key or certificate that the token brings or
// points to itself.
func readBearer(token string) (*bearer, error) {
	if len(token) > MaxBearer {
		return nil, fmt.Errorf("token of %d bytes, at most %d accepted", len(token), MaxBearer)
	}
	token = strings.TrimSpace(token)
	parts := strings.Split(token, ".")
	if len(parts) != 3 || strings.ContainsAny(token, "\r\n") {
		return nil, errors.New("not a token of the form header.claims.signature")
	}
	var raw [3][]byte
	for i, p := range parts {
		var err error
		if raw[i], err = base64url.DecodeString(p); err != nil {
			return nil, errors.New("not a token of the form header.claims.signature, each in unpadded base64url")
		}
	}
	jws, err := jose.ParseSignedCompact(token, algorithms())
	if err != nil {
		return nil, fmt.Errorf("parsing the token: %w", err)
	}
	if err := checkHeader(raw[0]); err != nil {
		return nil, err
	}
	if err := checkClaimNames(raw[1]); err != nil {
		return nil, err
	}
	h := jws.Signatures[0].Protected
	if h.KeyID == "" || len(h.KeyID) > maxKeyID {
		return nil, fmt.Errorf("token with a kid of %d bytes: want 1 to %d", len(h.KeyID), maxKeyID)
	}
	return &bearer{token: token, kid: h.KeyID, alg: h.Algorithm, payload: raw[1]}, nil
}

// checkHeader refuses parameters by which a token says how it wants to be
// checked.
func checkHeader(header []byte) error {
	var names map[string]json.RawMessage
	if err := json.Unmarshal(header, &names); err != nil {
		return errors.New("the token's header is not a JSON object")
	}
	for name := range names {
		switch strings.ToLower(name) {
		case "jwk", "jku", "x5u", "x5c", "crit":
			return fmt.Errorf("token with the header parameter %q: only configured keys are asked", name)
		}
	}
	return nil
}

// checkClaimNames refuses names that a decoder which ignores case takes for the
// claims that decide.
func checkClaimNames(payload []byte) error {
	var names map[string]json.RawMessage
	if err := json.Unmarshal(payload, &names); err != nil || names == nil {
		return errors.New("the token's claims are not a JSON object")
	}
	for name := range names {
		for _, decides := range []string{"iss", "sub", "aud", "exp", "nbf", "iat", "kubernetes.io"} {
			if name != decides && strings.EqualFold(name, decides) {
				return fmt.Errorf("token with the claim %q, which is not %q", name, decides)
			}
		}
	}
	return nil
}

// expected is what a token must say.
type expected struct {
	issuer   string // "": any, where whoever checks the signature knows its own
	audience string
	now      func() time.Time
}

// verify checks the signature against the issuer's keys of the token's kid, and
// then the claims.
func (b *bearer) verify(ctx context.Context, keys []jose.JSONWebKey, e expected) (*oidc.IDToken, error) {
	set := &oidc.StaticKeySet{}
	for _, k := range keys {
		if k.Algorithm == "" || k.Algorithm == b.alg {
			set.PublicKeys = append(set.PublicKeys, crypto.PublicKey(k.Key))
		}
	}
	return e.check(ctx, b, oidc.NewVerifier(e.issuer, set, e.config()))
}

// claim checks the claims alone. Somebody else must check the signature.
func (b *bearer) claim(ctx context.Context, e expected) (*oidc.IDToken, error) {
	cfg := e.config()
	cfg.InsecureSkipSignatureCheck = true
	return e.check(ctx, b, oidc.NewVerifier(e.issuer, nil, cfg))
}

func (e expected) config() *oidc.Config {
	cfg := &oidc.Config{ClientID: e.audience, SkipIssuerCheck: e.issuer == "", Now: e.now}
	for _, alg := range algorithms() {
		cfg.SupportedSigningAlgs = append(cfg.SupportedSigningAlgs, string(alg))
	}
	return cfg
}

func (e expected) check(ctx context.Context, b *bearer, v *oidc.IDTokenVerifier) (*oidc.IDToken, error) {
	t, err := v.Verify(ctx, b.token)
	if expired := (*oidc.TokenExpiredError)(nil); errors.As(err, &expired) {
		if expired.Expiry.IsZero() {
			return nil, errors.New("the token has no expiry (exp)")
		}
		return nil, fmt.Errorf("the token expired at %s, and now is %s", expired.Expiry.UTC().Format(time.RFC3339), e.now().UTC().Format(time.RFC3339))
	}
	if err != nil { // what it quotes, a stranger wrote
		return nil, errors.New(forPeople(strings.TrimPrefix(err.Error(), "oidc: ")))
	}
	return t, nil
}

// once names the token by what its signature covers: an ECDSA signature has a
// second form that is as good (SEC 1 section 4.1.4), which must not make it
// another token. That the rest has one spelling, readBearer saw to.
func (b *bearer) once() string {
	sum := sha256.Sum256([]byte(b.token[:strings.LastIndexByte(b.token, '.')]))
	return hex.EncodeToString(sum[:])
}
