package policy

import (
	"fmt"
	"slices"
)

// DoorTo names what an open door opens: workloads by name, and patterns for whoever
// comes to match them; at most limit names, and then how many more there are.
func (r *Ruleset) DoorTo(door RuleRef, limit int) []string {
	var out []string
	for i := range r.Rules() {
		rule := &r.rules[i]
		if rule.say() != opens || rule.Ref != door {
			continue
		}
		for _, p := range rule.To {
			out = append(out, r.title(p.String()))
		}
	}
	slices.Sort(out)
	out = slices.Compact(out)
	if more := len(out) - limit; more > 0 {
		out = append(out[:limit], fmt.Sprintf("and %d more", more))
	}
	return out
}
