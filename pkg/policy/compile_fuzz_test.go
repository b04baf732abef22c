package policy

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// drawSelector draws what mostly selects some of workloads, and now and then is a
// mistake.
func drawSelector(workloads []Workload) *rapid.Generator[Selector] {
	return rapid.Custom(func(t *rapid.T) Selector {
		kind := rapid.IntRange(0, 40).Draw(t, "kind")
		w := Workload{Name: "nobody"}
		if len(workloads) > 0 {
			w = rapid.SampledFrom(workloads).Draw(t, "workload")
		}
		switch {
		case kind == 40:
			return rapid.SampledFrom([]Selector{{Workload: "nobody"}, {ID: "/z"}, {ID: "spiffe://partner.example/**"}, {ID: "/**/a"}, {}}).Draw(t, "mistake")
		case kind < 15:
			return Selector{Workload: w.Name}
		case kind < 30 && len(w.Labels) > 0:
			labels := maps.Clone(w.Labels)
			if len(labels) == 2 && rapid.Bool().Draw(t, "one label") {
				delete(labels, rapid.SampledFrom([]string{"app", "env"}).Draw(t, "label"))
			}
			return Selector{Labels: labels}
		}
		return Selector{ID: rapid.SampledFrom([]string{"/**", "/*", "/*/*", "/*/b", "/a/*", "/a/**", "/*/**"}).Draw(t, "id")}
	})
}

// drawPort draws what mostly names a port of some of workloads.
func drawPort(workloads []Workload) *rapid.Generator[PortRef] {
	refs := []PortRef{{All: true}, {All: true}}
	for _, w := range workloads {
		for _, p := range w.Ports {
			refs = append(refs, PortRef{All: true}, PortRef{Name: p.Name}, PortRef{Number: p.Number})
		}
	}
	return rapid.Custom(func(t *rapid.T) PortRef {
		if rapid.IntRange(0, 40).Draw(t, "mistake") == 40 {
			return PortRef{Name: "nothing"}
		}
		return rapid.SampledFrom(refs).Draw(t, "port")
	})
}

func drawWorkloads(t *rapid.T) []Workload {
	var out []Workload
	for i, path := range []string{"/a", "/a/b", "/b/b", "/c"} {
		if rapid.IntRange(0, 5).Draw(t, "there") == 5 {
			continue
		}
		w := Workload{Name: fmt.Sprintf("w%d", i), ID: path, Labels: map[string]string{}, Ports: []Port{{Name: "tcp", Number: 9, Protocol: TCP}}}
		if i == 2 {
			w.Ports = nil
		}
		for _, key := range []string{"app", "env"} {
			if v := rapid.SampledFrom([]string{"x", "y", ""}).Draw(t, key); v != "" {
				w.Labels[key] = v
			}
		}
		for _, p := range []Port{{Name: "http", Number: 80, Protocol: HTTP}, {Name: "admin", Number: 81, Protocol: TCP}, {Name: "http", Number: 82, Protocol: HTTP}} {
			if !rapid.Bool().Draw(t, "not") && !slices.ContainsFunc(w.Ports, func(q Port) bool { return q.Name == p.Name }) {
				w.Ports = append(w.Ports, p)
			}
		}
		out = append(out, w)
	}
	return out
}

// drawPolicies draws policies each rule of which has a line of its own in its set.
func drawPolicies(t *rapid.T, set string, workloads []Workload) []Policy {
	line, selector, port := 0, drawSelector(workloads), drawPort(workloads)
	entry := rapid.Custom(func(t *rapid.T) Entry {
		line++
		return Entry{From: rapid.SliceOfN(selector, 1, 2).Draw(t, "from"), Ports: rapid.SliceOfN(port, 1, 2).Draw(t, "ports"), pos: pos{line, 1}}
	})
	var out []Policy
	for i := range rapid.IntRange(1, 3).Draw(t, "policies") {
		out = append(out, Policy{
			Name: fmt.Sprintf("p%d%s", i, set), Set: set, File: "f.yaml", To: selector.Draw(t, "to"),
			Allow: rapid.SliceOfN(entry, 1, 3).Draw(t, "allow"), Deny: rapid.SliceOfN(entry, 0, 1).Draw(t, "deny"),
		})
	}
	return out
}

