package registry

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/store"
)

const (
	// tokenGrace is how long used and expired tokens are remembered past their
	// expiry, so that their bearers are told what is wrong.
	tokenGrace = 24 * time.Hour
	// instanceIdle is how long an instance may be away before it is forgotten.
	instanceIdle = 90 * 24 * time.Hour
	// seenEvery is how exact Instance.Seen is: renewals are frequent, writes not.
	seenEvery = 24 * time.Hour
	// maxClean bounds the records that one Clean removes.
	maxClean     = 1000
	cleanupEvery = 10 * time.Minute
)

// Instance is one sidecar of a workload, from its enrolment on.
type Instance struct {
	Name     string      `json:"name"` // random, no secret
	ID       spiffeid.ID `json:"spiffe_id"`
	Key      []byte      `json:"key"` // enrolment key: PKIX, DER
	Enrolled time.Time   `json:"enrolled"`
	Seen     time.Time   `json:"seen"` // last issue or renewal, a day less exact
}

// EnrollmentKey is the key that may re-enrol this instance.
func (i Instance) EnrollmentKey() (*ecdsa.PublicKey, error) {
	key, err := attest.ParseEnrollmentKey(i.Key)
	if err != nil {
		return nil, fmt.Errorf("instance %s: %w", i.Name, err)
	}
	return key, nil
}

// Instance returns one instance, or [ErrUnknownInstance].
func (r *Registry) Instance(ctx context.Context, name string) (Instance, error) {
	_, inst, err := r.instance(ctx, name)
	return inst, err
}

func (r *Registry) instance(ctx context.Context, name string) (store.KV, Instance, error) {
	kv, err := r.cfg.Store.Get(ctx, instancePrefix+name)
	if errors.Is(err, store.ErrNotFound) {
		return store.KV{}, Instance{}, fmt.Errorf("instance %.64q: %w", name, ErrUnknownInstance)
	}
	if err != nil {
		return store.KV{}, Instance{}, fmt.Errorf("reading instance %.64q: %w", name, err)
	}
	inst, err := decode[Instance](kv)
	return kv, inst, err
}

// Instances lists all instances, in the order of their names.
func (r *Registry) Instances(ctx context.Context) ([]Instance, error) {
	kvs, _, err := r.cfg.Store.List(ctx, instancePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing instances: %w", err)
	}
	list := make([]Instance, len(kvs))
	for i, kv := range kvs {
		if list[i], err = decode[Instance](kv); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// Entitled returns nil if instance is one of workload id and may have an SVID
// now: its record exists and names this very ID, and the ID's workload is still
// defined and admits the evidence that it enrolled with.
func (r *Registry) Entitled(ctx context.Context, id spiffeid.ID, instance string) error {
	kv, inst, err := r.instance(ctx, instance)
	if err != nil {
		return err
	}
	if inst.ID != id {
		return fmt.Errorf("instance %.64q of %s: %w", instance, id, ErrUnknownInstance)
	}
	if _, err := r.admits(id, attest.KindJoinToken); err != nil {
		return err
	}
	return r.seen(ctx, kv, inst)
}

// seen notes that an instance is alive, at most once in seenEvery.
func (r *Registry) seen(ctx context.Context, kv store.KV, inst Instance) error {
	now := r.cfg.Now().UTC()
	if now.Sub(inst.Seen) < seenEvery {
		return nil
	}
	inst.Seen = now
	op, err := put(kv.Key, inst)
	if err != nil {
		return err
	}
	_, err = r.cfg.Store.Txn(ctx, []store.Cmp{{Key: kv.Key, Rev: kv.Rev}}, []store.Op{op})
	if errors.Is(err, store.ErrConflict) { // removed, or noted by another replica
		_, _, err = r.instance(ctx, inst.Name)
	}
	if err != nil {
		return fmt.Errorf("noting that instance %s is alive: %w", inst.Name, err)
	}
	return nil
}

// Remove forgets an instance: its enrolment key is worth nothing from then on,
// and its SVID is not renewed. An SVID that it holds ends by itself.
func (r *Registry) Remove(ctx context.Context, name, actor string) error {
	kv, inst, err := r.instance(ctx, name)
	if err != nil {
		return err
	}
	entry := r.cfg.Audit.Op(audit.Record{Actor: actor, Action: "instance.remove", Subject: inst.ID.String(), Detail: "instance " + name, Result: "removed"})
	if _, err := r.cfg.Store.Txn(ctx, []store.Cmp{{Key: kv.Key, Rev: kv.Rev}}, []store.Op{{Key: kv.Key, Delete: true}, entry}); err != nil {
		return fmt.Errorf("removing instance %s: %w", name, err)
	}
	return nil
}

// Clean forgets tokens that expired a day ago and instances not seen for 90 days,
// at most 1000 records at a call; it returns how many.
func (r *Registry) Clean(ctx context.Context) (int, error) {
	now := r.cfg.Now()
	var cmps []store.Cmp
	for prefix, old := range map[string]func(store.KV) bool{
		tokenPrefix: func(kv store.KV) bool {
			t, err := decode[tokenRecord](kv)
			return err == nil && now.Sub(t.Expires) > tokenGrace
		},
		instancePrefix: func(kv store.KV) bool {
			i, err := decode[Instance](kv)
			return err == nil && now.Sub(i.Seen) > instanceIdle
		},
	} {
		kvs, _, err := r.cfg.Store.List(ctx, prefix)
		if err != nil {
			return 0, fmt.Errorf("listing %s: %w", prefix, err)
		}
		for _, kv := range kvs {
			if len(cmps) < maxClean && old(kv) {
				cmps = append(cmps, store.Cmp{Key: kv.Key, Rev: kv.Rev})
			}
		}
	}
	done := 0
	for chunk := range slices.Chunk(cmps, store.MaxOps) {
		ops := make([]store.Op, len(chunk))
		for i, c := range chunk {
			ops[i] = store.Op{Key: c.Key, Delete: true}
		}
		if _, err := r.cfg.Store.Txn(ctx, chunk, ops); err != nil {
			return done, fmt.Errorf("forgetting old records: %w", err)
		}
		done += len(chunk)
	}
	return done, nil
}
