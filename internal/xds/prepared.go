package xds

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// prepared is a snapshot with its shared resources marshalled, each once for all
// nodes. What did not change is taken over from the one before.
type prepared struct {
	snap     *Snapshot
	rev      string
	services map[string]*serviceForm // :: SPIFFE ID → its wire form
	bundles  map[spiffeid.TrustDomain]*bundleForm
	secrets  map[string]*Resource // :: name → wire form of a bundle, or of a part
	slices   *sliceCache

	instances   []spiffeid.ID // of templates, those that have endpoints, ascending
	revocations *Resource     // nil: there is no list
}

type serviceForm struct {
	of              Service // what was marshalled
	cluster, assign *Resource
}

type bundleForm struct {
	of        *spiffebundle.Bundle // what was marshalled
	resources []*Resource
}

func prepare(snap *Snapshot, old *prepared, log hclog.Logger) *prepared {
	p := &prepared{
		snap:     snap,
		rev:      snap.Rev.String(),
		services: make(map[string]*serviceForm, len(snap.Services)),
		bundles:  make(map[spiffeid.TrustDomain]*bundleForm, len(snap.Bundles)),
		secrets:  make(map[string]*Resource, 2*len(snap.Bundles)),
		slices:   &sliceCache{rules: snap.Rules},
	}
	if old == nil {
		old = &prepared{slices: &sliceCache{}}
	}
	if old.slices.rules == snap.Rules {
		p.slices = old.slices
	}
	for id, s := range snap.Services {
		name := id.String()
		form, err := formOfService(id, s, old.services[name])
		if err != nil {
			log.Error("service kept in its last good form", "id", id, "error", err)
		}
		if form != nil {
			p.services[name] = form
		}
	}
	for td, bundle := range snap.Bundles {
		form, err := formOfBundle(td, bundle, old.bundles[td])
		if err != nil {
			log.Error("trust bundle kept in its last good form", "trust_domain", td, "error", err)
		}
		if form == nil {
			continue
		}
		p.bundles[td] = form
		for _, r := range form.resources {
			p.secrets[r.Name] = r
		}
	}
	p.instances = snap.instances()
	var err error
	if p.revocations, err = formOfRevocations(snap.Revocations, old.revocations); err != nil {
		log.Error("revocation list kept in its last good form", "error", err)
	}
	return p
}

// formOfService returns last where nothing changed, and beside an error.
func formOfService(id spiffeid.ID, s Service, last *serviceForm) (*serviceForm, error) {
	s.ID = id
	if last != nil && last.of.MeshName == s.MeshName && slices.Equal(last.of.Ports, s.Ports) && slices.EqualFunc(last.of.Endpoints, s.Endpoints, sameEndpoint) {
		return last, nil
	}
	cluster, err := clusterResource(s)
	if err != nil {
		return last, err
	}
	assign, err := endpointResource(s)
	if err != nil {
		return last, err
	}
	return &serviceForm{of: s, cluster: cluster, assign: assign}, nil
}

func sameEndpoint(a, b Endpoint) bool {
	return a.Instance == b.Instance && a.Addr == b.Addr && a.Direct == b.Direct && slices.Equal(a.Ports, b.Ports)
}

func formOfBundle(td spiffeid.TrustDomain, bundle *spiffebundle.Bundle, last *bundleForm) (*bundleForm, error) {
	if last != nil && last.of.Equal(bundle) {
		return last, nil
	}
	rs, err := bundleResources(td, bundle)
	if err != nil {
		return last, err
	}
	return &bundleForm{of: bundle, resources: rs}, nil
}

// sliceCache holds what one set of rules means to each node, made when the first
// stream of that node asks. Streams of one workload share it.
type sliceCache struct {
	rules *policy.Ruleset
	nodes sync.Map // :: sliceKey → *nodeSlice
}

// sliceKey is whose slice it is, and what the sidecar understands.
type sliceKey struct {
	id    spiffeid.ID
	level policy.Level

	proxyless bool
}

