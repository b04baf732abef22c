// Package proxy is the sidecar's data path: Inbound lets proven peers reach the
// app where policy allows it, Outbound takes the app's connections to other
// workloads. Both work from one immutable view that is replaced whole, and go on
// with the last one while the control plane is away.
//
// It does not obtain identities or views, and it does not parse configuration.
package proxy

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// View is what the proxy knows of the mesh at one moment. It is immutable. The
// zero View refuses everything and knows nobody.
type View struct {
	rules    *policy.Ruleset             // nil before the first; those that hold now
	written  *policy.Ruleset             // all of them, with their windows of time
	since    time.Time                   // when rules were made of written
	edge     time.Time                   // when they have to be made anew; zero: never
	ports    map[uint16]policy.Port      // declared ports of the own workload
	maxStale policy.MaxStale             // of the own workload
	services map[spiffeid.ID]xds.Service // destinations
	foreign  map[string]spiffeid.ID      // :: mesh name → foreign destination; no name that two bear
	revs     map[xds.Kind]xds.Revision   // what has arrived
	trust    uint64                      // grows with each update of the bundles
}

// verdict is a decision and what follows from it.
type verdict struct {
	policy.Decision
	status   int    // what a refused peer is told; 0 when allowed
	why      string // for the record, where no rule was asked
	told     string // for the peer, where no rule was asked
	portName string
	revision string
}

func (v verdict) allowed() bool { return v.status == 0 }

// toldReason is what a refused peer may know: of rules only the reason of a deny.
func (v verdict) toldReason() string {
	if v.Effect == policy.Deny && !v.Rule.IsZero() {
		return v.Reason
	}
	return v.told
}

// decide answers q. Everything is refused before the first rules, and on every
// port that is not declared.
func (v *View) decide(q policy.Request) verdict {
	if v.rules == nil {
		return verdict{status: http.StatusForbidden, why: "no policy received yet"}
	}
	out := verdict{revision: v.revs[xds.Rules].String()}
	port, declared := v.ports[q.Port]
	if !declared {
		out.status, out.why = http.StatusNotFound, "port is not declared"
		return out
	}
	out.portName = port.Name
	switch d := v.rules.Decide(q); d.Effect {
	case policy.Allow:
		out.Decision = d
	case policy.Inspect:
		out.status, out.why = http.StatusForbidden, "a rule looks at requests here, and this sidecar does not"
	default:
		out.Decision, out.status = d, http.StatusForbidden
	}
	return out
}

// MaxStale is what becomes of callers while revocations may be unknown.
func (v *View) MaxStale() policy.MaxStale { return v.maxStale }

// HasRules reports whether rules, and with them the own declared ports, have
// arrived.
func (v *View) HasRules() bool { return v.rules != nil }

// Revisions returns the revision of every kind that has arrived.
func (v *View) Revisions() map[xds.Kind]xds.Revision { return maps.Clone(v.revs) }

// Service returns a destination; false when the view does not hold it.
func (v *View) Service(id spiffeid.ID) (xds.Service, bool) {
	s, ok := v.services[id]
	return s, ok
}

// withdrawn reports whether q goes to a foreign destination or port that this
// view does not offer.
func (v *View) withdrawn(q policy.Request) bool {
	if q.Dst.IsZero() || q.Dst.TrustDomain() == q.Src.TrustDomain() {
		return false
	}
	s, ok := v.services[q.Dst]
	return !ok || !slices.ContainsFunc(s.Ports, func(p policy.Port) bool { return p.Number == q.Port })
}

// notOffered is the verdict on what is withdrawn.
func (v *View) notOffered() verdict {
	return verdict{status: http.StatusForbidden, why: "the destination is not offered any more", revision: v.revs[xds.Endpoints].String()}
}

// named finds a foreign destination by its mesh name, with or without ".mesh".
func (v *View) named(name string) (xds.Service, bool) {
	id, ok := v.foreign[strings.TrimSuffix(name, ".mesh")+".mesh"]
	if !ok {
		return xds.Service{}, false
	}
	return v.Service(id)
}

func foreignNames(services map[spiffeid.ID]xds.Service) map[string]spiffeid.ID {
	out := make(map[string]spiffeid.ID)
	for id, s := range services {
		if s.MeshName == "" {
			continue
		}
		if _, twice := out[s.MeshName]; twice {
			id = spiffeid.ID{} // nobody's
		}
		out[s.MeshName] = id
	}
	return out
}

// Views holds the newest View. The zero Views is ready and holds the zero View; its
// clock is time.Now.
type Views struct {
	// Now is the clock that windows of time go by; nil: time.Now. It is set before
	// the first Apply.
	Now func() time.Time

	current atomic.Pointer[View]

	mu       sync.Mutex // orders Apply
	watchers []func(v *View, changed xds.Kind)
}

// Load returns the newest view.
func (s *Views) Load() *View {
	if v := s.current.Load(); v != nil {
		return v
	}
	return &View{}
}

// Watch has fn called with each new view and the kind that made it new, by the
// caller of Apply, after the view is in force and before Apply returns.
func (s *Views) Watch(fn func(v *View, changed xds.Kind)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchers = append(s.watchers, fn)
}

