package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	// JWTTTL is how long a JWT-SVID lives at most: nobody can take it back once
	// it is out.
	JWTTTL = 5 * time.Minute
	// MaxAudiences, and MaxAudience in bytes, bound what a JWT-SVID is good for.
	MaxAudiences = 16
	MaxAudience  = 1024
)

// JWTRequest asks for a JWT-SVID.
type JWTRequest struct {
	ID spiffeid.ID
	// Audience says who may accept the token; see [CheckAudience].
	Audience []string
	// TTL: at least a second, and never longer than [JWTTTL]. Zero: JWTTTL.
	TTL time.Duration
}

// JWT is a JWT-SVID.
type JWT struct {
	Token           string // compact form (JWT-SVID 1, 5.1)
	ID              string // the claim jti, unique, for the audit log
	Issued, Expires time.Time
}

// IssueJWT signs a JWT-SVID with ES256. Its header has alg, kid and typ and
// nothing else (JWT-SVID 2); its claims are sub, aud, exp, iat, jti and, where
// the configuration names an issuer URL, iss. It refuses IDs of other trust
// domains, IDs without a path, IDs under /sallyport/ and an empty audience, and
// releases nothing that does not pass the checks of the JWT-SVID standard.
func (c *CA) IssueJWT(ctx context.Context, req JWTRequest) (JWT, error) {
	if err := ctx.Err(); err != nil {
		return JWT{}, err
	}
	now := c.cfg.Now()
	s := c.state.Load()
	if err := c.checkJWTRequest(req); err != nil {
		return JWT{}, fmt.Errorf("issuing a JWT-SVID for %q: %w", req.ID, err)
	}
	issued, err := c.signJWT(s, req, now)
	if err != nil {
		return JWT{}, fmt.Errorf("issuing a JWT-SVID for %s: %w", req.ID, err)
	}
	if err := c.lintJWT(s, issued.Token, req, now); err != nil {
		return JWT{}, fmt.Errorf("issuing a JWT-SVID for %s: token withheld: %w", req.ID, err)
	}
	return issued, nil
}

func (c *CA) checkJWTRequest(req JWTRequest) error {
	switch {
	case !req.ID.MemberOf(c.td) || req.ID.Path() == "":
		return fmt.Errorf("not a workload of trust domain %s", c.td)
	case identity.Reserved(req.ID):
		return errors.New("reserved for the control plane")
	case req.TTL != 0 && req.TTL < time.Second:
		return fmt.Errorf("a life of %v: at least 1s", req.TTL)
	}
	return CheckAudience(req.Audience)
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

// signJWT never lets a token outlive its key, which leaves the bundle then.
func (c *CA) signJWT(s *state, req JWTRequest, now time.Time) (JWT, error) {
	ttl := JWTTTL
	if req.TTL != 0 {
		ttl = min(req.TTL, JWTTTL)
	}
	start := now.UTC().Truncate(time.Second)
	end := start.Add(ttl)
	if last := s.jwt.cert.NotAfter; end.After(last) {
		end = last
	}
	if !end.After(now) {
		return JWT{}, fmt.Errorf("the signing key expired at %s; is the clock right?", s.jwt.cert.NotAfter.Format(time.RFC3339))
	}
	kid, err := keyID(s.jwt.cert.PublicKey)
	if err != nil {
		return JWT{}, err
	}
	key := jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: cryptosigner.Opaque(s.jwt.signer), KeyID: kid}}
	signer, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return JWT{}, fmt.Errorf("signing: %w", err)
	}
	serial := rand.Text()
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: c.cfg.JWTIssuer, Subject: req.ID.String(), Audience: req.Audience,
		Expiry: jwt.NewNumericDate(end), IssuedAt: jwt.NewNumericDate(start), ID: serial,
	}).Serialize()
	if err != nil {
		return JWT{}, fmt.Errorf("signing: %w", err)
	}
	return JWT{Token: token, ID: serial, Issued: start, Expires: end}, nil
}

// keyID is the RFC 7638 thumbprint of a key, base64url.
func keyID(pub crypto.PublicKey) (string, error) {
	sum, err := (&jose.JSONWebKey{Key: pub}).Thumbprint(crypto.SHA256)
	if err != nil {
		return "", fmt.Errorf("naming a JWT key: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(sum), nil
}

// newJWTKey makes a key that signs JWT-SVIDs, with the certificate that package
// ca keeps it with, which has the key ID as common name. No peer accepts that certificate: it is no authority, and
// its ID has no path.
func (c *CA) newJWTKey(now time.Time) (*authority, *pem.Block, error) {
	key, block, err := newFileKey()
	if err != nil {
		return nil, nil, fmt.Errorf("making a new JWT key: %w", err)
	}
	tmpl, err := template(c.td.ID(), now, c.cfg.JWTKeyTTL)
	if err != nil {
		return nil, nil, err
	}
	kid, err := keyID(key.Public())
	if err != nil {
		return nil, nil, err
	}
	tmpl.Subject = pkix.Name{CommonName: kid}
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	cert, err := sign(tmpl, &authority{signer: key}, key.Public())
	if err != nil {
		return nil, nil, fmt.Errorf("making a new JWT key: %w", err)
	}
	return &authority{cert: cert, signer: key}, block, nil
}
