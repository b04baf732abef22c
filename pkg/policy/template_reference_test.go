package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

// documents is Decide as docs/policy.md tells it of workloads and policies:
// without patterns, by asking what an ID is and which labels it has.
type documents struct{ set *Set }

// who gives the workload that has an ID, with the labels it has there.
func (d documents) who(id spiffeid.ID) (Workload, map[string]string, bool) {
	if id.TrustDomain() != td {
		return Workload{}, nil, false
	}
	got := strings.Split(id.Path(), "/")
next:
	for _, w := range d.set.Workloads {
		values := map[string]string{}
		want := strings.Split(w.ID, "/")
		if len(want) != len(got) {
			continue
		}
		for i, seg := range want {
			if strings.HasPrefix(seg, "{") {
				values[seg] = got[i]
			} else if seg != got[i] {
				continue next
			}
		}
		labels := map[string]string{}
		for k, v := range w.Labels {
			if strings.HasPrefix(v, "{") {
				v = values[v]
			}
			labels[k] = v
		}
		return w, labels, true
	}
	return Workload{}, nil, false
}

func (d documents) selects(sel Selector, id spiffeid.ID) bool {
	w, labels, known := d.who(id)
	switch {
	case sel.ID != "":
		return pattern(sel.ID).Match(id)
	case sel.Workload != "":
		return known && w.Name == sel.Workload
	}
	for k, v := range sel.Labels {
		if !known || labels[k] != v {
			return false
		}
	}
	return true
}

// decide answers for a declared port of a workload.
func (d documents) decide(q Request) Effect {
	w, _, _ := d.who(q.Dst)
	names := func(e Entry) bool {
		return slices.ContainsFunc(e.From, func(s Selector) bool { return d.selects(s, q.Src) }) &&
			slices.ContainsFunc(e.Ports, func(r PortRef) bool {
				p, ok := CompiledWorkload{Workload: w}.refPort(r)
				return r.All || ok && p.Number == q.Port
			})
	}
	effect := Deny
	for _, p := range d.set.Policies {
		if !d.selects(p.To, q.Dst) {
			continue
		}
		if slices.ContainsFunc(p.Deny, names) {
			return Deny
		}
		if slices.ContainsFunc(p.Allow, names) {
			effect = Allow
		}
	}
	return effect
}

// genTemplates draws workloads, templates among them, whose IDs do not overlap.
var genTemplates = rapid.Custom(func(t *rapid.T) []Workload {
	var out []Workload
	for i, ids := range [][]string{
		{"/a/{x}", "/a/a", "/a/b"}, {"/b/{x}/{y}", "/b/a/{x}", "/b/{x}/b", "/b/a/b"}, {"/c"}, {"/b/b/c/{x}"},
	} {
		w := Workload{Name: fmt.Sprintf("w%d", i), ID: rapid.SampledFrom(ids).Draw(t, "id"), Labels: map[string]string{}}
		if rapid.IntRange(0, 3).Draw(t, "there") == 0 {
			continue
		}
		values := []string{"a", "b"}
		for _, v := range w.variables() {
			values = append(values, "{"+v+"}", "{"+v+"}")
		}
		for _, key := range []string{"k", "l"} {
			if rapid.Bool().Draw(t, "labelled") {
				w.Labels[key] = rapid.SampledFrom(values).Draw(t, key)
			}
		}
		for n, name := range []string{"p", "q"} {
			if rapid.Bool().Draw(t, "port") {
				w.Ports = append(w.Ports, Port{Name: name, Number: uint16(n + 1 + i%2), Protocol: TCP})
			}
		}
		out = append(out, w)
	}
	if len(out) == 0 {
		return []Workload{{Name: "w0", ID: "/a/{x}", Ports: []Port{{Name: "p", Number: 1, Protocol: TCP}}}}
	}
	return out
})

