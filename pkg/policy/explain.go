package policy

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Explanation is a Decision with what an operator wants to know about it. It is
// never shown to whoever was refused.
type Explanation struct {
	Request
	Decision

	Overruled RuleRef // the allow that the deciding deny beat, if any
	Nearest   RuleRef // when no rule decided: the first allow that misses in one field only, if any
	Missed    string  // that field and what the rule names there, as in "port: rule names http (8080)"
	Note      string  // what Decide does not know: "payments declares no port 9999", or ""

	src, dst, port string // as people call them
}

// Explain answers q as [Ruleset.Decide] does and says why. Its cost grows with
// the number of rules.
func (r *Ruleset) Explain(q Request) Explanation {
	x := Explanation{
		Request: q, Decision: r.Decide(q),
		src: r.title(q.Src.String()), dst: r.title(q.Dst.String()), port: r.portTitle(q.Dst, q.Port),
	}
	if w, ok := r.Destination(q.Dst); ok {
		if _, declared := w.Port(q.Port); !declared {
			x.Note = fmt.Sprintf("%s declares no port %d, so its sidecar refuses it; declared: %s", w.Name, q.Port, portList(w.Ports))
		}
	} else if !r.trustDomain().IsZero() {
		x.Note = "no workload has the ID " + q.Dst.String()
	}
	switch {
	case x.Effect == Allow || q.Port == 0:
	case !x.Rule.IsZero():
		x.Overruled = r.overruled(q)
	default:
		x.Nearest, x.Missed = r.nearest(q)
	}
	return x
}

// overruled gives the first allow that matches q.
func (r *Ruleset) overruled(q Request) RuleRef {
	for i := range r.Rules() {
		rule := &r.rules[i]
		if rule.Effect == Allow && rule.port(q.Port) && rule.to(q.Dst) && rule.from(q.Src) {
			return rule.Ref
		}
	}
	return RuleRef{}
}

// nearest gives the first allow that q misses in one field only: preferably the
// port, then the source, then the destination.
func (r *Ruleset) nearest(q Request) (RuleRef, string) {
	var best *Rule
	bestField := 3 // 0 port, 1 source, 2 destination
	for i := range r.Rules() {
		rule := &r.rules[i]
		if rule.Effect != Allow {
			continue
		}
		missed, field := 0, 0
		for f, ok := range [3]bool{rule.port(q.Port), rule.from(q.Src), rule.to(q.Dst)} {
			if !ok {
				missed, field = missed+1, f
			}
		}
		if missed == 1 && field < bestField {
			best, bestField = rule, field
		}
	}
	switch {
	case best == nil:
		return RuleRef{}, ""
	case bestField == 0:
		names := make([]string, len(best.Ports))
		for i, p := range best.Ports {
			names[i] = r.portTitle(q.Dst, p)
		}
		return best.Ref, "port: rule names " + some(names)
	case bestField == 1:
		return best.Ref, "source: rule names " + some(r.titles(best.From))
	}
	return best.Ref, "destination: rule names " + some(r.titles(best.To))
}

// some joins names and bounds how many are listed.
func some(names []string) string {
	const limit = 5
	if len(names) > limit {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:limit], ", "), len(names)-limit)
	}
	return strings.Join(names, ", ")
}

// title gives the name of the workload with this ID, else the ID or pattern:
// its path where it lies in the workloads' trust domain.
func (r *Ruleset) title(id string) string {
	if i, ok := r.workloadIndex(id); ok {
		return r.workloads[i].Name
	}
	for _, w := range r.Templates() {
		if w.Pattern.String() == id {
			return w.Name
		}
	}
	if td := r.trustDomain(); !td.IsZero() {
		if path, own := strings.CutPrefix(id, td.IDString()+"/"); own {
			return "/" + path
		}
	}
	return id
}

func (r *Ruleset) titles(ps []identity.Pattern) []string {
	out := make([]string, len(ps))
	for i, p := range ps {
		out[i] = r.title(p.String())
	}
	return out
}

// portTitle gives "http (8080)" for a declared port of dst, else the number.
func (r *Ruleset) portTitle(dst spiffeid.ID, n uint16) string {
	w, _ := r.Destination(dst)
	if p, ok := w.Port(n); ok {
		return fmt.Sprintf("%s (%d)", p.Name, n)
	}
	return fmt.Sprint(n)
}

// String tells the verdict on the first line and the why on the following.
func (x Explanation) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s → %s port %s\n", x.Effect, x.src, x.dst, x.port)
	switch {
	case x.Effect == Allow:
		fmt.Fprintf(&b, "  allowed by %s\n", x.Rule)
	case !x.Rule.IsZero():
		fmt.Fprintf(&b, "  denied by %s\n", x.Rule)
	default:
		b.WriteString("  no rule allows it\n")
	}
	if x.Reason != "" {
		fmt.Fprintf(&b, "  reason: %s\n", x.Reason)
	}
	if !x.Overruled.IsZero() {
		fmt.Fprintf(&b, "  it overrules the allow of %s\n", x.Overruled)
	}
	if !x.Nearest.IsZero() {
		fmt.Fprintf(&b, "  nearest rule: %s\n  missed %s\n", x.Nearest, x.Missed)
	}
	if x.Note != "" {
		fmt.Fprintf(&b, "  note: %s\n", x.Note)
	}
	return b.String()
}
