package policy

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// genMesh draws rules about workloads, a template and a foreign workload.
var genMesh = rapid.Custom(func(t *rapid.T) *Ruleset {
	rules := NewRuleset(rapid.SliceOfN(genMeshRule, 1, 7).Draw(t, "rules")).Rules()
	ports := []Port{{Name: "p1", Number: 1, Protocol: HTTP}, {Name: "p2", Number: 2, Protocol: HTTP}}
	template, err := identity.ParsePattern("spiffe://shop.example/b/*")
	if err != nil {
		t.Fatal(err)
	}
	var templates []CompiledWorkload
	if rapid.Bool().Draw(t, "template") {
		templates = append(templates, CompiledWorkload{Workload: Workload{Name: "t", ID: "/b/{x}", Ports: ports}, Template: true, Pattern: template})
	}
	rs := newRuleset(slices.Clone(rules), genWorkloads.Draw(t, "workloads"), templates)
	if len(rs.Workloads()) == 0 {
		rs = newRuleset(slices.Clone(rules), []CompiledWorkload{{Workload: Workload{Name: "w", Ports: ports}, ID: id("/a")}}, templates)
	}
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	rs.domains = []TrustDomain{{Name: "partner", Domain: partner, Workloads: []ForeignWorkload{{ID: spiffeid.RequireFromPath(partner, "/a"), Ports: ports}}}}
	return rs
})

