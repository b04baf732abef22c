package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// broad is how many different values a segment of a path must have been seen with,
// everything else being equal, before a suggestion takes any value there.
const broad = 8

// Suggestion is a rule that would allow what came through open doors.
type Suggestion struct {
	To    CompiledWorkload
	Ports []string
	From  []Selector
	HTTP  []HTTPMatch // by method; empty: the whole connection
	Count int
	Last  time.Time
}

// Suggest gives the least set of rules that would allow what was recorded to pass
// through an open door and no rule allows, by workload, or by a label where
// everybody who has it was seen. Paths are generalised only where a segment was seen
// with many values. Callers that are no workload are named by their ID. Rules are taken
// as they hold at t.
func Suggest(rules *Ruleset, t time.Time, records []Observed) []Suggestion {
	now := rules.At(t)
	seen := map[spiffeid.ID]map[uint16]map[spiffeid.ID][]Observed{} // :: destination → port → source → records
	for _, o := range records {
		if !o.evidence() || o.Effect != Allow || o.Would != Deny || !o.Audited.IsZero() || o.Src.IsZero() {
			continue
		}
		if d := now.Decide(o.Request); d.Would == Allow {
			continue // a rule allows it by now
		}
		if seen[o.Dst] == nil {
			seen[o.Dst] = map[uint16]map[spiffeid.ID][]Observed{}
		}
		if seen[o.Dst][o.Port] == nil {
			seen[o.Dst][o.Port] = map[spiffeid.ID][]Observed{}
		}
		seen[o.Dst][o.Port][o.Src] = append(seen[o.Dst][o.Port][o.Src], o)
	}
	var out []Suggestion
	for _, dst := range slices.SortedFunc(maps.Keys(seen), func(a, b spiffeid.ID) int { return cmp.Compare(a.String(), b.String()) }) {
		w, ok := rules.Destination(dst)
		if !ok {
			continue
		}
		merged := map[string]*Suggestion{} // :: sources and requests → one rule
		var order []*Suggestion
		for _, number := range slices.Sorted(maps.Keys(seen[dst])) {
			port, declared := w.Port(number)
			if !declared {
				continue
			}
			bySource := seen[dst][number]
			s := Suggestion{To: w, Ports: []string{port.Name}, From: rules.selectorsFor(slices.Collect(maps.Keys(bySource)))}
			var requests []Observed
			whole := false
			for _, list := range bySource {
				for _, o := range list {
					s.Count += max(o.Count, 1)
					if o.Time.After(s.Last) {
						s.Last = o.Time
					}
					whole = whole || o.HTTP == nil
					requests = append(requests, o)
				}
			}
			if !whole {
				s.HTTP = generalise(requests)
			}
			key := fmt.Sprint(s.From, s.HTTP)
			if same := merged[key]; same != nil {
				same.Ports = append(same.Ports, port.Name)
				same.Count += s.Count
				if s.Last.After(same.Last) {
					same.Last = s.Last
				}
				continue
			}
			merged[key] = &s
			order = append(order, &s)
		}
		for _, s := range order {
			out = append(out, *s)
		}
	}
	return out
}

// selectorsFor names sources: by a label where it is that of two or more workloads,
// and of nobody else but them, else one by one.
func (r *Ruleset) selectorsFor(ids []spiffeid.ID) []Selector {
	left := map[spiffeid.ID]bool{}
	for _, id := range ids {
		left[id] = true
	}
	byLabel := map[[2]string][]spiffeid.ID{}
	for _, w := range r.Workloads() {
		for k, v := range w.Labels {
			byLabel[[2]string{k, v}] = append(byLabel[[2]string{k, v}], w.ID)
		}
	}
	labels := slices.SortedFunc(maps.Keys(byLabel), func(a, b [2]string) int { // the widest first
		return cmp.Or(len(byLabel[b])-len(byLabel[a]), cmp.Compare(a[0], b[0]), cmp.Compare(a[1], b[1]))
	})
	var out []Selector
	for _, l := range labels {
		all := byLabel[l]
		if len(all) < 2 || slices.ContainsFunc(all, func(id spiffeid.ID) bool { return !left[id] }) || r.templated(l) {
			continue
		}
		out = append(out, Selector{Labels: map[string]string{l[0]: l[1]}})
		for _, id := range all {
			delete(left, id)
		}
	}
	for _, id := range slices.SortedFunc(maps.Keys(left), func(a, b spiffeid.ID) int { return cmp.Compare(a.String(), b.String()) }) {
		w, ok := r.Workload(id)
		switch {
		case ok && !w.Template:
			out = append(out, Selector{Workload: w.Name})
		case id.TrustDomain() == r.trustDomain():
			out = append(out, Selector{ID: id.Path()})
		default:
			out = append(out, Selector{ID: id.String()})
		}
	}
	return out
}

// templated reports whether some template may have the label too: nobody has seen
// all of its identities.
func (r *Ruleset) templated(l [2]string) bool {
	return slices.ContainsFunc(r.Templates(), func(w CompiledWorkload) bool {
		v, ok := w.Labels[l[0]]
		_, variable := variable(v)
		return ok && (variable || v == l[1])
	})
}

