package policy

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func pattern(s string) identity.Pattern {
	p, err := identity.ParsePattern(td.IDString() + s)
	if err != nil {
		panic(err)
	}
	return p
}

// manyRules makes n rules about one destination: one source each, every tenth by
// pattern, every twentieth a deny.
func manyRules(n int) []Rule {
	rules := make([]Rule, n)
	for i := range rules {
		from := fmt.Sprintf("/team-%d/client-%d", i%100, i)
		if i%10 == 9 {
			from = fmt.Sprintf("/team-%d/batch-%d/*", i%100, i)
		}
		rules[i] = Rule{
			Ref:    RuleRef{Policy: "p", File: "f.yaml", Line: i + 1},
			Effect: Allow,
			From:   []identity.Pattern{pattern(from)},
			To:     []identity.Pattern{pattern("/shop/payments")},
			Ports:  []uint16{8080},
			Reason: "because",
		}
		if i%20 == 3 {
			rules[i].Effect = Deny
		}
	}
	return rules
}

// Requests that an exact rule, a pattern, a deny and no rule decides, whatever
// the number of rules.
var manyRequests = map[string]struct {
	q    Request
	want Effect
	line int
}{
	"exact":   {Request{Src: id("/team-2/client-2"), Dst: id("/shop/payments"), Port: 8080}, Allow, 3},
	"pattern": {Request{Src: id("/team-9/batch-9/x"), Dst: id("/shop/payments"), Port: 8080}, Allow, 10},
	"deny":    {Request{Src: id("/team-3/client-3"), Dst: id("/shop/payments"), Port: 8080}, Deny, 4},
	"port":    {Request{Src: id("/team-2/client-2"), Dst: id("/shop/payments"), Port: 8081}, Deny, 0},
	"nobody":  {Request{Src: id("/stranger"), Dst: id("/shop/payments"), Port: 8080}, Deny, 0},
	"nowhere": {Request{Src: id("/team-2/client-2"), Dst: id("/shop/other"), Port: 8080}, Deny, 0},
}

func TestDecideDoesNotAllocate(t *testing.T) {
	rs := NewRuleset(manyRules(1000))
	for name, r := range manyRequests {
		got := rs.Decide(r.q)
		if got.Effect != r.want || got.Rule.Line != r.line {
			t.Errorf("%s: got %+v, want %s by line %d", name, got, r.want, r.line)
		}
		if n := testing.AllocsPerRun(100, func() { rs.Decide(r.q) }); n != 0 {
			t.Errorf("%s: got %v allocations, want none", name, n)
		}
	}
	wild := NewRuleset([]Rule{{Effect: Allow, From: []identity.Pattern{pattern("/**")}, To: []identity.Pattern{pattern("/*/**")}}})
	q := Request{Src: id("/x"), Dst: id("/a/b/c"), Port: 1}
	if n := testing.AllocsPerRun(100, func() { wild.Decide(q) }); n != 0 {
		t.Errorf("destination by pattern: got %v allocations, want none", n)
	}
}

func meshRules(workloads, each int) []Rule {
	var rules []Rule
	for w := range workloads {
		for k := range each {
			rules = append(rules, Rule{
				Ref: RuleRef{File: "f.yaml", Line: len(rules) + 1}, Effect: Allow,
				From: []identity.Pattern{pattern(fmt.Sprintf("/w/%d", (w+k+1)%workloads))},
				To:   []identity.Pattern{pattern(fmt.Sprintf("/w/%d", w))},
			})
		}
	}
	return rules
}