// genMeshRule draws rules that are about somebody.
var genMeshRule = rapid.Custom(func(t *rapid.T) Rule {
	r := genAnyRule.Draw(t, "rule")
	pattern := func(list ...string) identity.Pattern {
		p, err := identity.ParsePattern("spiffe://" + rapid.SampledFrom(list).Draw(t, "pattern"))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	r.To = []identity.Pattern{pattern("shop.example/**", "shop.example/**", "shop.example/a", "shop.example/*", "shop.example/a/b", "shop.example/b/*", "shop.example/b/a", "partner.example/a")}
	r.From = []identity.Pattern{pattern("shop.example/**", "shop.example/**", "shop.example/*", "shop.example/a/*", "shop.example/*/b", "shop.example/b/*", "shop.example/a", "shop.example/b/b", "shop.example/b", "partner.example/**", "partner.example/a")}
	if rapid.Bool().Draw(t, "two") {
		r.From = append(r.From, genPattern.Draw(t, "from"))
	}
	if rapid.Bool().Draw(t, "plain") {
		r.Ports, r.HTTP, r.Audit = nil, nil, false
	}
	if rapid.IntRange(0, 3).Draw(t, "timeless") > 0 {
		r.Since, r.Until = time.Time{}, time.Time{}
	}
	return r
})

// meshIDs is everybody whom the random patterns can tell apart, as far as three
// segments go, and callers without an ID.
var meshIDs = func() []spiffeid.ID {
	out := []spiffeid.ID{{}, id("/c/c")}
	for _, domain := range []string{"shop.example", "partner.example"} {
		level := []string{"spiffe://" + domain}
		for range 3 {
			var next []string
			for _, prefix := range level {
				for _, seg := range []string{"a", "b", "z"} {
					next = append(next, prefix+"/"+seg)
				}
			}
			for _, s := range next {
				out = append(out, spiffeid.RequireFromString(s))
			}
			level = next
		}
	}
	return out
}()

// holds reports whether a place holds an ID.
func (p Place) holds(id spiffeid.ID) bool {
	if id.IsZero() {
		return p.Kind == WithoutAnyID
	}
	v := parseVector(id.String())
	return p.Kind != WithoutAnyID && p.vector.covers(v) && !anyCovers(p.except, v)
}

// check compares ways with Decide: what it lets through is told, by the same rule,
// and nothing else is.
func checkWays(t *rapid.T, rs *Ruleset, ways []Way, q Request, at time.Time) {
	want := reference(rs.At(at).Rules(), q)
	var told []Way
	for _, w := range ways {
		if w.From.holds(q.Src) && w.To.holds(q.Dst) && w.Port.Number == q.Port && !at.Before(w.Since) && (w.Until.IsZero() || at.Before(w.Until)) && saysRequest(w.Requests, q.HTTP) {
			told = append(told, w)
		}
	}
	if want.Effect == Allow && len(told) == 0 {
		t.Fatalf("%v %+v at %v passes (%+v) and is not told in\n%s", q, q.HTTP, at, want, Reached{Ways: ways})
	}
	conn := q
	conn.HTTP = nil
	for _, w := range told {
		want := want
		if w.Requests == "" && want.Effect == Allow { // a request may be allowed by another rule than its connection
			want = reference(rs.At(at).Rules(), conn)
		}
		if want.Effect != Allow || w.Rule != want.Rule || w.Audited != want.Audited || w.Door != (want.Would == Deny && want.Audited.IsZero()) && want.Audited.IsZero() {
			t.Fatalf("%v %+v at %v is told as %+v, and decided %+v", q, q.HTTP, at, w, want)
		}
	}
}

// saysRequest reads what Way.Requests says about a request.
func saysRequest(text string, h *HTTPRequest) bool {
	switch {
	case text == "":
		return true
	case h == nil:
		return false
	case text == "every request":
		return true
	}
	words := strings.Fields(text)
	except := strings.HasPrefix(text, "all methods except ")
	if except {
		words = words[3:]
	}
	n := 0
	for n < len(words) && (words[n] == "GET" || words[n] == "POST") {
		n++
	}
	if n > 0 && slices.Contains(words[:n], h.Method) == except {
		return false
	}
	for _, part := range strings.Split(strings.Join(words[n:], " "), ", ") {
		if part != "" && !saysPart(part, h) {
			return false
		}
	}
	return true
}

// saysPart reads one part: a path, a host, or what the only header and the only
// claim of the random rules are.
func saysPart(part string, h *HTTPRequest) bool {
	any := func(list string, is func(string) bool) bool {
		return list != "" && slices.ContainsFunc(strings.Split(list, " or "), is)
	}
	every := func(list string, is func(string) bool) bool {
		return !slices.ContainsFunc(strings.Split(list, " and "), func(s string) bool { return !is(s) })
	}
	lines := h.Header["X-Kind"]
	member := func(v string) bool {
		return slices.Contains(regexp.MustCompile(" *, *").Split(strings.Trim(strings.Join(lines, ","), " "), -1), v)
	}
	group := func(v string) bool { return slices.Contains(h.Claims["people"]["groups"], v) }
	path := func(patterns string) bool {
		return !slices.ContainsFunc(strings.Split(patterns, " & "), func(p string) bool { return p != "all paths" && !MatchPath(p, h.Path) })
	}
	if part[0] == '/' || strings.HasPrefix(part, "all paths") {
		base, except, _ := strings.Cut(part, " except ")
		return path(base) && !any(except, path)
	}
	if hosts, ok := strings.CutPrefix(part, "hosts not "); ok {
		return !any(hosts, func(s string) bool { return s == h.Host })
	}
	if strings.HasSuffix(part, ".example") {
		return h.Host == part
	}
	name, is, _ := strings.Cut(part, ": ")
	is, not, _ := strings.Cut(is, " but not ")
	if before, after, ok := strings.Cut(part, " not "); ok && is == "" {
		name, not = before, after
	}
	values, more := strings.CutSuffix(is, " and more")
	switch {
	case part == "without x-kind":
		return len(lines) == 0
	case part == "x-kind present":
		return len(lines) > 0
	case name == "x-kind" && is == "":
		return len(lines) > 0 && !any(not, member)
	case name == "x-kind" && !more:
		return len(lines) == 1 && lines[0] == is
	case name == "x-kind":
		alone := len(lines) == 1 && slices.Contains(append(strings.Split(values, " and "), not), lines[0])
		return !alone && every(values, member) && !any(not, member)
	case name == "groups of people":
		return (is == "" || every(values, group)) && !any(not, group)
	}
	panic("unknown words " + part)
}

func TestWaysAreDecide(t *testing.T) {
	check(t, func(t *rapid.T) {
		rs := genMesh.Draw(t, "mesh")
		var q WaysQuestion
		pattern := false
		switch rapid.IntRange(0, 3).Draw(t, "kind") {
		case 0:
			w := rapid.SampledFrom(rs.Workloads()).Draw(t, "to")
			q.To = w.Name
		case 1:
			q.To = "spiffe://partner.example/a"
			if len(rs.Templates()) > 0 {
				q.To = "t"
			}
		case 2:
			src := rapid.SampledFrom(meshIDs).Draw(t, "from")
			if q.From = src.String(); src.IsZero() {
				q.From = "anonymous"
			}
		default:
			q.From, pattern = genPattern.Draw(t, "from").String(), true
		}
		if rapid.Bool().Draw(t, "now") {
			q.Now = epoch.Add(time.Duration(rapid.IntRange(0, 8).Draw(t, "hour")) * 30 * time.Minute)
		}
		got, err := rs.Ways(q)
		if err != nil {
			t.Fatal(err)
		}
		from, _ := identity.ParsePattern(q.From)
		var dsts []spiffeid.ID
		for _, dst := range meshIDs {
			w, ok := rs.Destination(dst)
			if ok && (q.To == "" || w.Name == q.To || dst.String() == q.To) {
				dsts = append(dsts, dst)
			}
		}
		for range 3 {
			dst := rapid.SampledFrom(dsts).Draw(t, "dst")
			w, _ := rs.Destination(dst)
			if len(w.Ports) == 0 {
				continue
			}
			r := Request{Dst: dst, Port: rapid.SampledFrom(w.Ports).Draw(t, "port").Number, HTTP: rapid.OneOf(rapid.Just[*HTTPRequest](nil), genHTTP, genHTTP).Draw(t, "http")}
			if r.HTTP != nil && r.HTTP.Check() != nil {
				continue
			}
			at := epoch.Add(time.Duration(rapid.IntRange(0, 8).Draw(t, "moment")) * 30 * time.Minute)
			if at.Before(q.Now) {
				continue
			}
			for _, src := range meshIDs {
				if r.Src = src; q.From == "" || q.From == "anonymous" && src.IsZero() || from.Match(src) && !(pattern && src.IsZero()) {
					checkWays(t, rs, got.Ways, r, at)
				}
			}
		}
	})
}

// With All, exactly those places are told that hop after hop of single ones lead
// to, by paths that are as short as can be.
func TestWaysOfManyHops(t *testing.T) {
	check(t, func(t *rapid.T) {
		rs := genMesh.Draw(t, "mesh")
		start := rapid.SampledFrom(rs.Workloads()).Draw(t, "start")
		hops := map[string]int{start.Name: 0} // :: name of a destination → hops
		for queue := []string{start.Name}; len(queue) > 0; queue = queue[1:] {
			one, err := rs.Ways(WaysQuestion{From: queue[0]})
			if err != nil {
				t.Fatal(err)
			}
			for _, w := range one.Ways {
				if _, known := hops[w.To.Name]; !known && w.To.Kind != OfTemplate {
					hops[w.To.Name] = hops[queue[0]] + 1
					queue = append(queue, w.To.Name)
				}
			}
		}
		if len(rs.Templates()) > 0 {
			return // a part of a template is no question of its own
		}
		all, err := rs.Ways(WaysQuestion{From: start.Name, All: true})
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]int{start.Name: 0}
		for _, w := range all.Ways {
			if n, known := got[w.To.Name]; !known || len(w.Path)-1 < n {
				got[w.To.Name] = len(w.Path) - 1
			}
			if w.Path[0] != start.Name || w.Path[len(w.Path)-1] != w.To.Name || w.Path[len(w.Path)-2] != w.From.Name {
				t.Fatalf("the path %v of %s → %s", w.Path, w.From, w.To)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(hops) {
			t.Fatalf("got %v, want %v, from %s", got, hops, all)
		}
		// Back again: whoever leads to a place is told as a source of it.
		for name := range hops {
			if name == start.Name {
				continue
			}
			back, err := rs.Ways(WaysQuestion{To: name, All: true})
			if err != nil {
				t.Fatal(err)
			}
			shortest := 0
			for _, w := range back.Ways {
				if w.From.Name == start.Name && (shortest == 0 || len(w.Path)-1 < shortest) {
					shortest = len(w.Path) - 1
				}
			}
			if shortest != hops[name] {
				t.Fatalf("%s is %d hops from %s, and told as %d in\n%s", name, hops[name], start.Name, shortest, back)
			}
		}
	})
}
