package policy

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

// everyID is everybody whom the patterns of genMeshRule can tell apart: one segment
// longer than the longest of them.
var everyID = func() []spiffeid.ID {
	out := slices.Clone(meshIDs)
	for _, prefix := range meshIDs {
		if strings.Count(prefix.Path(), "/") == 3 {
			for _, end := range []string{"/a", "/z", "/z/z"} {
				out = append(out, spiffeid.RequireFromString(prefix.String()+end))
			}
		}
	}
	return append(out, spiffeid.RequireFromString("spiffe://shop.example"), spiffeid.RequireFromString("spiffe://partner.example"))
}()

// everyRequest has one request of every kind that genMatch can tell apart.
var everyRequest = func() []*HTTPRequest {
	paths := []string{"", "/a/%C3%A9", "/a%20b"}
	for level, n := []string{""}, 0; n < 4; n++ {
		var next []string
		for _, p := range level {
			next = append(next, p+"/a", p+"/b", p+"/x")
		}
		paths = append(paths, next...)
		level = next
	}
	var out []*HTTPRequest
	for _, p := range paths {
		for _, path := range []string{p, p + "/"} {
			for _, method := range []string{"GET", "POST", "DELETE"} {
				for _, host := range []string{"a.example", "b.example", "c.example"} {
					for _, lines := range [][]string{nil, {"x"}, {"y"}, {"z"}, {"x,z"}, {"y,z"}, {"x,y,z"}} {
						for _, groups := range [][]string{nil, {"x"}, {"y"}} {
							out = append(out, &HTTPRequest{
								Method: method, Path: path, Host: host, Header: map[string][]string{"X-Kind": lines},
								Claims: map[string]map[string][]string{"people": {"groups": groups}},
							})
						}
					}
				}
			}
		}
	}
	return slices.DeleteFunc(out, func(h *HTTPRequest) bool { return h.Path == "" })
}()

// escapes looks for something that r matches and no rule of by does, from a moment
// on, by asking about everything.
func escapes(r *Rule, by []Rule, from time.Time) bool {
	asked := map[string]bool{} // :: rules of by that match all but the request
	for _, dst := range everyID {
		if !matchAny(r.To, dst) {
			continue
		}
		for _, src := range everyID {
			if !matchAny(r.From, src) && !(r.Anonymous && src.IsZero()) {
				continue
			}
			for _, port := range []uint16{1, 2, 3, 77, 65535} {
				for half := range 10 {
					at := epoch.Add(time.Duration(half) * 30 * time.Minute)
					if at.Before(from) || !r.holds(at) || len(r.Ports) > 0 && !slices.Contains(r.Ports, port) {
						continue
					}
					key := ""
					whole := false
					var some []*Rule
					for i := range by {
						o := &by[i]
						if matchAny(o.To, dst) && (matchAny(o.From, src) || o.Anonymous && src.IsZero()) && (len(o.Ports) == 0 || slices.Contains(o.Ports, port)) && o.holds(at) {
							key += string(rune('a' + i))
							some = append(some, o)
							whole = whole || len(o.HTTP) == 0
						}
					}
					if whole || asked[key] {
						continue
					}
					asked[key] = true
					for _, h := range everyRequest {
						is := func(o *Rule) bool {
							return slices.ContainsFunc(o.HTTP, func(m HTTPMatch) bool { return about(m, *h, o.Effect) })
						}
						if (len(r.HTTP) == 0 || is(r)) && !slices.ContainsFunc(some, is) {
							return true
						}
					}
				}
			}
		}
	}
	return false
}

