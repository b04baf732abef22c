package registry

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/audit"
)

// Subject is what a revocation names: see [Revocation.Subject].
type Subject struct {
	Kind RevocationKind
	Name string
}

// Order is who revokes or readmits what, and why.
type Order struct {
	Subjects      []Subject
	Actor, Origin string
	Reason        string
}

func (o Order) record(action, result string) audit.Record {
	names := make([]string, len(o.Subjects))
	for i, s := range o.Subjects {
		names[i] = string(s.Kind) + " " + s.Name
	}
	return audit.Record{
		Actor: o.Actor, Origin: o.Origin, Action: action, Subject: strings.Join(names, ", "), Detail: o.Reason, Result: result,
	}
}

// Revoke refuses everything issued to the subjects so far. IDs and instances get
// nothing more until [Registry.Unrevoke]; of a serial only that certificate is
// refused. Revoking again renews the moment: what was issued in between is
// refused too.
func (r *Registry) Revoke(ctx context.Context, o Order) (Revocations, error) {
	now := r.cfg.Now().UTC()
	return r.revise(ctx, o.record("identity.revoke", "revoked"), func(all Revocations) ([]Revocation, error) {
		var out []Revocation
		for _, s := range o.Subjects {
			v, known := all.find(s.Kind, s.Name)
			if known && !v.At.Before(now) && (v.Blocked || s.Kind == RevokedSerial) {
				continue // written by an earlier chunk of this order
			}
			v.Kind, v.Subject, v.At, v.Actor, v.Reason = s.Kind, s.Name, now, o.Actor, o.Reason
			v.Until = now.Add(r.life())
			v.Blocked = s.Kind == RevokedID || s.Kind == RevokedInstance
			out = append(out, v)
		}
		return out, nil
	})
}

// Unrevoke admits the subjects again: they may get new SVIDs, and what was issued
// before stays refused. A serial cannot be readmitted.
func (r *Registry) Unrevoke(ctx context.Context, o Order) (Revocations, error) {
	now := r.cfg.Now()
	return r.revise(ctx, o.record("identity.unrevoke", "readmitted"), func(all Revocations) ([]Revocation, error) {
		var out []Revocation
		for _, s := range o.Subjects {
			if v, ok := all.find(s.Kind, s.Name); ok && v.Blocked {
				// Until now nothing was issued; what was before may live on.
				v.Blocked, v.Until = false, now.UTC().Add(r.life())
				out = append(out, v)
			}
		}
		return out, nil
	})
}

// RevokeIssuer refuses from a moment on whatever the key with this SHA-256 has
// signed, until when its certificate ends. Doing it again changes nothing but an
// earlier moment.
func (r *Registry) RevokeIssuer(ctx context.Context, keyHash []byte, from, until time.Time, o Order) (Revocations, error) {
	name := hex.EncodeToString(keyHash)
	o.Subjects = []Subject{{RevokedIssuer, name}}
	now := r.cfg.Now().UTC()
	return r.revise(ctx, o.record("ca.taint", "refused from "+from.UTC().Format(time.RFC3339)), func(all Revocations) ([]Revocation, error) {
		v, known := all.find(RevokedIssuer, name)
		if known && !from.Before(v.From) {
			return nil, nil
		}
		v = Revocation{Kind: RevokedIssuer, Subject: name, At: now, From: from.UTC(), Until: until.UTC(), Actor: o.Actor, Reason: o.Reason}
		return []Revocation{v}, nil
	})
}

// ReviseRemoved revokes the IDs of instances that no Workload has any more, lifts
// the mark from IDs that one has again (what was issued before stays refused),
// and forgets what no longer stands.
func (r *Registry) ReviseRemoved(ctx context.Context) error {
	if r.workloads.Load() == nil {
		return ErrNotReady
	}
	instances, err := r.Instances(ctx)
	if err != nil {
		return err
	}
	now := r.cfg.Now().UTC()
	entry := audit.Record{Actor: "control plane", Action: "identity.revoke", Subject: "IDs without Workload", Result: "revised"}
	_, err = r.revise(ctx, entry, func(all Revocations) ([]Revocation, error) {
		var out []Revocation
		gone := map[string]bool{}
		for _, i := range instances {
			if !r.defined(i.ID) {
				gone[i.ID.String()] = true
			}
		}
		for _, v := range all.All {
			lifted := v
			switch {
			case v.Kind == RevokedID && v.Removed && !gone[v.Subject] && r.definedName(v.Subject):
				lifted.Removed, lifted.Until = false, now.Add(r.life())
				out = append(out, lifted)
			case v.Kind == RevokedID && v.Removed:
				delete(gone, v.Subject)
			case !v.standing(now):
				out = append(out, v)
			}
		}
		for id := range gone {
			v, known := all.find(RevokedID, id)
			if !known || !v.Blocked {
				v = Revocation{Kind: RevokedID, Subject: id, At: now, Actor: "control plane", Reason: "no Workload has this ID"}
			}
			v.Removed = true
			out = append(out, v)
		}
		return out, nil
	})
	if err != nil {
		return fmt.Errorf("revoking IDs without Workload: %w", err)
	}
	return nil
}

func (r *Registry) definedName(id string) bool {
	parsed, err := spiffeid.FromString(id)
	return err == nil && r.defined(parsed)
}

// defined reports whether a Workload has this ID.
func (r *Registry) defined(id spiffeid.ID) bool {
	all := r.workloads.Load()
	if all == nil {
		return false
	}
	_, ok := all.workload(id)
	return ok
}

// life is how long a revocation is remembered once its subject is readmitted.
func (r *Registry) life() time.Duration { return max(r.cfg.SVIDTTL, longestLife) + time.Hour }
