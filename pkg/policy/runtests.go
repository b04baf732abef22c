package policy

import (
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestReport is the outcome of the policy tests of some sets.
type TestReport struct {
	Results []TestResult // in the order of the sets and of their files
}

// TestResult is the outcome of one PolicyTest.
type TestResult struct {
	Set, Name string
	File      string
	Line      int
	Questions int    // asked; a case without a port asks about every declared one
	Open      Errors // what passes today, although full enforcement would refuse it
	Failures  Errors // at most [MaxErrors]
	Failed    int    // failed questions, also those beyond
}

// RunTests asks rs every question of the PolicyTests in sets, which rs was
// compiled from. What is expected is what full enforcement gives
// ([Decision.Would]).
func RunTests(rs *Ruleset, sets []*Set) TestReport {
	var report TestReport
	for _, s := range sets {
		for _, t := range s.Tests {
			run := testRun{rs: rs, set: s, test: t, result: TestResult{Set: s.Name, Name: t.Name, File: t.File, Line: t.Line}}
			for _, c := range t.Cases {
				run.ask(c)
			}
			report.Results = append(report.Results, run.result)
		}
	}
	return report
}

// testRun asks the cases of one PolicyTest.
type testRun struct {
	rs     *Ruleset
	set    *Set
	test   PolicyTest
	result TestResult
}

func (t *testRun) ask(c Case) {
	dst, ok := t.workload(c.To)
	if !ok {
		t.fail(c, "", fmt.Sprintf("unknown workload %q", shorten(c.To)))
		return
	}
	var src spiffeid.ID
	if c.From != "" {
		var problem string
		if src, problem = refID(t.rs.trustDomain(), c.From, t.rs.nameToID); problem != "" {
			t.fail(c, "", problem)
			return
		}
	}
	ports, _, msg, hint := c.ports(dst)
	if msg != "" {
		t.fail(c, hint, msg)
		return
	}
	rs := t.rs
	if !c.At.IsZero() {
		rs = rs.At(c.At)
	}
	for _, port := range ports {
		t.result.Questions++
		q := Request{Src: src, Dst: dst.ID, Port: port.Number, HTTP: c.HTTP}
		d := rs.Decide(q)
		if d.Effect == Allow && d.Would == Deny {
			t.result.Open = append(t.result.Open, t.mistake(c, "", fmt.Sprintf("%s is let pass today %s", c.title(port), byDoor(d))))
		}
		if d.Would != c.Expect {
			t.fail(c, why(t.rs.ExplainAt(q, c.At)), fmt.Sprintf("%s: got %s, want %s", c.title(port), verdictText(d.Would), c.Expect))
		}
	}
}

// byDoor says why a Decision that full enforcement would refuse is an allow.
func byDoor(d Decision) string {
	if d.Audited.IsZero() {
		return "through the open door of " + d.Rule.String()
	}
	return "as " + d.Audited.String() + " only records"
}

// verdictText tells of a port as a whole.
func verdictText(e Effect) string {
	if e == Inspect {
		return "allow for some requests and deny for others"
	}
	return e.String()
}

// title says what a case asks about one port.
func (c Case) title(port Port) string {
	from := c.From
	if from == "" {
		from = "anonymous"
	}
	s := fmt.Sprintf("%s → %s:%s", from, c.To, port.Name)
	if c.HTTP != nil {
		s += " " + c.HTTP.Method + " " + c.HTTP.Path
	}
	if !c.At.IsZero() {
		s += " at " + c.At.Format(time.RFC3339)
	}
	return s
}

// workload gives the destination of a case.
func (t *testRun) workload(ref string) (CompiledWorkload, bool) {
	if td := t.rs.trustDomain(); !td.IsZero() {
		if id, problem := refID(td, ref, t.rs.nameToID); problem == "" {
			return t.rs.Destination(id)
		}
	}
	return CompiledWorkload{}, false
}

func (r *Ruleset) nameToID(name string) (spiffeid.ID, bool) {
	w, ok := r.WorkloadByName(name)
	return w.ID, ok
}

func (t *testRun) fail(c Case, hint, msg string) {
	t.result.Failed++
	if len(t.result.Failures) < MaxErrors {
		t.result.Failures = append(t.result.Failures, t.mistake(c, hint, msg))
	}
}

func (t *testRun) mistake(c Case, hint, msg string) *Error {
	return &Error{
		File: t.test.File, Line: c.line, Col: c.col, Msg: msg, Hint: hint,
		Snippet: snippet(t.set.sources[t.test.File], c.pos),
	}
}

// why gives an explanation on one line.
func why(x Explanation) string {
	switch {
	case x.Effect == Inspect:
		return "ask about one request with http or grpc"
	case x.Effect == Allow:
		return "allowed by " + x.Rule.String()
	case !x.Rule.IsZero():
		return "denied by " + x.Rule.String()
	case !x.Nearest.IsZero():
		return "nearest rule: " + x.Nearest.String() + "; missed " + x.Missed
	}
	return "no rule allows it"
}

// Failed reports whether some question was not answered as expected.
func (r TestReport) Failed() bool {
	for _, t := range r.Results {
		if t.Failed > 0 {
			return true
		}
	}
	return false
}

// Errors gives the failures, with their places; empty when none failed.
func (r TestReport) Errors() Errors {
	var out Errors
	for _, t := range r.Results {
		out = append(out, t.Failures...)
	}
	return out
}

// String gives a line per test as `go test -v` does, the failures below it, and
// a summary.
func (r TestReport) String() string {
	var b strings.Builder
	asked, failed := 0, 0
	for _, t := range r.Results {
		asked, failed = asked+t.Questions, failed+t.Failed
		verdict := "PASS"
		if t.Failed > 0 {
			verdict = "FAIL"
		}
		name := t.Name
		if t.Set != "" {
			name = t.Set + "/" + t.Name
		}
		fmt.Fprintf(&b, "--- %s: %s (%s:%d)\n", verdict, name, t.File, t.Line)
		for _, f := range t.Failures {
			fmt.Fprintf(&b, "    %s: %s\n", f.Position(), f.Msg)
			if f.Hint != "" {
				fmt.Fprintf(&b, "        %s\n", f.Hint)
			}
		}
		for _, o := range t.Open {
			fmt.Fprintf(&b, "    %s: note: %s\n", o.Position(), o.Msg)
		}
		if more := t.Failed - len(t.Failures); more > 0 {
			fmt.Fprintf(&b, "    and %d more failures\n", more)
		}
	}
	switch {
	case len(r.Results) == 0:
		b.WriteString("PASS: no policy tests\n")
	case failed > 0:
		fmt.Fprintf(&b, "FAIL: %d of %d questions in %d tests\n", failed, asked, len(r.Results))
	default:
		fmt.Fprintf(&b, "PASS: %d questions in %d tests\n", asked, len(r.Results))
	}
	return b.String()
}
