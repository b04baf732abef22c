package registry

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// maxTries bounds how often a change is tried that others get in the way of.
const maxTries = 5

// Admission is evidence of a platform as a sidecar shows it.
type Admission struct {
	Evidence attest.Verified
	// Key is the enrolment key to register. The caller has checked that the
	// sidecar holds its private half.
	Key    *ecdsa.PublicKey
	Origin string // where the call came from
}

// onceRecord remembers evidence that may be redeemed once.
type onceRecord struct {
	Instance string    `json:"instance"` // who redeemed it
	Expires  time.Time `json:"expires"`
}

// Admit registers a new instance of the one workload that the evidence proves.
// Of any number of parallel admissions of evidence that may be redeemed once,
// exactly one wins; only the winner's key may repeat it, and gets the same
// instance. So does whoever repeats evidence of another kind with the same key.
// Evidence that proves no workload is not spent.
func (r *Registry) Admit(ctx context.Context, adm Admission) (Instance, error) {
	for range maxTries {
		inst, err := r.admitOnce(ctx, adm)
		if !errors.Is(err, store.ErrConflict) {
			return inst, err
		}
	}
	return Instance{}, fmt.Errorf("admitting %s: %w", Describe(adm.Evidence), store.ErrConflict)
}

func (r *Registry) admitOnce(ctx context.Context, adm Admission) (Instance, error) {
	v, now := adm.Evidence, r.cfg.Now().UTC()
	switch {
	case v.Kind == attest.KindJoinToken, v.Kind == policy.Unix:
		return Instance{}, fmt.Errorf("evidence of kind %s is not admitted by itself", v.Kind)
	case v.Once != "" && now.Sub(v.Expires) > onceGrace: // and may be forgotten
		return Instance{}, fmt.Errorf("%w: it expired at %s", attest.ErrBadEvidence, v.Expires.UTC().Format(time.RFC3339))
	}
	if v.Once != "" {
		kv, err := r.cfg.Store.Get(ctx, oncePrefix+v.Once)
		if err == nil {
			return r.admitAgain(ctx, kv, adm)
		}
		if !errors.Is(err, store.ErrNotFound) {
			return Instance{}, fmt.Errorf("looking up %s: %w", Describe(v), err)
		}
	}
	_, id, err := r.Match(v, spiffeid.ID{})
	if err == nil {
		err = r.refuseRevoked(ctx, Instance{ID: id}) // it is not spent
	}
	if err != nil {
		return Instance{}, err
	}
	inst, err := newInstance(id, adm.Key, now)
	if err != nil {
		return Instance{}, err
	}
	inst.setEvidence(v)
	inst.Origin = adm.Origin
	if v.Once == "" {
		// The same again, as after a lost answer, is the same instance.
		inst.Name = instanceName(v.Kind, v.Issuer, id.String(), string(inst.Key))
		if old, err := r.repeat(ctx, inst.Name, adm.Key, ErrUnknownInstance); !errors.Is(err, ErrUnknownInstance) {
			old.setEvidence(v)
			return old, err
		}
	}
	inst.rev, err = r.register(ctx, inst, v)
	return inst, err
}

func (r *Registry) register(ctx context.Context, inst Instance, v attest.Verified) (int64, error) {
	op, err := put(instancePrefix+inst.Name, inst)
	if err != nil {
		return 0, err
	}
	cmps, ops := []store.Cmp{{Key: op.Key}}, []store.Op{op}
	if v.Once != "" {
		spend, err := put(oncePrefix+v.Once, onceRecord{Instance: inst.Name, Expires: v.Expires.UTC()})
		if err != nil {
			return 0, err
		}
		cmps, ops = append(cmps, store.Cmp{Key: spend.Key}), append(ops, spend)
	}
	rev, err := r.cfg.Store.Txn(ctx, cmps, ops)
	if err != nil {
		return 0, fmt.Errorf("registering an instance of %s: %w", inst.ID, err)
	}
	return rev, nil
}