// Apply puts one kind of resource in force; new bundles belong to the proxies'
// Source before. When it returns, every connection that new rules deny, or whose
// peer new bundles do not verify, has been cut.
func (s *Views) Apply(u xds.Update) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := *s.Load()
	next.revs = maps.Clone(next.revs)
	if next.revs == nil {
		next.revs = make(map[xds.Kind]xds.Revision)
	}
	next.revs[u.Kind] = u.Rev
	switch u.Kind {
	case xds.Rules:
		next.written, next.maxStale = u.Rules, u.MaxStale
		next.hold(s.now())
		next.ports = make(map[uint16]policy.Port, len(u.Ports))
		for _, p := range u.Ports {
			next.ports[p.Number] = p
		}
	case xds.Endpoints:
		next.services, next.foreign = u.Services, foreignNames(u.Services)
	case xds.Bundles:
		next.trust++
	}
	s.put(&next, u.Kind)
}

// put has a view in force. The caller holds mu.
func (s *Views) put(v *View, changed xds.Kind) {
	s.current.Store(v)
	for _, fn := range s.watchers {
		fn(v, changed)
	}
}

func (s *Views) now() time.Time {
	if s.Now != nil {
		return s.Now()
	}
	return time.Now()
}

// hold takes those of the rules that hold at t.
func (v *View) hold(t time.Time) {
	v.rules, v.edge = v.written.At(t), v.written.Next(t)
	v.since = t
}

// windowCheck is how late the edge of a window of time, or a clock that was set, is
// noticed.
const windowCheck = 100 * time.Millisecond

// Run keeps windows of time until ctx ends, whether or not the control plane is
// there: at each edge the rules that hold then are put in force, and connections
// that they deny are cut. It returns nil.
func (s *Views) Run(ctx context.Context) error {
	tick := time.NewTicker(windowCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			s.turn()
		}
	}
}

// turn puts other rules in force if a window has begun or ended, or if the clock
// was set back.
func (s *Views) turn() {
	now := s.now()
	if v := s.Load(); !v.due(now) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	next := *s.Load()
	if next.due(now) {
		next.hold(now)
		s.put(&next, xds.Rules)
	}
}

func (v *View) due(now time.Time) bool {
	passed := !v.edge.IsZero() && !now.Before(v.edge)
	return passed || v.written != nil && now.Before(v.since)
}

// Ready returns nil once every kind of resource has arrived, else an error that
// names what is missing. A revocation list need not be there.
func (s *Views) Ready() error {
	have := s.Load().revs
	var missing []string
	for _, k := range []xds.Kind{xds.Bundles, xds.Endpoints, xds.Rules} {
		if _, ok := have[k]; !ok {
			missing = append(missing, string(k))
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("waiting for the first %s from the control plane", strings.Join(missing, ", "))
	}
	return nil
}

// Describe gives the view in a form for people, to be shown as JSON.
func (v *View) Describe() any {
	type rule struct {
		Rule     string   `json:"rule"`
		Location string   `json:"location"`
		Effect   string   `json:"effect"`
		From     []string `json:"from"`
		To       []string `json:"to"`
		Ports    []uint16 `json:"ports"`
		Reason   string   `json:"reason,omitempty"`
	}
	type endpoint struct {
		Instance string   `json:"instance"`
		Address  string   `json:"address"`
		Ports    []uint16 `json:"ports"`
	}
	type service struct {
		ID        string        `json:"id"`
		Ports     []policy.Port `json:"ports"`
		Endpoints []endpoint    `json:"endpoints"`
	}
	out := struct {
		Revisions map[string]string `json:"revisions"`
		Ports     []policy.Port     `json:"ports"`
		Rules     []rule            `json:"rules"`
		Services  []service         `json:"services"`
	}{Revisions: make(map[string]string)}
	for k, r := range v.revs {
		out.Revisions[string(k)] = r.String()
	}
	for _, n := range slices.Sorted(maps.Keys(v.ports)) {
		out.Ports = append(out.Ports, v.ports[n])
	}
	if v.rules != nil {
		for _, r := range v.rules.Rules() {
			d := rule{Rule: r.Ref.Policy, Location: r.Ref.Location(), Effect: r.Effect.String(), Ports: r.Ports, Reason: r.Reason}
			if r.Ref.Set != "" {
				d.Rule = r.Ref.Set + "/" + r.Ref.Policy
			}
			for _, p := range r.From {
				d.From = append(d.From, p.String())
			}
			for _, p := range r.To {
				d.To = append(d.To, p.String())
			}
			out.Rules = append(out.Rules, d)
		}
	}
	for _, s := range v.services {
		d := service{ID: s.ID.String(), Ports: s.Ports}
		for _, e := range s.Endpoints {
			d.Endpoints = append(d.Endpoints, endpoint{e.Instance, e.Addr.String(), e.Ports})
		}
		out.Services = append(out.Services, d)
	}
	slices.SortFunc(out.Services, func(a, b service) int { return strings.Compare(a.ID, b.ID) })
	return out
}
