package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// field is a part of a rule that a request can miss; of several rules that miss in
// one, the one with the lowest is the nearest.
type field uint8

const (
	noField field = iota
	portField
	methodField
	pathField
	hostField
	headerField
	claimField
	timeField
	sourceField
	destinationField
	otherField // more than one
)

// nearest gives the first allow that q misses in one field only, at t.
func (r *Ruleset) nearest(q Request, t time.Time) (RuleRef, string) {
	var best *Rule
	nearest, request := otherField, -1
	for i := range r.Rules() {
		rule := &r.rules[i]
		if rule.Effect != Allow {
			continue
		}
		f, n := rule.misses(q, t)
		if f != noField && f < nearest {
			best, nearest, request = rule, f, n
		}
	}
	if best == nil {
		return RuleRef{}, ""
	}
	return best.Ref, r.missed(best, nearest, request, q)
}

// misses gives the one field in which the rule does not match q: noField for none,
// otherField for several. request is the entry of HTTP that comes nearest.
func (r *Rule) misses(q Request, t time.Time) (f field, request int) {
	for g, ok := range map[field]bool{
		portField: r.port(q.Port), sourceField: r.from(q.Src), destinationField: r.to(q.Dst),
		timeField: t.IsZero() || r.holds(t),
	} {
		f = f.and(g, ok)
	}
	if len(r.HTTP) == 0 || q.HTTP == nil {
		return f, -1
	}
	best := otherField
	for i := range r.HTTP {
		if g := r.HTTP[i].misses(q.HTTP, r.Effect); g < best || i == 0 {
			best, request = g, i
		}
	}
	return f.and(best, best == noField), request
}

// and adds a field that is missed unless ok.
func (f field) and(g field, ok bool) field {
	switch {
	case ok:
		return f
	case f == noField:
		return g
	}
	return otherField
}

func (m *HTTPMatch) misses(h *HTTPRequest, e Effect) field {
	f := noField.
		and(methodField, len(m.Methods) == 0 || slices.Contains(m.Methods, h.Method)).
		and(pathField, len(m.Paths) == 0 || slices.ContainsFunc(m.Paths, func(p string) bool { return MatchPath(p, h.Path) })).
		and(hostField, len(m.Hosts) == 0 || slices.Contains(m.Hosts, h.Host))
	for i := range m.Headers {
		f = f.and(headerField, m.Headers[i].match(h.Header[m.Headers[i].Name], e))
	}
	for _, c := range m.Claims {
		f = f.and(claimField, slices.Contains(h.Claims[c.Issuer][c.Claim], c.Value))
	}
	return f
}

// missed says what the rule names in a field.
func (r *Ruleset) missed(rule *Rule, f field, request int, q Request) string {
	var m HTTPMatch
	if request >= 0 {
		m = rule.HTTP[request]
	}
	switch f {
	case portField:
		names := make([]string, len(rule.Ports))
		for i, p := range rule.Ports {
			names[i] = r.portTitle(q.Dst, p)
		}
		return "port: rule names " + some(names)
	case methodField:
		return "method: rule names " + some(m.Methods)
	case pathField:
		return "path: rule names " + some(m.Paths)
	case hostField:
		return "host: rule names " + some(m.Hosts)
	case headerField:
		return "header: rule names " + some(headerTexts(m.Headers))
	case claimField:
		out := make([]string, len(m.Claims))
		for i, c := range m.Claims {
			out[i] = fmt.Sprintf("%s: %s of %s", c.Claim, c.Value, c.Issuer)
		}
		return "claim: rule names " + some(out)
	case timeField:
		return "time: rule holds " + windowText(rule.Since, rule.Until)
	case sourceField:
		return "source: rule names " + some(r.titles(rule.From))
	}
	return "destination: rule names " + some(r.titles(rule.To))
}

func headerTexts(hs []HeaderMatch) []string {
	out := make([]string, len(hs))
	for i, h := range hs {
		out[i] = strings.ToLower(h.Name) + ": " + h.Equals
		if h.Present {
			out[i] = strings.ToLower(h.Name) + " present"
		}
	}
	return out
}

// windowText gives "from T until T", or less where there is no limit.
func windowText(since, until time.Time) string {
	var parts []string
	if !since.IsZero() {
		parts = append(parts, "from "+since.Format(time.RFC3339))
	}
	if !until.IsZero() {
		parts = append(parts, "until "+until.Format(time.RFC3339))
	}
	return strings.Join(parts, " ")
}
