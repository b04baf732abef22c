package ca

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// lintJWT reads a token back as any peer would that holds the bundle, and holds
// it to the JWT-SVID standard before it is released. Numbers in brackets are
// sections of that standard. Package jwtsvid would do most of it, but reads the
// machine's clock and not the CA's; the tests have it look at the same tokens.
func (c *CA) lintJWT(s *state, token string, req JWTRequest, now time.Time) error {
	kid, err := lintJWTHeader(token)
	if err != nil {
		return err
	}
	key, ok := s.bundle.FindJWTAuthority(kid)
	if !ok {
		return fmt.Errorf("signed with key %s, which is not in the bundle", kid)
	}
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return fmt.Errorf("reading it back: %w", err)
	}
	var claims jwt.Claims
	if err := parsed.Claims(key, &claims); err != nil {
		return fmt.Errorf("checking the signature: %w", err)
	}
	return c.lintClaims(claims, req, now)
}

// lintJWTHeader: compact form [1], no header but alg, kid and typ [2].
func lintJWTHeader(token string) (kid string, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", fmt.Errorf("%d parts, want three", len(parts))
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil {
		return "", fmt.Errorf("reading the header: %w", err)
	}
	var header map[string]string // :: name → value
	if err := json.Unmarshal(raw, &header); err != nil {
		return "", fmt.Errorf("reading the header: %w", err)
	}
	if len(header) != 3 || header["alg"] != string(jose.ES256) || header["typ"] != "JWT" || header["kid"] == "" {
		return "", errors.New("the header is not alg ES256, kid and typ JWT alone")
	}
	return header["kid"], nil
}

// lintClaims: sub [3.1], aud [3.2], exp [3.3], and what this CA promises.
func (c *CA) lintClaims(claims jwt.Claims, req JWTRequest, now time.Time) error {
	switch {
	case claims.Subject != req.ID.String():
		return fmt.Errorf("names %s", claims.Subject)
	case !slices.Equal(claims.Audience, req.Audience):
		return fmt.Errorf("for audience %q, not %q", claims.Audience, req.Audience)
	case claims.Expiry == nil || !claims.Expiry.Time().After(now):
		return errors.New("no expiry, or a past one")
	case claims.Expiry.Time().After(now.Add(JWTTTL)), req.TTL != 0 && claims.Expiry.Time().After(now.Add(req.TTL)):
		return fmt.Errorf("valid until %s, too long", claims.Expiry.Time())
	case claims.IssuedAt == nil || claims.IssuedAt.Time().After(now) || now.Sub(claims.IssuedAt.Time()) > time.Second:
		return errors.New("not issued now")
	case claims.Issuer != c.cfg.JWTIssuer:
		return fmt.Errorf("issuer %q, not %q", claims.Issuer, c.cfg.JWTIssuer)
	case claims.ID == "":
		return errors.New("no jti")
	}
	return nil
}
