package policy

import (
	"fmt"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// The universe of the random rule sets: few names, so that rules meet.
var (
	genSeg  = rapid.SampledFrom([]string{"a", "a", "b"})
	genTD   = rapid.SampledFrom([]string{"shop.example", "shop.example", "shop.example", "shop.example", "partner.example"})
	genPort = rapid.SampledFrom([]uint16{1, 2, 3, 65535})
)

var genID = rapid.Custom(func(t *rapid.T) spiffeid.ID {
	td := spiffeid.RequireTrustDomainFromString(genTD.Draw(t, "td"))
	return spiffeid.RequireFromSegments(td, rapid.SliceOfN(genSeg, 1, 3).Draw(t, "segments")...)
})

var genPattern = rapid.Custom(func(t *rapid.T) identity.Pattern {
	s := "spiffe://" + genTD.Draw(t, "td")
	for _, seg := range rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "*"}), 0, 3).Draw(t, "segments") {
		s += "/" + seg
	}
	if rapid.Bool().Draw(t, "rest") {
		s += "/**"
	}
	p, err := identity.ParsePattern(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
})

var genRule = rapid.Custom(func(t *rapid.T) Rule {
	patterns := rapid.SliceOfN(rapid.OneOf(genPattern, rapid.Map(genID, identity.ExactPattern)), 0, 3)
	return Rule{
		Ref: RuleRef{
			Set:    rapid.SampledFrom([]string{"", "team"}).Draw(t, "set"),
			Policy: rapid.SampledFrom([]string{"p", "q"}).Draw(t, "policy"),
			File:   "f.yaml",
			Line:   rapid.IntRange(1, 5).Draw(t, "line"),
		},
		Effect: rapid.SampledFrom([]Effect{Deny, Allow, Allow}).Draw(t, "effect"),
		From:   patterns.Draw(t, "from"),
		To:     patterns.Draw(t, "to"),
		Ports:  rapid.SliceOfN(genPort, 0, 3).Draw(t, "ports"),
		Reason: rapid.SampledFrom([]string{"", "because"}).Draw(t, "reason"),
	}
})

// check runs f five times as often as rapid does by default.
func check(t *testing.T, f func(*rapid.T)) {
	for range 5 {
		rapid.Check(t, f)
	}
}

// genWorkloads draws workloads with ports, ordered by ID.
var genWorkloads = rapid.Custom(func(t *rapid.T) []CompiledWorkload {
	var out []CompiledWorkload
	for i, path := range []string{"/a", "/a/b", "/b", "/c/c"} {
		if !rapid.Bool().Draw(t, "there") {
			continue
		}
		w := CompiledWorkload{Workload: Workload{Name: fmt.Sprintf("w%d", i)}, ID: spiffeid.RequireFromPath(td, path)}
		for _, n := range []uint16{1, 2} {
			if rapid.Bool().Draw(t, "port") {
				w.Ports = append(w.Ports, Port{Name: fmt.Sprintf("p%d", n), Number: n, Protocol: TCP})
			}
		}
		out = append(out, w)
	}
	return out
})

// withWorkloads is what Compile makes of rules and workloads.
func withWorkloads(rules []Rule, workloads []CompiledWorkload) *Ruleset {
	return newRuleset(slices.Clone(NewRuleset(rules).Rules()), workloads, nil)
}

func TestReachAgreesWithDecide(t *testing.T) {
	check(t, func(t *rapid.T) {
		rs := withWorkloads(rapid.SliceOfN(genRule, 0, 12).Draw(t, "rules"), genWorkloads.Draw(t, "workloads"))
		src := genID.Draw(t, "src")
		var want []spiffeid.ID
		for _, w := range rs.Workloads() {
			if slices.ContainsFunc(w.Ports, func(p Port) bool {
				return reference(rs.Rules(), Request{Src: src, Dst: w.ID, Port: p.Number}).Effect == Allow
			}) {
				want = append(want, w.ID)
			}
		}
		if got := rs.Reach(src); !slices.Equal(got, want) {
			t.Fatalf("Reach(%s): got %v, want %v", src, got, want)
		}
	})
}

