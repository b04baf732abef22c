package policy

import (
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Explanation is a Decision with what an operator wants to know about it. It is
// never shown to whoever was refused.
type Explanation struct {
	Request
	Decision

	At        time.Time // zero: every window of time counts as open
	Overruled RuleRef   // the allow that the deciding deny beat, if any
	Nearest   RuleRef   // when no rule decided: the first allow that misses in one field only, if any
	Missed    string    // that field and what the rule names there, as in "port: rule names http (8080)"
	Note      string    // what Decide does not know: "payments declares no port 9999", or ""

	src, dst, port string // as people call them
}

// Explain answers q as [Ruleset.Decide] does and says why. Its cost grows with
// the number of rules.
func (r *Ruleset) Explain(q Request) Explanation { return r.ExplainAt(q, time.Time{}) }

// ExplainAt is Explain for a moment; the zero time counts every window of time as
// open.
func (r *Ruleset) ExplainAt(q Request, t time.Time) Explanation {
	then := r
	if !t.IsZero() {
		then = r.At(t)
	}
	x := Explanation{
		Request: q, Decision: then.Decide(q), At: t,
		src: r.title(q.Src.String()), dst: r.title(q.Dst.String()), port: r.portTitle(q.Dst, q.Port),
	}
	if q.Src.IsZero() {
		x.src = "anonymous"
	}
	x.Note = r.note(q, x)
	switch {
	case x.Effect != Deny || q.Port == 0:
	case !x.Rule.IsZero():
		x.Overruled = then.overruled(q)
	default:
		x.Nearest, x.Missed = r.nearest(q, t)
	}
	return x
}

// note tells what Decide does not know.
func (r *Ruleset) note(q Request, x Explanation) string {
	w, ok := r.Destination(q.Dst)
	switch {
	case !ok && !r.trustDomain().IsZero():
		return "no workload has the ID " + q.Dst.String()
	case !ok:
		return ""
	}
	port, declared := w.Port(q.Port)
	switch {
	case !declared:
		return fmt.Sprintf("%s declares no port %d, so its sidecar refuses it; declared: %s", w.Name, q.Port, portList(w.Ports))
	case q.HTTP != nil && port.Protocol == TCP:
		return fmt.Sprintf("port %s of %s is declared tcp: its sidecar sees no requests there", portList([]Port{port}), w.Name)
	case q.HTTP != nil && x.Effect == Deny:
		if err := q.HTTP.Check(); err != nil {
			return "answered 400 where a rule looks at requests: " + err.Error()
		}
	}
	return ""
}

// overruled gives the first allow that matches q.
func (r *Ruleset) overruled(q Request) RuleRef {
	for i := range r.Rules() {
		rule := &r.rules[i]
		if rule.Effect == Allow && rule.port(q.Port) && rule.to(q.Dst) && rule.from(q.Src) && (len(rule.HTTP) == 0 || q.HTTP != nil && rule.request(q.HTTP)) {
			return rule.Ref
		}
	}
	return RuleRef{}
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
	fmt.Fprintf(&b, "%s: %s → %s port %s", x.Effect, x.src, x.dst, x.port)
	if x.HTTP != nil {
		fmt.Fprintf(&b, " %s %s", x.HTTP.Method, x.HTTP.Path)
	}
	if !x.At.IsZero() {
		fmt.Fprintf(&b, " at %s", x.At.Format(time.RFC3339))
	}
	b.WriteByte('\n')
	switch {
	case x.Effect == Inspect:
		b.WriteString("  each request is decided by itself: ask about one\n")
	case x.Effect == Allow && x.Would == Deny && x.Audited.IsZero():
		fmt.Fprintf(&b, "  let through by the open door of %s; no rule allows it\n", x.Rule)
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
	if !x.Audited.IsZero() {
		fmt.Fprintf(&b, "  it would be denied by %s, which only records\n", x.Audited)
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
