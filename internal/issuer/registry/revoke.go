package registry

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/store"
)

const (
	revokedPrefix = prefix + "revoked/"
	keyRevocation = prefix + "revocation" // the list's number; every change rewrites it

	// revokeMargin is how far the clocks of two replicas may be apart: what is
	// issued so shortly after a revocation is refused with what came before, and
	// nothing is issued meanwhile.
	revokeMargin = 5 * time.Second
	// longestLife is for how long, at least, a revocation is remembered: the life
	// of SVIDs may have been longer when they were issued.
	longestLife = 25 * time.Hour
	// maxRevocations bounds the list. It travels to every sidecar.
	maxRevocations = 50_000
	revokeTries    = 8
)

var (
	// ErrRevoked says that the identity or instance is revoked.
	ErrRevoked = errors.New("revoked")
	// ErrReadmitting says that a revocation is so young that a new SVID could not
	// be told from the refused ones.
	ErrReadmitting = errors.New("revoked a moment ago; try again in some seconds")
	// ErrNothingToRevoke says that nothing bears the name, or, on the way back,
	// that it is not revoked.
	ErrNothingToRevoke = errors.New("nothing to do")
	// ErrTooManyRevocations says that the list is full.
	ErrTooManyRevocations = fmt.Errorf("more than %d revocations in force", maxRevocations)
)

// RevocationKind says what a revocation names.
type RevocationKind string

// Kinds of revocation.
const (
	RevokedID       RevocationKind = "id"
	RevokedInstance RevocationKind = "instance"
	RevokedSerial   RevocationKind = "serial"
	RevokedIssuer   RevocationKind = "issuer"
)

// Revocation refuses what was issued to its subject until At, and with Blocked
// that anything is issued to it again.
type Revocation struct {
	Kind    RevocationKind `json:"kind"`
	Subject string         `json:"subject"` // SPIFFE ID, instance, serial or SHA-256 of a key, the last two in lower-case hex
	At      time.Time      `json:"at"`
	From    time.Time      `json:"from,omitzero"`  // issuers: refused from then on, so that all can renew before
	Until   time.Time      `json:"until,omitzero"` // when nothing issued until At can be valid; zero while Blocked or Removed
	Actor   string         `json:"actor"`
	Reason  string         `json:"reason,omitempty"`
	Blocked bool           `json:"blocked,omitempty"` // by an operator, until unrevoked
	Removed bool           `json:"removed,omitempty"` // no Workload has the ID
}

// Bound is the moment before which the subject's SVIDs were issued: no SVID is
// issued between At and Bound.
func (v Revocation) Bound() time.Time {
	return v.At.Truncate(time.Second).Add(time.Second + revokeMargin)
}

// standing reports whether v must be kept at now.
func (v Revocation) standing(now time.Time) bool {
	return v.Blocked || v.Removed || now.Before(v.Until)
}

func (v Revocation) key() string { return revocationKey(v.Kind, v.Subject) }

// revocationKey is of fixed length: an ID may be longer than a key of the store.
func revocationKey(kind RevocationKind, subject string) string {
	sum := sha256.Sum256([]byte(subject))
	return revokedPrefix + string(kind) + "/" + hex.EncodeToString(sum[:])
}

// Revocations is everything revoked at one moment. It is immutable.
type Revocations struct {
	Number int64 // grows with every change, also over a restore from a backup
	All    []Revocation
}

// revocationNumber is the record under keyRevocation.
type revocationNumber struct {
	Number int64 `json:"number"`
}

// Revocations reads what is revoked, ordered by kind and subject.
func (r *Registry) Revocations(ctx context.Context) (Revocations, error) {
	all, _, err := r.readRevocations(ctx)
	return all, err
}

func (r *Registry) readRevocations(ctx context.Context) (Revocations, store.Cmp, error) {
	guard := store.Cmp{Key: keyRevocation}
	var out Revocations
	kv, err := r.cfg.Store.Get(ctx, keyRevocation)
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return out, guard, fmt.Errorf("reading revocations: %w", err)
	default:
		n, err := decode[revocationNumber](kv)
		if err != nil {
			return out, guard, err
		}
		out.Number, guard.Rev = n.Number, kv.Rev
	}
	kvs, _, err := r.cfg.Store.List(ctx, revokedPrefix)
	if err != nil {
		return out, guard, fmt.Errorf("reading revocations: %w", err)
	}
	for _, kv := range kvs {
		v, err := decode[Revocation](kv)
		if err != nil {
			return out, guard, err
		}
		out.All = append(out.All, v)
	}
	slices.SortFunc(out.All, func(a, b Revocation) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Subject, b.Subject))
	})
	return out, guard, nil
}

