package policy

import (
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// An Invariant is proved by cases. One is broken where some source, destination,
// port, request and moment exist such that one rule lets it pass and no deny
// refuses it. So each rule that opens something is taken by itself, with each
// selector of its from, and the most harmless identities that it and the
// invariant both select are asked: those that exist, and those that could (see
// identities). This is complete: a deny can only take access away, and among the
// identities that could exist and that two selectors pick, one that has no label
// besides those asked for, and no segment that anybody wrote besides those asked
// for, is matched by the fewest denies. Ports that nobody declared yet are chosen
// in the same way. Times are the spans between the edges of windows, and requests
// one of each kind that the rules tell apart; both are asked through [Ruleset]'s
// own evaluator.

// Prove checks every Invariant of sets, which rs was compiled from, over all
// identities that could exist: workloads have the labels that their document gives
// them; any other ID of the trust domain may have any labels, and within the IDs
// of a Scope those that it grants; IDs of other trust domains have none. What
// passes through an open door passes, and a deny in audit mode refuses nothing.
// Every moment counts, past ones too.
func Prove(rs *Ruleset, sets []*Set) Proof {
	var invariants []Invariant
	for _, s := range sets {
		invariants = append(invariants, s.Invariants...)
	}
	proof := Proof{Invariants: len(invariants)}
	if len(invariants) == 0 || rs == nil {
		return proof
	}
	p := newProver(rs.trustDomain(), sets)
	for _, v := range invariants {
		p.prove(v, &proof)
	}
	return proof
}

// prover holds what one run of [Prove] has learnt.
type prover struct {
	identities
	opens    []clause // allows and open doors
	denies   []clause // those that are enforced
	audits   []clause // those that are not
	outcomes map[string]outcomeOf
}

// clause is a rule as it was written.
type clause struct {
	entry Entry
	from  []chooser
	to    chooser
	ref   RuleRef
	door  bool
}

// outcomeOf says whether an open clause lets something pass past some denies.
type outcomeOf struct {
	passes, unsure bool
	request        *HTTPRequest
	at             time.Time
}

// newProver reads sets, which compile.
func newProver(td spiffeid.TrustDomain, sets []*Set) *prover {
	c := newCompiler(td, sets)
	c.addDomains()
	c.addWorkloads()
	c.addExternals()
	c.readScopes()
	p := &prover{identities: identities{c: c, uses: c.labelUses(), avoided: [2]map[[2]string]bool{{}, {}}}, outcomes: map[string]outcomeOf{}}
	everyone := p.choose(Selector{ID: "/**"})
	for _, s := range c.sets {
		for _, d := range s.Defaults {
			p.opens = append(p.opens, clause{
				entry: Entry{Ports: []PortRef{{All: true}}, Until: d.Until}, from: []chooser{everyone}, to: p.choose(d.To), door: true,
				ref: RuleRef{Set: s.Name, Policy: d.Name, File: d.File, Line: d.Line},
			})
		}
		for _, pol := range s.Policies {
			to := p.choose(pol.To)
			if s.Name != "" { // whom its Scope does not grant may not have them: see beside
				p.avoid(asSource, pol.To)
				p.avoid(asDestination, pol.To)
			}
			for _, e := range pol.Allow {
				p.opens = append(p.opens, p.clause(s, pol, to, e))
			}
			for _, e := range pol.Deny {
				d := p.clause(s, pol, to, e)
				if e.Audit {
					p.audits = append(p.audits, d)
					continue
				}
				p.denies = append(p.denies, d)
				p.avoid(asDestination, pol.To)
				for _, f := range e.From {
					p.avoid(asSource, f)
				}
			}
		}
	}
	p.gather()
	return p
}

func (p *prover) clause(s *Set, pol Policy, to chooser, e Entry) clause {
	c := clause{entry: e, to: to, ref: RuleRef{Set: s.Name, Policy: pol.Name, File: pol.File, Line: e.line}}
	for _, f := range e.From {
		c.from = append(c.from, p.choose(f))
	}
	return c
}

// avoid notes labels that serve a party worse than others do.
func (x *identities) avoid(e end, s Selector) {
	for k, v := range s.Labels {
		x.avoided[e][[2]string{k, v}] = true
	}
}

// prove looks for breaches of one invariant, one per rule at most.
func (p *prover) prove(v Invariant, proof *Proof) {
	from, to := p.choose(v.From), p.choose(v.To)
	memo := [2]map[string][]*Party{{}, {}} // :: selector → who could be chosen
	fail := func(why string) {
		proof.Unproved = append(proof.Unproved, fmt.Sprintf("%s (%s:%d): %s", v.Name, v.File, v.Line, why))
	}
	for i := range p.opens {
		open := &p.opens[i]
		var found *Breach
		for _, f := range open.from {
			sources, ok1 := p.chosen(memo[0], f, from, asSource)
			if len(sources) == 0 {
				continue
			}
			dests, ok2 := p.chosen(memo[1], open.to, to, asDestination)
			if !ok1 || !ok2 {
				fail(fmt.Sprintf("more than %d kinds of identity to tell apart because of %s", maxParties, open.ref))
				return
			}
			b, unsure := p.breach(open, sources, dests, question{f, open.to, from, to})
			if unsure {
				fail(fmt.Sprintf("too many kinds of request to tell apart because of %s", open.ref))
				return
			}
			if b != nil && (found == nil || b.From.Exists && b.To.Exists) {
				found = b
			}
			if found != nil && found.From.Exists && found.To.Exists {
				break // nobody doubts that one
			}
		}
		if found == nil {
			continue
		}
		found.Invariant, found.File, found.Line = v.Name, v.File, v.Line
		if len(proof.Breaches) < maxBreaches {
			proof.Breaches = append(proof.Breaches, *found)
		} else {
			proof.More++
		}
	}
}

// question is the selectors of a rule and of an invariant.
type question struct{ from, to, neverFrom, neverTo chooser }

func (p *prover) chosen(memo map[string][]*Party, rule, never chooser, s end) ([]*Party, bool) {
	key := rule.key()
	if out, ok := memo[key]; ok {
		return out, true
	}
	out, ok := p.both(rule, never, s)
	memo[key] = out
	return out, ok
}

// breach looks for a source, a destination and a port between which open lets
// something pass.
func (p *prover) breach(open *clause, sources, dests []*Party, q question) (*Breach, bool) {
	type way struct {
		to     *Party
		port   Port
		denies []int // indexes of p.denies that are about it
	}
	var ways []way
	seen := map[string]bool{}
	for _, d := range dests {
		for _, port := range p.portsOf(d, open) {
			denies := p.deniesTo(d, port)
			if key := fmt.Sprint(d.key(), denies); !seen[key] {
				seen[key] = true
				ways = append(ways, way{d, port, denies})
			}
		}
	}
	clear(seen)
	for _, s := range sources {
		denied := p.deniesFrom(s)
		key := fmt.Sprint(s.key(), denied)
		if seen[key] {
			continue
		}
		seen[key] = true
		for _, w := range ways {
			pairs := [][2]*Party{{s, w.to}}
			if clash(s, w.to) {
				pairs = pairs[:0]
				for _, both := range p.same(q, s) {
					pairs = append(pairs, [2]*Party{both, both})
				}
			}
			for _, pair := range pairs {
				from, to := denied, w.denies
				if pair[0] != s {
					from, to = p.deniesFrom(pair[0]), p.deniesTo(pair[1], w.port)
				}
				switch o := p.outcome(open, meetSorted(from, to)); {
				case o.unsure:
					return nil, true
				case o.passes:
					return &Breach{From: *pair[0], To: *pair[1], Port: w.port, Request: o.request, At: o.at, Rule: open.ref, Door: open.door}, false
				}
			}
		}
	}
	return nil, false
}

// deniesFrom lists the denies that name a source.
func (p *prover) deniesFrom(s *Party) []int {
	var out []int
	for i := range p.denies {
		if slices.ContainsFunc(p.denies[i].from, func(c chooser) bool { return c.selects(s) }) {
			out = append(out, i)
		}
	}
	return out
}

// deniesTo lists the denies that are about a port of a destination.
func (p *prover) deniesTo(d *Party, port Port) []int {
	var out []int
	for i := range p.denies {
		c := &p.denies[i]
		if c.to.selects(d) && c.names(port) {
			out = append(out, i)
		}
	}
	return out
}

// meetSorted gives what two ascending lists have in common.
func meetSorted(a, b []int) []int {
	var out []int
	for _, i := range a {
		if _, both := slices.BinarySearch(b, i); both {
			out = append(out, i)
		}
	}
	return out
}

// outcome asks the evaluator about an open clause and the denies that meet it. It
// does not depend on who asks whom.
func (p *prover) outcome(open *clause, denies []int) outcomeOf {
	key := fmt.Sprintf("%p %v", open, denies)
	o, known := p.outcomes[key]
	if !known {
		rules := []Rule{open.rule(Allow)}
		for _, i := range denies {
			rules = append(rules, p.denies[i].rule(Deny))
		}
		o = passesSometime(newRuleset(rules, nil, nil))
		p.outcomes[key] = o
	}
	return o
}

// The two that [prover.outcome] asks about, and their port.
const (
	anySource = "spiffe://a/a"
	anyDest   = "spiffe://a/b"
	anyPort   = 1
)

// rule gives the clause as one about the two.
func (c *clause) rule(e Effect) Rule {
	return Rule{
		Ref: c.ref, Effect: e, From: exactly(anySource), To: exactly(anyDest), Ports: []uint16{anyPort},
		HTTP: c.entry.HTTP, Since: c.entry.Since, Until: c.entry.Until,
	}
}

// passesSometime looks for a moment and a request at which something passes.
func passesSometime(rs *Ruleset) outcomeOf {
	edges := windowEdges(rs)
	times := []time.Time{{}}
	if len(edges) > 0 {
		times = append([]time.Time{edges[0].Add(-time.Second)}, edges...)
	}
	unsure := false
	for _, t := range times {
		now := rs
		if !t.IsZero() {
			now = rs.At(t)
		}
		ix := now.newIndex(anyDest)
		conditions := ix.conditions(anySource, anyPort)
		conn := ix.verdict(anySource, anyPort, nil)
		if conn.deny != 0 { // of the whole connection
			continue
		}
		if len(conditions) == 0 {
			if conn.passes() {
				return outcomeOf{passes: true, at: t}
			}
			continue
		}
		matches := make([]*HTTPMatch, len(conditions))
		for i, c := range conditions {
			matches[i] = c.match
		}
		probes := newProbes(matches)
		for i := range probes.all {
			if r := &probes.all[i].request; ix.verdict(anySource, anyPort, r).passes() {
				return outcomeOf{passes: true, at: t, request: r}
			}
		}
		unsure = unsure || !probes.exact
	}
	return outcomeOf{unsure: unsure}
}