// TestCompareMissesNothing asks about every ID that the random patterns can tell
// apart: an ID gains, loses, becomes or ceases to be guarded exactly if an entry
// of the Diff says so.
func TestCompareMissesNothing(t *testing.T) {
	var universe []spiffeid.ID
	for _, domain := range []string{"shop.example", "partner.example"} {
		level := []string{"spiffe://" + domain}
		universe = append(universe, spiffeid.RequireFromString(level[0]))
		for range 5 { // one segment longer than the longest pattern
			var next []string
			for _, prefix := range level {
				for _, seg := range []string{"a", "b", "z"} {
					next = append(next, prefix+"/"+seg)
				}
			}
			for _, s := range next {
				universe = append(universe, spiffeid.RequireFromString(s))
			}
			level = next
		}
	}
	check(t, func(t *rapid.T) {
		// Rules about few destinations, with many ways to cross.
		rules := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Rule {
			r := genRule.Draw(t, "rule")
			r.To = []identity.Pattern{identity.ExactPattern(spiffeid.RequireFromPath(td, "/a"))}
			return r
		}), 0, 5)
		before := withWorkloads(rules.Draw(t, "before"), genWorkloads.Draw(t, "workloads before"))
		after := withWorkloads(rules.Draw(t, "after"), genWorkloads.Draw(t, "workloads after"))
		checkDiff(t, before, after, Compare(before, after), universe)
	})
}

func checkDiff(t *rapid.T, before, after *Ruleset, d Diff, universe []spiffeid.ID) {
	dst := spiffeid.RequireFromPath(td, "/a")
	wb, _ := before.Workload(dst)
	wa, _ := after.Workload(dst)
	found := map[change]bool{}
	for _, port := range unionPorts(wb.Ports, wa.Ports) {
		_, pb := wb.Port(port.Number)
		_, pa := wa.Port(port.Number)
		for _, src := range universe {
			q := Request{Src: src, Dst: dst, Port: port.Number}
			var was, is Decision
			if pb {
				was = reference(before.Rules(), q)
			}
			if pa {
				is = reference(after.Rules(), q)
			}
			kind, list := same, d.Gained
			switch {
			case was.Effect < is.Effect:
				kind = gained
			case was.Effect > is.Effect:
				kind, list = lost, d.Lost
			case pa && pb && was.Rule.IsZero() && !is.Rule.IsZero():
				kind, list = guarded, d.Guarded
			case pa && pb && !was.Rule.IsZero() && is.Rule.IsZero():
				kind, list = unguarded, d.Unguarded
			default:
				continue
			}
			found[kind] = true
			if !slices.ContainsFunc(list, func(a Access) bool { return a.Port == port.Name && names(t, before, after, a.Src).Match(src) }) {
				t.Fatalf("change %d of %s → %s:%d is not told in\n%s", kind, src, dst, port.Number, d)
			}
		}
	}
	for kind, list := range map[change][]Access{gained: d.Gained, lost: d.Lost, guarded: d.Guarded, unguarded: d.Unguarded} {
		if len(list) > 0 && !found[kind] {
			t.Fatalf("change %d is told but does not happen:\n%s", kind, d)
		}
	}
	if found[gained] && d.OnlyRemoves() {
		t.Fatalf("OnlyRemoves although somebody gains access:\n%s", d)
	}
	if len(found) > 0 && d.Empty() {
		t.Fatal("Empty although something changed")
	}
}

// names turns the Src of an Access back into a pattern.
func names(t *rapid.T, before, after *Ruleset, src string) identity.Pattern {
	for _, rs := range []*Ruleset{before, after} {
		if w, ok := rs.WorkloadByName(src); ok {
			return identity.ExactPattern(w.ID)
		}
	}
	if src[0] == '/' {
		src = td.IDString() + src
	}
	p, err := identity.ParsePattern(src)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
