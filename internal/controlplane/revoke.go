package controlplane

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	// revocationEpoch is constant: the list's number outlives a restore by itself.
	revocationEpoch = 1
	// reviseEvery is how often revocations that no longer stand are forgotten.
	reviseEvery = time.Hour
	// reviseRetry is the pause after a failure.
	reviseRetry = time.Second
	// signEvery is how often it is asked whether the list has to be signed again.
	signEvery = 250 * time.Millisecond
	// freshen is after how long an unchanged list is signed again, at the latest: a
	// sidecar that is cut off learns from its neighbours by that how old its own is.
	freshen = 5 * time.Minute
	// foreseeable stands for an end that only an operator can give.
	foreseeable = 10 * 365 * 24 * time.Hour
)

func listVersion(number int64) string { return fmt.Sprintf("%d.%d", revocationEpoch, number) }

// revoker turns what the registry holds as revoked into the signed list that
// sidecars get, and answers whether a caller of this control plane is on it.
type revoker struct {
	trustDomain spiffeid.TrustDomain
	registry    *registry.Registry
	source      identity.Source // signs the list
	backdate    time.Duration   // by how much our certificates' NotBefore precedes their issue
	publish     func(envelope []byte)
	now         func() time.Time
	log         hclog.Logger
	changed     chan struct{} // one slot: the workloads are new

	book *revocation.Book

	mu      sync.Mutex
	read    bool                 // guarded by mu; all has been read
	all     registry.Revocations // guarded by mu
	problem error                // guarded by mu; why the list is not out as it should be
	removed map[string]bool      // guarded by mu :: SPIFFE ID that is revoked for having no Workload, and for nothing else
	signer  time.Time            // guarded by mu; when the SVID that signed ends
	signed  time.Time            // guarded by mu
	list    []byte               // guarded by mu; the newest, as it was signed …
	number  int64                // guarded by mu; … and its number
	sent    int64                // guarded by mu; number of the newest one that sidecars are sent
	out     chan struct{}        // guarded by mu; closed when a newer list is sent
}

// workloadsChanged asks for a look at IDs without Workload.
func (r *revoker) workloadsChanged() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// revise revokes the IDs of Workloads that are gone, and forgets what is over,
// until ctx ends.
func (r *revoker) revise(ctx context.Context) error {
	pause := time.NewTimer(reviseEvery)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.changed:
		case <-pause.C:
		}
		next := reviseEvery
		if err := r.registry.ReviseRemoved(ctx); err != nil && ctx.Err() == nil {
			r.log.Warn("revising the revocations; trying again", "error", err)
			next = reviseRetry
		}
		pause.Reset(next)
	}
}

// run puts each change on the list, until ctx ends.
func (r *revoker) run(ctx context.Context) error {
	for {
		err := r.registry.WatchRevocations(ctx, func(all registry.Revocations) error {
			r.mu.Lock()
			r.all, r.read = all, true
			r.mu.Unlock()
			r.release()
			return nil
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		r.log.Warn("watching the revocations; trying again", "error", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(reviseRetry):
		}
	}
}

// resign signs the list anew every few minutes and before half of what its signer
// had left is over, so that a sidecar that gets it from a neighbour can verify it.
func (r *revoker) resign(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		if r.due() {
			r.release()
		}
		timer.Reset(signEvery)
	}
}

// due reports whether there is something to sign that nobody has signed, or not
// recently enough.
func (r *revoker) due() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case !r.read:
		return false
	case r.problem != nil:
		return true
	}
	return !r.now().Before(r.signed.Add(min(r.signer.Sub(r.signed)/2, freshen)))
}

// refuseTainted puts tainted issuers on the list, until ctx ends. Each is refused
// after grace, so that all can have renewed.
func (r *revoker) refuseTainted(ctx context.Context, c *ca.CA, grace time.Duration) error {
	return c.WatchTainted(ctx, func(all []ca.Tainted) error {
		for _, t := range all {
			hash, err := hex.DecodeString(t.KeyHash)
			if err != nil || t.Kind == "jwt" { // JWT keys leave the bundle by themselves
				continue
			}
			for {
				_, err := r.registry.RevokeIssuer(ctx, hash, t.At.Add(grace), t.Until, registry.Order{Actor: "control plane", Reason: t.Kind + " " + t.Subject + " is tainted"})
				if err == nil {
					break
				}
				r.log.Error("refusing what a tainted key signed; trying again", "subject", t.Subject, "error", err)
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(reviseRetry):
				}
			}
		}
		return nil
	})
}