// TestNothingIsDenied covers F1: the zero of everything denies.
func TestNothingIsDenied(t *testing.T) {
	q := Request{Src: id("/a"), Dst: id("/b"), Port: 80}
	var none *Ruleset
	all := []Rule{{Effect: Allow, From: []identity.Pattern{pattern("/**")}, To: []identity.Pattern{pattern("/**")}}}
	for name, got := range map[string]Decision{
		"nil Ruleset":          none.Decide(q),
		"nil For":              none.For(q.Dst).Decide(q),
		"zero Ruleset":         (&Ruleset{}).Decide(q),
		"no rules":             NewRuleset(nil).Decide(q),
		"rule without From":    NewRuleset([]Rule{{Effect: Allow, To: all[0].To}}).Decide(q),
		"rule without To":      NewRuleset([]Rule{{Effect: Allow, From: all[0].From}}).Decide(q),
		"rule of zero pattern": NewRuleset([]Rule{{Effect: Allow, From: []identity.Pattern{{}}, To: []identity.Pattern{{}}}}).Decide(q),
		"zero request":         NewRuleset(all).Decide(Request{}),
		"no source":            NewRuleset(all).Decide(Request{Dst: q.Dst, Port: 80}),
		"no destination":       NewRuleset(all).Decide(Request{Src: q.Src, Port: 80}),
		"no port":              NewRuleset(all).Decide(Request{Src: q.Src, Dst: q.Dst}),
		"For of nobody":        NewRuleset(all).For(spiffeid.ID{}).Decide(q),
		"foreign source":       NewRuleset(all).Decide(Request{Src: spiffeid.RequireFromString("spiffe://other.example/a"), Dst: q.Dst, Port: 80}),
		"trust domain as source": NewRuleset(all).Decide(Request{
			Src: spiffeid.RequireFromString("spiffe://shop.example"), Dst: q.Dst, Port: 80}),
	} {
		if got != (Decision{}) {
			t.Errorf("%s: got %+v, want the zero Decision", name, got)
		}
	}
	if got := NewRuleset(all).Decide(q); got.Effect != Allow {
		t.Errorf("the counter-check: got %+v, want allow", got)
	}
	if none.Reach(q.Src) != nil || none.Rules() != nil || none.Workloads() != nil || !Compare(none, none).Empty() {
		t.Error("a nil Ruleset is not empty")
	}
}

// TestManyRulesShareTheirSelectors compiles rules that select the same
// thousand workloads on both sides, and decides, without naming each pair.
func TestManyRulesShareTheirSelectors(t *testing.T) {
	const workloads, policies = 1000, 1000
	set := &Set{}
	for i := range workloads {
		set.Workloads = append(set.Workloads, Workload{
			Name: fmt.Sprintf("w%d", i), ID: fmt.Sprintf("/w/%d", i),
			Labels: map[string]string{"mesh": "yes"}, Ports: []Port{{Name: "http", Number: 80, Protocol: HTTP}},
		})
	}
	for i := range policies {
		sel := Selector{Labels: map[string]string{"mesh": "yes"}}
		set.Policies = append(set.Policies, Policy{Name: fmt.Sprintf("p%d", i), To: sel, File: "f.yaml",
			Allow: []Entry{{From: []Selector{sel}, Ports: []PortRef{{Name: "http"}}, pos: pos{i + 1, 1}}}})
	}
	rs, err := Compile(td, []*Set{set})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(rs.Rules()); got != policies {
		t.Fatalf("got %d rules, want %d", got, policies)
	}
	if got := len(rs.targets); got != 1 {
		t.Errorf("got %d targets, want 1", got)
	}
	if got := rs.Decide(Request{Src: id("/w/1"), Dst: id("/w/999"), Port: 80}); got.Rule.Line != 1 || got.Effect != Allow {
		t.Errorf("got %+v, want allow by line 1", got)
	}
	if got := len(rs.Reach(id("/w/1"))); got != workloads {
		t.Errorf("reaches %d workloads, want %d", got, workloads)
	}
}

// TestHandMadeSets compiles what no file can say: it never opens anything.
func TestHandMadeSets(t *testing.T) {
	from := []Selector{{ID: "/**"}}
	all := []PortRef{{All: true}}
	for name, p := range map[string]Policy{
		"no ports":       {To: Selector{ID: "/**"}, Allow: []Entry{{From: from}}},
		"zero port":      {To: Selector{ID: "/**"}, Allow: []Entry{{From: from, Ports: []PortRef{{}}}}},
		"zero to":        {Allow: []Entry{{From: from, Ports: all}}},
		"no from":        {To: Selector{ID: "/**"}, Allow: []Entry{{Ports: all}}},
		"zero from":      {To: Selector{ID: "/**"}, Allow: []Entry{{From: []Selector{{}}, Ports: all}}},
		"bad pattern":    {To: Selector{ID: "/**"}, Allow: []Entry{{From: []Selector{{ID: "/**/x"}}, Ports: all}}},
		"bad to":         {To: Selector{ID: "**"}, Allow: []Entry{{From: from, Ports: all}}},
		"unnamed policy": {To: Selector{ID: "/x/**"}, Allow: []Entry{{From: from, Ports: all}}},
	} {
		set := &Set{Workloads: []Workload{{Name: "w", ID: "/w", Ports: []Port{{Name: "http", Number: 80}}}}, Policies: []Policy{p}}
		rs, err := Compile(td, []*Set{set})
		if err != nil {
			continue
		}
		if got := rs.Decide(Request{Src: id("/x"), Dst: id("/w"), Port: 80}); got.Effect != Deny {
			t.Errorf("%s: got %+v, want deny", name, got)
		}
	}
}

