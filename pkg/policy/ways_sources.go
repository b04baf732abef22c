package policy

import (
	"cmp"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// selection is who is meant as a source: everybody, the IDs of a pattern without
// some, one identity, or, with an empty id, callers without one.
type selection struct {
	all    bool
	vector *vector
	except []vector
	id     string
}

// has reports whether an ID is meant.
func (s selection) has(id string) bool {
	switch {
	case s.all:
		return true
	case s.vector == nil:
		return s.id == id
	}
	return id != "" && s.takes(parseVector(id))
}

// takes reports whether all of v is meant.
func (s selection) takes(v vector) bool {
	return s.all || s.vector != nil && s.vector.covers(v) && !anyCovers(s.except, v)
}

// meets reports whether some ID of a pattern is meant, if perhaps only one that is
// left out.
func (s selection) meets(pattern string) bool {
	switch {
	case s.all:
		return true
	case s.vector == nil:
		return s.id != "" && parseVector(pattern).covers(parseVector(s.id))
	}
	return s.vector.meets(parseVector(pattern))
}

func anyCovers(vs []vector, v vector) bool {
	return slices.ContainsFunc(vs, func(o vector) bool { return o.covers(v) })
}

// meets reports whether some ID matches both.
func (v vector) meets(o vector) bool {
	n := max(v.minLen(), o.minLen())
	a, ok1 := v.ofLength(n)
	b, ok2 := o.ofLength(n)
	if !ok1 || !ok2 {
		return false
	}
	_, ok := a.meet(b)
	return ok
}

// crowd is what can come to one destination: IDs by name, and what the patterns
// about it cut.
type crowd struct {
	r       *Ruleset
	g       *gate
	sel     selection
	ids     []string // "" are callers without one
	cut     regions
	inexact bool
}

// crowd finds everybody whom the rules of g tell apart and sel means.
func (r *Ruleset) crowd(g *gate, sel selection) crowd {
	c := crowd{r: r, g: g, sel: sel}
	if !sel.all && sel.vector == nil {
		c.ids = []string{sel.id}
		return c
	}
	ids := g.named()
	for _, w := range r.Workloads() {
		ids[w.ID.String()] = true
	}
	for _, d := range r.TrustDomains() {
		for _, w := range d.Workloads {
			ids[w.ID.String()] = true
		}
	}
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		if sel.has(id) && g.names(id) {
			c.ids = append(c.ids, id)
		}
	}
	patterns := g.wild()
	if sel.vector != nil {
		for p := range patterns {
			if !sel.meets(p) {
				delete(patterns, p)
			}
		}
		for _, v := range append([]vector{*sel.vector}, sel.except...) {
			patterns[v.String()] = true
		}
	}
	for _, t := range r.Templates() { // whom a pattern may name, too
		v := parseVector(t.Pattern.String())
		if sel.meets(t.Pattern.String()) && slices.ContainsFunc(slices.Collect(maps.Keys(patterns)), func(p string) bool { return v.meets(parseVector(p)) }) {
			patterns[t.Pattern.String()] = true
		}
	}
	var ok bool
	c.cut, ok = cutRegions(slices.Sorted(maps.Keys(patterns)))
	c.inexact = !ok
	return c
}

// listing is what is told about one port.
type listing struct {
	crowd
	atoms []map[grant]bool          // :: index of cut.atoms → what passes; nil for those that are not meant
	named map[string]map[grant]bool // :: ID →
	shown map[grant][]Place
	out   []Way
}

// through lists what passes to one port, with Path and To left out. Workloads and
// templates are listed by name, everybody else by patterns where they are equal.
func (c crowd) through(port Port) []Way {
	l := listing{crowd: c, named: map[string]map[grant]bool{}, shown: map[grant][]Place{}}
	ask := func(src string) map[grant]bool {
		out := map[grant]bool{}
		for _, gr := range c.g.grants(src, port.Number) {
			out[gr] = true
		}
		return out
	}
	for _, a := range c.cut.atoms {
		var passes map[grant]bool
		if c.sel.takes(a) {
			passes = ask(a.witness())
		}
		l.atoms = append(l.atoms, passes)
	}
	for _, id := range c.ids {
		l.named[id] = ask(id)
	}
	for _, templates := range []bool{true, false} {
		for _, p := range c.cut.patterns {
			if (c.r.templateOf(p.vector) >= 0) == templates {
				l.add(p.vector, p.atoms)
			}
		}
		for i, a := range c.cut.atoms {
			if (c.r.templateOf(a) >= 0) == templates {
				l.add(a, []int{i})
			}
		}
	}
	for _, id := range c.ids {
		p := c.r.place(id)
		for _, gr := range sortedGrants(l.named[id]) {
			if p.Kind == OwnWorkload || id == "" || !l.covered(gr, parseVector(id)) {
				l.list(gr, p)
			}
		}
	}
	for i := range l.out {
		l.out[i].Port = port
	}
	return l.out
}

