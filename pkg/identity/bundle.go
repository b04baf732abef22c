package identity

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// MaxBundle is how large a bundle may be, in bytes.
	MaxBundle     = 256 << 10
	maxBundleKeys = 256

	useX509 = "x509-svid"
	useJWT  = "jwt-svid"
)

// bundleDocument is a SPIFFE bundle (Trust Domain and Bundle section 4.1).
type bundleDocument struct {
	Keys     []json.RawMessage `json:"keys"`
	Sequence *uint64           `json:"spiffe_sequence,omitempty"`
	Hint     *int64            `json:"spiffe_refresh_hint,omitempty"` // seconds
}

// ParseBundle reads a SPIFFE bundle of td. Keys of a kind or for a use that it does not
// know are ignored, as are X.509 entries without certificate (Trust Domain and
// Bundle 4.1.3, X509-SVID 6.2); a document that leaves none is valid and trusts
// nothing. An entry of a known kind that is malformed makes the whole document
// so: what is left of it would be a guess. At most MaxBundle bytes and 256 keys
// are read.
func ParseBundle(td spiffeid.TrustDomain, data []byte) (*spiffebundle.Bundle, error) {
	b, err := parseBundle(td, data)
	if err != nil {
		return nil, fmt.Errorf("reading bundle of %s: %w", td, err)
	}
	return b, nil
}

func parseBundle(td spiffeid.TrustDomain, data []byte) (*spiffebundle.Bundle, error) {
	if len(data) > MaxBundle {
		return nil, fmt.Errorf("larger than %d bytes", MaxBundle)
	}
	var doc bundleDocument
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&doc); err != nil {
		return nil, fmt.Errorf("not a JWK set: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("not a JWK set: something follows it")
	}
	switch {
	case doc.Keys == nil:
		return nil, errors.New("not a JWK set: no keys")
	case len(doc.Keys) > maxBundleKeys:
		return nil, fmt.Errorf("%d keys, at most %d accepted", len(doc.Keys), maxBundleKeys)
	case doc.Hint != nil && (*doc.Hint < 0 || *doc.Hint > int64(10*365*24*time.Hour/time.Second)):
		return nil, fmt.Errorf("spiffe_refresh_hint of %d s", *doc.Hint)
	}
	b := spiffebundle.New(td)
	if doc.Sequence != nil {
		b.SetSequenceNumber(*doc.Sequence)
	}
	if doc.Hint != nil {
		b.SetRefreshHint(time.Duration(*doc.Hint) * time.Second)
	}
	for i, raw := range doc.Keys {
		if err := addKey(b, raw); err != nil {
			return nil, fmt.Errorf("key %d: %w", i, err)
		}
	}
	return b, nil
}

// addKey puts one entry into b, or leaves it out where it is of no concern to us.
func addKey(b *spiffebundle.Bundle, raw json.RawMessage) error {
	var head struct {
		Kty string            `json:"kty"`
		Use string            `json:"use"`
		Crv string            `json:"crv"`
		X5C []json.RawMessage `json:"x5c"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return errors.New("not a JWK")
	}
	known := head.Kty == "RSA" || head.Kty == "EC" && (head.Crv == "P-256" || head.Crv == "P-384" || head.Crv == "P-521")
	if head.Use != useX509 && head.Use != useJWT || !known {
		return nil
	}
	if head.Use == useX509 && len(head.X5C) == 0 {
		return nil
	}
	var key jose.JSONWebKey
	if err := key.UnmarshalJSON(raw); err != nil {
		return err
	}
	if !key.IsPublic() || !key.Valid() {
		return errors.New("not a valid public key")
	}
	if head.Use == useJWT {
		if b.HasJWTAuthority(key.KeyID) {
			return fmt.Errorf("kid %.64q is there twice", key.KeyID)
		}
		return b.AddJWTAuthority(key.KeyID, key.Key)
	}
	if len(key.Certificates) != 1 {
		return fmt.Errorf("x5c holds %d certificates, want one", len(key.Certificates))
	}
	if cert := key.Certificates[0]; !cert.BasicConstraintsValid || !cert.IsCA {
		return errors.New("x5c: not the certificate of an authority") // it would vouch for itself as a leaf
	}
	b.AddX509Authority(key.Certificates[0])
	return nil
}

// MarshalBundle writes b as a SPIFFE bundle. The same content gives the same bytes:
// X.509 authorities in b's order, then JWT keys by their ID.
func MarshalBundle(b *spiffebundle.Bundle) ([]byte, error) {
	doc := struct {
		Keys     []jose.JSONWebKey `json:"keys"`
		Sequence *uint64           `json:"spiffe_sequence,omitempty"`
		Hint     *int64            `json:"spiffe_refresh_hint,omitempty"`
	}{Keys: []jose.JSONWebKey{}}
	for _, cert := range b.X509Authorities() {
		doc.Keys = append(doc.Keys, jose.JSONWebKey{Key: cert.PublicKey, Use: useX509, Certificates: []*x509.Certificate{cert}})
	}
	doc.Keys = append(doc.Keys, JWTKeys(b, useJWT)...)
	if n, ok := b.SequenceNumber(); ok {
		doc.Sequence = &n
	}
	if hint, ok := b.RefreshHint(); ok {
		s := int64((hint + time.Second - 1) / time.Second)
		doc.Hint = &s
	}
	data, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("writing bundle of %s: %w", b.TrustDomain(), err)
	}
	return data, nil
}

// JWTKeys are b's JWT authorities as JWKs of the given use, by key ID.
func JWTKeys(b *spiffebundle.Bundle, use string) []jose.JSONWebKey {
	keys := []jose.JSONWebKey{}
	for kid, key := range b.JWTAuthorities() {
		keys = append(keys, jose.JSONWebKey{Key: key, KeyID: kid, Use: use})
	}
	slices.SortFunc(keys, func(a, b jose.JSONWebKey) int { return cmp.Compare(a.KeyID, b.KeyID) })
	return keys
}
