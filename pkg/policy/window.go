package policy

import "time"

// holds reports whether the rule's window of time is open at t.
func (r *Rule) holds(t time.Time) bool {
	return (r.Since.IsZero() || !t.Before(r.Since)) && (r.Until.IsZero() || t.Before(r.Until))
}

// At gives the rules that hold at t, and nothing of those that do not: its
// Decide answers for that moment. Without windows of time it is r itself.
func (r *Ruleset) At(t time.Time) *Ruleset {
	var rules []Rule
	for i := range r.Rules() {
		if r.rules[i].holds(t) {
			rules = append(rules, r.rules[i])
		}
	}
	if len(rules) == len(r.Rules()) {
		return r
	}
	return r.with(rules)
}

// Next gives the first moment after t at which a window of time begins or ends;
// zero for none.
func (r *Ruleset) Next(t time.Time) time.Time {
	var next time.Time
	for i := range r.Rules() {
		for _, edge := range [2]time.Time{r.rules[i].Since, r.rules[i].Until} {
			if edge.After(t) && (next.IsZero() || edge.Before(next)) {
				next = edge
			}
		}
	}
	return next
}

// with gives r with other rules.
func (r *Ruleset) with(rules []Rule) *Ruleset {
	out := newRuleset(rules, r.workloads, r.templates)
	out.domains, out.externals, out.issuers = r.domains, r.externals, r.issuers
	if out.only != nil {
		out.prepare(out.only)
	}
	return out
}