// meant is what docs/policy.md says of a selector, about one ID.
func meant(sel Selector, workloads []Workload, id spiffeid.ID) bool {
	for _, w := range workloads {
		if td.IDString()+w.ID != id.String() {
			continue
		}
		if sel.Workload == w.Name {
			return true
		}
		all := len(sel.Labels) > 0
		for k, v := range sel.Labels {
			all = all && w.Labels[k] == v
		}
		if all {
			return true
		}
	}
	if sel.ID == "" {
		return false
	}
	full := sel.ID
	if full[0] == '/' {
		full = td.IDString() + full
	}
	p, err := identity.ParsePattern(full)
	return err == nil && p.Match(id)
}

// namesPort reports whether one of refs names a declared port.
func namesPort(refs []PortRef, p Port) bool {
	return slices.ContainsFunc(refs, func(r PortRef) bool { return r.All || r.Name == p.Name || r.Number == p.Number })
}

// compileAndAsk asks what was compiled, and the sets themselves, who reaches what. It
// reports whether anything was compiled, and allowed.
func compileAndAsk(t *rapid.T) (compiled, allowed bool) {
	workloads := drawWorkloads(t)
	sets := []*Set{{Workloads: workloads, Policies: drawPolicies(t, "", workloads)}}
	if rapid.IntRange(0, 3).Draw(t, "two sets") == 0 {
		sets[0].Scopes = []Scope{{Name: "team", IDs: []ScopeID{{ID: "/**"}}}}
		sets = append(sets, &Set{Name: "team", Policies: drawPolicies(t, "team", workloads)})
	}
	rs, err := Compile(td, sets)
	if err != nil {
		var errs Errors
		if !errors.As(err, &errs) || len(errs) == 0 || rs != nil {
			t.Fatalf("got %v and %T", rs, err)
		}
		return false, false
	}
	for _, w := range workloads {
		dst := spiffeid.RequireFromPath(td, w.ID)
		for _, src := range []string{"spiffe://shop.example/a", "spiffe://shop.example/a/b", "spiffe://shop.example/b/b", "spiffe://shop.example/c", "spiffe://shop.example/z", "spiffe://partner.example/a"} {
			for _, port := range w.Ports { // any other is refused by its sidecar, whatever the rules say
				q := Request{Src: spiffeid.RequireFromString(src), Dst: dst, Port: port.Number}
				want, by := written(sets, port, q)
				got := rs.Decide(q)
				allowed = allowed || want == Allow
				if got.Effect != want || got.Rule != by {
					t.Fatalf("%+v: got %s by %s, want %s by %s", q, got.Effect, got.Rule, want, by)
				}
			}
		}
	}
	return true, allowed
}

// written decides by the sets alone.
func written(sets []*Set, port Port, q Request) (Effect, RuleRef) {
	var allows, denies []RuleRef
	for _, s := range sets {
		for _, p := range s.Policies {
			if !meant(p.To, sets[0].Workloads, q.Dst) {
				continue
			}
			take := func(entries []Entry, out *[]RuleRef) {
				for _, e := range entries {
					if namesPort(e.Ports, port) && slices.ContainsFunc(e.From, func(sel Selector) bool { return meant(sel, sets[0].Workloads, q.Src) }) {
						*out = append(*out, RuleRef{Set: s.Name, Policy: p.Name, File: p.File, Line: e.line})
					}
				}
			}
			take(p.Allow, &allows)
			take(p.Deny, &denies)
		}
	}
	first := func(refs []RuleRef) RuleRef {
		return slices.MinFunc(refs, func(a, b RuleRef) int {
			return cmp.Or(cmp.Compare(a.Set, b.Set), cmp.Compare(a.Line, b.Line))
		})
	}
	switch {
	case len(denies) > 0:
		return Deny, first(denies)
	case len(allows) > 0:
		return Allow, first(allows)
	}
	return Deny, RuleRef{}
}

func TestCompileAgreesWithReference(t *testing.T) {
	compiled, allowed := 0, 0
	check(t, func(t *rapid.T) {
		c, a := compileAndAsk(t)
		if c {
			compiled++
		}
		if a {
			allowed++
		}
	})
	if compiled < 15 || allowed < 10 {
		t.Errorf("only %d random sets were compiled, and %d allowed anything", compiled, allowed)
	}
}

func FuzzCompile(f *testing.F) {
	addNoise(f)
	f.Fuzz(rapid.MakeFuzz(func(t *rapid.T) { compileAndAsk(t) }))
}