// generalise gives the methods and paths of requests.
func generalise(requests []Observed) []HTTPMatch {
	paths := map[string][]string{} // :: method → paths
	for _, o := range requests {
		if CheckPath(o.HTTP.Path) == nil {
			paths[o.HTTP.Method] = append(paths[o.HTTP.Method], o.HTTP.Path)
		}
	}
	byPaths := map[string][]string{} // :: patterns → methods
	for method, list := range paths {
		key := strings.Join(patternsOf(list), "\n")
		byPaths[key] = append(byPaths[key], method)
	}
	var out []HTTPMatch
	for _, key := range slices.Sorted(maps.Keys(byPaths)) {
		slices.Sort(byPaths[key])
		out = append(out, HTTPMatch{Methods: byPaths[key], Paths: strings.Split(key, "\n")})
	}
	return out
}

// patternsOf takes any value for a segment that was seen with many, where the rest
// of the path was the same.
func patternsOf(paths []string) []string {
	slices.Sort(paths)
	paths = slices.Compact(paths)
	for depth := 1; ; depth++ {
		values, deeper := map[string]map[string]bool{}, false // :: the rest → values of the segment
		for _, p := range paths {
			segs := strings.Split(p, "/")
			deeper = deeper || len(segs) > depth
			if len(segs) <= depth || segs[depth] == "" {
				continue
			}
			key := strings.Join(segs[:depth], "/") + "\x00" + strings.Join(segs[depth+1:], "/")
			if values[key] == nil {
				values[key] = map[string]bool{}
			}
			values[key][segs[depth]] = true
		}
		if !deeper {
			return paths
		}
		for i, p := range paths {
			segs := strings.Split(p, "/")
			if len(segs) <= depth || segs[depth] == "" {
				continue
			}
			if key := strings.Join(segs[:depth], "/") + "\x00" + strings.Join(segs[depth+1:], "/"); len(values[key]) >= broad {
				segs[depth] = "*"
				paths[i] = strings.Join(segs, "/")
			}
		}
		slices.Sort(paths)
		paths = slices.Compact(paths)
	}
}

// SuggestionFile writes suggestions as a file of policies, ready to review: one
// Policy for each destination, called after it.
func SuggestionFile(all []Suggestion) []byte {
	var b strings.Builder
	named := map[string]bool{}
	for i, s := range all {
		if i == 0 || all[i-1].To.ID != s.To.ID {
			if i > 0 {
				b.WriteString("---\n")
			}
			to, name := "workload: "+s.To.Name, s.To.Name
			if s.To.Template || !isLabel(s.To.Name) {
				to = fmt.Sprintf("id: %q", s.To.ID.Path())
				name = strings.Trim(strings.ReplaceAll(strings.ToLower(s.To.ID.Path()), "/", "-"), "-")
			}
			if ext, ok := strings.CutPrefix(s.To.Name, "external:"); ok {
				to, name = "external: "+ext, ext
			}
			fmt.Fprintf(&b, "apiVersion: %s\nkind: Policy\nmetadata: {name: seen-%s}\nspec:\n  to: {%s}\n  allow:\n", APIVersion, uniqueLabel(name, named), to)
		}
		fmt.Fprintf(&b, "    # seen %d times, last %s\n    - from: [%s]\n      ports: [%s]\n", s.Count, s.Last.UTC().Format(time.RFC3339), selectorTexts(s.From), strings.Join(s.Ports, ", "))
		for n, m := range s.HTTP {
			if n == 0 {
				b.WriteString("      http:\n")
			}
			quoted := make([]string, len(m.Paths))
			for k, p := range m.Paths {
				quoted[k] = fmt.Sprintf("%q", p)
			}
			fmt.Fprintf(&b, "        - {methods: [%s], paths: [%s]}\n", strings.Join(m.Methods, ", "), strings.Join(quoted, ", "))
		}
	}
	return []byte(b.String())
}

// uniqueLabel makes a name that is a DNS label with its prefix, and unlike those
// before it.
func uniqueLabel(s string, named map[string]bool) string {
	s = strings.Trim(strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			return c
		}
		return '-'
	}, strings.ToLower(s)), "-")
	s = strings.Trim(s[:min(len(s), 50)], "-")
	name := s
	for n := 2; named[name]; n++ {
		name = fmt.Sprintf("%s-%d", s, n)
	}
	named[name] = true
	return name
}

func selectorTexts(from []Selector) string {
	out := make([]string, len(from))
	for i, s := range from {
		switch {
		case s.Workload != "":
			out[i] = "{workload: " + s.Workload + "}"
		case s.ID != "":
			out[i] = fmt.Sprintf("{id: %q}", s.ID)
		default:
			var labels []string
			for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
				labels = append(labels, fmt.Sprintf("%s: %q", k, s.Labels[k]))
			}
			out[i] = "{labels: {" + strings.Join(labels, ", ") + "}}"
		}
	}
	return strings.Join(out, ", ")
}