// nodeSlice is one node's part of the rules, in wire form.
type nodeSlice struct {
	known bool          // the snapshot has a workload of that ID
	ports []policy.Port // what it was made for, as is known
	once  sync.Once

	err       error                // set by fill, as are the fields below
	domain    spiffeid.TrustDomain // the node's
	resources map[string][]*Resource
	reach     reach                   // what the node may reach
	foreign   map[string]*serviceForm // :: SPIFFE ID → what is offered of a foreign destination
	proxyless *proxyless              // nil: a sidecar's slice
	narrowed  string                  // rules that mean less there than they say
}

// slice returns what a node may know of the rules. Its error means that the node's
// rules have no wire form; the node then keeps what it has.
func (p *prepared) slice(key sliceKey) *nodeSlice {
	service, known := p.snap.service(key.id)
	same := func(n *nodeSlice) bool { return n.known == known && slices.Equal(n.ports, service.Ports) }
	for {
		v, ok := p.slices.nodes.Load(key)
		n, _ := v.(*nodeSlice)
		if !ok || !same(n) {
			fresh := &nodeSlice{known: known, ports: service.Ports}
			if !ok {
				v, _ = p.slices.nodes.LoadOrStore(key, fresh)
			} else if !p.slices.nodes.CompareAndSwap(key, n, fresh) {
				continue // another stream of the same workload was first
			} else {
				v = fresh
			}
			n = v.(*nodeSlice)
		}
		if same(n) {
			n.once.Do(func() { n.fill(key, p.slices.rules, p.snap.Services) })
			return n
		}
	}
}

// fill leaves the slice of an ID that is no workload without rules, whatever
// patterns match it: the node lets nothing in and reaches nothing. Of services it
// reads the foreign ones, which change with the rules only.
func (n *nodeSlice) fill(key sliceKey, rules *policy.Ruleset, services map[spiffeid.ID]Service) {
	id := key.id
	n.domain = id.TrustDomain()
	if key.proxyless {
		n.proxyless, n.err = newProxyless(n, id, rules)
		return
	}
	var mine *policy.Ruleset
	own := door{ports: n.ports}
	if rules != nil && n.known {
		var changed []policy.RuleRef
		mine, changed = rules.For(id).ForLevel(key.level)
		n.narrowed = list(changed)
		w, _ := rules.Workload(id)
		own.maxStale = w.MaxStale
		for _, r := range rules.Reach(id) {
			n.reach.add(r)
			if r.TrustDomain() != n.domain {
				n.err = errors.Join(n.err, n.offer(id, rules, services[r]))
			}
		}
		n.reach.of(id, rules)
	}
	if n.err != nil {
		return
	}
	if n.resources, n.err = ownResources(id, own, mine, key.level); n.err != nil {
		return
	}
	for _, list := range n.resources {
		for _, r := range list {
			if size := proto.Size(r); size > maxResource {
				n.err = fmt.Errorf("%s of %s would take %d bytes; a sidecar accepts %d", r.Name, id, size, maxResource)
			}
		}
	}
}

// offer makes the form of a foreign destination with the ports that the rules
// allow id to call. In the own trust domain a node may know every port, and the
// other end refuses; a foreign one does not have our rules.
func (n *nodeSlice) offer(id spiffeid.ID, rules *policy.Ruleset, s Service) error {
	refused := func(port uint16) bool {
		return rules.Decide(policy.Request{Src: id, Dst: s.ID, Port: port}).Effect != policy.Allow
	}
	s.Ports = slices.DeleteFunc(slices.Clone(s.Ports), func(p policy.Port) bool { return refused(p.Number) })
	s.Endpoints = slices.Clone(s.Endpoints)
	for i, e := range s.Endpoints {
		s.Endpoints[i].Ports = slices.DeleteFunc(slices.Clone(e.Ports), refused)
	}
	form, err := formOfService(s.ID, s, nil)
	if err != nil {
		return err
	}
	if n.foreign == nil {
		n.foreign = make(map[string]*serviceForm)
	}
	n.foreign[s.ID.String()] = form
	return nil
}

// service returns what v's node may be told of a destination; nil if there is none.
func (v nodeView) service(name string) *serviceForm {
	s := v.p.services[name]
	if s == nil || s.of.ID.TrustDomain() == v.slice.domain {
		return s
	}
	return v.slice.foreign[name]
}
