package policy

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

var universes = flag.Int("universes", 200, "how many random sets TestProveAgreesWithBruteForce proves")

// TestProveAgreesWithBruteForce takes small sets at random and asks everybody who
// could exist about everybody: whoever passes is a breach that Prove must know of.
// What Prove says is broken is defined for real, compiled and decided.
func TestProveAgreesWithBruteForce(t *testing.T) {
	seed := rand.Uint64()
	held, broken := 0, 0
	for i := range *universes {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		sets := randomSets(r)
		rs, err := Compile(td, sets)
		if err != nil {
			continue
		}
		proof := Prove(rs, sets)
		require.Empty(t, proof.Unproved)
		b := newBrute(sets)
		way, found := b.search(sets[0].Invariants[0])
		if found {
			broken++
		} else {
			held++
		}
		if found != proof.Failed() {
			t.Fatalf("seed %d/%d: brute force found %v (%s); Prove says\n%s\nof\n%s", seed, i, found, way, proof, describeSets(sets))
		}
		for _, x := range proof.Breaches {
			if problem := confirm(sets, x); problem != "" {
				t.Fatalf("seed %d/%d: a breach that is none: %s\n%s\nof\n%s", seed, i, problem, proof, describeSets(sets))
			}
		}
		if found {
			if problem := confirm(sets, way); problem != "" {
				t.Fatalf("seed %d/%d: brute force is wrong: %s\n%s\nof\n%s", seed, i, problem, way, describeSets(sets))
			}
		}
	}
	if held < *universes/50 || broken < *universes/50 {
		t.Errorf("%d invariants held and %d did not: want many of both", held, broken)
	}
	t.Logf("%d held, %d did not", held, broken)
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

var bruteTimes = []time.Time{
	time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
	time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2028, 1, 1, 0, 0, 0, 0, time.UTC),
}

func randomLabels(r *rand.Rand, least int) map[string]string {
	out := map[string]string{}
	for len(out) < least {
		for _, k := range []string{"x", "y"} {
			if r.IntN(3) == 0 {
				out[k] = pick(r, "1", "2")
			}
		}
		if least == 0 {
			break
		}
	}
	return out
}

func randomSelector(r *rand.Rand, workloads []string, more ...Selector) Selector {
	options := []Selector{
		{Labels: randomLabels(r, 1)}, {Labels: randomLabels(r, 1)}, {Labels: randomLabels(r, 1)},
		{ID: pick(r, "/a", "/b", "/a/b", "/a/*", "/**", "/*/b", "/a/**", "/*", "/t/*", "/t/1")}, {ID: "/**"},
	}
	if len(workloads) > 0 {
		options = append(options, Selector{Workload: pick(r, workloads...)})
	}
	return pick(r, append(options, more...)...)
}

