package controlplane

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/catalog"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// inputs is what the reconciler builds a snapshot from.
type inputs struct {
	catalog   catalog.State
	endpoints table
	bundle    *spiffebundle.Bundle // of the own trust domain
	foreign   identity.Bundles     // of others; nil: not known yet
	revoked   []byte               // the signed revocation list
	have      struct{ catalog, endpoints, bundle, revoked bool }
}

// reconciler turns catalogue, endpoints and trust bundle into the snapshot that
// every sidecar's view is cut from. Watches hand in what is new; run, one
// goroutine, is the sole owner of what goes out.
type reconciler struct {
	trustDomain spiffeid.TrustDomain
	publish     func(*xds.Snapshot)
	workloads   func([]policy.CompiledWorkload) // told before the snapshot is published
	revoked     func() map[spiffeid.ID]bool     // whom gRPC servers refuse; nil: nobody
	log         hclog.Logger

	mu    sync.Mutex
	in    inputs        // guarded by mu
	dirty chan struct{} // one slot: something in `in` is new

	state atomic.Pointer[catalog.State] // in force; what Admin answers from
}

func newReconciler(td spiffeid.TrustDomain, publish func(*xds.Snapshot), workloads func([]policy.CompiledWorkload), log hclog.Logger) *reconciler {
	return &reconciler{trustDomain: td, publish: publish, workloads: workloads, log: log, dirty: make(chan struct{}, 1)}
}

func (r *reconciler) update(change func(*inputs)) {
	r.mu.Lock()
	change(&r.in)
	r.mu.Unlock()
	select {
	case r.dirty <- struct{}{}:
	default:
	}
}

func (r *reconciler) setCatalog(s catalog.State) {
	r.update(func(in *inputs) { in.catalog, in.have.catalog = s, true })
}

func (r *reconciler) setEndpoints(t table) {
	r.update(func(in *inputs) { in.endpoints, in.have.endpoints = t, true })
}

func (r *reconciler) setBundle(b *spiffebundle.Bundle) {
	r.update(func(in *inputs) { in.bundle, in.have.bundle = b, true })
}

func (r *reconciler) setForeign(b identity.Bundles) {
	r.update(func(in *inputs) { in.foreign = b })
}

func (r *reconciler) setRevocations(envelope []byte) {
	r.update(func(in *inputs) { in.revoked, in.have.revoked = envelope, true })
}

// current is the state in force; nil before the first snapshot.
func (r *reconciler) current() *catalog.State { return r.state.Load() }

// currentEndpoints are the published endpoints that the reconciler knows.
func (r *reconciler) currentEndpoints() table {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.in.endpoints
}

// run publishes a snapshot after each change, without delay: what changes while
// one is being built goes into the next.
func (r *reconciler) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.dirty:
		}
		r.mu.Lock()
		in := r.in
		r.mu.Unlock()
		if !in.have.catalog || !in.have.endpoints || !in.have.bundle || !in.have.revoked || in.foreign == nil {
			continue
		}
		if old := r.state.Load(); old == nil || old.Rules != in.catalog.Rules {
			r.workloads(slices.Concat(in.catalog.Rules.Workloads(), in.catalog.Rules.Templates()))
		}
		r.state.Store(&in.catalog)
		r.publish(r.snapshot(in))
	}
}

func (r *reconciler) snapshot(in inputs) *xds.Snapshot {
	workloads := in.catalog.Rules.Workloads()
	services := make(map[spiffeid.ID]xds.Service, len(workloads))
	for _, w := range workloads {
		services[w.ID] = xds.Service{ID: w.ID, Ports: w.Ports, Endpoints: append(serving(in.endpoints[w.ID], w.Ports), listed(w)...)}
	}
	for id, eps := range in.endpoints { // of templates, whose IDs only those who have them tell
		if w, ok := in.catalog.Rules.Workload(id); ok && w.Template {
			services[id] = xds.Service{ID: id, Ports: w.Ports, Endpoints: serving(eps, w.Ports)}
		}
	}
	s := &xds.Snapshot{
		Rev:         xds.Revision(in.catalog.Rev),
		Rules:       in.catalog.Rules,
		Services:    services,
		Revocations: in.revoked,
		Bundles:     identity.Bundles{r.trustDomain: in.bundle},
	}
	if r.revoked != nil {
		s.Revoked = r.revoked()
	}
	addForeign(s, in.foreign)
	return s
}

// serving keeps of each endpoint the ports that are still declared.
func serving(eps []xds.Endpoint, declared []policy.Port) []xds.Endpoint {
	out := make([]xds.Endpoint, 0, len(eps))
	for _, ep := range eps {
		ep.Ports = slices.DeleteFunc(slices.Clone(ep.Ports), func(n uint16) bool {
			return !slices.ContainsFunc(declared, func(p policy.Port) bool { return p.Number == n })
		})
		if len(ep.Ports) > 0 {
			out = append(out, ep)
		}
	}
	return out
}

// listed are the instances that w's document lists, which have no sidecar.
func listed(w policy.CompiledWorkload) []xds.Endpoint {
	out := make([]xds.Endpoint, len(w.Endpoints))
	for i, addr := range w.Endpoints {
		out[i] = xds.Endpoint{Instance: addr.String(), Addr: addr, Ports: []uint16{addr.Port()}, Direct: true}
	}
	return out
}
