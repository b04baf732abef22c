package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Lint is a kind of [Warning].
type Lint string

// Kinds of warning.
const (
	NeverMatches Lint = "never-matches" // a rule, or a part of it, that no request can match
	Shadowed     Lint = "shadowed"      // an allow of which denies take away all
	Redundant    Lint = "redundant"     // a rule that another one of the same effect covers
	UnusedLabel  Lint = "unused-label"  // a label that no selector names
	Ended        Lint = "ended"         // a window of time that is over
	UnusedPort   Lint = "unused-port"   // a port of a Workload that no rule allows
	Incomplete   Lint = "incomplete"    // there was too much to look at
)

// maxLintPairs bounds how many pairs of rules are compared.
const maxLintPairs = 2_000_000

// Warning is something in the files that is no mistake and probably not meant.
type Warning struct {
	Lint Lint
	Error
}

// String gives FILE:LINE:COL: warning: MSG (LINT), then the snippet and what to do.
func (w *Warning) String() string {
	e := w.Error
	e.Msg = fmt.Sprintf("warning: %s (%s)", e.Msg, w.Lint)
	return e.Error()
}

// Warnings looks through sets, from which r was compiled, for what is no mistake and
// probably not meant, as things are at a moment, ordered by place. Whether rules
// cover one another is found out exactly, over everybody who could exist and all
// that could be asked from then on; where there are too many patterns or kinds of
// request for that, nothing is said.
func (r *Ruleset) Warnings(sets []*Set, now time.Time) []Warning {
	l := linter{rs: r, sets: sets, now: now, cover: cover{now: now, vectors: map[string]vector{}}}
	l.collect()
	l.destinations()
	l.windows()
	for _, rule := range l.rules {
		l.neverMatches(rule)
	}
	var denying []Rule
	for i := range r.Rules() {
		if r.rules[i].say() == denies {
			denying = append(denying, r.rules[i])
		}
	}
	l.wildDenies = wildTo(denying)
	for _, rule := range l.rules {
		l.shadowed(rule)
	}
	for _, rule := range l.rules {
		l.redundant(rule)
	}
	if l.pairs > maxLintPairs {
		l.out = append(l.out, Warning{Incomplete, Error{Msg: "too many rules to compare each with the others"}})
	}
	l.labels()
	l.ports()
	slices.SortStableFunc(l.out, func(a, b Warning) int { return comparePlace(&a.Error, &b.Error) })
	return l.out
}

// linter is one run of [Ruleset.Warnings].
type linter struct {
	rs         *Ruleset
	sets       []*Set
	now        time.Time
	cover      cover
	rules      []*lintRule // as they are written
	of         []*lintRule // :: index of rs.rules →; nil for open doors
	wildDenies []string
	pairs      int
	about      []bool          // :: index of rs.rules → some destination has such an ID
	serves     []bool          // :: the same → and declares such a port
	opened     map[string]bool // :: workload and port → some allow is about it
	out        []Warning
}

func (l *linter) warn(kind Lint, s *Set, file string, p pos, hint, format string, args ...any) {
	l.out = append(l.out, Warning{kind, Error{
		File: file, Line: p.line, Col: p.col, Msg: fmt.Sprintf(format, args...), Hint: hint, Snippet: snippet(s.sources[file], p),
	}})
}

func (l *linter) td() spiffeid.TrustDomain { return l.rs.trustDomain() }

func (l *linter) over(t time.Time) bool { return !t.IsZero() && !t.After(l.now) }

// windows reports what has ended.
func (l *linter) windows() {
	for _, r := range l.rules {
		if l.over(r.entry.Until) {
			r.dead = true
			l.warn(Ended, r.set, r.policy.File, r.entry.until, "remove the rule, or give it more time", "the rule ended at %s", r.entry.Until.Format(time.RFC3339))
		}
	}
	for _, s := range l.sets {
		for _, d := range s.Defaults {
			if l.over(d.Until) {
				l.warn(Ended, s, d.File, d.until, "remove the document", "the open door closed at %s", d.Until.Format(time.RFC3339))
			}
		}
		for _, w := range s.Workloads {
			for i, p := range w.Ports {
				if l.over(p.Plaintext) {
					l.warn(Ended, s, w.File, w.ports[i], "remove plaintext", "port %s takes plaintext no longer, since %s", p.Name, p.Plaintext.Format(time.RFC3339))
				}
			}
		}
	}
}

