package registry

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/store"
)

const (
	// DefaultTokenTTL and MaxTokenTTL bound how long a join token waits.
	DefaultTokenTTL = 10 * time.Minute
	MaxTokenTTL     = 7 * 24 * time.Hour

	instanceNameSize = 10 // bytes
)

// tokenRecord is a join token at rest. The secret is not in it.
type tokenRecord struct {
	ID         spiffeid.ID `json:"spiffe_id"`
	SecretHash []byte      `json:"secret_hash"` // SHA-256
	Created    time.Time   `json:"created"`
	Expires    time.Time   `json:"expires"`
	Actor      string      `json:"actor"`
	Instance   string      `json:"instance,omitempty"` // who redeemed it; empty: nobody
}

// Created is a new join token.
type Created struct {
	Token   string // the wire form, a secret: shown once and not stored
	ID      spiffeid.ID
	Expires time.Time
}

// TokenRequest asks for a join token.
type TokenRequest struct {
	Workload string        // metadata.name
	TTL      time.Duration // zero: DefaultTokenTTL; otherwise 1 s to MaxTokenTTL
	Actor    string        // who asks and from where, for the audit log
	Origin   string
}

// CreateToken makes a join token. Of its errors, [IsRequestError] tells those
// that a better request avoids.
func (r *Registry) CreateToken(ctx context.Context, req TokenRequest) (Created, error) {
	ttl := req.TTL
	if ttl == 0 {
		ttl = DefaultTokenTTL
	}
	if ttl < time.Second || ttl > MaxTokenTTL {
		return Created{}, fmt.Errorf("join token for %.64q: %w: %v is not between 1s and %v", req.Workload, ErrBadTTL, ttl, MaxTokenTTL)
	}
	id, err := r.tokenSubject(req.Workload)
	if err == nil {
		err = r.refuseRevoked(ctx, Instance{ID: id})
	}
	if err != nil {
		return Created{}, err
	}
	token, err := attest.NewToken(r.cfg.RootHash())
	if err != nil {
		return Created{}, err
	}
	now := r.cfg.Now().UTC()
	hash := attest.SecretHash(token.Secret[:])
	rec := tokenRecord{ID: id, SecretHash: hash[:], Created: now, Expires: now.Add(ttl), Actor: req.Actor}
	op, err := put(tokenPrefix+token.ID, rec)
	if err != nil {
		return Created{}, err
	}
	entry := r.cfg.Audit.Op(audit.Record{
		Time: now, Actor: req.Actor, Origin: req.Origin, Action: "token.create", Subject: id.String(),
		Detail: fmt.Sprintf("join token %s, expires %s", token.ID, rec.Expires.Format(time.RFC3339)), Result: "created",
	})
	if _, err := r.cfg.Store.Txn(ctx, []store.Cmp{{Key: op.Key}}, []store.Op{op, entry}); err != nil {
		return Created{}, fmt.Errorf("storing a join token for %s: %w", id, err)
	}
	return Created{Token: token.Encode(), ID: id, Expires: rec.Expires}, nil
}

func (r *Registry) tokenSubject(workload string) (spiffeid.ID, error) {
	all := r.workloads.Load()
	if all == nil {
		return spiffeid.ID{}, ErrNotReady
	}
	w, ok := all.byName[workload]
	if !ok {
		return spiffeid.ID{}, fmt.Errorf("workload %.64q: %w", workload, ErrUnknownWorkload)
	}
	_, err := r.admits(Instance{ID: w.ID, Kind: attest.KindJoinToken})
	return w.ID, err
}

// Redemption is a join token as a sidecar presents it.
type Redemption struct {
	TokenID string
	Secret  []byte
	// Key is the enrolment key to register. The caller has checked that the
	// sidecar holds its private half.
	Key    *ecdsa.PublicKey
	Origin string // where the call came from, for the audit log
}

// Redeem spends a join token and registers a new instance of its workload with
// the enrolment key. Of any number of parallel redemptions exactly one wins; only
// the winner's key may repeat it, and gets the same instance. Whether a token is
// used or expired is told only to whoever knows its secret. A token that is
// refused because its workload is gone is not spent.
func (r *Registry) Redeem(ctx context.Context, red Redemption) (Instance, error) {
	// A conflict means that another redemption was faster: the second look finds
	// the token used. A third would mean that somebody rewrites records.
	for range 3 {
		inst, err := r.redeemOnce(ctx, red)
		if !errors.Is(err, store.ErrConflict) {
			return inst, err
		}
	}
	return Instance{}, fmt.Errorf("redeeming join token %.64q: %w", red.TokenID, store.ErrConflict)
}

