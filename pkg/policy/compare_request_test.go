package policy

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// TestCompareMissesNoRequest asks both rule sets about random requests at random
// moments: whatever passes in one and not in the other is told, and a Diff without
// a word means that nothing does.
func TestCompareMissesNoRequest(t *testing.T) {
	dst := spiffeid.RequireFromPath(td, "/a")
	world := []CompiledWorkload{{
		Workload: Workload{Name: "a", Ports: []Port{{Name: "p1", Number: 1, Protocol: HTTP}, {Name: "p2", Number: 2, Protocol: HTTP}}}, ID: dst,
	}}
	rules := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Rule {
		r := genAnyRule.Draw(t, "rule")
		r.To = []identity.Pattern{identity.ExactPattern(dst)}
		r.Anonymous = false // a Diff tells of identities
		return r
	}), 0, 4)
	check(t, func(t *rapid.T) {
		b := rules.Draw(t, "before")
		before, after := withWorkloads(b, world), withWorkloads(b, world)
		if rapid.Bool().Draw(t, "changed") {
			after = withWorkloads(rules.Draw(t, "after"), world)
		}
		d := Compare(before, after)
		passes := func(r *Ruleset, at time.Time, q Request) bool {
			return reference(r.At(at).Rules(), q).Effect == Allow
		}
		for range 40 {
			q := genRequest.Draw(t, "request")
			q.Dst, q.HTTP = dst, genHTTP.Draw(t, "http")
			if q.Src.IsZero() || q.HTTP.Check() != nil || q.Port > 2 || q.Port == 0 {
				continue
			}
			at := epoch.Add(time.Duration(rapid.IntRange(0, 8).Draw(t, "moment")) * 30 * time.Minute)
			was, is := passes(before, at, q), passes(after, at, q)
			list := d.Gained
			if was {
				list = d.Lost
			}
			if was != is && !slices.ContainsFunc(list, func(a Access) bool {
				return a.Port == "p"+string('0'+rune(q.Port)) && names(t, before, after, a.Src).Match(q.Src) && inTime(a, at)
			}) {
				t.Fatalf("%v passes: %v, then %v, at %v (%+v); told is\n%s", q, was, is, at, *q.HTTP, d)
			}
		}
		if slices.EqualFunc(before.Rules(), after.Rules(), func(x, y Rule) bool { return compareRules(x, y) == 0 }) && !d.Empty() {
			t.Fatalf("nothing changed, and told is\n%s", d)
		}
	})
}

// inTime reports whether the time of an Access includes t.
func inTime(a Access, t time.Time) bool {
	words := strings.Fields(a.When)
	for i := 0; i+1 < len(words); i += 2 {
		edge, err := time.Parse(time.RFC3339, words[i+1])
		if err != nil || words[i] == "from" && t.Before(edge) || words[i] == "until" && !t.Before(edge) {
			return false
		}
	}
	return true
}

// Each class of paths has a witness that its patterns match and the others do not,
// and no path is of none.
func TestPathClasses(t *testing.T) {
	check(t, func(t *rapid.T) {
		patterns := rapid.SliceOfNDistinct(genPathPattern, 0, 6, rapid.ID).Draw(t, "patterns")
		classes, exact := pathClasses(patterns)
		if !exact {
			t.Fatal("too many")
		}
		seen := map[string]bool{}
		matched := func(path string) (out string) {
			for i, p := range patterns {
				if MatchPath(p, path) {
					out += string('a' + rune(i))
				}
			}
			return out
		}
		for _, c := range classes {
			if err := CheckPath(c.witness); err != nil {
				t.Fatalf("witness %q: %v", c.witness, err)
			}
			if seen[matched(c.witness)] {
				t.Fatalf("two classes for the patterns of %q", c.witness)
			}
			seen[matched(c.witness)] = true
		}
		for range 50 {
			path := "/" + strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "x", "%C3%A9"}), 1, 5).Draw(t, "path"), "/")
			if rapid.Bool().Draw(t, "slash") {
				path += "/"
			}
			if !seen[matched(path)] {
				t.Fatalf("no class for %q, which matches %q of %q", path, matched(path), patterns)
			}
		}
	})
}
