package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// scope is a Scope with its patterns read.
type scope struct {
	Scope
	ids []identity.Pattern
}

// place is where something was written.
type place struct {
	set  *Set
	file string
	line int
}

func (p place) String() string { return fmt.Sprintf("%s:%d", p.file, p.line) }

// readScopes indexes the Scopes. IDs that two of them grant are a mistake: it
// would be open which labels an identity there can have.
func (c *compiler) readScopes() {
	for _, s := range c.sets {
		for _, d := range s.Scopes {
			sc := &scope{Scope: d}
			for _, id := range d.IDs {
				p, ok := c.pattern(s, d.File, Selector{ID: id.ID, pos: id.pos})
				if !ok {
					continue
				}
				for _, other := range c.scopeNames() {
					if c.scopes[other].meets(p) {
						c.errs.add(s.mistake(&c.errs, d.File, id.pos, "give each set IDs of its own",
							fmt.Sprintf("Scope %s grants IDs that Scope %s grants too: %s", d.Name, other, shorten(id.ID))))
					}
				}
				sc.ids = append(sc.ids, p)
			}
			c.scopes[d.Name] = sc
		}
	}
}

func (c *compiler) scopeNames() []string { return slices.Sorted(maps.Keys(c.scopes)) }

// evidence lists the evidence that is granted.
func (s *scope) evidence() []string {
	out := make([]string, len(s.Evidence))
	for i, a := range s.Evidence {
		out[i] = a.String()
	}
	return out
}

// meets reports whether some ID is granted and matched by p.
func (s *scope) meets(p identity.Pattern) bool {
	return slices.ContainsFunc(s.ids, func(id identity.Pattern) bool { return meet(id, p) })
}

// covers reports whether every ID that p matches is granted, by one pattern.
func (s *scope) covers(p identity.Pattern) bool {
	return slices.ContainsFunc(s.ids, func(id identity.Pattern) bool {
		return parseVector(id.String()).covers(parseVector(p.String()))
	})
}

// meet reports whether two patterns match some ID both.
func meet(a, b identity.Pattern) bool {
	v, w := parseVector(a.String()), parseVector(b.String())
	n := max(v.minLen(), w.minLen())
	x, ok1 := v.ofLength(n)
	y, ok2 := w.ofLength(n)
	if !ok1 || !ok2 {
		return false
	}
	_, ok := x.meet(y)
	return ok
}

// checkScopes holds each set other than the root set within its Scope. It comes
// before the policies are resolved, as what a set may select depends on it.
func (c *compiler) checkScopes() {
	uses := c.labelUses()
	for _, s := range c.sets {
		if s.Name == "" {
			c.rootWithinScopes(s, uses)
			continue
		}
		if len(s.Workloads)+len(s.Policies)+len(s.Externals)+len(s.Tests) == 0 {
			continue
		}
		sc := c.scopes[s.Name]
		if sc == nil {
			file, at := s.first()
			c.errs.add(s.mistake(&c.errs, file, at, fmt.Sprintf("write a document of kind: Scope with metadata.name: %s into the root set", s.Name),
				fmt.Sprintf("set %s has no Scope, so it may define nothing", s.Name)))
			continue
		}
		for _, w := range s.Workloads {
			c.scopedWorkload(s, sc, w, uses)
		}
		for _, x := range s.Externals {
			if !sc.covers(identity.ExactPattern(x.ID(c.td))) && x.Name != "" {
				c.beyond(s, sc, x.File, pos{x.Line, x.Col}, fmt.Sprintf("the ID of External %s, %s/%s,", x.Name, externalPrefix, x.Name), sc.patterns()...)
			}
		}
	}
}

// rootWithinScopes holds the root set's workloads with IDs of a Scope to its labels.
func (c *compiler) rootWithinScopes(s *Set, uses map[string]map[string]place) {
	for _, w := range s.Workloads {
		i, known := c.byName[w.Name]
		if !known || c.workloads[i].Set != s.Name {
			continue // reported already
		}
		for _, name := range c.scopeNames() {
			if c.scopes[name].meets(c.workloads[i].pattern()) {
				c.scopedLabels(s, c.scopes[name], w, uses)
			}
		}
	}
}

// first gives the place of something that the set defines.
func (s *Set) first() (string, pos) {
	for _, w := range s.Workloads {
		return w.File, pos{w.Line, w.Col}
	}
	for _, p := range s.Policies {
		return p.File, pos{p.Line, p.Col}
	}
	for _, x := range s.Externals {
		return x.File, pos{x.Line, x.Col}
	}
	for _, t := range s.Tests {
		return t.File, pos{t.Line, t.Col}
	}
	return s.Name, pos{}
}

// beyond reports something of a set that its Scope does not grant, and what of the
// kind it does.
func (c *compiler) beyond(s *Set, sc *scope, file string, p pos, what string, granted ...string) {
	text := "nothing"
	if len(granted) > 0 {
		text = shorten(strings.Join(granted, ", "))
	}
	c.errs.add(s.mistake(&c.errs, file, p, fmt.Sprintf("it grants %s; whoever keeps the root set can change that, at %s:%d", text, sc.File, sc.Line),
		fmt.Sprintf("%s is not within Scope %s", what, sc.Name)))
}

