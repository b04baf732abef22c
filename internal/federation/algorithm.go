package federation

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"

	"github.com/go-jose/go-jose/v4"
)

// algorithm is the one JWS algorithm that we name for a key (RFC 7518 section 3.1);
// "" for a key that JWT-SVIDs are not signed with.
func algorithm(key any) string {
	switch k := key.(type) {
	case *rsa.PublicKey:
		return string(jose.RS256)
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return string(jose.ES256)
		case elliptic.P384():
			return string(jose.ES384)
		case elliptic.P521():
			return string(jose.ES512)
		}
	}
	return ""
}
