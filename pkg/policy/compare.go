package policy

import (
	"hash/maphash"
	"maps"
	"slices"
	"strconv"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Compare says who gains and who loses access to what when after replaces
// before; either may be nil. It asks about every declared port of every
// workload, for every ID that a rule names and for a witness of every region
// that the patterns of the rules cut out of the IDs that could exist: nothing
// that changes escapes it. Rules that only moved or were renamed are no
// difference.
func Compare(before, after *Ruleset) Diff {
	c := comparison{before: before, after: after, seed: maphash.MakeSeed(), hashes: map[listKey]uint64{}}
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
	}
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		c.destination(id, c.title(id))
	}
	c.templates()
	c.domains()
	return c.diff
}

type comparison struct {
	before, after *Ruleset
	seed          maphash.Seed
	hashes        map[listKey]uint64 // :: From → its hash
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
	if s.exists {
		s.rules = rs.rulesTo(id)
	}
	return s
}

// find gives the verdict on an undeclared port as none: its sidecar refuses it.
func (s side) find(src string, port uint16) verdict {
	if _, ok := s.workload.Port(port); !ok {
		return verdict{}
	}
	return s.index.find(src, port, nil)
}

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
		c.diff.inexact = append(c.diff.inexact, title)
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

// ask compares the two verdicts about one source.
func ask(b, a side, src string, port uint16) (change, verdict, verdict) {
	vb, va := b.find(src, port), a.find(src, port)
	was, is := vb.deny == 0 && vb.allow != 0, va.deny == 0 && va.allow != 0
	_, pb := b.workload.Port(port)
	_, pa := a.workload.Port(port)
	switch {
	case !was && is:
		return gained, vb, va
	case was && !is:
		return lost, vb, va
	case !pb || !pa: // nothing was guarded where there was no port
		return same, vb, va
	case vb.deny == 0 && va.deny != 0:
		return guarded, vb, va
	case vb.deny != 0 && va.deny == 0:
		return unguarded, vb, va
	}
	return same, vb, va
}

// port compares one port of one destination: patterns first, so that an ID is
// not listed where a listed pattern covers it.
func (c *comparison) port(b, a side, port Port, dst string, sources []string, regions regions) {
	kinds := make([]change, len(regions.atoms))
	for i, atom := range regions.atoms {
		kinds[i], _, _ = ask(b, a, atom.witness(), port.Number)
	}
	shown := map[change][]vector{} // regions already listed
	report := func(kind change, v vector, src string, name string) {
		for _, s := range shown[kind] {
			if s.covers(v) {
				return
			}
		}
		shown[kind] = append(shown[kind], v)
		_, vb, va := ask(b, a, src, port.Number)
		c.record(kind, b, a, vb, va, src, Access{Src: name, Dst: dst, Port: port.Name})
	}
	for _, p := range regions.patterns {
		if kind := kinds[p.atoms[0]]; kind != same && !slices.ContainsFunc(p.atoms, func(i int) bool { return kinds[i] != kind }) {
			report(kind, p.vector, regions.atoms[p.atoms[0]].witness(), c.title(p.vector.String()))
		}
	}
	for i, atom := range regions.atoms {
		if kinds[i] != same {
			report(kinds[i], atom, atom.witness(), c.title(atom.String()))
		}
	}
	for _, src := range sources {
		if kind, _, _ := ask(b, a, src, port.Number); kind != same {
			report(kind, parseVector(src), src, c.title(src))
		}
	}
}

// record enters one difference.
func (c *comparison) record(kind change, b, a side, vb, va verdict, src string, x Access) {
	d := &c.diff
	switch kind {
	case gained:
		d.adds = true
		x.Rule = a.rs.rules[va.allow-1].Ref
		d.keep(&d.Gained, x)
	case lost:
		x.Rule = b.rs.rules[vb.allow-1].Ref
		if va.deny != 0 {
			x.DeniedBy = a.rs.rules[va.deny-1].Ref
		}
		d.keep(&d.Lost, x)
	case guarded:
		x.Rule = a.rs.rules[va.deny-1].Ref
		d.keep(&d.Guarded, x)
	case unguarded:
		_, was := c.before.workloadIndex(src)
		_, is := c.after.workloadIndex(src)
		if !was || is {
			d.adds = true
		}
		x.Rule = b.rs.rules[vb.deny-1].Ref
		d.keep(&d.Unguarded, x)
	}
}

// fingerprint sums up the rules about one destination, without their places.
// Equal fingerprints mean equal decisions; different ones may too.
func (c *comparison) fingerprint(s side) []uint64 {
	out := make([]uint64, 0, len(s.rules))
	for _, i := range s.rules {
		rule := &s.rs.rules[i]
		if len(rule.From) == 0 {
			continue
		}
		var h maphash.Hash
		h.SetSeed(c.seed)
		h.WriteByte(byte(rule.Effect))
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