// patterns lists the IDs that are granted.
func (s *scope) patterns() []string {
	out := make([]string, len(s.IDs))
	for i, id := range s.IDs {
		out[i] = id.ID
	}
	return out
}

// labelUses gives, for each label key, the sets whose selectors name it: to all
// others it is reserved.
func (c *compiler) labelUses() map[string]map[string]place {
	uses := map[string]map[string]place{} // :: key → set → where its selectors name it first
	for _, s := range c.sets {
		for _, sel := range s.selectors() {
			for key := range sel.Labels {
				if uses[key] == nil {
					uses[key] = map[string]place{}
				}
				if _, known := uses[key][s.Name]; !known {
					uses[key][s.Name] = place{s, sel.file, sel.line}
				}
			}
		}
	}
	return uses
}

// placed is a selector and the file that it stands in.
type placed struct {
	Selector
	file string
}

// selectors lists what a set selects by, tests apart.
func (s *Set) selectors() []placed {
	var out []placed
	for _, p := range s.Policies {
		out = append(out, placed{p.To, p.File})
		for _, e := range slices.Concat(p.Allow, p.Deny) {
			for _, sel := range e.From {
				out = append(out, placed{sel, p.File})
			}
		}
	}
	for _, d := range s.Defaults {
		out = append(out, placed{d.To, d.File})
	}
	for _, v := range s.Invariants {
		out = append(out, placed{v.From, v.File}, placed{v.To, v.File})
	}
	return out
}

// reserved says why only a Scope can grant a label key to a set; "" if it is free.
func (c *compiler) reserved(key, set string, uses map[string]map[string]place) string {
	for _, name := range c.scopeNames() {
		if _, named := c.scopes[name].Labels[key]; named {
			return fmt.Sprintf("Scope %s names it", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(uses[key])) {
		if name != set {
			return fmt.Sprintf("%s selects by it at %s", uses[key][name].set.title(), uses[key][name])
		}
	}
	return ""
}

// scopedWorkload holds one workload of a set within its Scope.
func (c *compiler) scopedWorkload(s *Set, sc *scope, w Workload, uses map[string]map[string]place) {
	i, known := c.byName[w.Name]
	if !known || c.workloads[i].Set != s.Name {
		return // reported already
	}
	if !sc.covers(c.workloads[i].pattern()) {
		c.beyond(s, sc, w.File, w.id, "id "+shorten(w.ID), sc.patterns()...)
	}
	c.scopedLabels(s, sc, w, uses)
	for _, a := range w.Attest {
		if !slices.ContainsFunc(sc.Evidence, func(g Attest) bool { return g.grants(a) }) {
			c.beyond(s, sc, w.File, a.pos, fmt.Sprintf("evidence %q of workload %s", shorten(a.String()), w.Name), sc.evidence()...)
		}
	}
}

// scopedLabels holds the labels of a workload to what a Scope grants for its ID. So
// they are all that anybody with such an ID can have.
func (c *compiler) scopedLabels(s *Set, sc *scope, w Workload, uses map[string]map[string]place) {
	at := pos{w.Line, w.Col}
	for _, key := range slices.Sorted(maps.Keys(w.Labels)) {
		values, granted := sc.Labels[key]
		why := c.reserved(key, sc.Name, uses)
		switch {
		case granted && slices.Contains(values, w.Labels[key]), !granted && why == "":
		case granted:
			c.beyond(s, sc, w.File, at, fmt.Sprintf("label %s: %s of workload %s", key, shorten(w.Labels[key]), w.Name), values...)
		default:
			c.beyond(s, sc, w.File, at, fmt.Sprintf("label %s of workload %s, which is reserved because %s,", key, w.Name, why), slices.Sorted(maps.Keys(sc.Labels))...)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(sc.Labels)) {
		if _, has := w.Labels[key]; !has {
			c.beyond(s, sc, w.File, at, fmt.Sprintf("workload %s without label %s", w.Name, key), sc.Labels[key]...)
		}
	}
}

// grants reports whether whatever proves a is evidence that g describes.
func (g Attest) grants(a Attest) bool {
	if g.Kind != a.Kind || g.Issuer != a.Issuer {
		return false
	}
	for _, v := range a.Via {
		if !slices.Contains(g.Via, v) {
			return false
		}
	}
	for k, v := range g.Select {
		if got, ok := a.Select[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// scopedTo holds the to of a policy within the Scope of its set.
func (c *compiler) scopedTo(s *Set, p Policy, to destinations) bool {
	sc := c.scopes[s.Name]
	switch {
	case s.Name == "":
		return true
	case sc == nil:
		return false // reported by checkScopes
	case p.To.ID != "":
		pattern, ok := c.pattern(s, p.File, p.To)
		if ok && !sc.covers(pattern) {
			c.beyond(s, sc, p.File, p.To.pos, fmt.Sprintf("spec.to of Policy %s, %s,", p.Name, shorten(p.To.ID)), sc.patterns()...)
			return false
		}
		return ok
	}
	for _, i := range to.workloads {
		if w := c.workloads[i]; !sc.covers(w.pattern()) {
			c.beyond(s, sc, p.File, p.To.pos, fmt.Sprintf("spec.to of Policy %s selects %s (%s), which", p.Name, w.Name, w.Workload.ID), sc.patterns()...)
			return false
		}
	}
	return true
}