func TestCompile100kRules(t *testing.T) {
	set := &Set{}
	for i := range 1000 {
		set.Workloads = append(set.Workloads, Workload{Name: fmt.Sprintf("w%d", i), ID: fmt.Sprintf("/w/%d", i),
			Ports: []Port{{Name: "http", Number: 80, Protocol: HTTP}}})
		p := Policy{Name: fmt.Sprintf("p%d", i), To: Selector{Workload: fmt.Sprintf("w%d", i)}}
		for k := range 100 {
			p.Allow = append(p.Allow, Entry{From: []Selector{{Workload: fmt.Sprintf("w%d", (i+k)%1000)}}, Ports: []PortRef{{Name: "http"}}, pos: pos{k + 1, 1}})
		}
		set.Policies = append(set.Policies, p)
	}
	rs, err := Compile(td, []*Set{set})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(rs.Rules()); got != 100_000 {
		t.Fatalf("got %d rules, want 100000", got)
	}
	if got := len(rs.For(id("/w/5")).Rules()); got != 100 {
		t.Errorf("For gives %d rules, want 100", got)
	}
	if got := rs.Decide(Request{Src: id("/w/7"), Dst: id("/w/5"), Port: 80}); got.Rule.Line != 3 {
		t.Errorf("got %+v, want line 3", got)
	}
	c := compiler{rules: make([]Rule, MaxRules)}
	c.add(Rule{})
	c.add(Rule{})
	if got := c.errs.err(); len(c.rules) != MaxRules || got == nil || !strings.Contains(got.Error(), "more than 200000 rules in all sets") || len(c.errs.errs) != 1 {
		t.Errorf("got %d rules and %v, want %d and one error", len(c.rules), got, MaxRules)
	}
}

// TestConcurrentUse races the calls that make an index.
func TestConcurrentUse(t *testing.T) {
	rs := newRuleset(meshRules(100, 10), []CompiledWorkload{{Workload: Workload{Name: "w", Ports: []Port{{Name: "p", Number: 80}}}, ID: id("/w/5")}}, nil)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 100 {
				q := Request{Src: id(fmt.Sprintf("/w/%d", i)), Dst: id("/w/5"), Port: 80}
				want := reference(rs.Rules(), q)
				if got := rs.Decide(q); got != want {
					t.Errorf("goroutine %d: got %+v, want %+v", g, got, want)
				}
				if got := len(rs.Reach(q.Src)) == 1; got != (want.Effect == Allow) {
					t.Errorf("goroutine %d: reach %v, want %v", g, got, want.Effect)
				}
				rs.For(q.Dst)
			}
		})
	}
	wg.Wait()
}

// TestManyPatternsMatchOneSource goes past what an index remembers for a source.
func TestManyPatternsMatchOneSource(t *testing.T) {
	to := []identity.Pattern{pattern("/shop/payments")}
	for _, segs := range []int{2, 4, 5} { // 3, 15 and 31 patterns
		src := id(strings.Repeat("/a", segs))
		rules := []Rule{{Ref: RuleRef{Line: 1}, Effect: Allow, From: []identity.Pattern{identity.ExactPattern(src)}, To: to, Ports: []uint16{1}}}
		for bits := 1; bits < 1<<segs; bits++ {
			text := ""
			for i := range segs {
				text += []string{"/a", "/*"}[bits>>i&1]
			}
			line := len(rules) + 1
			rules = append(rules, Rule{Ref: RuleRef{Line: line}, Effect: Allow, From: []identity.Pattern{pattern(text)}, To: to, Ports: []uint16{uint16(line)}})
		}
		rs := NewRuleset(rules)
		for _, r := range rules {
			q := Request{Src: src, Dst: id("/shop/payments"), Port: r.Ports[0]}
			if got := rs.Decide(q); got.Effect != Allow || got.Rule.Line != r.Ref.Line {
				t.Errorf("%s, port %d: got %+v, want line %d", src, q.Port, got, r.Ref.Line)
			}
		}
	}
}
