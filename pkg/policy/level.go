package policy

import "time"

// Level is what a sidecar understands of the language. It declares its own; one that
// declares none is at level 1.
type Level int

// Levels.
const (
	LevelPorts    Level = 1 + iota // identities and ports
	LevelWindows                   // and windows of time, audit mode, open doors
	LevelRequests                  // and http, grpc, when, anonymous

	// CurrentLevel is that of this version's sidecar.
	CurrentLevel = LevelWindows
)

// ForLevel gives the rules for a sidecar that understands no more than l, and those
// that mean something else there. It never allows what r does not: an allow that
// such a sidecar cannot enforce is left out, or loses the callers that it cannot
// tell; a deny is widened to the whole port and to all times; a deny in audit mode
// is left out, as it would record what it does not say.
func (r *Ruleset) ForLevel(l Level) (*Ruleset, []RuleRef) {
	return r.rewrite(func(rule Rule) (Rule, bool, bool) { return rule.forLevel(l) })
}

// rewrite gives the rules as each makes them, without those that it does not keep,
// and tells which of them are not the same.
func (r *Ruleset) rewrite(each func(Rule) (out Rule, keep, same bool)) (*Ruleset, []RuleRef) {
	var rules []Rule
	var changed []RuleRef
	for i := range r.Rules() {
		rule, keep, same := each(r.rules[i])
		if keep {
			rules = append(rules, rule)
		}
		if !same && (len(changed) == 0 || changed[len(changed)-1] != rule.Ref) {
			changed = append(changed, rule.Ref)
		}
	}
	if len(changed) == 0 {
		return r, nil
	}
	return r.with(rules), changed
}

func (r Rule) forLevel(l Level) (out Rule, keep, same bool) {
	out, keep, same = r, true, true
	if l < LevelRequests && len(r.HTTP) > 0 {
		out.HTTP, same = nil, false
		keep = r.say() == denies
	}
	if l < LevelRequests && r.Anonymous {
		out.Anonymous, same = false, false
	}
	if l < LevelWindows && (!r.Since.IsZero() || !r.Until.IsZero()) {
		out.Since, out.Until, same = time.Time{}, time.Time{}, false
		keep = keep && r.say() == denies
	}
	if l < LevelWindows && r.Audit {
		same = false
		keep = false
	}
	return out, keep, same
}