// randomSets gives a root set, a set s with a Scope, and an invariant; they need
// not compile.
func randomSets(r *rand.Rand) []*Set {
	root, team := &Set{}, &Set{Name: "s"}
	var names []string
	ports := func() []Port {
		out := []Port{{Name: "p", Number: pick[uint16](r, 80, 81), Protocol: GRPC, Plaintext: bruteTimes[3]}}
		if r.IntN(2) == 0 {
			out = append(out, Port{Name: "q", Number: 161 - out[0].Number, Protocol: pick(r, TCP, GRPC), Plaintext: bruteTimes[3]})
		}
		return out
	}
	for i, id := range []string{"/a", "/a/a", "/a/b", "/b/a"} {
		if r.IntN(2) == 0 {
			w := Workload{Name: fmt.Sprintf("w%d", i), ID: id, Labels: randomLabels(r, 0), Ports: ports()}
			names = append(names, w.Name)
			root.Workloads = append(root.Workloads, w)
		}
	}
	if r.IntN(3) > 0 { // so that most selectors find somebody
		for _, xy := range []string{"11", "12", "21", "22"} {
			root.Workloads = append(root.Workloads, Workload{Name: "z" + xy, ID: "/z/z/" + xy, Labels: map[string]string{"x": xy[:1], "y": xy[1:]}, Ports: []Port{
				{Name: "p", Number: 80, Protocol: GRPC, Plaintext: bruteTimes[3]}, {Name: "q", Number: 81, Protocol: GRPC, Plaintext: bruteTimes[3]}}})
		}
	}
	if r.IntN(3) == 0 {
		root.Workloads = append(root.Workloads, Workload{Name: "t", ID: "/t/{user}", Labels: map[string]string{"x": "{user}", "y": pick(r, "1", "2")}, Ports: ports()})
		names = append(names, "t")
	}
	if r.IntN(2) == 0 {
		s := Scope{Name: "s", IDs: []ScopeID{{ID: pick(r, "/a/**", "/b", "/b/*", "/*/b", "/a")}}, Labels: map[string][]string{}}
		for _, k := range []string{"x", "y"} {
			if r.IntN(2) == 0 {
				s.Labels[k] = pick(r, []string{"1"}, []string{"1", "2"}, []string{"2", "3"})
			}
		}
		root.Scopes = append(root.Scopes, s)
	}
	rule := func(set string, effect Effect, n int) Entry {
		e := Entry{From: []Selector{randomSelector(r, names, Selector{Anonymous: true})}, pos: pos{n, 1}}
		if r.IntN(3) == 0 {
			e.From = append(e.From, randomSelector(r, names))
		}
		e.Ports = pick(r, []PortRef{{All: true}}, []PortRef{{All: true}}, []PortRef{{Name: "p"}}, []PortRef{{Name: "q"}, {Number: 80}})
		if r.IntN(4) == 0 {
			e.HTTP = []HTTPMatch{pick(r, HTTPMatch{Methods: []string{"GET"}}, HTTPMatch{Paths: []string{"/v/*"}}, HTTPMatch{Methods: []string{"GET"}, Paths: []string{"/v"}})}
		}
		if r.IntN(4) == 0 {
			e.Since, e.Until = pick(r, time.Time{}, bruteTimes[1]), pick(r, time.Time{}, bruteTimes[2])
		}
		e.Audit = effect == Deny && r.IntN(5) == 0
		return e
	}
	for i := range 1 + r.IntN(4) {
		p := Policy{Name: fmt.Sprintf("p%d", i), To: randomSelector(r, names), Line: i}
		if i == 0 || r.IntN(3) == 0 {
			p.Allow = append(p.Allow, rule("", Allow, i))
		} else {
			p.Deny = append(p.Deny, rule("", Deny, i))
		}
		if set := root; r.IntN(6) == 0 && len(root.Scopes) > 0 {
			set = team
			p.Set = "s"
			set.Policies = append(set.Policies, p)
		} else {
			set.Policies = append(set.Policies, p)
		}
	}
	if r.IntN(10) == 0 {
		root.Defaults = append(root.Defaults, Defaults{Name: "d", To: randomSelector(r, names), Until: bruteTimes[2]})
	}
	root.Invariants = []Invariant{{Name: "v", From: randomSelector(r, names, Selector{Anonymous: true}), To: randomSelector(r, names)}}
	return []*Set{root, team}
}

// brute knows everybody of a small universe, and decides by the words of the
// language.
type brute struct {
	sets    []*Set
	parties []Party
}

func newBrute(sets []*Set) *brute {
	b := &brute{sets: sets}
	taken := map[string]bool{}
	template := false
	for _, s := range sets {
		for _, w := range s.Workloads {
			if w.ID == "/t/{user}" {
				template = true
				for _, user := range []string{"1", "2", "a", "b", "c"} {
					l := maps.Clone(w.Labels)
					l["x"] = user
					b.parties = append(b.parties, Party{Name: w.Name, ID: spiffeid.RequireFromPath(td, "/t/"+user), Labels: l, Exists: true, ports: w.Ports})
				}
				continue
			}
			taken[w.ID] = true
			b.parties = append(b.parties, Party{Name: w.Name, ID: spiffeid.RequireFromPath(td, w.ID), Labels: w.Labels, Exists: true, ports: w.Ports})
		}
	}
	segs := []string{"a", "b", "c", "t"}
	var ids []string
	for _, x := range segs {
		ids = append(ids, "/"+x)
		for _, y := range append(segs, "1") {
			ids = append(ids, "/"+x+"/"+y, "/"+x+"/"+y+"/a", "/"+x+"/"+y+"/c")
		}
	}
	var ports []Port
	for _, name := range []string{"p", "q", "r"} {
		for _, number := range []uint16{80, 81, 82} {
			ports = append(ports, Port{Name: name, Number: number, Protocol: GRPC, Plaintext: bruteTimes[3]})
		}
	}
	for _, id := range ids {
		if taken[id] || template && strings.HasPrefix(id, "/t/") && strings.Count(id, "/") == 2 {
			continue
		}
		for _, x := range []string{"", "1", "2", "3"} {
			for _, y := range []string{"", "1", "2", "3"} {
				l := map[string]string{"x": x, "y": y}
				maps.DeleteFunc(l, func(_, v string) bool { return v == "" })
				p := Party{ID: spiffeid.RequireFromPath(td, id), Labels: l, ports: ports}
				if b.legal(p) {
					b.parties = append(b.parties, p)
				}
			}
		}
	}
	b.parties = append(b.parties, Party{})
	return b
}