func (r *Registry) admitAgain(ctx context.Context, kv store.KV, adm Admission) (Instance, error) {
	rec, err := decode[onceRecord](kv)
	if err != nil {
		return Instance{}, err
	}
	return r.repeat(ctx, rec.Instance, adm.Key, ErrEvidenceUsed)
}

// Vouch returns the instance that an agent's word makes of a process: the one of
// this agent and of the workload that the evidence proves with the agent under
// via. It is stored when something is issued to it; see [Registry.Record].
func (r *Registry) Vouch(ctx context.Context, agent Instance, v attest.Verified) (Instance, error) {
	if v.Kind != policy.Unix {
		return Instance{}, fmt.Errorf("evidence of kind %s is not for an agent to give", v.Kind)
	}
	if agent.Vouched() {
		return Instance{}, fmt.Errorf("instance %s vouches for others: %w", agent.Name, ErrVouched)
	}
	_, id, err := r.Match(v, agent.ID)
	if err != nil {
		return Instance{}, err
	}
	name := instanceName("agent", agent.Name, id.String())
	inst, err := r.Instance(ctx, name)
	switch {
	case errors.Is(err, ErrUnknownInstance):
		inst = Instance{Name: name, ID: id, Enrolled: r.cfg.Now().UTC(), Via: agent.ID, Agent: agent.Name}
	case err != nil:
		return Instance{}, err
	}
	inst.setEvidence(v)
	return inst, nil
}

// instanceName gives 80 bits that depend on all parts.
func instanceName(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil)[:instanceNameSize])
}

// Issuance is a certificate or token that is about to leave.
type Issuance struct {
	Action string // one of package audit
	Actor  string // who asked for it
	Origin string // from where
	Detail string // by which evidence
	Result string // serial or expiry
	// Serial and NotAfter are a certificate's. Zero: a JWT-SVID.
	Serial   string
	NotAfter time.Time
}

// Record notes what is issued to an instance, in its record and in the audit
// log, in one transaction: what it returns an error for must not be sent. An
// instance that was removed in the meantime is [ErrUnknownInstance]; one that is
// revoked, or whose ID or agent is, [ErrRevoked].
func (r *Registry) Record(ctx context.Context, inst Instance, is Issuance) error {
	if err := r.refuseRevoked(ctx, inst); err != nil { // whatever it was issued for
		return err
	}
	for range maxTries {
		err := r.recordOnce(ctx, inst, is)
		if !errors.Is(err, store.ErrConflict) {
			return err
		}
		latest, err := r.Instance(ctx, inst.Name)
		if err != nil {
			return err
		}
		if latest.ID != inst.ID {
			return fmt.Errorf("instance %s of %s: %w", inst.Name, inst.ID, ErrUnknownInstance)
		}
		latest.setEvidence(inst.evidence())
		inst = latest
	}
	return fmt.Errorf("recording what is issued to instance %s: %w", inst.Name, store.ErrConflict)
}

func (r *Registry) recordOnce(ctx context.Context, inst Instance, is Issuance) error {
	now := r.cfg.Now().UTC()
	inst.Seen, inst.Origin = now, is.Origin
	if is.Serial != "" && !is.NotAfter.Before(inst.NotAfter) {
		inst.NotAfter, inst.Serial = is.NotAfter.UTC(), is.Serial
	}
	op, err := put(instancePrefix+inst.Name, inst)
	if err != nil {
		return err
	}
	cmps := []store.Cmp{{Key: op.Key, Rev: inst.rev}}
	if inst.Vouched() { // hundreds of processes may ask at once, and the newest is as good as any
		cmps = nil
	}
	entry := r.cfg.Audit.Op(audit.Record{
		Time: now, Actor: is.Actor, Origin: is.Origin, Action: is.Action, Subject: inst.ID.String(), Detail: is.Detail, Result: is.Result,
	})
	if _, err := r.cfg.Store.Txn(ctx, cmps, []store.Op{op, entry}); err != nil {
		return fmt.Errorf("recording what is issued to instance %s: %w", inst.Name, err)
	}
	if err := r.cfg.Audit.Trim(ctx); err != nil {
		r.log.Warn("trimming the audit log", "error", err) // what was issued is recorded
	}
	return nil
}