// labels reports labels whose key no selector names, and no Scope. A value that only sets a
// workload apart from those that are selected has done its work.
func (l *linter) labels() {
	named := map[string]bool{} // :: key
	for _, s := range l.sets {
		for _, sel := range s.selectors() {
			for k := range sel.Labels {
				named[k] = true
			}
		}
		for _, sc := range s.Scopes {
			for k := range sc.Labels {
				named[k] = true
			}
		}
	}
	more := map[string][]*Workload{} // :: key that nobody names → who has it
	var keys []string
	for _, s := range l.sets {
		for i := range s.Workloads {
			w := &s.Workloads[i]
			for _, k := range slices.Sorted(maps.Keys(w.Labels)) {
				if named[k] {
					continue
				}
				if more[k] == nil {
					keys = append(keys, k)
				}
				more[k] = append(more[k], w)
			}
		}
	}
	for _, k := range keys {
		w := more[k][0]
		others := ""
		if n := len(more[k]) - 1; n > 0 {
			others = fmt.Sprintf(", here and on %d more workloads", n)
		}
		l.warn(UnusedLabel, l.set(w.Set), w.File, w.labels[k], "remove it, or select by it", "no selector names the label %s%s", k, others)
	}
}

func (l *linter) set(name string) *Set {
	return l.sets[slices.IndexFunc(l.sets, func(s *Set) bool { return s.Name == name })]
}

// destinations finds, for every declared port, the rules about it.
func (l *linter) destinations() {
	l.about, l.serves = make([]bool, len(l.rs.rules)), make([]bool, len(l.rs.rules))
	l.opened = map[string]bool{}
	add := func(name string, rules []int32, ports []Port) {
		for _, i := range rules {
			rule := &l.rs.rules[i]
			l.about[i] = true
			for _, p := range ports {
				if !rule.port(p.Number) {
					continue
				}
				l.serves[i] = true
				if rule.Effect == Allow && !l.over(rule.Until) {
					l.opened[name+" "+p.Name] = true
				}
			}
		}
	}
	for _, w := range l.rs.Workloads() {
		add(w.Name, l.rs.rulesTo(w.ID.String()), w.Ports)
	}
	for _, t := range l.rs.Templates() {
		var rules []int32
		for _, target := range l.rs.targets {
			if v := parseVector(t.Pattern.String()); slices.ContainsFunc(target.to, func(p identity.Pattern) bool { return l.cover.vector(p).meets(v) }) {
				rules = append(rules, target.rules...)
			}
		}
		add(t.Name, rules, t.Ports)
	}
	for _, d := range l.rs.TrustDomains() {
		for _, w := range d.Workloads {
			add("", l.rs.rulesTo(w.ID.String()), w.Ports)
		}
	}
	for _, x := range l.rs.Externals() {
		add("", l.rs.rulesTo(x.ID(l.td()).String()), []Port{x.Port})
	}
}

// ports reports declared ports that no allow, and no open door, is about.
func (l *linter) ports() {
	for _, s := range l.sets {
		for _, w := range s.Workloads {
			for i, p := range w.Ports {
				if !l.opened[w.Name+" "+p.Name] {
					l.warn(UnusedPort, s, w.File, w.ports[i], "allow somebody, or remove the port", "no rule allows anybody to reach port %s of %s", p.Name, w.Name)
				}
			}
		}
	}
}

// comparePlace orders mistakes and warnings by where they are.
func comparePlace(a, b *Error) int {
	if d := strings.Compare(a.File, b.File); d != 0 {
		return d
	}
	if a.Line != b.Line {
		return a.Line - b.Line
	}
	return a.Col - b.Col
}