// add lists what passes from all of some regions, which together are what no
// narrower region has of v.
func (l *listing) add(v vector, regions []int) {
	for _, gr := range sortedGrants(l.atoms[regions[0]]) {
		if slices.ContainsFunc(regions, func(i int) bool { return !l.atoms[i][gr] }) || l.covered(gr, v) {
			continue
		}
		p := l.r.placeOf(v)
		for i, a := range l.cut.atoms {
			if !slices.Contains(regions, i) && v.covers(a) && !l.atoms[i][gr] && !anyCovers(p.except, a) {
				p.except = append(p.except, a)
				p.Except = append(p.Except, l.r.title(a.String()))
			}
		}
		for _, id := range l.ids {
			if id != "" && !l.named[id][gr] && v.covers(parseVector(id)) && !anyCovers(p.except, parseVector(id)) {
				p.except = append(p.except, parseVector(id))
				p.Except = append(p.Except, l.r.title(id))
			}
		}
		l.list(gr, p)
		l.shown[gr] = append(l.shown[gr], p)
	}
}

// covered reports whether a place that is listed already holds all of v.
func (l *listing) covered(gr grant, v vector) bool {
	return slices.ContainsFunc(l.shown[gr], func(p Place) bool { return p.vector.covers(v) && !anyCovers(p.except, v) })
}

func (l *listing) list(gr grant, from Place) {
	l.out = append(l.out, Way{
		From: from, Requests: gr.requests, Since: gr.since, Until: gr.until, Rule: gr.rule, Door: gr.door, Audited: gr.audited,
	})
}

func sortedGrants(m map[grant]bool) []grant {
	return slices.SortedFunc(maps.Keys(m), func(a, b grant) int {
		return cmp.Or(cmp.Compare(a.requests, b.requests), a.since.Compare(b.since), a.until.Compare(b.until),
			cmp.Compare(a.rule.short(), b.rule.short()), cmp.Compare(a.audited.short(), b.audited.short()))
	})
}

// place gives an identity as people call it.
func (r *Ruleset) place(id string) Place {
	if id == "" {
		return Place{Name: "anonymous", Kind: WithoutAnyID}
	}
	p := Place{Name: r.title(id), ID: id, Kind: NoWorkload, vector: parseVector(id)}
	_, own := r.workloadIndex(id)
	_, template := r.templateIndex(id)
	td := r.trustDomain()
	parsed, err := spiffeid.FromString(id)
	switch {
	case own:
		p.Kind = OwnWorkload
	case !td.IsZero() && p.vector.td != td.Name():
		p.Kind = Foreign
	case template:
		p.Kind = OfTemplate
	case err == nil && isExternal(parsed):
		p.Kind = Outside
		if w, ok := r.external(parsed); ok {
			p.Name = w.Name
		}
	}
	return p
}

// placeOf gives what a pattern stands for.
func (r *Ruleset) placeOf(v vector) Place {
	if !v.rest && !slices.Contains(v.segs, "*") {
		return r.place(v.String())
	}
	p := Place{Name: r.title(v.String()), ID: v.String(), Kind: OfPattern, vector: v}
	switch {
	case r.templateOf(v) >= 0:
		p.Kind = OfTemplate
	case !r.trustDomain().IsZero() && v.td != r.trustDomain().Name():
		p.Kind = Foreign
	}
	return p
}

// templateOf gives the template that all IDs of v are of, or -1.
func (r *Ruleset) templateOf(v vector) int {
	return slices.IndexFunc(r.Templates(), func(t CompiledWorkload) bool { return parseVector(t.Pattern.String()).covers(v) })
}