// genSet draws policies about workloads, as far as they compile.
func genSet(t *rapid.T, workloads []Workload) (*Set, *Ruleset) {
	set := &Set{Workloads: workloads}
	selector := rapid.Custom(func(t *rapid.T) Selector {
		switch rapid.IntRange(0, 3).Draw(t, "kind") {
		case 0:
			return Selector{Workload: rapid.SampledFrom(workloads).Draw(t, "workload").Name}
		case 1:
			return Selector{ID: rapid.SampledFrom([]string{"/a/*", "/b/**", "/**", "/*/a", "/*/a/*", "/a/a", "/b/a/b", "/b/*/b", "/b/a/**", "/c"}).Draw(t, "id")}
		}
		labels := map[string]string{rapid.SampledFrom([]string{"k", "l"}).Draw(t, "key"): rapid.SampledFrom([]string{"a", "b"}).Draw(t, "value")}
		if rapid.Bool().Draw(t, "two") {
			labels[rapid.SampledFrom([]string{"k", "l"}).Draw(t, "key")] = rapid.SampledFrom([]string{"a", "b"}).Draw(t, "value")
		}
		return Selector{Labels: labels}
	})
	rs, err := Compile(td, []*Set{set})
	if err != nil {
		t.Fatal(err)
	}
	for n := range rapid.IntRange(1, 5).Draw(t, "policies") {
		e := Entry{
			From:  rapid.SliceOfN(selector, 1, 2).Draw(t, "from"),
			Ports: rapid.SampledFrom([][]PortRef{{{All: true}}, {{Name: "p"}}, {{Number: 2}}, {{Name: "q"}, {Number: 1}}}).Draw(t, "ports"),
			pos:   pos{n + 1, 1},
		}
		p := Policy{Name: fmt.Sprintf("p%d", n), File: "f.yaml", To: selector.Draw(t, "to")}
		if rapid.IntRange(0, 2).Draw(t, "deny") == 0 {
			p.Deny = []Entry{e}
		} else {
			p.Allow = []Entry{e}
		}
		set.Policies = append(set.Policies, p)
		if more, err := Compile(td, []*Set{set}); err == nil {
			rs = more
		} else { // it selects nothing, or no port
			set.Policies = set.Policies[:len(set.Policies)-1]
		}
	}
	return set, rs
}

// templateUniverse holds every ID of up to four segments that matters, and some
// that are nobody's.
func templateUniverse() []spiffeid.ID {
	out := []spiffeid.ID{spiffeid.RequireFromString("spiffe://partner.example/a/a"), id("/c"), id("/a"), id("/c/a"), id("/b/b/c/a"), id("/b/b/c/b"), id("/b/b/c/z"), id("/b/b/z/a"),
		id("/z"), id("/z/a"), id("/z/z"), id("/z/a/z"), id("/z/z/z"), id("/z/z/z/z"), id("/b/z/z/z"), id("/z/z/z/z/z"), id("/b/z/z/z/z"), id("/a/z/z/z"), id("/z/a/z/z"), id("/b/a/z/z"), id("/b/a/z/z/z")}
	for _, x := range []string{"a", "b", "z"} {
		out = append(out, id("/a/"+x), id("/b/"+x))
		for _, y := range []string{"a", "b", "z"} {
			out = append(out, id("/b/"+x+"/"+y), id("/a/"+x+"/"+y))
		}
	}
	return out
}

