package policy

import (
	"slices"
	"time"
)

// windowEdges gives the moments at which some window of time begins or ends.
func windowEdges(sets ...*Ruleset) []time.Time {
	var out []time.Time
	for _, rs := range sets {
		for i := range rs.Rules() {
			for _, t := range [2]time.Time{rs.rules[i].Since, rs.rules[i].Until} {
				if !t.IsZero() {
					out = append(out, t)
				}
			}
		}
	}
	slices.SortFunc(out, time.Time.Compare)
	return slices.CompactFunc(out, time.Time.Equal)
}

// joinSpans makes one Diff of those of the spans that edges cut: an access that
// differs in some of them only says in which.
func joinSpans(edges []time.Time, spans []Diff) Diff {
	out := Diff{Workloads: spans[0].Workloads}
	lists := func(d *Diff) []*[]Access { return []*[]Access{&d.Gained, &d.Lost, &d.Guarded, &d.Unguarded} }
	for _, d := range spans {
		out.adds = out.adds || d.adds
		out.More = max(out.More, d.More)
		for _, dst := range d.inexact {
			if !slices.Contains(out.inexact, dst) {
				out.inexact = append(out.inexact, dst)
			}
		}
	}
	for n, list := range lists(&out) {
		var order []Access
		in := map[Access][]bool{} // :: difference → in which spans
		for i := range spans {
			for _, a := range *lists(&spans[i])[n] {
				if in[a] == nil {
					in[a] = make([]bool, len(spans))
					order = append(order, a)
				}
				in[a][i] = true
			}
		}
		for _, a := range order {
			for _, when := range spanTexts(edges, in[a]) {
				a.When = when
				*list = append(*list, a)
			}
		}
	}
	return out
}

// spanTexts says when something is: "" for always, else one text for each run of
// spans.
func spanTexts(edges []time.Time, in []bool) []string {
	if !slices.Contains(in, false) {
		return []string{""}
	}
	var out []string
	for i := 0; i < len(in); i++ {
		if !in[i] {
			continue
		}
		var since, until time.Time
		if i > 0 {
			since = edges[i-1]
		}
		for i < len(in) && in[i] {
			i++
		}
		if i < len(in) {
			until = edges[i-1]
		}
		out = append(out, windowText(since, until))
	}
	return out
}