// release signs what is revoked and hands it out. What goes wrong is logged: the
// list before stays out, and resign tries again.
func (r *revoker) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.releaseLocked()
	if err == nil {
		r.problem = nil
		return
	}
	news := r.problem == nil || r.problem.Error() != err.Error()
	r.problem = err
	if news && !errors.Is(err, identity.ErrNoIdentity) { // of which its own health says more
		r.log.Error("signing the revocation list; the one before stays out", "error", err)
	}
	if r.signed.IsZero() { // policy does not wait for it
		r.publish(nil)
	}
}

// trouble says why revocations do not go out; "" when they do.
func (r *revoker) trouble() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.problem == nil || errors.Is(r.problem, identity.ErrNoIdentity) {
		return ""
	}
	return "the revocation list cannot be signed, so what is revoked now is refused here only: " + r.problem.Error()
}

func (r *revoker) releaseLocked() error {
	svid, err := r.source.GetX509SVID()
	if err != nil {
		return err
	}
	list, removed, err := r.compile(r.all)
	if err != nil {
		return err
	}
	envelope, err := revocation.Sign(list, svid)
	if err != nil {
		return err
	}
	if _, err := r.book.Offer(envelope); err != nil {
		return err
	}
	r.removed = removed
	r.signed, r.signer = r.now(), svid.Certificates[0].NotAfter
	r.list, r.number = envelope, r.all.Number
	r.publish(envelope)
	return nil
}

// goesOut notes what sidecars are sent from now on.
func (r *revoker) goesOut(envelope []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sent == r.number || !bytes.Equal(envelope, r.list) {
		return // nothing new, or a newer one is on its way
	}
	r.sent = r.number
	if r.out != nil {
		close(r.out)
	}
	r.out = make(chan struct{})
}

// compile gives all in the form that travels.
func (r *revoker) compile(all registry.Revocations) (*sallyportv1.RevocationList, map[string]bool, error) {
	out := &sallyportv1.RevocationList{
		TrustDomain: r.trustDomain.Name(), Epoch: revocationEpoch, Number: all.Number, Issued: timestamppb.New(r.now()),
	}
	removed := map[string]bool{}
	for _, v := range all.All {
		until := timestamppb.New(v.Until)
		if v.Blocked || v.Removed { // no end in sight
			until = timestamppb.New(v.At.Add(foreseeable))
		}
		notBefore := timestamppb.New(v.Bound().Add(-r.backdate))
		switch v.Kind {
		case registry.RevokedID:
			id, err := spiffeid.FromString(v.Subject)
			if err != nil {
				return nil, nil, fmt.Errorf("revocation of %q: %w", v.Subject, err)
			}
			if v.Removed && !v.Blocked {
				removed[v.Subject] = true
			}
			out.Ids = append(out.Ids, &sallyportv1.RevokedID{
				Path: id.Path(), NotBefore: notBefore, IssuedAt: timestamppb.New(v.Bound()), Until: until,
			})
		case registry.RevokedInstance:
			out.Instances = append(out.Instances, &sallyportv1.RevokedInstance{Instance: v.Subject, NotBefore: notBefore, Until: until})
		default:
			raw, err := hex.DecodeString(v.Subject)
			if err != nil {
				return nil, nil, fmt.Errorf("revocation of %s %q: %w", v.Kind, v.Subject, err)
			}
			if v.Kind == registry.RevokedSerial {
				out.Serials = append(out.Serials, &sallyportv1.RevokedSerial{Serial: raw, Until: until})
			} else {
				out.Issuers = append(out.Issuers, &sallyportv1.RevokedIssuer{KeyHash: raw, Until: until, From: timestamppb.New(v.From)})
			}
		}
	}
	return out, removed, nil
}

// published returns nil once the list with this number, or a newer one, is out.
func (r *revoker) published(ctx context.Context, number int64) error {
	for {
		r.mu.Lock()
		if r.out == nil {
			r.out = make(chan struct{})
		}
		have, next := r.sent, r.out
		r.mu.Unlock()
		if have >= number {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-next:
		}
	}
}

// refuse says why a caller may not use an RPC: its SVID is on the list. One whose
// Workload is gone may still ask for its view, which is empty.
func (r *revoker) refuse(p identity.Peer, orphan bool) error {
	err := r.book.Check(p)
	if err == nil || !errors.Is(err, revocation.ErrRevoked) {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if orphan && r.removed[p.ID.String()] {
		return nil
	}
	return err
}

// atGRPC are the IDs that gRPC servers without sidecar refuse, which know no
// revocation list: those that are blocked or have no Workload, and, once an
// operator has readmitted one, for as long as an SVID of before can live there.
func (r *revoker) atGRPC() map[spiffeid.ID]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[spiffeid.ID]bool{}
	for _, v := range r.all.All {
		if v.Kind != registry.RevokedID || !v.Blocked && !v.Removed && r.now().After(v.Bound().Add(issuer.AppTTL)) {
			continue
		}
		if id, err := spiffeid.FromString(v.Subject); err == nil {
			out[id] = true
		}
	}
	return out
}