// WatchRevocations calls fn with what is revoked at once and after every change,
// until ctx ends or fn fails; it returns that error.
func (r *Registry) WatchRevocations(ctx context.Context, fn func(Revocations) error) error {
	for {
		_, rev, err := r.cfg.Store.List(ctx, keyRevocation)
		if err != nil {
			return fmt.Errorf("watching revocations: %w", err)
		}
		tell := func(int64, []store.Event) error {
			all, err := r.Revocations(ctx)
			if err != nil {
				return err
			}
			return fn(all)
		}
		if err := tell(0, nil); err != nil {
			return err
		}
		if err := r.cfg.Store.Watch(ctx, keyRevocation, rev, tell); !errors.Is(err, store.ErrCompacted) {
			return err
		}
	}
}

// refuseRevoked returns ErrRevoked or ErrReadmitting unless something may be issued
// to inst now: its ID, its name where it has one yet, and its agent are asked for.
func (r *Registry) refuseRevoked(ctx context.Context, inst Instance) error {
	for _, s := range inst.subjects() {
		if s.Name == "" {
			continue
		}
		kv, err := r.cfg.Store.Get(ctx, revocationKey(s.Kind, s.Name))
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return fmt.Errorf("asking whether %s is revoked: %w", s.Name, err)
		}
		v, err := decode[Revocation](kv)
		if err != nil {
			return err
		}
		switch {
		case v.Blocked:
			return fmt.Errorf("%s %s: %w since %s; an operator can readmit it: sallyport identity unrevoke", s.Kind, s.Name, ErrRevoked, v.At.UTC().Format(time.RFC3339))
		case r.cfg.Now().Before(v.Bound()):
			return fmt.Errorf("%s %s: %w", s.Kind, s.Name, ErrReadmitting)
		}
	}
	return nil
}

// revise changes revocations in one transaction: change gets those in force and
// returns the ones to write; such as stand no longer are deleted. Of parallel
// changes each sees the result of the one before.
func (r *Registry) revise(ctx context.Context, entry audit.Record, change func(Revocations) ([]Revocation, error)) (Revocations, error) {
	for range revokeTries {
		before, guard, err := r.readRevocations(ctx)
		if err != nil {
			return Revocations{}, err
		}
		changed, err := change(before)
		if err != nil || len(changed) == 0 {
			return before, err
		}
		if len(before.All)+len(changed) > maxRevocations {
			return before, ErrTooManyRevocations
		}
		// One chunk at a time, each a state of its own: what is revoked first is
		// refused first.
		head := changed[:min(len(changed), store.MaxOps-2)]
		ops, err := r.revisionOps(before, head, entry)
		if err != nil {
			return before, err
		}
		_, err = r.cfg.Store.Txn(ctx, []store.Cmp{guard}, ops)
		if errors.Is(err, store.ErrConflict) {
			continue
		}
		if err != nil {
			return before, fmt.Errorf("writing revocations: %w", err)
		}
		if len(head) < len(changed) {
			return r.revise(ctx, entry, change)
		}
		return r.Revocations(ctx)
	}
	return Revocations{}, fmt.Errorf("writing revocations: %w", store.ErrConflict)
}

func (r *Registry) revisionOps(before Revocations, changed []Revocation, entry audit.Record) ([]store.Op, error) {
	now := r.cfg.Now()
	number, err := put(keyRevocation, revocationNumber{max(before.Number+1, now.UnixMilli())})
	if err != nil {
		return nil, err
	}
	ops := []store.Op{number, r.cfg.Audit.Op(entry)}
	for _, v := range changed {
		if !v.standing(now) {
			ops = append(ops, store.Op{Key: v.key(), Delete: true})
			continue
		}
		value, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("encoding the revocation of %s: %w", v.Subject, err)
		}
		ops = append(ops, store.Op{Key: v.key(), Value: value})
	}
	return ops, nil
}

// Blocks reports whether nothing is issued to an instance: because of itself, its
// ID, or its agent.
func (all Revocations) Blocks(i Instance) bool {
	for _, s := range i.subjects() {
		if v, ok := all.find(s.Kind, s.Name); ok && v.Blocked {
			return true
		}
	}
	return false
}

// subjects are what a revocation of the instance may name.
func (i Instance) subjects() []Subject {
	return []Subject{
		{RevokedID, i.ID.String()}, {RevokedInstance, i.Name}, {RevokedID, i.Via.String()}, {RevokedInstance, i.Agent},
	}
}

// find returns the revocation of a subject, false if there is none.
func (all Revocations) find(kind RevocationKind, subject string) (Revocation, bool) {
	for _, v := range all.All {
		if v.Kind == kind && v.Subject == subject {
			return v, true
		}
	}
	return Revocation{}, false
}
