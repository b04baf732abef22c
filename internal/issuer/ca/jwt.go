package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	// JWTTTL is how long a JWT-SVID lives: nobody can take it back once it is out.
	JWTTTL = 5 * time.Minute
	// MaxAudiences and MaxAudience, in bytes, bound what a JWT-SVID is good for.
	MaxAudiences = 16
	MaxAudience  = 1024
)

// JWTRequest asks for a JWT-SVID.
type JWTRequest struct {
	ID       spiffeid.ID
	Audience []string // 1 to MaxAudiences
}

// JWT is an issued JWT-SVID.
type JWT struct {
	Token   string // compact JWS
	ID      string // jti: names it in the audit log
	Issued  time.Time
	Expires time.Time
}

// newJWTKey makes a JWT signing key: P-256, for ES256. Its certificate is a form
// to keep it in; the common name is the key id, the RFC 7638 thumbprint.
func (c *CA) newJWTKey(now time.Time) (*authority, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("making a JWT key: %w", err)
	}
	kid, err := (&jose.JSONWebKey{Key: key.Public()}).Thumbprint(crypto.SHA256)
	if err != nil {
		return nil, nil, fmt.Errorf("naming a JWT key: %w", err)
	}
	tmpl, err := template(c.td.ID(), now, c.cfg.JWTKeyTTL)
	if err != nil {
		return nil, nil, err
	}
	tmpl.Subject = pkix.Name{CommonName: base64.RawURLEncoding.EncodeToString(kid)}
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	cert, err := sign(tmpl, &authority{signer: key}, key.Public())
	if err != nil {
		return nil, nil, fmt.Errorf("making a JWT key: %w", err)
	}
	return &authority{cert, key}, key, nil
}

// jwtClaims are those of JWT-SVID sections 3.1 to 3.3, and those by which others
// tell tokens apart (RFC 7519 section 4.1).
type jwtClaims struct {
	Subject  string   `json:"sub"`
	Audience []string `json:"aud"`
	Expiry   int64    `json:"exp"`
	IssuedAt int64    `json:"iat"`
	Issuer   string   `json:"iss,omitempty"`
	ID       string   `json:"jti"`
}

// IssueJWT signs a JWT-SVID (ES256) that lives for [JWTTTL]. It refuses IDs of
// other trust domains, IDs without a path and IDs under /sallyport/, and releases
// nothing that a validator would refuse.
func (c *CA) IssueJWT(ctx context.Context, req JWTRequest) (JWT, error) {
	if err := ctx.Err(); err != nil {
		return JWT{}, err
	}
	if identity.Reserved(req.ID) || !req.ID.MemberOf(c.td) || req.ID.Path() == "" {
		return JWT{}, fmt.Errorf("issuing a JWT-SVID for %q: not a workload of trust domain %s", req.ID, c.td)
	}
	if err := CheckAudience(req.Audience); err != nil {
		return JWT{}, fmt.Errorf("issuing a JWT-SVID for %s: %w", req.ID, err)
	}
	out, err := c.signJWT(req)
	if err != nil {
		return JWT{}, fmt.Errorf("issuing a JWT-SVID for %s: %w", req.ID, err)
	}
	if err := c.lintJWT(out, req); err != nil {
		return JWT{}, fmt.Errorf("issuing a JWT-SVID for %s: token withheld: %w", req.ID, err)
	}
	return out, nil
}

// CheckAudience refuses an empty audience, more than [MaxAudiences], and ones
// that are empty or longer than [MaxAudience] bytes.
func CheckAudience(audience []string) error {
	if len(audience) == 0 || len(audience) > MaxAudiences {
		return fmt.Errorf("%d audiences: want 1 to %d", len(audience), MaxAudiences)
	}
	for _, a := range audience {
		if strings.TrimSpace(a) == "" || len(a) > MaxAudience {
			return fmt.Errorf("audience of %d bytes: want 1 to %d", len(a), MaxAudience)
		}
	}
	return nil
}

func (c *CA) signJWT(req JWTRequest) (JWT, error) {
	key := c.state.Load().jwtActive
	now := c.cfg.Now()
	if !now.Add(JWTTTL).Before(key.cert.NotAfter) {
		return JWT{}, fmt.Errorf("the JWT key ends at %s; is the clock right?", key.cert.NotAfter.Format(time.RFC3339))
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key.signer, KeyID: key.cert.Subject.CommonName}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return JWT{}, fmt.Errorf("signing: %w", err)
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return JWT{}, fmt.Errorf("naming a token: %w", err)
	}
	out := JWT{ID: hex.EncodeToString(id), Issued: now.Truncate(time.Second), Expires: now.Add(JWTTTL).Truncate(time.Second)}
	out.Token, err = jwt.Signed(signer).Claims(jwtClaims{
		Subject: req.ID.String(), Audience: req.Audience, Issuer: c.cfg.JWTIssuer, ID: out.ID,
		IssuedAt: out.Issued.Unix(), Expiry: out.Expires.Unix(),
	}).Serialize()
	if err != nil {
		return JWT{}, fmt.Errorf("signing: %w", err)
	}
	return out, nil
}

// lintJWT reads a token back as any validator would: header [JWT-SVID 2], claims
// [3] and signature, by the published keys.
func (c *CA) lintJWT(t JWT, req JWTRequest) error {
	tok, err := jwt.ParseSigned(t.Token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return fmt.Errorf("a validator would refuse it: %w", err)
	}
	if len(tok.Headers) != 1 {
		return errors.New("not one signature")
	}
	h := tok.Headers[0]
	if typ, _ := h.ExtraHeaders[jose.HeaderType].(string); typ != "JWT" || len(h.ExtraHeaders) != 1 || h.JSONWebKey != nil || h.Nonce != "" {
		return errors.New("a header besides alg, kid and typ")
	}
	key, ok := c.state.Load().published.FindJWTAuthority(h.KeyID)
	if !ok {
		return fmt.Errorf("key %q is not published", h.KeyID)
	}
	var got jwtClaims
	if err := tok.Claims(key, &got); err != nil {
		return fmt.Errorf("a validator would refuse it: %w", err)
	}
	now := c.cfg.Now()
	switch {
	case got.Subject != req.ID.String():
		return fmt.Errorf("names %s", got.Subject)
	case !slices.Equal(got.Audience, req.Audience):
		return errors.New("not for the requested audience")
	case got.Expiry <= now.Unix() || got.Expiry > now.Add(JWTTTL).Unix() || got.IssuedAt > now.Unix():
		return errors.New("not valid now, or longer than promised")
	}
	return nil
}
