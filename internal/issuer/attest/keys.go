package attest

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	// keysFresh is how long keys are used without asking for newer ones. A key
	// that the issuer has withdrawn is refused after it.
	keysFresh = 5 * time.Minute
	// keysLast is how long keys are used while newer ones cannot be had.
	keysLast = 24 * time.Hour
	// keysPause lies between two attempts to fetch them, whatever tokens arrive.
	keysPause = 10 * time.Second

	maxKeys = 100 // in one document
)

// keys is the cache of an issuer's public keys. Whoever needs a key that it
// lacks, or finds it old, fetches the issuer's document: one at a time and not
// before keysPause has passed, so that tokens with invented key IDs cost the
// issuer next to nothing. It is safe for concurrent use.
type keys struct {
	fetch func(ctx context.Context) ([]byte, error) // a JWK set (RFC 7517)
	now   func() time.Time

	cached atomic.Pointer[keySet] // nil: none was ever had

	turn chan struct{} // holds one: who takes it may fetch, and owns the following
	last time.Time     // when the last attempt began
	err  error         // what became of it
}

// keySet is one document. It is immutable.
type keySet struct {
	byID    map[string][]jose.JSONWebKey // :: kid → keys; more than one is rare
	fetched time.Time
}

func newKeys(now func() time.Time, fetch func(context.Context) ([]byte, error)) *keys {
	k := &keys{fetch: fetch, now: now, turn: make(chan struct{}, 1)}
	k.turn <- struct{}{}
	return k
}

// usable gives the cached keys of an ID; fresh says that nobody need ask for
// newer ones.
func (k *keys) usable(kid string) (found []jose.JSONWebKey, fresh bool) {
	s := k.cached.Load()
	if s == nil {
		return nil, false
	}
	age := k.now().Sub(s.fetched)
	if age > keysLast {
		return nil, false
	}
	found = s.byID[kid]
	return found, len(found) > 0 && age <= keysFresh
}

// find gives the issuer's keys of an ID: at least one, else [ErrBadEvidence]
// where the issuer has none, or [ErrUnreachable] where that is not known.
func (k *keys) find(ctx context.Context, kid string) ([]jose.JSONWebKey, error) {
	found, fresh := k.usable(kid)
	if fresh {
		return found, nil
	}
	if len(found) > 0 { // old, but good enough while somebody else asks
		select {
		case <-k.turn:
		default:
			return found, nil
		}
	} else {
		select {
		case <-k.turn:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: waiting for its keys: %w", ErrUnreachable, ctx.Err())
		}
	}
	defer func() { k.turn <- struct{}{} }()
	if found, fresh = k.usable(kid); fresh {
		return found, nil // it came while we waited
	}
	asked := k.refresh(ctx)
	if found, _ = k.usable(kid); len(found) > 0 {
		return found, nil
	}
	switch {
	case k.err != nil:
		return nil, fmt.Errorf("%w: fetching its keys: %w", ErrUnreachable, k.err)
	case !asked:
		return nil, fmt.Errorf("%w: its keys were fetched less than %v ago and had none with the token's kid %.64q; if it is new, try again", ErrUnreachable, keysPause, kid)
	}
	return nil, bad(fmt.Errorf("the issuer has no key with the token's kid %.64q", kid))
}

// refresh fetches the document, unless that was tried a moment ago. Only who has
// the turn may call it. A caller who leaves does not stop it: otherwise strangers
// could keep the keys from being renewed.
func (k *keys) refresh(ctx context.Context) (asked bool) {
	now := k.now()
	if since := now.Sub(k.last); !k.last.IsZero() && since >= 0 && since < keysPause {
		return false
	}
	k.last = now
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	document, err := k.fetch(ctx)
	if err != nil {
		k.err = err
		return true
	}
	byID, err := parseKeys(document)
	if err == nil {
		k.cached.Store(&keySet{byID, now})
	}
	k.err = err
	return true
}

// parseKeys reads a JWK set. Keys that no token accepted here could be signed
// with are left out: of other types, for encryption, private, too weak, without
// an ID. A set in which none is left is an error.
func parseKeys(document []byte) (map[string][]jose.JSONWebKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(document, &set); err != nil {
		return nil, errors.New("parsing the key set: not a JSON Web Key Set")
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("parsing the key set: %d keys, at most %d accepted", len(set.Keys), maxKeys)
	}
	byID := map[string][]jose.JSONWebKey{}
	for _, raw := range set.Keys {
		var key jose.JSONWebKey
		if json.Unmarshal(raw, &key) != nil || !suits(&key) {
			continue
		}
		byID[key.KeyID] = append(byID[key.KeyID], key)
	}
	if len(byID) == 0 {
		return nil, errors.New("parsing the key set: no RSA or EC signature key with a kid")
	}
	return byID, nil
}

func suits(k *jose.JSONWebKey) bool {
	if k.KeyID == "" || len(k.KeyID) > maxKeyID || k.Use != "" && k.Use != "sig" || !k.Valid() {
		return false
	}
	switch key := k.Key.(type) {
	case *rsa.PublicKey:
		return key.N.BitLen() >= minRSABits && key.N.BitLen() <= maxRSABits
	case *ecdsa.PublicKey:
		return true
	}
	return false
}
