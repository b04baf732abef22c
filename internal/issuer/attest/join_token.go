package attest

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
)

// KindJoinToken is the kind that a Workload's attest list names to admit join
// tokens.
//
// A join token proves that its bearer was given it by an operator, who named one
// workload when making it. It does not prove where the bearer runs or what it
// executes: whoever reads the token before the sidecar does can be the workload.
//
// Replay: a token is redeemed once, by compare-and-swap. The one repetition that
// is answered is that of the same enrolment key, which must prove itself again:
// so a sidecar whose answer was lost on the way is not locked out, and nobody
// else gains anything.
const KindJoinToken = "join-token"

// SecretSize is the size of a join token's secret in bytes.
const SecretSize = 32

// Token is a join token. Its wire form, [Token.Encode], is
//
//	sp1.<id>.<secret>.<root>
//
// with an id of 16 bytes, a secret of 32 and the SHA-256 of the control plane's
// root public key, each in unpadded base64url. The hash lets the sidecar
// authenticate the control plane before it sends anything.
type Token struct {
	ID       string // as it stands in the wire form; not secret
	Secret   [SecretSize]byte
	RootHash [sha256.Size]byte
}

const (
	tokenPrefix = "sp1"
	tokenIDSize = 16
)

// ErrTokenSyntax says that a string is no join token. The string itself is never
// part of an error: it may be a secret.
var ErrTokenSyntax = errors.New(`not a join token: one line of the form sp1.<id>.<secret>.<root>, as "sallyport token create" prints it`)

var base64url = base64.RawURLEncoding.Strict()

// NewToken makes a token with a random id and secret.
func NewToken(rootHash [sha256.Size]byte) (Token, error) {
	t := Token{RootHash: rootHash}
	var id [tokenIDSize]byte
	if _, err := rand.Read(id[:]); err != nil {
		return Token{}, fmt.Errorf("making a join token: %w", err)
	}
	if _, err := rand.Read(t.Secret[:]); err != nil {
		return Token{}, fmt.Errorf("making a join token: %w", err)
	}
	t.ID = base64url.EncodeToString(id[:])
	return t, nil
}

// ParseToken reads the wire form. Leading and trailing white space is allowed,
// since tokens are kept in files; anything else that [Token.Encode] would not
// write is [ErrTokenSyntax].
func ParseToken(s string) (Token, error) {
	parts := strings.Split(strings.TrimSpace(s), ".")
	if len(parts) != 4 || parts[0] != tokenPrefix || !decodeExact(make([]byte, tokenIDSize), parts[1]) {
		return Token{}, ErrTokenSyntax
	}
	t := Token{ID: parts[1]}
	if !decodeExact(t.Secret[:], parts[2]) || !decodeExact(t.RootHash[:], parts[3]) {
		return Token{}, ErrTokenSyntax
	}
	return t, nil
}

// decodeExact fills dst from s; false unless s is the one encoding of exactly
// that many bytes.
func decodeExact(dst []byte, s string) bool {
	// The decoder skips line breaks; with the length given, they leave it short.
	if len(s) != base64url.EncodedLen(len(dst)) {
		return false
	}
	n, err := base64url.Decode(dst, []byte(s))
	return err == nil && n == len(dst)
}

// Encode gives the wire form, which is a secret.
func (t Token) Encode() string {
	return strings.Join([]string{tokenPrefix, t.ID, base64url.EncodeToString(t.Secret[:]), base64url.EncodeToString(t.RootHash[:])}, ".")
}

// String names the token without its secret, for logs and errors.
func (t Token) String() string { return tokenPrefix + "." + t.ID + ".…" }

// GoString is String, so that %#v does not show the secret either.
func (t Token) GoString() string { return t.String() }

// SecretHash is what the control plane stores of a secret. A plain hash is
// enough: a secret has 256 random bits and cannot be guessed.
func SecretHash(secret []byte) [sha256.Size]byte { return sha256.Sum256(secret) }

// SecretMatches compares a presented secret with a stored hash in constant time.
func SecretMatches(secret, hash []byte) bool {
	got := SecretHash(secret)
	return len(secret) == SecretSize && subtle.ConstantTimeCompare(got[:], hash) == 1
}

// RootHash is the hash of a root's public key that a token carries.
func RootHash(root *x509.Certificate) [sha256.Size]byte {
	return sha256.Sum256(root.RawSubjectPublicKeyInfo)
}

// PinsRoot reports whether t was made for the CA with this root.
func (t Token) PinsRoot(root *x509.Certificate) bool { return RootHash(root) == t.RootHash }