// legal reports whether a Scope, if the ID is of one, grants the labels.
func (b *brute) legal(p Party) bool {
	for _, pol := range b.sets[1].Policies {
		scoped := len(b.sets[0].Scopes) > 0 && matches(b.sets[0].Scopes[0].IDs[0].ID, p.ID)
		if len(pol.To.Labels) > 0 && bruteSelects(pol.To, &p) && !scoped {
			return false // the team's policy would leave its Scope
		}
	}
	for _, s := range b.sets[0].Scopes {
		if !matches(s.IDs[0].ID, p.ID) {
			continue
		}
		for k, values := range s.Labels {
			if !slices.Contains(values, p.Labels[k]) {
				return false
			}
		}
		for k := range p.Labels {
			if _, granted := s.Labels[k]; !granted && rootNames(b.sets[0], k) {
				return false
			}
		}
	}
	return true
}

// rootNames reports whether the root set selects by a label.
func rootNames(s *Set, key string) bool {
	var sels []Selector
	for _, p := range s.Policies {
		sels = append(sels, p.To)
		for _, e := range slices.Concat(p.Allow, p.Deny) {
			sels = append(sels, e.From...)
		}
	}
	for _, d := range s.Defaults {
		sels = append(sels, d.To)
	}
	for _, v := range s.Invariants {
		sels = append(sels, v.From, v.To)
	}
	return slices.ContainsFunc(sels, func(s Selector) bool { _, ok := s.Labels[key]; return ok })
}

func matches(pattern string, id spiffeid.ID) bool {
	p, err := identity.ParsePattern(td.IDString() + pattern)
	return err == nil && p.Match(id)
}

func bruteSelects(s Selector, p *Party) bool {
	switch {
	case s.Anonymous:
		return p.ID.IsZero()
	case s.Workload != "":
		return p.Name == s.Workload
	case s.ID != "":
		return matches(s.ID, p.ID)
	}
	for k, v := range s.Labels {
		if p.Labels[k] != v {
			return false
		}
	}
	return true
}

// bruteRule is an entry with the to of its policy.
type bruteRule struct {
	Entry
	to  Selector
	say say
}

func (b *brute) rules() []bruteRule {
	var out []bruteRule
	for _, s := range b.sets {
		for _, p := range s.Policies {
			for _, e := range p.Allow {
				out = append(out, bruteRule{Entry: e, to: p.To, say: allows})
			}
			for _, e := range p.Deny {
				if !e.Audit {
					out = append(out, bruteRule{Entry: e, to: p.To, say: denies})
				}
			}
		}
		for _, d := range s.Defaults {
			out = append(out, bruteRule{Entry: Entry{From: []Selector{{ID: "/**"}}, Ports: []PortRef{{All: true}}, Until: d.Until}, to: d.To, say: opens})
		}
	}
	return out
}

// search looks for anybody who passes although v says never.
func (b *brute) search(v Invariant) (Breach, bool) {
	rules := b.rules()
	names := make([]map[*Party]bool, len(rules)) // which sources a rule names, and which destinations
	for i, r := range rules {
		names[i] = map[*Party]bool{}
		for n := range b.parties {
			names[i][&b.parties[n]] = slices.ContainsFunc(r.From, func(s Selector) bool { return bruteSelects(s, &b.parties[n]) })
		}
	}
	for d := range b.parties {
		dst := &b.parties[d]
		if dst.ID.IsZero() || !bruteSelects(v.To, dst) {
			continue
		}
		var about []int
		for i, r := range rules {
			if bruteSelects(r.to, dst) {
				about = append(about, i)
			}
		}
		for s := range b.parties {
			src := &b.parties[s]
			if !bruteSelects(v.From, src) || src.ID == dst.ID && s != d {
				continue
			}
			var mine []bruteRule
			for _, i := range about {
				if names[i][src] {
					mine = append(mine, rules[i])
				}
			}
			if x, ok := bruteWay(mine, dst); ok {
				x.From, x.To = *src, *dst
				return x, true
			}
		}
	}
	return Breach{}, false
}

