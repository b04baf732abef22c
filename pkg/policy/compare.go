package policy

import (
	"cmp"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strconv"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Compare says who gains and who loses access to what when after replaces
// before; either may be nil. It asks about every declared port of every
// workload, for every ID that a rule names and for a witness of every region
// that the patterns of the rules cut out of the IDs that could exist; where rules
// look at requests, about a witness of every kind of request that they tell apart;
// and where they have windows of time, about every span between two edges of one.
// Nothing that changes escapes it. What passes through an open door passes. Rules
// that only moved or were renamed are no difference.
func Compare(before, after *Ruleset) Diff {
	edges := windowEdges(before, after)
	if len(edges) == 0 {
		return compareNow(before, after)
	}
	spans := make([]Diff, 0, len(edges)+1)
	for i := -1; i < len(edges); i++ {
		t := edges[max(i, 0)]
		if i < 0 {
			t = t.Add(-1)
		}
		spans = append(spans, compareNow(before.At(t), after.At(t)))
	}
	return joinSpans(edges, spans)
}

// compareNow takes every rule for one that holds.
func compareNow(before, after *Ruleset) Diff {
	c := comparison{before: before, after: after, seed: maphash.MakeSeed(), hashes: map[listKey]uint64{}, probes: map[string]probes{}}
	c.workloads()
	ids := map[string]struct{}{}
	for _, r := range []*Ruleset{before, after} {
		for _, w := range r.Workloads() {
			ids[w.ID.String()] = struct{}{}
		}
		for _, d := range r.TrustDomains() {
			for _, w := range d.Workloads {
				ids[w.ID.String()] = struct{}{}
			}
		}
		for _, x := range r.Externals() {
			ids[x.ID(r.trustDomain()).String()] = struct{}{}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		c.destination(id, c.title(id))
	}
	c.templates()
	c.domains()
	c.externals()
	c.issuers()
	return c.diff
}

type comparison struct {
	before, after *Ruleset
	seed          maphash.Seed
	hashes        map[listKey]uint64 // :: From → its hash
	probes        map[string]probes  // :: conditions → what to ask because of them
	diff          Diff
}

// side is what one Ruleset says about one destination.
type side struct {
	rs       *Ruleset
	workload CompiledWorkload
	exists   bool
	rules    []int32
	index    *index
}

func newSide(rs *Ruleset, id string) side {
	s := side{rs: rs, index: &index{}}
	if i, ok := rs.workloadIndex(id); ok {
		s.workload, s.exists = rs.workloads[i], true
	}
	if i, ok := rs.templateIndex(id); ok {
		s.workload, s.exists = rs.templates[i], true
	}
	if w, ok := rs.foreign(id); ok {
		s.workload, s.exists = w, true
	}
	if parsed, err := spiffeid.FromString(id); err == nil {
		if w, ok := rs.external(parsed); ok {
			s.workload, s.exists = w, true
		}
	}
	if s.exists {
		s.rules = rs.rulesTo(id)
	}
	return s
}

// find gives the verdict on an undeclared port as none: its sidecar refuses it.
func (s side) find(src string, port uint16, h *HTTPRequest) (v verdict) {
	if _, ok := s.workload.Port(port); ok {
		s.index.find(src, port, h, &v)
	}
	return v
}

// passes reports whether something passes today, if perhaps through an open door.
func (v verdict) passes() bool { return v.deny == 0 && (v.allow != 0 || v.door != 0) }

// by is the rule that lets it pass.
func (v verdict) by() int32 { return cmp.Or(v.allow, v.door) - 1 }

// destination compares what is said about one destination, called title.
func (c *comparison) destination(id, title string) {
	b, a := newSide(c.before, id), newSide(c.after, id)
	if b.exists && a.exists && slices.Equal(b.workload.Ports, a.workload.Ports) && slices.Equal(c.fingerprint(b), c.fingerprint(a)) {
		return
	}
	exact := map[string]struct{}{}
	wild := map[string]struct{}{}
	for _, s := range []*side{&b, &a} {
		if !s.exists {
			continue
		}
		s.index = s.rs.newIndex(id) // not kept: a mesh's indexes together are large
		for src := range s.index.exact {
			exact[src] = struct{}{}
		}
		for _, i := range s.rules {
			for _, p := range s.rs.rules[i].From {
				if _, one := p.Exact(); !one && !p.IsZero() {
					wild[p.String()] = struct{}{}
				}
			}
		}
	}
	regions, ok := cutRegions(slices.Sorted(maps.Keys(wild)))
	if !ok {
		c.inexact(title)
	}
	sources := slices.Sorted(maps.Keys(exact))
	for _, port := range unionPorts(b.workload.Ports, a.workload.Ports) {
		c.port(b, a, port, title, sources, regions)
	}
}

// change is how access differs for one source.
type change uint8

const (
	same change = iota
	gained
	lost
	guarded
	unguarded
)

// outcome is what changes for one source: some requests, or "" for a connection.
type outcome struct {
	kind    change
	request string
}

// verdicts are of before and after, on one request that stands for all of an outcome.
type verdicts struct{ before, after verdict }

// ask compares what both sides say about one source.
func (c *comparison) ask(b, a side, src string, port uint16) map[outcome]verdicts {
	conditions := append(b.index.conditions(src, port), a.index.conditions(src, port)...)
	if len(conditions) == 0 {
		v := verdicts{b.find(src, port, nil), a.find(src, port, nil)}
		if kind := c.kind(b, a, port, v); kind != same {
			return map[outcome]verdicts{{kind: kind}: v}
		}
		return nil
	}
	probes, exact := c.probesOf(conditions)
	if !exact {
		c.inexact(c.title(b.id(a)))
	}
	found := map[change][]int{} // :: → indexes of probes.all
	first := map[change]verdicts{}
	for i := range probes.all {
		v := verdicts{b.find(src, port, &probes.all[i].request), a.find(src, port, &probes.all[i].request)}
		kind := c.kind(b, a, port, v)
		if len(found[kind]) == 0 {
			first[kind] = v
		}
		found[kind] = append(found[kind], i)
	}
	out := map[outcome]verdicts{}
	for kind, some := range found {
		if kind == same {
			continue
		}
		for _, text := range probes.describe(some) {
			out[outcome{kind, text}] = first[kind]
		}
	}
	return out
}

func (c *comparison) inexact(title string) {
	if !slices.Contains(c.diff.inexact, title) {
		c.diff.inexact = append(c.diff.inexact, title)
	}
}

// id is the destination's.
func (s side) id(other side) string {
	if s.exists {
		return s.workload.ID.String()
	}
	return other.workload.ID.String()
}

func (c *comparison) kind(b, a side, port uint16, v verdicts) change {
	was, is := v.before.passes(), v.after.passes()
	_, pb := b.workload.Port(port)
	_, pa := a.workload.Port(port)
	switch {
	case !was && is:
		return gained
	case was && !is:
		return lost
	case !pb || !pa: // nothing was guarded where there was no port
		return same
	case v.before.deny == 0 && v.after.deny != 0:
		return guarded
	case v.before.deny != 0 && v.after.deny == 0:
		return unguarded
	}
	return same
}

// port compares one port of one destination: patterns first, so that an ID is
// not listed where a listed pattern covers it.
func (c *comparison) port(b, a side, port Port, dst string, sources []string, regions regions) {
	found := make([]map[outcome]verdicts, len(regions.atoms))
	for i, atom := range regions.atoms {
		found[i] = c.ask(b, a, atom.witness(), port.Number)
	}
	shown := map[outcome][]vector{} // regions already listed
	report := func(o outcome, v verdicts, of vector, src, name string) {
		for _, s := range shown[o] {
			if s.covers(of) {
				return
			}
		}
		shown[o] = append(shown[o], of)
		c.record(o.kind, b, a, v, src, Access{Src: name, Dst: dst, Port: port.Name, Request: o.request})
	}
	for _, p := range regions.patterns {
		first := found[p.atoms[0]]
		for _, o := range sortedOutcomes(first) {
			if !slices.ContainsFunc(p.atoms, func(i int) bool { _, ok := found[i][o]; return !ok }) {
				report(o, first[o], p.vector, regions.atoms[p.atoms[0]].witness(), c.title(p.vector.String()))
			}
		}
	}
	for i, atom := range regions.atoms {
		for _, o := range sortedOutcomes(found[i]) {
			report(o, found[i][o], atom, atom.witness(), c.title(atom.String()))
		}
	}
	for _, src := range sources {
		named := c.ask(b, a, src, port.Number)
		for _, o := range sortedOutcomes(named) {
			report(o, named[o], parseVector(src), src, c.title(src))
		}
	}
}

func sortedOutcomes(m map[outcome]verdicts) []outcome {
	return slices.SortedFunc(maps.Keys(m), func(x, y outcome) int {
		return cmp.Or(cmp.Compare(x.kind, y.kind), cmp.Compare(x.request, y.request))
	})
}

// record enters one difference.
func (c *comparison) record(kind change, b, a side, v verdicts, src string, x Access) {
	d := &c.diff
	switch kind {
	case gained:
		d.adds = true
		x.Rule = a.rs.rules[v.after.by()].Ref
		d.keep(&d.Gained, x)
	case lost:
		x.Rule = b.rs.rules[v.before.by()].Ref
		if v.after.deny != 0 {
			x.DeniedBy = a.rs.rules[v.after.deny-1].Ref
		}
		d.keep(&d.Lost, x)
	case guarded:
		x.Rule = a.rs.rules[v.after.deny-1].Ref
		d.keep(&d.Guarded, x)
	case unguarded:
		_, was := c.before.workloadIndex(src)
		_, is := c.after.workloadIndex(src)
		if !was || is {
			d.adds = true
		}
		x.Rule = b.rs.rules[v.before.deny-1].Ref
		d.keep(&d.Unguarded, x)
	}
}

// fingerprint sums up the rules about one destination, without their places.
// Equal fingerprints mean equal decisions; different ones may too.
func (c *comparison) fingerprint(s side) []uint64 {
	out := make([]uint64, 0, len(s.rules))
	for _, i := range s.rules {
		rule := &s.rs.rules[i]
		if len(rule.From) == 0 && !rule.Anonymous {
			continue
		}
		var h maphash.Hash
		h.SetSeed(c.seed)
		fmt.Fprint(&h, rule.say(), rule.Anonymous, rule.HTTP)
		h.WriteString(strconv.FormatUint(c.hash(rule.From), 16))
		for _, p := range rule.Ports {
			h.WriteString(" " + strconv.Itoa(int(p)))
		}
		out = append(out, h.Sum64())
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (c *comparison) hash(ps []identity.Pattern) uint64 {
	if len(ps) == 0 {
		return 0
	}
	key := keyOf(ps)
	sum, ok := c.hashes[key]
	if !ok {
		var h maphash.Hash
		h.SetSeed(c.seed)
		for _, p := range ps {
			h.WriteString(p.String())
			h.WriteByte(0)
		}
		sum = h.Sum64()
		c.hashes[key] = sum
	}
	return sum
}

// title calls an ID as people do, by the newer set where it is known.
func (c *comparison) title(id string) string {
	if _, ok := c.after.workloadIndex(id); !ok {
		if _, ok := c.before.workloadIndex(id); ok || c.after.trustDomain().IsZero() {
			return c.before.title(id)
		}
	}
	return c.after.title(id)
}