func (r *Registry) redeemOnce(ctx context.Context, red Redemption) (Instance, error) {
	kv, tok, err := r.token(ctx, red)
	if err != nil {
		return Instance{}, err
	}
	if tok.Instance != "" {
		return r.repeat(ctx, tok.Instance, red.Key, ErrTokenUsed)
	}
	now := r.cfg.Now().UTC()
	if !now.Before(tok.Expires) {
		return Instance{}, fmt.Errorf("%w (it was valid until %s)", ErrTokenExpired, tok.Expires.Format(time.RFC3339))
	}
	if err := r.refuseRevoked(ctx, Instance{ID: tok.ID}); err != nil { // it is not spent
		return Instance{}, err
	}
	inst, err := newInstance(tok.ID, red.Key, now)
	if err != nil {
		return Instance{}, err
	}
	inst.Kind, inst.Origin = attest.KindJoinToken, red.Origin
	inst.Subject = fmt.Sprintf("%s, made by %s", red.TokenID, tok.Actor)
	w, err := r.admits(inst)
	if err != nil {
		return Instance{}, err
	}
	tok.Instance = inst.Name
	spend, err := put(kv.Key, tok)
	if err != nil {
		return Instance{}, err
	}
	register, err := put(instancePrefix+inst.Name, inst)
	if err != nil {
		return Instance{}, err
	}
	entry := r.cfg.Audit.Op(audit.Record{
		Time: now, Actor: inst.ID.String(), Origin: red.Origin, Action: "token.redeem", Subject: w.Name,
		Detail: fmt.Sprintf("join token %s, made by %s", red.TokenID, tok.Actor), Result: "instance " + inst.Name,
	})
	cmps := []store.Cmp{{Key: kv.Key, Rev: kv.Rev}, {Key: register.Key}}
	if inst.rev, err = r.cfg.Store.Txn(ctx, cmps, []store.Op{spend, register, entry}); err != nil {
		return Instance{}, fmt.Errorf("redeeming join token %.64q: %w", red.TokenID, err)
	}
	return inst, nil
}

// CheckToken returns nil if there is a join token with this secret, spent or not.
func (r *Registry) CheckToken(ctx context.Context, id string, secret []byte) error {
	_, _, err := r.token(ctx, Redemption{TokenID: id, Secret: secret})
	return err
}

// token reads a token's record and checks the secret before it says anything
// else about it.
func (r *Registry) token(ctx context.Context, red Redemption) (store.KV, tokenRecord, error) {
	kv, err := r.cfg.Store.Get(ctx, tokenPrefix+red.TokenID)
	if errors.Is(err, store.ErrNotFound) {
		return store.KV{}, tokenRecord{}, ErrUnknownToken
	}
	if err != nil {
		return store.KV{}, tokenRecord{}, fmt.Errorf("reading join token %.64q: %w", red.TokenID, err)
	}
	tok, err := decode[tokenRecord](kv)
	if err != nil {
		return store.KV{}, tokenRecord{}, err
	}
	if !attest.SecretMatches(red.Secret, tok.SecretHash) {
		return store.KV{}, tokenRecord{}, ErrUnknownToken
	}
	return kv, tok, nil
}

// repeat answers a redemption whose first answer got lost: the key that it
// registered may ask again. To everyone else it was used.
func (r *Registry) repeat(ctx context.Context, instance string, key *ecdsa.PublicKey, used error) (Instance, error) {
	inst, err := r.Instance(ctx, instance)
	if errors.Is(err, ErrUnknownInstance) {
		return Instance{}, used
	}
	if err != nil {
		return Instance{}, err
	}
	registered, err := inst.EnrollmentKey()
	if err != nil {
		return Instance{}, err
	}
	if !registered.Equal(key) {
		return Instance{}, used
	}
	return r.Entitlement(ctx, inst.ID, inst.Name)
}

// newInstance draws a name of 80 random bits. It is no secret.
func newInstance(id spiffeid.ID, key *ecdsa.PublicKey, now time.Time) (Instance, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return Instance{}, fmt.Errorf("encoding the enrolment key: %w", err)
	}
	name := make([]byte, instanceNameSize)
	if _, err := rand.Read(name); err != nil {
		return Instance{}, fmt.Errorf("naming an instance: %w", err)
	}
	return Instance{Name: hex.EncodeToString(name), ID: id, Key: der, Enrolled: now, Seen: now}, nil
}
