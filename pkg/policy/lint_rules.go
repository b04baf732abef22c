package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// lintRule is an entry of a Policy with what it was compiled to.
type lintRule struct {
	set     *Set
	policy  *Policy
	entry   *Entry
	effect  Effect
	parts   []*Rule
	indexes []int32 // of parts, in the rules of all
	dead    bool    // it never matches, or its window has ended: that is reported
}

// ref is how messages call it.
func (r *lintRule) ref() string {
	return RuleRef{Set: r.set.Name, Policy: r.policy.Name, File: r.policy.File, Line: r.entry.line}.short()
}

// place orders rules as they are written.
func (r *lintRule) place(o *lintRule) int {
	return cmp.Or(strings.Compare(r.policy.File, o.policy.File), r.entry.line-o.entry.line, r.entry.col-o.entry.col)
}

// collect joins the entries of all policies with their compiled rules.
func (l *linter) collect() {
	at := map[string]*lintRule{} // :: file and place →
	for _, s := range l.sets {
		for p := range s.Policies {
			policy := &s.Policies[p]
			for _, list := range []struct {
				effect  Effect
				entries []Entry
			}{{Allow, policy.Allow}, {Deny, policy.Deny}} {
				for e := range list.entries {
					r := &lintRule{set: s, policy: policy, entry: &list.entries[e], effect: list.effect}
					l.rules = append(l.rules, r)
					at[fmt.Sprint(policy.File, ":", r.entry.line, ":", r.entry.col)] = r
				}
			}
		}
	}
	l.of = make([]*lintRule, len(l.rs.rules))
	for i := range l.rs.rules {
		rule := &l.rs.rules[i]
		if r := at[fmt.Sprint(rule.Ref.File, ":", rule.Ref.Line, ":", rule.col)]; r != nil && rule.col > 0 {
			r.parts, r.indexes = append(r.parts, rule), append(r.indexes, int32(i))
			l.of[i] = r
		}
	}
}

// neverMatches reports rules, and parts of them, that match nothing at all.
func (l *linter) neverMatches(r *lintRule) {
	e := r.entry
	var nobody, nothing []pos
	for _, sel := range e.From {
		if id, err := spiffeid.FromPath(l.td(), strings.TrimSuffix(strings.TrimSuffix(sel.ID, "/**"), "/*")); sel.ID != "" && err == nil && isExternal(id) {
			nobody = append(nobody, sel.pos)
		}
	}
	for i := range e.HTTP {
		if neverMatch(e.HTTP[i:i+1], r.effect) && i < len(e.matches) {
			nothing = append(nothing, e.matches[i])
		}
	}
	const hint = "remove it"
	switch {
	case len(nobody) == len(e.From):
		r.dead = true
		l.warn(NeverMatches, r.set, r.policy.File, e.pos, hint, "the rule never matches: an ID below %s is never issued", externalPrefix)
		return
	case len(e.HTTP) > 0 && len(nothing) == len(e.HTTP):
		r.dead = true
		l.warn(NeverMatches, r.set, r.policy.File, e.pos, "ask for one value, or write an entry for each", "the rule never matches: an allow wants exactly one line of a header, and this one wants two values of it")
		return
	}
	for _, p := range nobody {
		l.warn(NeverMatches, r.set, r.policy.File, p, hint, "this source never matches: an ID below %s is never issued", externalPrefix)
	}
	for _, p := range nothing {
		l.warn(NeverMatches, r.set, r.policy.File, p, "ask for one value, or write an entry for each", "this entry never matches: an allow wants exactly one line of a header, and this one wants two values of it")
	}
	if r.effect == Allow { // a deny may be there before what it guards
		l.noDestination(r)
	}
}

// noDestination reports an allow that is about no declared port of anybody.
func (l *linter) noDestination(r *lintRule) {
	any := false
	for _, i := range r.indexes {
		if l.serves[i] {
			return
		}
		any = any || l.about[i]
	}
	r.dead = true
	if !any {
		l.warn(NeverMatches, r.set, r.policy.File, r.entry.pos, "check the pattern of spec.to", "the rule allows nothing: no workload has an ID that %s matches", r.policy.To.ID)
		return
	}
	p := r.entry.pos
	if len(r.entry.Ports) > 0 {
		p = r.entry.Ports[0].pos
	}
	l.warn(NeverMatches, r.set, r.policy.File, p, "declare the port in the Workload", "the rule allows nothing: what spec.to selects declares no such port")
}

