package attest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
)

// KindEnrollmentKey names re-enrolment in audit records. It stands in no
// Workload: a key is registered only by redeeming other evidence.
//
// An enrolment key proves that its holder is the very instance that registered
// it, or has read that instance's state folder. It is good for nothing but
// re-enrolling that instance, and can be revoked without touching others.
//
// Replay: the key signs a nonce that the server drew for this one stream,
// together with the hash of the CSR that is to be signed; a recorded proof fits
// no other stream and no other key.
const KindEnrollmentKey = "enrollment-key"

const (
	// NonceSize is the size of a challenge in bytes.
	NonceSize = 32
	// MaxEnrollmentKey is the size limit of an encoded public key in bytes.
	MaxEnrollmentKey = 1 << 10

	proofContext = "sallyport enrolment v1\x00"
)

// ErrBadProof says that a proof was not made by the registered key for this
// challenge and CSR.
var ErrBadProof = errors.New("the enrolment key's proof does not fit the challenge")

// NewNonce draws a challenge.
func NewNonce() ([]byte, error) {
	n := make([]byte, NonceSize)
	if _, err := rand.Read(n); err != nil {
		return nil, fmt.Errorf("drawing a challenge: %w", err)
	}
	return n, nil
}

// ParseEnrollmentKey reads a PKIX public key, which must be ECDSA P-256.
func ParseEnrollmentKey(der []byte) (*ecdsa.PublicKey, error) {
	if len(der) == 0 || len(der) > MaxEnrollmentKey {
		return nil, fmt.Errorf("enrolment key of %d bytes: want 1 to %d", len(der), MaxEnrollmentKey)
	}
	pub, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("parsing the enrolment key: %w", err)
	}
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("parsing the enrolment key: not an ECDSA P-256 key")
	}
	return key, nil
}

// Prove signs a challenge for one CSR.
func Prove(key *ecdsa.PrivateKey, nonce, csr []byte) ([]byte, error) {
	if len(nonce) != NonceSize {
		return nil, fmt.Errorf("challenge of %d bytes: want %d", len(nonce), NonceSize)
	}
	sig, err := ecdsa.SignASN1(rand.Reader, key, proofDigest(nonce, csr))
	if err != nil {
		return nil, fmt.Errorf("signing the challenge: %w", err)
	}
	return sig, nil
}

// CheckProof returns ErrBadProof unless key signed this nonce and CSR.
func CheckProof(key *ecdsa.PublicKey, nonce, csr, signature []byte) error {
	if len(nonce) != NonceSize || !ecdsa.VerifyASN1(key, proofDigest(nonce, csr), signature) {
		return ErrBadProof
	}
	return nil
}

func proofDigest(nonce, csr []byte) []byte {
	sum := sha256.Sum256(csr)
	h := sha256.New()
	h.Write([]byte(proofContext))
	h.Write(nonce)
	h.Write(sum[:])
	return h.Sum(nil)
}
