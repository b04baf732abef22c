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

// Observed is one recorded connection or request, or several alike.
type Observed struct {
	Request
	Effect, Would Effect // as it was decided then
	Audited       RuleRef
	Reporter      spiffeid.ID // whose sidecar recorded it
	Time          time.Time   // of the last one
	Count         int         // how many; 0 counts as 1
}

// evidence reports whether the record counts: what a caller says of a destination
// does not. Of an External nobody else can tell.
func (o Observed) evidence() bool {
	return o.Reporter == o.Dst || isExternal(o.Dst) && o.Reporter == o.Src
}

// Change is what would become of some recorded connections or requests.
type Change struct {
	Src, Dst string // as people call them
	Port     string
	Request  string // METHOD and path; "" for connections
	Was      Effect
	Will     Effect // Inspect: it depends on requests that were not recorded
	Rule     RuleRef
	Count    int
	Last     time.Time
}

// String gives one line.
func (c Change) String() string {
	request := ""
	if c.Request != "" {
		request = " " + c.Request
	}
	rule := "no rule"
	if !c.Rule.IsZero() {
		rule = c.Rule.short()
	}
	return fmt.Sprintf("%s → %s:%s%s: %d times, last %s (%s)", c.Src, c.Dst, c.Port, request, c.Count, c.Last.UTC().Format(time.RFC3339), rule)
}

// Impact is what rules would do to what was recorded.
type Impact struct {
	Refused []Change  // passed, and would be refused
	Allowed []Change  // was refused, and would pass
	Unknown []Change  // was kept too coarsely to tell: never guessed
	Same    int       // records that nothing changes for
	Ignored int       // records of others than the destination's own sidecar
	Unused  []RuleRef // allows that match no record, save those that have not begun
}

// Changes reports whether any verdict changes, or might.
func (i Impact) Changes() bool { return len(i.Refused)+len(i.Allowed)+len(i.Unknown) > 0 }

// ImpactOf decides recorded connections and requests again, under rules as they hold
// at t. Only records of the destination's own sidecar count, and for an External
// those of the caller's. A connection to a port whose rules look at requests is
// unknown. The cost is that of the distinct records times that of the rules that
// match one.
func ImpactOf(rules *Ruleset, t time.Time, records []Observed) Impact {
	now := rules.At(t)
	var out Impact
	groups := map[string]*Change{} // :: kind and text → change
	matched := map[RuleRef]bool{}
	seen := map[string]bool{}
	for _, o := range records {
		if !o.evidence() {
			out.Ignored += max(o.Count, 1)
			continue
		}
		key := o.key()
		if !seen[key] {
			seen[key] = true
			now.match(o.Request, matched)
		}
		d := now.decideDeclared(o.Request)
		if d.Effect == o.Effect {
			out.Same += max(o.Count, 1)
			continue
		}
		key = fmt.Sprint(o.Effect, d.Effect, key)
		c := groups[key]
		if c == nil {
			c = &Change{
				Src: now.callerTitle(o.Src), Dst: now.title(o.Dst.String()), Port: now.portTitle(o.Dst, o.Port),
				Was: o.Effect, Will: d.Effect, Rule: d.Rule,
			}
			if o.HTTP != nil {
				c.Request = o.HTTP.Method + " " + o.HTTP.Path
			}
			groups[key] = c
		}
		c.Count += max(o.Count, 1)
		if o.Time.After(c.Last) {
			c.Last = o.Time
		}
	}
	for _, key := range slices.Sorted(maps.Keys(groups)) {
		c := *groups[key]
		switch {
		case c.Will == Inspect:
			out.Unknown = append(out.Unknown, c)
		case c.Will == Allow:
			out.Allowed = append(out.Allowed, c)
		default:
			out.Refused = append(out.Refused, c)
		}
	}
	out.Unused = rules.unused(t, matched)
	return out
}

// decideDeclared is Decide, but that nobody serves an ID that is no destination, or a
// port that it does not declare: its sidecar refuses that, whatever the rules say.
// Rules without workloads, as a sidecar has them, know of neither.
func (r *Ruleset) decideDeclared(q Request) Decision {
	if len(r.Workloads())+len(r.Templates()) == 0 {
		return r.Decide(q)
	}
	if w, ok := r.Destination(q.Dst); !ok {
		return Decision{}
	} else if _, declared := w.Port(q.Port); !declared {
		return Decision{}
	}
	return r.Decide(q)
}

// key is one text for all records that are decided alike.
func (o Observed) key() string {
	key := fmt.Sprint(o.Src, " ", o.Dst, " ", o.Port)
	if h := o.HTTP; h != nil {
		key += fmt.Sprint(" ", h.Method, " ", h.Path, " ", h.Host, h.Header, h.Claims)
	}
	return key
}

// match notes every rule that matches q, or some request on it.
func (r *Ruleset) match(q Request, matched map[RuleRef]bool) {
	for _, i := range r.rulesTo(q.Dst.String()) {
		rule := &r.rules[i]
		if rule.from(q.Src) && rule.port(q.Port) && (len(rule.HTTP) == 0 || q.HTTP == nil || rule.request(q.HTTP)) {
			matched[rule.Ref] = true
		}
	}
}

// unused gives the allows, open doors apart, none of whose parts was matched. Those
// that have not begun at t could not be.
func (r *Ruleset) unused(t time.Time, matched map[RuleRef]bool) []RuleRef {
	var out []RuleRef
	stays := map[RuleRef]bool{} // what stands on one line is told apart by nobody
	for i := range r.Rules() {
		if rule := &r.rules[i]; rule.say() != allows || rule.Since.After(t) {
			stays[rule.Ref] = true
		}
	}
	for i := range r.Rules() {
		if rule := &r.rules[i]; !stays[rule.Ref] && !matched[rule.Ref] && !slices.Contains(out, rule.Ref) {
			out = append(out, rule.Ref)
		}
	}
	slices.SortFunc(out, func(a, b RuleRef) int { return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line)) })
	return out
}

func (r *Ruleset) callerTitle(id spiffeid.ID) string {
	if id.IsZero() {
		return "anonymous"
	}
	return r.title(id.String())
}

// String gives the changes, those that would be refused first.
func (i Impact) String() string {
	var b strings.Builder
	for _, part := range []struct {
		title string
		list  []Change
	}{
		{"would be refused", i.Refused}, {"would be allowed", i.Allowed},
		{"unknown: rules look at requests that were not recorded", i.Unknown},
	} {
		if len(part.list) == 0 {
			continue
		}
		fmt.Fprintf(&b, "%s:\n", part.title)
		for _, c := range part.list {
			fmt.Fprintf(&b, "  %s\n", c)
		}
	}
	if !i.Changes() {
		b.WriteString("no recorded verdict changes\n")
	}
	fmt.Fprintf(&b, "%d records stay as they are", i.Same)
	if i.Ignored > 0 {
		fmt.Fprintf(&b, "; %d were not of the destination's own sidecar and do not count", i.Ignored)
	}
	b.WriteString("\n")
	if len(i.Unused) > 0 {
		b.WriteString("allows that match no record:\n")
		for _, r := range i.Unused {
			fmt.Fprintf(&b, "  %s\n", r)
		}
	}
	return b.String()
}
