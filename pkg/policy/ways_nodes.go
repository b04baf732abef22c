package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// destinations lists everything that has declared ports: workloads, what rules
// tell apart of templates, workloads of other trust domains, and externals.
func (s *waySearch) destinations() {
	add := func(p Place, id string, ports []Port) {
		s.nodes = append(s.nodes, wayNode{place: p, id: id, ports: ports, targets: s.r.targetsTo(id)})
	}
	for _, w := range s.r.Workloads() {
		add(s.r.place(w.ID.String()), w.ID.String(), w.Ports)
	}
	atoms, ok := s.r.templateParts()
	if !ok {
		s.notes["too many patterns to tell all IDs of templates apart"] = true
	}
	for i, a := range atoms {
		t := s.r.templateOf(a)
		if _, own := s.r.workloadIndex(a.witness()); own || t < 0 {
			continue
		}
		p := s.r.placeOf(a)
		for j, narrow := range atoms {
			if i != j && a.covers(narrow) && !anyCovers(p.except, narrow) {
				p.except = append(p.except, narrow)
				p.Except = append(p.Except, s.r.title(narrow.String()))
			}
		}
		add(p, a.witness(), s.r.templates[t].Ports)
	}
	for _, d := range s.r.TrustDomains() {
		for _, w := range d.Workloads {
			add(s.r.place(w.ID.String()), w.ID.String(), w.Ports)
		}
	}
	for _, x := range s.r.Externals() {
		id := x.ID(s.r.trustDomain()).String()
		add(s.r.place(id), id, []Port{x.Port})
	}
	s.at = map[int32][]int{}
	for n := range s.nodes {
		for _, t := range s.nodes[n].targets {
			s.at[t] = append(s.at[t], n)
		}
	}
}

// templateParts gives the regions that rules cut out of the IDs of templates, as
// destinations; false when there are too many.
func (r *Ruleset) templateParts() ([]vector, bool) {
	whole := map[string]vector{}
	for _, t := range r.Templates() {
		whole[t.Pattern.String()] = parseVector(t.Pattern.String())
	}
	if len(whole) == 0 {
		return nil, true
	}
	parts, ok := (&comparison{after: r}).parts(whole)
	cut, all := cutRegions(parts)
	return cut.atoms, ok && all
}

// source gives a destination's IDs as sources.
func (n *wayNode) source() selection {
	if n.place.vector.String() == n.id {
		return selection{id: n.id}
	}
	return selection{vector: &n.place.vector, except: n.place.except}
}

// naming gives the rules that name somebody whom sel means, by target.
func (s *waySearch) naming(sel selection) map[int32][]int32 {
	out := map[int32][]int32{}
	if sel.vector == nil && sel.id != "" {
		for _, i := range s.r.sourceIndex().rules(sel.id) {
			out[s.r.of[i]] = append(out[s.r.of[i]], i)
		}
		return out
	}
	known := map[listKey]bool{} // :: From → whether it names somebody
	for i := range s.r.rules {
		rule := &s.r.rules[i]
		names := sel.vector == nil && rule.Anonymous
		if sel.vector != nil && len(rule.From) > 0 {
			var ok bool
			if names, ok = known[keyOf(rule.From)]; !ok {
				names = slices.ContainsFunc(rule.From, func(p identity.Pattern) bool { return sel.meets(p.String()) })
				known[keyOf(rule.From)] = names
			}
		}
		if names {
			out[s.r.of[i]] = append(out[s.r.of[i]], int32(i))
		}
	}
	return out
}

// candidates gives the nodes that an allow, or an open door, among some rules is
// about.
func (s *waySearch) candidates(byTarget map[int32][]int32) []int {
	found := map[int]bool{}
	for t, rules := range byTarget {
		if slices.ContainsFunc(rules, func(i int32) bool { return s.r.rules[i].Effect == Allow }) {
			for _, n := range s.at[t] {
				found[n] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// nodesOf gives the destinations that are, or may be, somebody of a source.
func (s *waySearch) nodesOf(p Place) []int {
	if p.Kind == OfPattern || p.Kind == WithoutAnyID { // its workloads are listed by themselves
		return nil
	}
	var out []int
	for n := range s.nodes {
		v := s.nodes[n].place.vector
		if s.nodes[n].place.Kind == Outside || !v.meets(p.vector) {
			continue
		}
		both, ok := v, true
		if p.vector.minLen() == v.minLen() && !v.rest && !p.vector.rest {
			both, ok = v.meet(p.vector)
		}
		if ok && !anyCovers(p.except, both) && !anyCovers(s.nodes[n].place.except, both) {
			out = append(out, n)
		}
	}
	return out
}

// source finds who is meant by the source of a question.
func (r *Ruleset) source(ref string) (Place, selection, error) {
	if _, taken := r.WorkloadByName(ref); ref == "anonymous" && !taken {
		return r.place(""), selection{}, nil
	}
	v, err := r.meant(ref)
	if err != nil {
		return Place{}, selection{}, err
	}
	p := r.placeOf(v)
	if p.ID == v.String() && !v.rest && !slices.Contains(v.segs, "*") {
		return p, selection{id: p.ID}, nil
	}
	return p, selection{vector: &v}, nil
}

// ends finds the destinations that are meant by a question.
func (s *waySearch) ends(ref string) ([]int, error) {
	v, err := s.r.meant(ref)
	if err != nil {
		return nil, err
	}
	var out []int
	for n := range s.nodes {
		p := s.nodes[n].place
		if v.covers(p.vector) || p.vector.covers(v) && !anyCovers(p.except, v) {
			out = append(out, n)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s is no workload, no ID of a template, no listed workload of another trust domain and no External: nothing can reach it", ref)
	}
	return out, nil
}

// meant reads a workload's name, external:NAME, an ID or a pattern.
func (r *Ruleset) meant(ref string) (vector, error) {
	td := r.trustDomain()
	if name, ok := strings.CutPrefix(ref, "external:"); ok {
		if i := slices.IndexFunc(r.Externals(), func(x External) bool { return x.Name == name }); i >= 0 {
			return parseVector(r.externals[i].ID(td).String()), nil
		}
		return vector{}, fmt.Errorf("unknown External %q", shorten(name))
	}
	if w, ok := r.WorkloadByName(ref); ok {
		return parseVector(w.pattern().String()), nil
	}
	full := ref
	switch {
	case strings.HasPrefix(ref, "/"):
		full = td.IDString() + ref
	case !strings.HasPrefix(ref, "spiffe://"):
		err := fmt.Errorf("unknown workload %q", shorten(ref))
		if r != nil {
			if hint := didYouMean(ref, slices.Sorted(maps.Keys(r.byName))); hint != "" {
				err = fmt.Errorf("%w: %s", err, hint)
			}
		}
		return vector{}, err
	}
	p, err := identity.ParsePattern(full)
	if err != nil {
		return vector{}, fmt.Errorf("%q: %w", shorten(ref), err)
	}
	known := p.TrustDomain() == td || slices.ContainsFunc(r.TrustDomains(), func(d TrustDomain) bool { return d.Domain == p.TrustDomain() })
	if !known {
		return vector{}, fmt.Errorf("trust domain %s is neither this mesh's, %s, nor that of a TrustDomain document", p.TrustDomain().Name(), td.Name())
	}
	return parseVector(p.String()), nil
}
