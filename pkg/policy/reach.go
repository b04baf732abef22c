package policy

import (
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// from reports whether the rule names src.
func (r *Rule) from(src spiffeid.ID) bool {
	return matchAny(r.From, src) || r.Anonymous && src.IsZero()
}

// to reports whether the rule is about dst.
func (r *Rule) to(dst spiffeid.ID) bool { return matchAny(r.To, dst) }

// port reports whether the rule names the port.
func (r *Rule) port(n uint16) bool {
	if len(r.Ports) == 0 {
		return true
	}
	_, ok := slices.BinarySearch(r.Ports, n)
	return ok
}

func matchAny(ps []identity.Pattern, id spiffeid.ID) bool {
	for _, p := range ps {
		if p.Match(id) {
			return true
		}
	}
	return false
}

// sourceIndex finds the rules that name a source, and the workloads that a
// target covers.
type sourceIndex struct {
	lists [][]int32          // one per distinct From: indexes of rules
	exact map[string][]int32 // :: SPIFFE ID → indexes of lists
	wild  trie[[]int32]      // :: pattern → indexes of lists
	dests [][]int32          // :: index of targets → indexes of workloads, ascending
}

// Reach gives the IDs of the workloads that src may reach on at least one of
// their declared ports: own ones, ordered, then instances, in their order, then
// foreign ones. Nobody can list the IDs of templates: instances are those to be
// considered, each once; any that is of no template is left out. Reach is empty
// on a sidecar, which knows no workloads.
func (r *Ruleset) Reach(src spiffeid.ID, instances ...spiffeid.ID) []spiffeid.ID {
	if r == nil || src.IsZero() {
		return nil
	}
	x := r.sourceIndex()
	byTarget := map[int32][]int32{} // :: index of targets → rules about it that name src
	byDest := map[int32][]int32{}   // :: index of workloads → the same
	var allowed []int32
	for _, i := range x.rules(src.String()) {
		t := r.of[i]
		if t < 0 {
			continue
		}
		byTarget[t] = append(byTarget[t], i)
		for _, w := range x.dests[t] {
			byDest[w] = append(byDest[w], i)
			if r.rules[i].Effect == Allow {
				allowed = append(allowed, w)
			}
		}
	}
	slices.Sort(allowed)
	var out []spiffeid.ID
	for _, w := range slices.Compact(allowed) {
		if r.opens(byDest[w], r.workloads[w].Ports) {
			out = append(out, r.workloads[w].ID)
		}
	}
	for _, id := range instances {
		_, own := r.workloadIndex(id.String())
		if t, ok := r.templateIndex(id.String()); ok && !own && r.opens(r.about(id, byTarget), r.templates[t].Ports) {
			out = append(out, id)
		}
	}
	for _, d := range r.domains {
		for _, w := range d.Workloads {
			if r.opens(r.about(w.ID, byTarget), w.Ports) {
				out = append(out, w.ID)
			}
		}
	}
	return out
}

// about gives those of some rules that are about dst.
func (r *Ruleset) about(dst spiffeid.ID, byTarget map[int32][]int32) []int32 {
	var rules []int32
	for _, t := range r.targetsTo(dst.String()) {
		rules = append(rules, byTarget[t]...)
	}
	return rules
}

// Opens reports whether src may reach dst, a workload or an ID of a template, on at
// least one of its declared ports.
func (r *Ruleset) Opens(src, dst spiffeid.ID) bool {
	w, ok := r.Destination(dst)
	if !ok || src.IsZero() {
		return false
	}
	var rules []int32
	for _, i := range r.rulesTo(dst.String()) {
		if r.rules[i].from(src) {
			rules = append(rules, i)
		}
	}
	return r.opens(rules, w.Ports)
}

// opens reports whether rules allow, and do not deny, some port, if perhaps not
// for every request.
func (r *Ruleset) opens(rules []int32, ports []Port) bool {
	for _, p := range ports {
		var v verdict
		for _, i := range rules {
			switch rule := &r.rules[i]; {
			case !rule.port(p.Number):
			case len(rule.HTTP) > 0:
				v.when |= rule.say().bit()
			default:
				v.add(rule.say(), i)
			}
		}
		var d Decision
		if r.put(&v, nil, &d); d.Effect != Deny {
			return true
		}
	}
	return false
}

func (x *sourceIndex) rules(src string) []int32 {
	lists := slices.Clone(x.exact[src])
	x.wild.match(src, func(ls *[]int32) { lists = append(lists, *ls...) })
	slices.Sort(lists)
	var out []int32
	for _, l := range slices.Compact(lists) {
		out = append(out, x.lists[l]...)
	}
	return out
}

// sourceIndex gives the index, made by the first call. Two callers may make it
// at once; both results are equal.
func (r *Ruleset) sourceIndex() *sourceIndex {
	if x := r.sources.Load(); x != nil {
		return x
	}
	x := &sourceIndex{exact: map[string][]int32{}, dests: make([][]int32, len(r.targets))}
	seen := map[listKey]int32{}
	for i, rule := range r.rules {
		if len(rule.From) == 0 {
			continue
		}
		l, ok := seen[keyOf(rule.From)]
		if !ok {
			l = int32(len(x.lists))
			seen[keyOf(rule.From)] = l
			x.lists = append(x.lists, nil)
			x.addList(l, rule.From)
		}
		x.lists[l] = append(x.lists[l], int32(i))
	}
	for t, target := range r.targets {
		x.dests[t] = r.covered(target.to)
	}
	r.sources.Store(x)
	return x
}

func (x *sourceIndex) addList(l int32, from []identity.Pattern) {
	for _, p := range from {
		if _, exact := p.Exact(); exact {
			x.exact[p.String()] = append(x.exact[p.String()], l)
		} else if !p.IsZero() {
			at := x.wild.add(p.String())
			*at = append(*at, l)
		}
	}
}

// covered gives the indexes of the workloads that some pattern matches.
func (r *Ruleset) covered(to []identity.Pattern) []int32 {
	var out []int32
	for _, p := range to {
		if _, exact := p.Exact(); exact {
			if w, ok := r.workloadIndex(p.String()); ok {
				out = append(out, int32(w))
			}
			continue
		}
		for w := range r.workloads {
			if p.Match(r.workloads[w].ID) {
				out = append(out, int32(w))
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
