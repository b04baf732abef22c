package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Compile joins sets into the rules of trust domain td: names, labels and port
// names become IDs, patterns and numbers. It reports, as [Errors], what no
// single set can know: names and IDs taken twice, references to nothing. Without
// a Workload in any set it fails with [ErrNoWorkload]. The order of sets does
// not matter.
func Compile(td spiffeid.TrustDomain, sets []*Set) (*Ruleset, error) {
	c := newCompiler(td, sets)
	sets = c.sets
	for i := range sets[min(1, len(sets)):] {
		if sets[i].Name == sets[i+1].Name {
			return nil, fmt.Errorf("compiling sets: the set %q is given twice", sets[i].Name)
		}
	}
	checkDuplicates(sets, &c.errs)
	c.addDomains()
	c.addWorkloads()
	c.addExternals()
	c.checkEvidence()
	c.readScopes()
	c.checkScopes()
	if len(c.workloads) == 0 && !c.errs.failed() {
		return nil, Errors{{Msg: ErrNoWorkload.Error(), Hint: "define at least one kind: Workload", err: ErrNoWorkload}}
	}
	for _, s := range sets {
		for _, p := range s.Policies {
			c.policy(s, p)
		}
		for _, d := range s.Defaults {
			c.defaults(s, d)
		}
		for _, v := range s.Invariants {
			c.invariant(s, v)
		}
		for _, t := range s.Tests {
			c.test(s, t)
		}
	}
	c.errs.cut = c.errs.full()
	if err := c.errs.err(); err != nil {
		return nil, err
	}
	rs := newRuleset(c.rules, c.workloads[:c.exactN:c.exactN], c.workloads[c.exactN:c.realN:c.realN])
	rs.domains, rs.externals = c.domains, c.externals
	for _, s := range sets {
		rs.issuers = append(rs.issuers, s.TokenIssuers...) // of the root set only
	}
	slices.SortFunc(rs.issuers, func(a, b TokenIssuer) int { return strings.Compare(a.Name, b.Name) })
	return rs, nil
}

func newCompiler(td spiffeid.TrustDomain, sets []*Set) *compiler {
	return &compiler{
		td: td, sets: slices.SortedFunc(slices.Values(sets), func(a, b *Set) int { return strings.Compare(a.Name, b.Name) }),
		from: map[string][]identity.Pattern{}, to: map[string]destinations{}, split: map[string][]group{},
		narrow: map[string]int{}, abroad: map[string]int{}, scopes: map[string]*scope{},
	}
}

// checkDuplicates reports resources of one kind with the same name.
func checkDuplicates(sets []*Set, errs *collector) {
	first := map[[2]string]place{} // :: kind, name → where
	check := func(s *Set, kind, name, file string, p pos) {
		key := [2]string{kind, name}
		was, dup := first[key]
		if name == "" {
			return // reported when it was parsed
		}
		if !dup {
			first[key] = place{s, file, p.line}
			return
		}
		where := fmt.Sprintf("first defined at %s:%d", was.file, was.line)
		if was.set != s {
			where = fmt.Sprintf("first defined in %s at %s:%d", was.set.title(), was.file, was.line)
		}
		errs.add(s.mistake(errs, file, p, where, fmt.Sprintf("duplicate %s %q", kind, name)))
	}
	for _, s := range sets {
		for _, w := range s.Workloads {
			check(s, "Workload", w.Name, w.File, pos{w.Line, w.Col})
		}
		for _, p := range s.Policies {
			check(s, "Policy", p.Name, p.File, pos{p.Line, p.Col})
		}
		for _, d := range s.TrustDomains {
			check(s, "TrustDomain", d.Name, d.File, pos{d.Line, d.Col})
		}
		for _, d := range s.TokenIssuers {
			check(s, "TokenIssuer", d.Name, d.File, pos{d.Line, d.Col})
		}
		for _, d := range s.Externals {
			check(s, "External", d.Name, d.File, pos{d.Line, d.Col})
		}
		for _, d := range s.Defaults {
			check(s, "Defaults", d.Name, d.File, pos{d.Line, d.Col})
		}
		for _, d := range s.Scopes {
			check(s, "Scope", d.Name, d.File, pos{d.Line, d.Col})
		}
		for _, d := range s.Invariants {
			check(s, "Invariant", d.Name, d.File, pos{d.Line, d.Col})
		}
		for _, t := range s.Tests {
			check(s, "PolicyTest", t.Name, t.File, pos{t.Line, t.Col})
		}
	}
}

// title names a set for people.
func (s *Set) title() string {
	if s.Name == "" {
		return "the root set"
	}
	return "set " + s.Name
}

// mistake makes an Error at a place of the set's files.
func (s *Set) mistake(errs *collector, file string, p pos, hint, msg string) *Error {
	e := &Error{File: file, Line: p.line, Col: p.col, Msg: msg, Hint: hint}
	if !errs.full() {
		e.Snippet = snippet(s.sources[file], p)
	}
	return e
}