// bruteWay tries every port, moment and request.
func bruteWay(rules []bruteRule, dst *Party) (Breach, bool) {
	if !slices.ContainsFunc(rules, func(r bruteRule) bool { return r.say != denies }) {
		return Breach{}, false
	}
	for _, port := range dst.ports {
		requests := []*HTTPRequest{nil}
		if port.Protocol != TCP {
			requests = nil
			for _, m := range []string{"GET", "PUT"} {
				for _, p := range []string{"/v", "/v/1", "/w"} {
					requests = append(requests, &HTTPRequest{Method: m, Path: p})
				}
			}
		}
		for _, at := range bruteTimes {
			for _, h := range requests {
				passes := slices.ContainsFunc(rules, func(r bruteRule) bool {
					return r.say != denies && bruteHits(r, port, at, h)
				})
				denied := slices.ContainsFunc(rules, func(r bruteRule) bool {
					return r.say == denies && bruteHits(r, port, at, h)
				})
				if passes && !denied {
					return Breach{Port: port, At: at, Request: h}, true
				}
			}
		}
	}
	return Breach{}, false
}

func bruteHits(r bruteRule, port Port, at time.Time, h *HTTPRequest) bool {
	return (r.Since.IsZero() || !at.Before(r.Since)) && (r.Until.IsZero() || at.Before(r.Until)) &&
		slices.ContainsFunc(r.Ports, func(p PortRef) bool {
			return p.All || p.Name != "" && p.Name == port.Name || p.Name == "" && p.Number == port.Number
		}) && (len(r.HTTP) == 0 || h != nil && bruteRequest(r.HTTP[0], h))
}

func bruteRequest(m HTTPMatch, h *HTTPRequest) bool {
	if len(m.Methods) > 0 && m.Methods[0] != h.Method {
		return false
	}
	switch {
	case len(m.Paths) == 0:
		return true
	case m.Paths[0] == "/v":
		return h.Path == "/v"
	}
	return h.Path == "/v/1"
}

// confirm defines whoever does not exist yet, compiles and asks Decide; it gives
// what is wrong, or "".
func confirm(sets []*Set, x Breach) string {
	root, team := *sets[0], *sets[1]
	define := func(p Party, name string, ports []Port) {
		switch {
		case p.Exists || p.ID.IsZero() || p.ID.TrustDomain() != td:
			return
		case isExternal(p.ID):
			x := External{Name: strings.TrimPrefix(p.ID.Path(), "/external/"), Host: "x.example", Port: ports[0]}
			root.Externals = append(slices.Clone(root.Externals), x)
			return
		}
		w := Workload{Name: name, ID: p.ID.Path(), Labels: p.Labels, Ports: ports}
		for _, s := range root.Scopes {
			if matches(s.IDs[0].ID, p.ID) {
				w.Set = "s"
				team.Workloads = append(slices.Clone(team.Workloads), w)
				return
			}
		}
		root.Workloads = append(slices.Clone(root.Workloads), w)
	}
	define(x.To, "dest", []Port{x.Port})
	if x.From.ID != x.To.ID {
		define(x.From, "from", nil)
	}
	rs, err := Compile(td, append([]*Set{&root, &team}, sets[2:]...))
	if err != nil {
		return err.Error()
	}
	if !x.At.IsZero() {
		rs = rs.At(x.At)
	}
	q := Request{Src: x.From.ID, Dst: x.To.ID, Port: x.Port.Number, HTTP: x.Request}
	if q.HTTP == nil && rs.Decide(q).Effect == Inspect { // of an audited deny, or of other allows
		q.HTTP = &HTTPRequest{Method: "GET", Path: "/v"}
	}
	if d := rs.Decide(q); d.Effect != Allow {
		return fmt.Sprintf("decided %+v", d)
	}
	inv := root.Invariants[0]
	if foreign := x.From.ID.TrustDomain() != td && !x.From.ID.IsZero(); !foreign && !bruteSelects(inv.From, &x.From) || !bruteSelects(inv.To, &x.To) {
		return "the invariant does not select them"
	}
	return ""
}

func describeSets(sets []*Set) string {
	var b strings.Builder
	for _, s := range sets {
		fmt.Fprintf(&b, "set %q\n", s.Name)
		for _, w := range s.Workloads {
			fmt.Fprintf(&b, "  workload %s %s %v %v\n", w.Name, w.ID, w.Labels, w.Ports)
		}
		for _, sc := range s.Scopes {
			fmt.Fprintf(&b, "  scope %v %v\n", sc.IDs, sc.Labels)
		}
		for _, p := range s.Policies {
			fmt.Fprintf(&b, "  policy %s to %+v\n    allow %+v\n    deny %+v\n", p.Name, p.To, p.Allow, p.Deny)
		}
		for _, d := range s.Defaults {
			fmt.Fprintf(&b, "  defaults %+v\n", d)
		}
		for _, v := range s.Invariants {
			fmt.Fprintf(&b, "  never %+v to %+v\n", v.From, v.To)
		}
	}
	return b.String()
}
