package policy

import (
	"cmp"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Ruleset is an immutable set of compiled rules: the whole mesh's from
// [Compile], or what one sidecar needs from [Ruleset.For] and [NewRuleset]. All
// methods may be called at the same time. A nil Ruleset denies everything.
type Ruleset struct {
	rules     []Rule             // in canonical order: see compareRules
	workloads []CompiledWorkload // ordered by ID; nil on a sidecar
	templates []CompiledWorkload // in the order of the sets
	forms     trie[int]          // :: pattern of a template → index of templates
	domains   []TrustDomain      // foreign ones, by name
	externals []External         // by name
	issuers   []TokenIssuer      // by name
	byName    map[string]int     // :: metadata.name → index of workloads, of templates behind them

	targets []target                // one per distinct To
	of      []int32                 // :: index of rules → index of targets
	dests   map[string]*destination // :: SPIFFE ID that a To names exactly, or of a workload →
	only    *destination            // the one of dests, if it is alone: a sidecar's own
	wild    trie[[]int32]           // :: pattern → indexes of targets

	sources atomic.Pointer[sourceIndex] // made by the first Reach
}

// target is the To shared by some rules.
type target struct {
	to    []identity.Pattern
	rules []int32 // ascending
}

// destination is an ID that requests can name, with its index.
type destination struct {
	id      string
	targets []int32               // those that name it exactly
	index   atomic.Pointer[index] // made by the first Decide
}

// NewRuleset makes a Ruleset from rules in any order; it is how a sidecar builds
// what it received. Rules without From or To match nothing. The rules are
// copied, the patterns in them are shared and must not change.
func NewRuleset(rules []Rule) *Ruleset {
	rules = slices.Clone(rules)
	for i, r := range rules {
		if !slices.IsSorted(r.Ports) {
			rules[i].Ports = slices.Sorted(slices.Values(r.Ports))
		}
	}
	r := newRuleset(rules, nil, nil)
	if r.only != nil { // no request shall wait for its index
		r.prepare(r.only)
	}
	return r
}

// newRuleset takes ownership of rules, of workloads, which are ordered by ID, and
// of templates.
func newRuleset(rules []Rule, workloads, templates []CompiledWorkload) *Ruleset {
	slices.SortFunc(rules, compareRules)
	r := &Ruleset{
		rules: rules, workloads: workloads, templates: templates,
		byName: make(map[string]int, len(workloads)),
		of:     make([]int32, len(rules)),
		dests:  make(map[string]*destination, len(workloads)),
	}
	for i, w := range workloads {
		r.byName[w.Name] = i
		r.dests[w.ID.String()] = &destination{id: w.ID.String()}
	}
	for i, w := range templates {
		r.byName[w.Name] = len(workloads) + i
		*r.forms.add(w.Pattern.String()) = i
	}
	seen := map[listKey]int32{} // :: To → index of targets
	for i, rule := range rules {
		if len(rule.To) == 0 {
			r.of[i] = -1
			continue
		}
		t, ok := seen[keyOf(rule.To)]
		if !ok {
			t = int32(len(r.targets))
			seen[keyOf(rule.To)] = t
			r.targets = append(r.targets, target{to: rule.To})
			r.addTarget(t, rule.To)
		}
		r.of[i] = t
		r.targets[t].rules = append(r.targets[t].rules, int32(i))
	}
	if len(r.dests) == 1 {
		for _, d := range r.dests {
			r.only = d
		}
	}
	return r
}

// addTarget makes target t findable by the IDs and patterns of its To.
func (r *Ruleset) addTarget(t int32, to []identity.Pattern) {
	for _, p := range to {
		if p.IsZero() {
			continue
		}
		id, exact := p.Exact()
		if !exact {
			at := r.wild.add(p.String())
			*at = append(*at, t)
			continue
		}
		d := r.dests[id.String()]
		if d == nil {
			d = &destination{id: id.String()}
			r.dests[id.String()] = d
		}
		d.targets = append(d.targets, t)
	}
}

// listKey tells lists of patterns apart: lists of one by content, longer ones
// by identity, as compiled rules share them.
type listKey struct {
	one  identity.Pattern
	list *identity.Pattern
	n    int
}

// keyOf gives the key of a list that is not empty.
func keyOf(ps []identity.Pattern) listKey {
	if len(ps) == 1 {
		return listKey{one: ps[0], n: 1}
	}
	return listKey{list: &ps[0], n: len(ps)}
}

// compareRules is the canonical order: denies first, those in audit mode after
// them, then allows, then open doors; among each by set, file and line.
// Of several rules that match, the first is the one reported, whatever order
// they travelled in.
func compareRules(a, b Rule) int {
	return cmp.Or(
		cmp.Compare(a.say(), b.say()),
		cmp.Compare(a.Ref.Set, b.Ref.Set),
		cmp.Compare(a.Ref.File, b.Ref.File),
		cmp.Compare(a.Ref.Line, b.Ref.Line),
		cmp.Compare(a.Ref.Policy, b.Ref.Policy),
		cmp.Compare(a.Reason, b.Reason),
		slices.Compare(a.Ports, b.Ports),
		slices.CompareFunc(a.To, b.To, comparePatterns),
		slices.CompareFunc(a.From, b.From, comparePatterns),
		compareBool(a.Anonymous, b.Anonymous),
		a.Since.Compare(b.Since),
		a.Until.Compare(b.Until),
		slices.CompareFunc(a.HTTP, b.HTTP, compareMatches),
	)
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

func compareMatches(a, b HTTPMatch) int {
	return cmp.Or(
		slices.Compare(a.Methods, b.Methods),
		slices.Compare(a.Paths, b.Paths),
		slices.Compare(a.Hosts, b.Hosts),
		slices.CompareFunc(a.Headers, b.Headers, func(a, b HeaderMatch) int {
			return cmp.Or(cmp.Compare(a.Name, b.Name), compareBool(a.Present, b.Present), cmp.Compare(a.Equals, b.Equals))
		}),
		slices.CompareFunc(a.Claims, b.Claims, func(a, b ClaimMatch) int {
			return cmp.Or(cmp.Compare(a.Issuer, b.Issuer), cmp.Compare(a.Claim, b.Claim), cmp.Compare(a.Value, b.Value))
		}),
	)
}

func comparePatterns(a, b identity.Pattern) int { return strings.Compare(a.String(), b.String()) }

// Rules gives the rules in canonical order: denies first, those in audit mode
// after them, then allows, then open doors; among each by set, file and line. The
// caller must not change them.
func (r *Ruleset) Rules() []Rule {
	if r == nil {
		return nil
	}
	return r.rules
}

// Workloads gives every workload that has one ID, ordered by it; nil on a sidecar.
// The caller must not change them.
func (r *Ruleset) Workloads() []CompiledWorkload {
	if r == nil {
		return nil
	}
	return r.workloads
}

// trustDomain is that of the workloads; zero on a sidecar.
func (r *Ruleset) trustDomain() spiffeid.TrustDomain {
	switch {
	case len(r.Workloads()) > 0:
		return r.workloads[0].ID.TrustDomain()
	case len(r.Templates()) > 0:
		return r.templates[0].Pattern.TrustDomain()
	}
	return spiffeid.TrustDomain{}
}

// Templates gives every templated workload; nil on a sidecar. The caller must not
// change them.
func (r *Ruleset) Templates() []CompiledWorkload {
	if r == nil {
		return nil
	}
	return r.templates
}

// Workload gives the workload that has this ID. Of a template it is the one with
// this very ID and with the labels that it has then.
func (r *Ruleset) Workload(id spiffeid.ID) (CompiledWorkload, bool) {
	if i, ok := r.workloadIndex(id.String()); ok {
		return r.workloads[i], true
	}
	if i, ok := r.templateIndex(id.String()); ok {
		return r.templates[i].at(id), true
	}
	return CompiledWorkload{}, false
}

// templateIndex gives the template that an ID matches; no ID matches two.
func (r *Ruleset) templateIndex(id string) (int, bool) {
	found := -1
	if r != nil {
		r.forms.match(id, func(i *int) { found = *i })
	}
	return found, found >= 0
}

func (r *Ruleset) workloadIndex(id string) (int, bool) {
	return slices.BinarySearchFunc(r.Workloads(), id, func(w CompiledWorkload, id string) int {
		return strings.Compare(w.ID.String(), id)
	})
}

// WorkloadByName gives the workload with this metadata.name; a template has no ID.
func (r *Ruleset) WorkloadByName(name string) (CompiledWorkload, bool) {
	if r == nil {
		return CompiledWorkload{}, false
	}
	i, ok := r.byName[name]
	switch {
	case !ok:
		return CompiledWorkload{}, false
	case i < len(r.workloads):
		return r.workloads[i], true
	}
	return r.templates[i-len(r.workloads)], true
}

// For gives the slice that the sidecar of self needs: the rules whose To matches
// self, with their To narrowed to self, so that a sidecar learns nothing of
// others. It decides about requests to self exactly as r does. Its cost is that
// of the rules it returns.
func (r *Ruleset) For(self spiffeid.ID) *Ruleset {
	if r == nil || self.IsZero() {
		return newRuleset(nil, nil, nil)
	}
	indexes := r.rulesTo(self.String())
	rules := make([]Rule, len(indexes))
	to := []identity.Pattern{identity.ExactPattern(self)}
	for n, i := range indexes {
		rules[n] = r.rules[i]
		rules[n].To = to
	}
	return newRuleset(rules, nil, nil)
}

// rulesTo gives the indexes of the rules whose To matches id, ascending.
func (r *Ruleset) rulesTo(id string) []int32 {
	var rules []int32
	for _, t := range r.targetsTo(id) {
		rules = append(rules, r.targets[t].rules...)
	}
	slices.Sort(rules) // each rule belongs to one target
	return rules
}

// targetsTo gives the indexes of the targets that match id, ascending.
func (r *Ruleset) targetsTo(id string) []int32 {
	var targets []int32
	if d := r.dests[id]; d != nil {
		targets = append(targets, d.targets...)
	}
	r.wild.match(id, func(ts *[]int32) { targets = append(targets, *ts...) })
	slices.Sort(targets)
	return slices.Compact(targets)
}