// TestShadowedIsExact asks about everything that could be asked: an allow is
// shadowed exactly if a deny matches whatever it matches.
func TestShadowedIsExact(t *testing.T) {
	shadowed := 0
	rapid.Check(t, func(t *rapid.T) {
		rules := rapid.SliceOfN(genMeshRule, 1, 5).Draw(t, "rules")
		for i := range rules {
			rules[i].Ports = slices.Sorted(slices.Values(rules[i].Ports)) // as Compile does
		}
		now := epoch.Add(time.Duration(rapid.IntRange(0, 4).Draw(t, "now")) * 30 * time.Minute)
		rules[0].Effect, rules[0].Audit = Allow, false
		var denies []Rule
		for i := 1; i < len(rules); i++ {
			rules[i].Effect, rules[i].Audit = Deny, false
			denies = append(denies, rules[i])
		}
		if rapid.Bool().Draw(t, "narrow") && len(denies) > 0 { // so that some are
			rules[0].To, rules[0].From, rules[0].Anonymous = denies[0].To, denies[0].From, denies[0].Anonymous
			rules[0].Ports = denies[0].Ports
			if rapid.Bool().Draw(t, "requests") {
				rules[0].HTTP = denies[0].HTTP
			}
		}
		allow := &rules[0]
		if !allow.Until.IsZero() && !allow.Until.After(now) || !allow.Until.IsZero() && !allow.Until.After(allow.Since) || neverMatch(allow.HTTP, Allow) {
			return // reported as such
		}
		c := cover{now: now, vectors: map[string]vector{}, wild: wildTo(denies), about: func(vector) []*Rule {
			var out []*Rule
			for i := range denies {
				out = append(out, &denies[i])
			}
			return out
		}}
		got := c.covers(allow)
		if want := !escapes(allow, denies, now); got != want {
			t.Fatalf("shadowed: got %v, want %v", got, want)
		}
		if got {
			shadowed++
		}
	})
	if shadowed < 5 {
		t.Errorf("only %d of the random allows were shadowed", shadowed)
	}
}

// TestWarnedRulesDoNothing takes away what is warned of as shadowed or redundant: all
// of it together changes no decision about a request.
func TestWarnedRulesDoNothing(t *testing.T) {
	removed := 0
	check(t, func(t *rapid.T) {
		rules := rapid.SliceOfN(genMeshRule, 1, 6).Draw(t, "rules")
		if rapid.IntRange(0, 3).Draw(t, "twice") == 0 {
			rules = append(rules, rules[0])
		}
		now := epoch.Add(time.Duration(rapid.IntRange(0, 4).Draw(t, "now")) * 30 * time.Minute)
		l := linter{rs: NewRuleset(rules), now: now, cover: cover{now: now, vectors: map[string]vector{}}, wildDenies: wildTo(rules)}
		l.of = make([]*lintRule, len(rules))
		for i := range l.rs.rules {
			rule := &l.rs.rules[i]
			r := &lintRule{set: &Set{}, policy: &Policy{}, entry: &Entry{Reason: rule.Reason, pos: pos{line: i + 1}}, effect: rule.Effect, parts: []*Rule{rule}}
			r.dead = neverMatch(rule.HTTP, rule.Effect) || l.over(rule.Until)
			if l.of[i] = r; rule.say() != opens {
				l.rules = append(l.rules, r)
			}
		}
		for _, r := range l.rules {
			l.shadowed(r)
		}
		for _, r := range l.rules {
			l.redundant(r)
		}
		var left []Rule
		for i, rule := range l.rs.rules {
			if !slices.ContainsFunc(l.out, func(w Warning) bool { return w.Line == i+1 }) {
				left = append(left, rule)
			}
		}
		removed += len(rules) - len(left)
		for range 30 {
			q := Request{Src: rapid.SampledFrom(meshIDs).Draw(t, "src"), Dst: rapid.SampledFrom(meshIDs).Draw(t, "dst"), Port: genPort.Draw(t, "port"), HTTP: genHTTP.Draw(t, "http")}
			at := now.Add(time.Duration(rapid.IntRange(0, 6).Draw(t, "moment")) * 30 * time.Minute)
			was, is := reference(l.rs.At(at).Rules(), q), reference(NewRuleset(left).At(at).Rules(), q)
			if q.HTTP.Check() == nil && (was.Effect != is.Effect || was.Would != is.Would) {
				t.Fatalf("%v %+v at %v: got %v, was %v, without what is warned of: %v", q, q.HTTP, at, is, was, l.out)
			}
		}
	})
	if removed < 50 {
		t.Errorf("only %d of the random rules were warned of", removed)
	}
}