// compiler holds what one run of [Compile] has learnt.
type compiler struct {
	td        spiffeid.TrustDomain
	sets      []*Set
	errs      collector
	workloads []CompiledWorkload            // ordered by ID, then the templates
	byName    map[string]int                // :: metadata.name → index of workloads
	byID      map[string]int                // :: SPIFFE ID → index of workloads
	byLabel   map[[2]string][]int           // :: key, value → indexes of exact workloads, ascending
	exactN    int                           // so many of workloads have one ID, then come the templates …
	realN     int                           // … and from here on templates with some of their IDs
	scopes    map[string]*scope             // :: set → its Scope
	narrow    map[string]int                // :: template and pattern → index of workloads
	domains   []TrustDomain                 // by name
	externals []External                    // by name
	abroad    map[string]int                // :: foreign SPIFFE ID, or that of an External → index of workloads
	from      map[string][]identity.Pattern // :: text of a from list → what it means
	to        map[string]destinations       // :: text of a to → what it means
	split     map[string][]group            // :: text of a to and ports → what they mean
	rules     []Rule
	tooMany   bool // MaxRules was reported
}

// addWorkloads gives every workload its ID and indexes it.
func (c *compiler) addWorkloads() {
	type owner struct {
		set *Set
		w   Workload
	}
	owners := map[string]owner{} // :: SPIFFE ID → who has it
	for _, s := range c.sets {
		for _, w := range s.Workloads {
			if w.ID == "" || len(w.variables()) > 0 {
				continue // reported when the set was parsed, or a template
			}
			id, err := spiffeid.FromPath(c.td, w.ID)
			if err != nil {
				c.errs.add(s.mistake(&c.errs, w.File, w.id, "", fmt.Sprintf("id %q: %v", shorten(w.ID), err)))
				continue
			}
			was, taken := owners[id.String()]
			switch {
			case len(id.String()) > identity.MaxIDLength:
				c.errs.add(s.mistake(&c.errs, w.File, w.id, "", fmt.Sprintf("the SPIFFE ID is longer than %d bytes", identity.MaxIDLength)))
			case isExternal(id):
				c.errs.add(s.mistake(&c.errs, w.File, w.id, "choose another id", fmt.Sprintf("id %s: what lies below %s is for kind: External", w.ID, externalPrefix)))
			case identity.Reserved(id):
				c.errs.add(s.mistake(&c.errs, w.File, w.id, "choose another id", fmt.Sprintf("id %s is reserved for Sallyport itself", w.ID)))
			case taken:
				c.errs.add(s.mistake(&c.errs, w.File, w.id, fmt.Sprintf("first taken by workload %s of %s at %s:%d", was.w.Name, was.set.title(), was.w.File, was.w.Line),
					fmt.Sprintf("id %s belongs to two workloads", w.ID)))
			default:
				owners[id.String()] = owner{s, w}
				c.workloads = append(c.workloads, CompiledWorkload{Workload: w, ID: id})
			}
		}
	}
	slices.SortFunc(c.workloads, func(a, b CompiledWorkload) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	c.exactN = len(c.workloads)
	c.addTemplates()
	c.realN = len(c.workloads)
	c.byName, c.byID, c.byLabel = map[string]int{}, map[string]int{}, map[[2]string][]int{}
	for i, w := range c.workloads {
		c.byName[w.Name] = i
		if w.Template {
			continue
		}
		c.byID[w.ID.String()] = i
		for k, v := range w.Labels {
			c.byLabel[[2]string{k, v}] = append(c.byLabel[[2]string{k, v}], i)
		}
	}
}

// policy compiles every entry of p.
func (c *compiler) policy(s *Set, p Policy) {
	if c.errs.full() {
		return // looking for more than is shown could take minutes
	}
	to, ok := c.to[p.To.key()]
	if !ok {
		if to, ok = c.selectTo(s, p); !ok {
			return
		}
		c.to[to.text] = to
	}
	if !c.scopedTo(s, p, to) {
		return
	}
	for _, e := range p.Allow {
		c.entry(s, p, to, Allow, e)
	}
	for _, e := range p.Deny {
		c.entry(s, p, to, Deny, e)
	}
}

// entry compiles one rule. Workloads of `to` whose ports differ get rules of
// their own, with the same RuleRef.
func (c *compiler) entry(s *Set, p Policy, to destinations, effect Effect, e Entry) {
	if c.errs.full() {
		return
	}
	from, ok := c.selectFrom(s, p, e)
	if !ok {
		return
	}
	if !c.knownIssuer(s, p, e) {
		return
	}
	rule := Rule{
		Ref:    RuleRef{Set: s.Name, Policy: p.Name, File: p.File, Line: e.line},
		Effect: effect, Audit: e.Audit, From: from, Anonymous: e.anonymous(),
		HTTP: e.HTTP, Since: e.Since, Until: e.Until, Reason: e.Reason, col: e.col,
	}
	groups, ok := c.groups(s, p, to, e)
	if !ok {
		return
	}
	for _, g := range groups {
		rule.To, rule.Ports = g.to, g.ports
		c.add(rule)
	}
}

// add appends a rule within MaxRules.
func (c *compiler) add(r Rule) {
	if len(c.rules) < MaxRules {
		c.rules = append(c.rules, r)
		return
	}
	if !c.tooMany {
		c.tooMany = true
		c.errs.add(&Error{File: r.Ref.File, Line: r.Ref.Line, Col: 1, Msg: fmt.Sprintf("more than %d rules in all sets", MaxRules)})
	}
}
