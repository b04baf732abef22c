package policy

import (
	"fmt"
	"strings"
)

const (
	maxDiff      = 1000 // differences of one kind that a Diff keeps
	maxDiffLines = 200  // that its String shows
)

// Diff is what a change means: not which lines moved, but who gains or loses
// what. It is made by [Compare].
type Diff struct {
	Workloads []string // lines such as "+ workload reports (/shop/reports)"
	Gained    []Access
	Lost      []Access
	Guarded   []Access // refused before by default, now by a deny too
	Unguarded []Access // refused before by a deny, now by default only
	More      int      // differences that are not listed

	adds    bool     // something is opened, or could be
	inexact []string // destinations with too many patterns to compare
}

// Access is one way from a source to a port of a workload.
type Access struct {
	Src      string  // a workload's name, an ID or a pattern
	Dst      string  // a workload's name
	Port     string  // a declared name
	Request  string  // which requests, as in "POST /v1/charges"; "" is the whole connection
	When     string  // "from T until T"; "" is always
	Rule     RuleRef // the rule that allows it (Gained) or did (Lost); else the deny
	DeniedBy RuleRef // Lost: the deny that takes it away, if one does
}

// Empty reports whether nothing changed for anybody.
func (d Diff) Empty() bool {
	return len(d.Workloads)+len(d.Gained)+len(d.Lost)+len(d.Guarded)+len(d.Unguarded)+len(d.inexact)+d.More == 0
}

// OnlyRemoves reports whether the change opens nothing: nobody, known or not,
// gains access, no workload or evidence is added or renamed, and no deny is
// lifted, save from identities that cease to exist. A change that is too large
// to compare exactly is assumed to open something.
func (d Diff) OnlyRemoves() bool { return !d.adds && len(d.inexact) == 0 }

// Inexact gives the destinations that have too many patterns to compare.
func (d Diff) Inexact() []string { return d.inexact }

// String gives one line per difference: "+" for what is gained, "-" for what is
// lost, "~" for a workload that changed, "!" for a deny that changes no access.
// The number of lines is bounded.
func (d Diff) String() string {
	if d.Empty() {
		return "no difference in who may reach what\n"
	}
	lines := append([]string(nil), d.Workloads...)
	for _, a := range d.Gained {
		lines = append(lines, fmt.Sprintf("+ %s  (%s)", a, a.Rule.short()))
	}
	for _, a := range d.Lost {
		if a.DeniedBy.IsZero() {
			lines = append(lines, fmt.Sprintf("- %s  (%s)", a, a.Rule.short()))
		} else {
			lines = append(lines, fmt.Sprintf("- %s  (denied by %s)", a, a.DeniedBy.short()))
		}
	}
	for _, a := range d.Guarded {
		lines = append(lines, fmt.Sprintf("! %s  (now denied by %s)", a, a.Rule.short()))
	}
	for _, a := range d.Unguarded {
		lines = append(lines, fmt.Sprintf("! %s  (no longer denied by %s)", a, a.Rule.short()))
	}
	for _, dst := range d.inexact {
		lines = append(lines, fmt.Sprintf("? %s: too many patterns to compare", dst))
	}
	more := d.More
	if len(lines) > maxDiffLines {
		more += len(lines) - maxDiffLines
		lines = lines[:maxDiffLines]
	}
	if more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(lines, "\n") + "\n"
}

// String gives SRC → DST:PORT, the requests and the time.
func (a Access) String() string {
	s := a.Src + " → " + a.Dst + ":" + a.Port
	for _, more := range []string{a.Request, a.When} {
		if more != "" {
			s += " " + more
		}
	}
	return s
}

// short gives POLICY FILE:LINE, with the set's name before the policy's where it
// is not the root set.
func (r RuleRef) short() string {
	if r.Set != "" {
		return r.Set + "/" + r.Policy + " " + r.Location()
	}
	return r.Policy + " " + r.Location()
}

// keep appends to one of the lists, or counts.
func (d *Diff) keep(list *[]Access, a Access) {
	if len(*list) < maxDiff {
		*list = append(*list, a)
	} else {
		d.More++
	}
}

func (d *Diff) workload(format string, args ...any) {
	if len(d.Workloads) < maxDiff {
		d.Workloads = append(d.Workloads, fmt.Sprintf(format, args...))
	} else {
		d.More++
	}
}
