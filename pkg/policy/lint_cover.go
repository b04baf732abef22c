package policy

import (
	"maps"
	"slices"
	"time"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// cover finds out whether some rules match everything that another one matches,
// from now on: every source and destination that could exist, every port, request
// and moment. It asks about a witness of every region that the patterns of the
// rules cut, and of every kind of request that they tell apart, so its answer is
// exact; where there are too many of them it is no.
type cover struct {
	now     time.Time
	vectors map[string]vector // :: pattern → its vector
	// about gives the rules that may match what is meant for a destination; wild is
	// what their To, and perhaps that of others, has of patterns.
	about func(dst vector) []*Rule
	wild  []string
}

// covers reports whether everything that r matches is matched.
func (c *cover) covers(r *Rule) bool {
	dsts, ok := c.witnesses(r.To, c.wild)
	if !ok {
		return false
	}
	for _, dst := range dsts {
		by := slices.DeleteFunc(c.about(dst), func(o *Rule) bool { return !c.matches(o.To, dst) })
		ports := r.Ports
		if len(ports) == 0 {
			ports = []uint16{0} // one that no rule names; those that one does are covered then, too
		}
		for _, port := range ports {
			there := slices.DeleteFunc(slices.Clone(by), func(o *Rule) bool { return !o.port(port) })
			if len(there) == 0 || !c.sources(r, there) {
				return false
			}
		}
	}
	return len(dsts) > 0
}

// sources goes through everybody whom r names.
func (c *cover) sources(r *Rule, by []*Rule) bool {
	wild := map[string]bool{}
	for _, o := range by {
		for _, p := range o.From {
			if _, exact := p.Exact(); !exact && !p.IsZero() {
				wild[p.String()] = true
			}
		}
	}
	srcs, ok := c.witnesses(r.From, slices.Sorted(maps.Keys(wild)))
	if !ok {
		return false
	}
	for _, src := range srcs {
		if !c.moments(r, slices.DeleteFunc(slices.Clone(by), func(o *Rule) bool { return !c.matches(o.From, src) })) {
			return false
		}
	}
	return !r.Anonymous || c.moments(r, slices.DeleteFunc(slices.Clone(by), func(o *Rule) bool { return !o.Anonymous }))
}

// moments goes through the spans of time in which r holds.
func (c *cover) moments(r *Rule, by []*Rule) bool {
	if len(by) == 0 {
		return false
	}
	times := []time.Time{c.now}
	for _, o := range append(slices.Clone(by), r) {
		for _, t := range [2]time.Time{o.Since, o.Until} {
			if t.After(c.now) {
				times = append(times, t)
			}
		}
	}
	for _, t := range times {
		if r.holds(t) && !c.kinds(r, slices.DeleteFunc(slices.Clone(by), func(o *Rule) bool { return !o.holds(t) })) {
			return false
		}
	}
	return true
}

// kinds goes through the kinds of request that r matches; where it is about none,
// all of them.
func (c *cover) kinds(r *Rule, by []*Rule) bool {
	switch {
	case slices.ContainsFunc(by, func(o *Rule) bool { return len(o.HTTP) == 0 }):
		return true
	case len(by) == 0:
		return false
	}
	var matches []*HTTPMatch
	for _, o := range append(slices.Clone(by), r) {
		for i := range o.HTTP {
			matches = append(matches, &o.HTTP[i])
		}
	}
	p := newProbes(matches)
	if !p.exact {
		return false
	}
	for i := range p.all {
		h := &p.all[i].request
		if (len(r.HTTP) == 0 || r.request(h)) && !slices.ContainsFunc(by, func(o *Rule) bool { return o.request(h) }) {
			return false
		}
	}
	return true
}

// witnesses gives one ID for each region that ps and others cut out of ps; false
// when there are too many.
func (c *cover) witnesses(ps []identity.Pattern, others []string) ([]vector, bool) {
	var out, wide []vector
	cut := map[string]bool{}
	for _, p := range ps {
		v := c.vector(p)
		if _, exact := p.Exact(); exact {
			out = append(out, v)
		} else if !p.IsZero() {
			wide = append(wide, v)
			cut[p.String()] = true
		}
	}
	if len(wide) == 0 {
		return out, true
	}
	for _, o := range others {
		if v := parseVector(o); slices.ContainsFunc(wide, v.meets) {
			cut[o] = true
		}
	}
	regions, ok := cutRegions(slices.Sorted(maps.Keys(cut)))
	for _, a := range regions.atoms {
		if anyCovers(wide, a) {
			out = append(out, parseVector(a.witness()))
		}
	}
	return out, ok
}

// matches reports whether some pattern matches an ID, which may be a witness.
func (c *cover) matches(ps []identity.Pattern, id vector) bool {
	return slices.ContainsFunc(ps, func(p identity.Pattern) bool { return c.vector(p).covers(id) })
}

func (c *cover) vector(p identity.Pattern) vector {
	v, ok := c.vectors[p.String()]
	if !ok {
		v = parseVector(p.String())
		c.vectors[p.String()] = v
	}
	return v
}