// shadowed reports an allow that denies take away wholly.
func (l *linter) shadowed(r *lintRule) {
	if r.effect != Allow || r.dead {
		return
	}
	by := map[*lintRule]bool{}
	c := l.cover
	c.wild = l.wildDenies
	c.about = func(dst vector) []*Rule {
		var out []*Rule
		for _, i := range l.rs.rulesTo(dst.String()) {
			if o := l.of[i]; o != nil && l.rs.rules[i].say() == denies && !o.dead {
				by[o] = true
				out = append(out, &l.rs.rules[i])
			}
		}
		return out
	}
	for _, part := range r.parts {
		if !c.covers(part) {
			return
		}
	}
	var names []string
	for _, o := range needed(&c, r.parts, by) {
		names = append(names, o.ref())
	}
	r.dead = true
	l.warn(Shadowed, r.set, r.policy.File, r.entry.pos, "remove it, or narrow what denies it", "the rule allows nothing: all that it matches is denied by %s", some(names))
}

// needed leaves out rules without which the others still cover parts; of very many,
// none.
func needed(c *cover, parts []*Rule, by map[*lintRule]bool) []*lintRule {
	const limit = 30
	c.about = func(vector) []*Rule {
		var out []*Rule
		for o := range by {
			out = append(out, o.parts...)
		}
		return out
	}
	all := slices.SortedFunc(maps.Keys(by), (*lintRule).place)
	if len(all) > limit {
		return all
	}
	for _, o := range slices.Backward(all) { // the first one stays
		if delete(by, o); !c.coversAll(parts) {
			by[o] = true
		}
	}
	return slices.SortedFunc(maps.Keys(by), (*lintRule).place)
}

// redundant reports a rule of which another one says the same and perhaps more.
func (l *linter) redundant(r *lintRule) {
	if r.dead || len(r.parts) == 0 {
		return
	}
	dsts, _ := l.cover.witnesses(r.parts[0].To, nil)
	if len(dsts) == 0 {
		return
	}
	seen := map[*lintRule]bool{r: true}
	for _, i := range l.rs.rulesTo(dsts[0].String()) {
		o := l.of[i]
		if o == nil || seen[o] || o.dead {
			continue
		}
		seen[o] = true
		if l.pairs++; l.pairs > maxLintPairs {
			return
		}
		if l.saysAll(o, r) && (!l.saysAll(r, o) || r.place(o) > 0) {
			l.warn(Redundant, r.set, r.policy.File, r.entry.pos, "remove it, or narrow the other one", "the rule adds nothing: %s covers all of it", o.ref())
			return
		}
	}
}

// saysAll reports whether o does what r does, and tells the same reason.
func (l *linter) saysAll(o, r *lintRule) bool {
	ours, theirs := r.parts[0].say(), o.parts[0].say()
	if ours != theirs && !(ours == audits && theirs == denies) || r.entry.Reason != "" && r.entry.Reason != o.entry.Reason {
		return false
	}
	c := l.cover
	c.about = func(vector) []*Rule { return slices.Clone(o.parts) }
	for _, part := range o.parts {
		c.wild = append(c.wild, wildTo([]Rule{*part})...)
	}
	return c.coversAll(r.parts)
}

func (c *cover) coversAll(parts []*Rule) bool {
	return !slices.ContainsFunc(parts, func(r *Rule) bool { return !c.covers(r) })
}

// neverMatch reports whether no canonical request is of any of matches; of none,
// every one is.
func neverMatch(matches []HTTPMatch, e Effect) bool {
	if len(matches) == 0 {
		return false
	}
	r := Rule{Effect: e, HTTP: matches}
	all := make([]*HTTPMatch, len(matches))
	for i := range matches {
		all[i] = &matches[i]
	}
	p := newProbes(all)
	for i := range p.all {
		if r.request(&p.all[i].request) {
			return false
		}
	}
	return p.exact
}

// wildTo gives the patterns among the destinations of rules.
func wildTo(rules []Rule) []string {
	var out []string
	for i := range rules {
		for _, p := range rules[i].To {
			if _, exact := p.Exact(); !exact && !p.IsZero() {
				out = append(out, p.String())
			}
		}
	}
	return out
}