// TestTemplatesAgreeWithDocuments compares what templates and labels compile to
// with what the documents say, for every pair of IDs.
func TestTemplatesAgreeWithDocuments(t *testing.T) {
	universe := templateUniverse()
	rapid.Check(t, func(t *rapid.T) {
		set, rs := genSet(t, genTemplates.Draw(t, "workloads"))
		docs := documents{set}
		for _, src := range universe {
			var reach []spiffeid.ID
			for _, dst := range universe {
				w, labels, known := docs.who(dst)
				got, found := rs.Workload(dst)
				if found != known || known && (got.Name != w.Name || got.ID != dst || !maps.Equal(got.Labels, labels)) {
					t.Fatalf("Workload(%s) = %+v, %v; want %s %v, %v", dst, got, found, w.Name, labels, known)
				}
				reaches := false
				for _, port := range w.Ports {
					q := Request{Src: src, Dst: dst, Port: port.Number}
					want := docs.decide(q)
					reaches = reaches || want == Allow
					for name, r := range map[string]*Ruleset{"Decide": rs, "For": rs.For(dst), "NewRuleset": NewRuleset(rs.Rules())} {
						if got := r.Decide(q).Effect; got != want {
							t.Fatalf("%s of %v: got %s, want %s\n%+v", name, q, got, want, set)
						}
					}
				}
				if reaches {
					reach = append(reach, dst)
				}
			}
			got := rs.Reach(src, universe...)
			slices.SortFunc(got, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
			slices.SortFunc(reach, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
			if !slices.Equal(got, reach) {
				t.Fatalf("Reach(%s): got %v, want %v", src, got, reach)
			}
			for _, dst := range universe {
				if got, want := rs.Opens(src, dst), slices.Contains(reach, dst); got != want {
					t.Fatalf("Opens(%s, %s): got %v, want %v", src, dst, got, want)
				}
			}
		}
	})
}

// TestCompareTemplatesMissesNothing asks about every pair of IDs: what changes
// for one is told, and what is told happens.
func TestCompareTemplatesMissesNothing(t *testing.T) {
	universe := templateUniverse()
	rapid.Check(t, func(t *rapid.T) {
		oldSet, before := genSet(t, genTemplates.Draw(t, "before"))
		newSet, after := genSet(t, genTemplates.Draw(t, "after"))
		d := Compare(before, after)
		gains := false
		told := map[string]bool{}
		for _, dst := range universe {
			was, _, _ := documents{oldSet}.who(dst)
			is, _, _ := documents{newSet}.who(dst)
			for _, port := range unionPorts(was.Ports, is.Ports) {
				for _, src := range universe {
					q := Request{Src: src, Dst: dst, Port: port.Number}
					b, a, list := Deny, Deny, d.Gained
					if slices.ContainsFunc(was.Ports, func(p Port) bool { return p.Number == port.Number }) {
						b = documents{oldSet}.decide(q)
					}
					if slices.ContainsFunc(is.Ports, func(p Port) bool { return p.Number == port.Number }) {
						a = documents{newSet}.decide(q)
					}
					if a == b {
						continue
					}
					if a < b {
						list = d.Lost
					}
					gains = gains || a > b
					found := false
					for i, x := range list {
						if x.Port == port.Name && called(t, before, after, x.Src, src) && called(t, before, after, x.Dst, dst) {
							found = true
							told[fmt.Sprint(a, i)] = true
						}
					}
					if !found {
						t.Fatalf("%s → %s:%s: %s became %s, which is not told in\n%s", src, dst, port.Name, b, a, d)
					}
				}
			}
		}
		if gains && d.OnlyRemoves() {
			t.Fatalf("OnlyRemoves although somebody gains access:\n%s", d)
		}
		for i, x := range d.Gained {
			if !told[fmt.Sprint(Allow, i)] {
				t.Fatalf("%s is told but does not happen:\n%s", x, d)
			}
		}
		for i, x := range d.Lost {
			if !told[fmt.Sprint(Deny, i)] {
				t.Fatalf("%s is told but does not happen:\n%s", x, d)
			}
		}
	})
}

// called reports whether a name in a Diff, of a workload before or after, can
// mean an ID.
func called(t *rapid.T, before, after *Ruleset, name string, id spiffeid.ID) bool {
	found := false
	for _, rs := range []*Ruleset{before, after} {
		if w, ok := rs.WorkloadByName(name); ok {
			if found = true; w.pattern().Match(id) {
				return true
			}
		}
	}
	return !found && names(t, before, after, name).Match(id)
}

// TestHandMadeTemplates compiles what no file can say, and more templates than
// are compared in reasonable time.
func TestHandMadeTemplates(t *testing.T) {
	for name, w := range map[string]Workload{
		"twice":         {ID: "/x/{a}/{a}"},
		"foreign label": {ID: "/x/{a}", Labels: map[string]string{"k": "{b}"}},
		"part":          {ID: "/x/{c}/a{b}"},
		"first":         {ID: "/{a}"},
		"ours":          {ID: "/sallyport/{a}"},
		"wildcard":      {ID: "/x/{a}/*"},
		"rest":          {ID: "/x/{a}/**"},
		"no slash":      {ID: "x/{a}"},
		"unclosed":      {ID: "/x/{a"},
		"empty":         {ID: "/x/{}"},
		"long":          {ID: "/x/{a}/" + strings.Repeat("a", 2048)},
	} {
		w.Name = "w"
		if rs, err := Compile(td, []*Set{{Workloads: []Workload{w}}}); err == nil {
			t.Errorf("%s: compiled to %+v", name, rs.Templates())
		}
	}
	set := &Set{}
	for i := range MaxTemplates + 1 {
		set.Workloads = append(set.Workloads, Workload{Name: fmt.Sprintf("w%d", i), ID: fmt.Sprintf("/w%d/{a}", i)})
	}
	if _, err := Compile(td, []*Set{set}); err == nil || !strings.Contains(err.Error(), "more than 1000 templates in all sets") {
		t.Errorf("got %v", err)
	}
}
