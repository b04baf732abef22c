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
	// onceGrace is how long redeemed tokens are remembered past their expiry, for
	// clocks that differ.
	onceGrace = 10 * time.Minute
	// instanceIdle is how long an instance may be away before it is forgotten.
	// Platforms give new evidence at any time, and start new instances all the
	// time: those are forgotten sooner, and an agent's processes soonest.
	instanceIdle = 90 * 24 * time.Hour
	platformIdle = 7 * 24 * time.Hour
	vouchedIdle  = 24 * time.Hour
	// maxClean bounds the records that one Clean removes.
	maxClean     = 1000
	cleanupEvery = 10 * time.Minute
)

// Instance is one sidecar of a workload, from its enrolment on, or the processes
// of one workload on one agent's host.
type Instance struct {
	Name string      `json:"name"` // no secret
	ID   spiffeid.ID `json:"spiffe_id"`
	// Key is the enrolment key: PKIX, DER. Nil where an agent vouches.
	Key      []byte    `json:"key,omitempty"`
	Enrolled time.Time `json:"enrolled"`
	Seen     time.Time `json:"seen"` // when something was last issued to it

	// The evidence that it enrolled with.
	Kind      string           `json:"kind,omitempty"` // empty, in records of old: join-token
	Issuer    string           `json:"issuer,omitempty"`
	Selectors attest.Selectors `json:"selectors,omitempty"`
	Subject   string           `json:"subject,omitempty"`
	// Via is the agent that vouches, and Agent the agent's instance. Zero: none.
	Via   spiffeid.ID `json:"via,omitzero"`
	Agent string      `json:"agent,omitempty"`

	Origin   string    `json:"origin,omitempty"`   // address of the last enrolment or renewal
	NotAfter time.Time `json:"not_after,omitzero"` // end of the longest certificate issued to it
	Serial   string    `json:"serial,omitempty"`   // of that certificate, lower-case hex

	rev int64 // of the record; zero: not stored yet
}

func (i Instance) evidence() attest.Verified {
	return attest.Verified{Kind: i.Kind, Issuer: i.Issuer, Selectors: i.Selectors, Subject: i.Subject}
}

func (i *Instance) setEvidence(v attest.Verified) {
	i.Kind, i.Issuer, i.Selectors, i.Subject = v.Kind, v.Issuer, v.Selectors, v.Subject
}

// Vouched reports whether an agent vouches for the instance.
func (i Instance) Vouched() bool { return i.Agent != "" }

// Evidence words the evidence that it enrolled with, for people.
func (i Instance) Evidence() string { return Describe(i.evidence()) }

// EnrollmentKey is the key that may re-enrol this instance.
func (i Instance) EnrollmentKey() (*ecdsa.PublicKey, error) {
	if i.Vouched() {
		return nil, fmt.Errorf("instance %s: %w", i.Name, ErrVouched)
	}
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
	inst, err := decodeInstance(kv)
	return kv, inst, err
}

func decodeInstance(kv store.KV) (Instance, error) {
	inst, err := decode[Instance](kv)
	if inst.Kind == "" {
		inst.Kind = attest.KindJoinToken
	}
	inst.rev = kv.Rev
	return inst, err
}

// Instances lists all instances, in the order of their names.
func (r *Registry) Instances(ctx context.Context) ([]Instance, error) {
	kvs, _, err := r.cfg.Store.List(ctx, instancePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing instances: %w", err)
	}
	list := make([]Instance, len(kvs))
	for i, kv := range kvs {
		if list[i], err = decodeInstance(kv); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// Entitled returns nil if instance is one of workload id and may have an SVID
// now: its record exists and names this very ID, and the ID's workload is still
// defined and admits the evidence that the instance enrolled with. Where an agent
// vouches, that agent must be entitled too.
func (r *Registry) Entitled(ctx context.Context, id spiffeid.ID, instance string) error {
	_, err := r.Entitlement(ctx, id, instance)
	return err
}

// Entitlement is [Registry.Entitled] with the instance.
func (r *Registry) Entitlement(ctx context.Context, id spiffeid.ID, instance string) (Instance, error) {
	inst, err := r.entitled(ctx, id, instance)
	if err != nil || !inst.Vouched() {
		return inst, err
	}
	agent, err := r.entitled(ctx, inst.Via, inst.Agent)
	if err == nil && agent.Vouched() {
		err = ErrVouched
	}
	if err != nil {
		return Instance{}, fmt.Errorf("agent of instance %s: %w", inst.Name, err)
	}
	return inst, nil
}

func (r *Registry) entitled(ctx context.Context, id spiffeid.ID, instance string) (Instance, error) {
	_, inst, err := r.instance(ctx, instance)
	if err != nil {
		return Instance{}, err
	}
	if inst.ID != id {
		return Instance{}, fmt.Errorf("instance %.64q of %s: %w", instance, id, ErrUnknownInstance)
	}
	if _, err := r.admits(inst); err != nil {
		return Instance{}, err
	}
	return inst, r.refuseRevoked(ctx, inst)
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

// idle is how long the instance may be away.
func (i Instance) idle() time.Duration {
	switch {
	case i.Vouched():
		return vouchedIdle
	case i.Kind == attest.KindJoinToken:
		return instanceIdle
	}
	return platformIdle
}

// Clean forgets join tokens that expired a day ago, redeemed ones of platforms
// that expired, and instances that were away for 90 days, for 7 where a platform
// vouched, or for a day where an agent did and their certificates are over too; at
// most 1000 records at a call. It returns how many.
func (r *Registry) Clean(ctx context.Context) (int, error) {
	now := r.cfg.Now()
	var cmps []store.Cmp
	for prefix, old := range map[string]func(store.KV) bool{
		tokenPrefix: func(kv store.KV) bool {
			t, err := decode[tokenRecord](kv)
			return err == nil && now.Sub(t.Expires) > tokenGrace
		},
		oncePrefix: func(kv store.KV) bool {
			o, err := decode[onceRecord](kv)
			return err == nil && now.Sub(o.Expires) > onceGrace
		},
		instancePrefix: func(kv store.KV) bool {
			i, err := decodeInstance(kv)
			return err == nil && now.Sub(i.Seen) > i.idle() && now.After(i.NotAfter)
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
