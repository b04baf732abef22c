package policy

import (
	"slices"
	"time"
)

// gate is what rules say about one destination, in each span of time that their
// windows cut.
type gate struct {
	rules []*Ruleset // one for each span
	index []*index   // the same
	known []map[gateKey][]passage
	edges []time.Time // between the spans
}

// gateKey is what an answer depends on: who the rules take the source for.
type gateKey struct {
	port  uint16
	cells [4]*cell
}

// newGate makes the gate of a destination, which may be the witness of a region,
// from now on; the zero time is before all windows. It takes ownership of about.
func newGate(dst string, about []Rule, now time.Time) *gate {
	g := &gate{edges: windowEdges(newRuleset(slices.Clone(about), nil, nil))}
	g.edges = slices.DeleteFunc(g.edges, func(t time.Time) bool { return !t.After(now) })
	for i := -1; i < len(g.edges); i++ {
		t := now
		switch {
		case i >= 0:
			t = g.edges[i]
		case now.IsZero() && len(g.edges) > 0:
			t = g.edges[0].Add(-1)
		}
		rules := slices.DeleteFunc(slices.Clone(about), func(r Rule) bool { return !r.holds(t) })
		rs := newRuleset(rules, nil, nil)
		g.rules = append(g.rules, rs)
		g.index = append(g.index, rs.newIndex(dst))
		g.known = append(g.known, map[gateKey][]passage{})
	}
	return g
}

// named gives the IDs that some rule names exactly as a source; "" for callers
// without one.
func (g *gate) named() map[string]bool {
	out := map[string]bool{}
	for _, ix := range g.index {
		for src := range ix.exact {
			out[src] = true
		}
	}
	return out
}

// names reports whether some rule names an ID, "" for callers without one.
func (g *gate) names(id string) bool {
	return slices.ContainsFunc(g.index, func(ix *index) bool { return len(ix.cells(id)) > 0 })
}

// wild gives the patterns that some rule has as a source.
func (g *gate) wild() map[string]bool {
	out := map[string]bool{}
	for _, rs := range g.rules {
		for i := range rs.rules {
			for _, p := range rs.rules[i].From {
				if _, exact := p.Exact(); !exact && !p.IsZero() {
					out[p.String()] = true
				}
			}
		}
	}
	return out
}

// passage is what lets something pass, and which requests.
type passage struct {
	requests string
	rule     RuleRef
	door     bool
	audited  RuleRef
}

// grant is a passage for some time.
type grant struct {
	passage
	since, until time.Time
}

// grants gives what passes from a source to a port, and when.
func (g *gate) grants(src string, port uint16) []grant {
	var order []passage
	in := map[passage][]bool{} // :: → in which spans
	for i := range g.rules {
		for _, p := range g.passages(i, src, port) {
			if in[p] == nil {
				in[p] = make([]bool, len(g.rules))
				order = append(order, p)
			}
			in[p][i] = true
		}
	}
	var out []grant
	for _, p := range order {
		for i := 0; i < len(g.rules); i++ {
			if !in[p][i] {
				continue
			}
			gr := grant{passage: p}
			if i > 0 {
				gr.since = g.edges[i-1]
			}
			for i < len(g.rules) && in[p][i] {
				i++
			}
			if i < len(g.rules) {
				gr.until = g.edges[i-1]
			}
			out = append(out, gr)
		}
	}
	return out
}

// passages gives what passes in one span of time. Sources that the same rules name
// are asked about once.
func (g *gate) passages(span int, src string, port uint16) []passage {
	cells := g.index[span].cells(src)
	if len(cells) == 0 {
		return nil
	}
	key := gateKey{port: port}
	small := len(cells) <= len(key.cells)
	copy(key.cells[:], cells)
	if known, ok := g.known[span][key]; ok && small {
		return known
	}
	out := passages(g.rules[span], g.index[span], src, port)
	if small {
		g.known[span][key] = out
	}
	return out
}

// cells gives what the rules that name src say.
func (ix *index) cells(src string) []*cell {
	var out []*cell
	if s := ix.exact[src]; s != nil {
		out = append(out, &s.cell)
	}
	ix.wild.match(src, func(c *cell) { out = append(out, c) })
	return out
}

// Texts for requests that cannot be told apart for their number.
const (
	someRequests    = "some requests, of too many kinds to list"
	perhapsRequests = "perhaps some requests, of too many kinds to tell"
)

func passages(rs *Ruleset, ix *index, src string, port uint16) []passage {
	conn := ix.verdict(src, port, nil)
	switch {
	case conn.deny != 0: // of the whole connection
		return nil
	case !conn.undecided() && !conn.passes():
		return nil
	case !conn.undecided():
		return []passage{rs.passage(conn)}
	}
	conditions := ix.conditions(src, port)
	matches := make([]*HTTPMatch, len(conditions))
	for i, c := range conditions {
		matches[i] = c.match
	}
	probes := newProbes(matches)
	found := map[passage][]int{} // :: without requests → indexes of probes.all
	var order []passage
	for i := range probes.all {
		v := ix.verdict(src, port, &probes.all[i].request)
		if !v.passes() {
			continue
		}
		p := rs.passage(v)
		if found[p] == nil {
			order = append(order, p)
		}
		found[p] = append(found[p], i)
	}
	if !probes.exact && len(order) == 0 {
		return []passage{{requests: perhapsRequests}}
	}
	var out []passage
	for _, p := range order {
		texts := []string{someRequests}
		if probes.exact {
			texts = probes.texts(found[p])
		}
		for _, text := range texts {
			p.requests = text
			out = append(out, p)
		}
	}
	return out
}

func (r *Ruleset) passage(v verdict) passage {
	p := passage{rule: r.rules[v.by()].Ref, door: v.allow == 0}
	if v.audit != 0 {
		p.audited = r.rules[v.audit-1].Ref
	}
	return p
}
