package policy

import (
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// identities knows who exists and who could.
type identities struct {
	c       *compiler
	uses    map[string]map[string]place
	parties [2][]*Party           // those that exist, templates apart
	longest int                   // segments of the longest ID that some pattern spells out
	fresh   [2]string             // a segment that nobody wrote …
	short   [2]string             // … and a short one
	number  uint16                // a port that nobody wrote
	port    string                // the same
	avoided [2]map[[2]string]bool // :: label that a deny, or the to of a team, names
}

// choose reads a selector of sets that compile.
func (x *identities) choose(s Selector) chooser {
	c := chooser{Selector: s}
	if s.ID != "" {
		full := s.ID
		if strings.HasPrefix(full, "/") {
			full = x.c.td.IDString() + full
		}
		c.pattern, _ = identity.ParsePattern(full)
	}
	return c
}

// gather lists who exists, and what nobody wrote.
func (p *prover) gather() {
	c := p.c
	segments, names := map[string]bool{}, map[string]bool{}
	numbers := map[uint16]bool{}
	note := func(pattern string) {
		v := parseVector(pattern)
		p.longest = max(p.longest, v.minLen())
		for _, s := range v.segs {
			segments[s] = true
		}
	}
	ports := func(ps []Port) {
		for _, port := range ps {
			names[port.Name], numbers[port.Number] = true, true
		}
	}
	for i, w := range c.workloads {
		note(w.pattern().String())
		ports(w.Ports)
		if w.Template {
			continue
		}
		party := &Party{Name: w.Name, ID: w.ID, Labels: w.Labels, Exists: true, ports: w.Ports}
		p.parties[asDestination] = append(p.parties[asDestination], party)
		if i < c.exactN {
			p.parties[asSource] = append(p.parties[asSource], party)
		}
	}
	for _, d := range c.domains {
		for _, w := range d.Workloads {
			note(w.ID.String())
			ports(w.Ports)
			p.parties[asDestination] = append(p.parties[asDestination], &Party{Name: w.ID.String(), ID: w.ID, Exists: true, ports: w.Ports})
		}
	}
	for _, sc := range c.scopes {
		for _, id := range sc.ids {
			note(id.String())
		}
	}
	for _, cl := range slices.Concat(p.opens, p.denies) {
		for _, sel := range append(slices.Clone(cl.from), cl.to) {
			note(sel.pattern.String())
		}
		for _, r := range cl.entry.Ports {
			names[r.Name], numbers[r.Number] = true, true
		}
	}
	for _, s := range c.sets {
		for _, v := range s.Invariants {
			for _, sel := range [2]Selector{v.From, v.To} {
				cs := p.choose(sel)
				note(cs.pattern.String())
			}
		}
	}
	for i, name := range freshNames {
		p.fresh[i] = unused(name, segments)
		p.short[i] = shortest(segments)
		segments[p.short[i]] = true
	}
	p.port = unused("any-port", names)
	for p.number = 65535; numbers[p.number]; p.number-- {
	}
}

// both gives who a selector of a rule and one of an invariant both pick: all that
// exist, and of those that could the ones that the fewest others pick as well;
// false where they are too many.
func (x *identities) both(rule, never chooser, e end) ([]*Party, bool) {
	if rule.Anonymous || never.Anonymous {
		if rule.Anonymous && never.Anonymous {
			return []*Party{{}}, true
		}
		return nil, true
	}
	var out []*Party
	for _, p := range x.parties[e] {
		if rule.selects(p) && never.selects(p) {
			out = append(out, p)
		}
	}
	for i := x.c.exactN; i < x.c.realN; i++ {
		for _, w := range x.byEvidence(x.c.workloads[i]) {
			if p := x.ofTemplate(w, rule, never, e); p != nil {
				out = append(out, p)
			}
		}
	}
	out = append(out, x.couldExist(rule, never, e)...)
	return out, len(out) <= maxParties
}

// byEvidence gives a template once for each entry of its evidence, with the IDs that
// such evidence can fill in: where the entry asks for a value, no other one comes.
func (x *identities) byEvidence(w CompiledWorkload) []CompiledWorkload {
	if len(w.Attest) == 0 {
		return []CompiledWorkload{w}
	}
	var out []CompiledWorkload
	for _, a := range w.Attest {
		segs := strings.Split(w.Workload.ID, "/")
		for i, seg := range segs {
			if name, ok := variable(seg); ok {
				segs[i] = "*"
				if v, fixed := a.Select[name]; fixed {
					segs[i] = v
				}
			}
		}
		one := w
		var err error
		if one.Pattern, err = identity.ParsePattern(x.c.td.IDString() + strings.Join(segs, "/")); err == nil {
			out = append(out, one) // else no ID can be made of such a value
		}
	}
	return out
}

// ofTemplate gives an ID of a template that both selectors pick, and that others
// pick only where they pick all such IDs; nil for none.
func (x *identities) ofTemplate(w CompiledWorkload, rule, never chooser, e end) *Party {
	pattern, ok := w.Pattern, true
	for _, c := range [2]chooser{rule, never} {
		switch {
		case c.External != "", c.Workload != "" && c.Workload != w.Name:
			return nil
		case c.ID != "":
			pattern, ok = intersect(pattern, c.pattern)
		}
		for k, v := range c.Labels {
			if ok {
				pattern, ok = CompiledWorkload{Workload: w.Workload, Template: true, Pattern: pattern}.narrow(pattern, k, v)
			}
		}
		if !ok {
			return nil
		}
	}
	id, ok := x.witness(parseVector(pattern.String()), e)
	if !ok {
		return nil
	}
	w = w.at(id)
	return &Party{Name: w.Name, ID: id, Labels: w.Labels, Exists: true, ports: w.Ports}
}

// witness gives an ID of a vector without "**": where it has "*", a segment that
// nobody wrote.
func (x *identities) witness(v vector, e end) (spiffeid.ID, bool) {
	for _, fresh := range [2]string{x.fresh[e], x.short[e]} { // an ID has at most so many bytes
		segs := slices.Clone(v.segs)
		for i, s := range segs {
			if s == "*" {
				segs[i] = fresh
			}
		}
		id, err := spiffeid.FromString(vector{td: v.td, segs: segs}.String())
		if err == nil && len(id.String()) <= identity.MaxIDLength {
			return id, true
		}
	}
	return spiffeid.ID{}, false
}

// couldExist gives identities that nobody defined and both selectors pick.
func (x *identities) couldExist(rule, never chooser, e end) []*Party {
	labels, ok := x.labels(rule, never)
	if !ok {
		return nil
	}
	var out []*Party
	a, b := x.vector(rule), x.vector(never)
	for n := 1; n <= x.longest+1; n++ {
		v, ok1 := a.ofLength(n)
		w, ok2 := b.ofLength(n)
		if !ok1 || !ok2 {
			continue
		}
		both, ok := v.meet(w)
		if !ok {
			continue
		}
		out = append(out, x.zone(both, "", labels, e)...)
		for _, name := range x.c.scopeNames() {
			for _, id := range x.c.scopes[name].ids {
				part, ok := parseVector(id.String()).ofLength(n)
				if !ok {
					continue
				}
				if within, ok := both.meet(part); ok {
					out = append(out, x.zone(within, name, labels, e)...)
				}
			}
		}
	}
	return out
}

// labels gives what two selectors ask for together; false where only somebody who
// exists could be picked, or nobody.
func (x *identities) labels(rule, never chooser) (map[string]string, bool) {
	out := map[string]string{}
	for _, c := range [2]chooser{rule, never} {
		if c.Workload != "" || c.External != "" || c.Anonymous {
			return nil, false
		}
		for k, v := range c.Labels {
			if was, has := out[k]; has && was != v {
				return nil, false
			}
			out[k] = v
		}
	}
	return out, true
}

// vector gives the IDs that a selector by ID picks; one by labels, all of this
// trust domain.
func (x *identities) vector(c chooser) vector {
	if c.ID != "" {
		return parseVector(c.pattern.String())
	}
	return vector{td: x.c.td.Name(), rest: true}
}

// zone gives identities with IDs of v, one for each choice of labels, that no
// document defines, and that lie in the IDs of the Scope called scope, "" for none.
func (x *identities) zone(v vector, scope string, labels map[string]string, e end) []*Party {
	id, ok := x.witness(v, e)
	if !ok || !x.free(id, labels, e) {
		return nil
	}
	own := id.TrustDomain() == x.c.td
	if in := x.scopeOf(id); own && in != scope || !own && scope != "" {
		return nil // asked about elsewhere
	}
	exact := !slices.Contains(v.segs, "*")
	choices := []map[string]string{labels}
	if own && scope != "" {
		choices = x.granted(scope, labels, e)
	}
	var out []*Party
	for _, l := range choices {
		if p := (&Party{ID: id, Labels: l, exact: exact}); x.beside(p) {
			out = append(out, p)
		}
	}
	return out
}

// beside reports whether the policies of all teams would stay within their Scopes if
// somebody existed: none of them selects by label whom its Scope does not grant.
func (x *identities) beside(p *Party) bool {
	for _, s := range x.c.sets {
		if s.Name == "" || len(p.Labels) == 0 {
			continue
		}
		for _, pol := range s.Policies {
			to := chooser{Selector: pol.To}
			if len(pol.To.Labels) > 0 && to.selects(p) && !x.within(p.ID, s.Name) {
				return false
			}
		}
	}
	return true
}

// within reports whether the Scope of a set grants an ID.
func (x *identities) within(id spiffeid.ID, set string) bool {
	sc := x.c.scopes[set]
	return sc != nil && slices.ContainsFunc(sc.ids, func(p identity.Pattern) bool { return p.Match(id) })
}

// free reports whether an identity with this ID could be defined, with labels.
func (x *identities) free(id spiffeid.ID, labels map[string]string, e end) bool {
	own := id.TrustDomain() == x.c.td
	_, taken := x.c.byID[id.String()]
	switch {
	case taken:
		return false
	case !own:
		_, listed := x.c.abroad[id.String()]
		return !listed || e == asSource
	case isExternal(id):
		_, listed := x.c.abroad[id.String()]
		return e == asDestination && !listed && len(labels) == 0 && strings.Count(id.Path(), "/") == 2
	case identity.Reserved(id):
		return e == asSource && len(labels) == 0
	}
	for i := x.c.exactN; i < x.c.realN; i++ {
		if x.c.workloads[i].Pattern.Match(id) {
			return false
		}
	}
	return true
}

// scopeOf gives the set whose Scope grants the ID, or "".
func (x *identities) scopeOf(id spiffeid.ID) string {
	for name, sc := range x.c.scopes {
		if slices.ContainsFunc(sc.ids, func(p identity.Pattern) bool { return p.Match(id) }) {
			return name
		}
	}
	return ""
}

// granted completes labels as a Scope demands: each key that it names with a value
// that it grants, and no other key that is reserved. A value that nothing avoids serves
// best; where there is none, each is a choice of its own.
func (x *identities) granted(scope string, labels map[string]string, e end) []map[string]string {
	sc := x.c.scopes[scope]
	for k, v := range labels {
		values, named := sc.Labels[k]
		if named && !slices.Contains(values, v) || !named && x.c.reserved(k, scope, x.uses) != "" {
			return nil
		}
	}
	out := []map[string]string{labels}
	for _, k := range slices.Sorted(maps.Keys(sc.Labels)) {
		if _, chosen := labels[k]; chosen {
			continue
		}
		values := sc.Labels[k]
		if i := slices.IndexFunc(values, func(v string) bool { return e != asBoth && !x.avoided[e][[2]string{k, v}] }); i >= 0 {
			values = values[i : i+1]
		}
		var next []map[string]string
		for _, l := range out {
			for _, v := range values {
				l := maps.Clone(l)
				l[k] = v
				next = append(next, l)
			}
		}
		if out = next; len(out) > maxParties {
			break // both says so
		}
	}
	return out
}

// exactly gives the pattern of one ID.
func exactly(id string) []identity.Pattern {
	p, _ := identity.ParsePattern(id)
	return []identity.Pattern{p}
}
