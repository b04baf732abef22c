package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// What --output json prints is described in docs/json.md, and stays as it is: fields
// come, none goes or changes. What the control plane answers is printed as its
// protobuf message; the rest has its forms here.

// checkOutput refuses an unknown form before a verb does anything.
func (c *cli) checkOutput(*cobra.Command, []string) error {
	if c.output != "text" && c.output != "json" {
		return fmt.Errorf("--output %s: want text or json", c.output)
	}
	return nil
}

// asksJSON reports whether a command line asks for JSON, also where it is too wrong
// to be parsed.
func asksJSON(args []string) bool {
	i := slices.Index(args, "--output")
	return slices.Contains(args, "--output=json") || i >= 0 && i+1 < len(args) && args[i+1] == "json"
}

// jsonError is one mistake. Line and col are 0, and file is "", where none is to blame.
type jsonError struct {
	File    string `json:"file"`
	Line    int    `json:"line"`
	Col     int    `json:"col"`
	Message string `json:"message"`
	Hint    string `json:"hint"`
}

func jsonErrors(errs policy.Errors) []jsonError {
	out := make([]jsonError, 0, len(errs))
	for _, e := range errs {
		out = append(out, jsonError{e.File, e.Line, e.Col, e.Msg, e.Hint})
	}
	return out
}

// printErrors writes what ends a verb as {"errors": [...]}.
func (c *cli) printErrors(err error) {
	var list []jsonError
	var mistakes policy.Errors
	if errors.As(err, &mistakes) {
		list = jsonErrors(mistakes)
	} else {
		list = readErrors(message(err))
	}
	if err := c.printJSON(map[string]any{"errors": list}); err != nil {
		fmt.Fprintf(c.stderr, "sallyport: %s\n", message(err))
	}
}

var mistakeLine = regexp.MustCompile(`^([^ :][^:]*):(\d+):(\d+): (.*)$`)

// readErrors reads the mistakes that a control plane tells as text. What is not one
// is a message by itself.
func readErrors(text string) (out []jsonError) {
	found := false
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		m := mistakeLine.FindStringSubmatch(line)
		switch hint, isHint := strings.CutPrefix(line, "    hint: "); {
		case m != nil:
			e := jsonError{File: m[1], Message: m[4]}
			e.Line, _ = strconv.Atoi(m[2])
			e.Col, _ = strconv.Atoi(m[3])
			out, found = append(out, e), true
		case found && isHint:
			out[len(out)-1].Hint = hint
		case found && strings.HasPrefix(line, "    "): // the line itself, and a caret
		case found && line != "":
			out = append(out, jsonError{Message: line})
		}
	}
	if !found {
		return []jsonError{{Message: text}}
	}
	return out
}

// jsonRule is where a rule is written.
type jsonRule struct {
	Set    string `json:"set"`
	Policy string `json:"policy"`
	File   string `json:"file"`
	Line   int    `json:"line"`
}

// ruleJSON gives nil for no rule.
func ruleJSON(r policy.RuleRef) *jsonRule {
	if r.IsZero() {
		return nil
	}
	return &jsonRule{r.Set, r.Policy, r.File, r.Line}
}

// mapped is never nil, which would be null.
func mapped[A, B any](list []A, f func(A) B) []B {
	out := make([]B, 0, len(list))
	for _, a := range list {
		out = append(out, f(a))
	}
	return out
}

func same[A any](a A) A { return a }

type jsonTest struct {
	Set       string      `json:"set"`
	Name      string      `json:"name"`
	File      string      `json:"file"`
	Line      int         `json:"line"`
	Questions int         `json:"questions"`
	Failed    int         `json:"failed"`
	Failures  []jsonError `json:"failures"`
	Open      []jsonError `json:"open"`
}

func testsJSON(report policy.TestReport) any {
	results := mapped(report.Results, func(r policy.TestResult) jsonTest {
		return jsonTest{r.Set, r.Name, r.File, r.Line, r.Questions, r.Failed, jsonErrors(r.Failures), jsonErrors(r.Open)}
	})
	return struct {
		Tests   int        `json:"tests"`
		Failed  bool       `json:"failed"`
		Results []jsonTest `json:"results"`
	}{len(report.Results), report.Failed(), results}
}

type jsonParty struct {
	Name   string            `json:"name"`
	ID     string            `json:"id"`
	Labels map[string]string `json:"labels"`
	Exists bool              `json:"exists"`
}

func partyJSON(p policy.Party) jsonParty {
	out := jsonParty{p.Name, p.ID.String(), map[string]string{}, p.Exists}
	maps.Copy(out.Labels, p.Labels)
	return out
}

type jsonBreach struct {
	Invariant string    `json:"invariant"`
	File      string    `json:"file"`
	Line      int       `json:"line"`
	From      jsonParty `json:"from"`
	To        jsonParty `json:"to"`
	Port      string    `json:"port"`
	Number    uint16    `json:"number"`
	Request   string    `json:"request"`
	At        string    `json:"at"`
	Rule      *jsonRule `json:"rule"`
	Door      bool      `json:"door"`
}

func proofJSON(p policy.Proof) any {
	breaches := mapped(p.Breaches, func(x policy.Breach) jsonBreach {
		out := jsonBreach{
			Invariant: x.Invariant, File: x.File, Line: x.Line, From: partyJSON(x.From), To: partyJSON(x.To),
			Port: x.Port.Name, Number: x.Port.Number, Rule: ruleJSON(x.Rule), Door: x.Door,
		}
		if x.Request != nil {
			out.Request = x.Request.String()
		}
		if !x.At.IsZero() {
			out.At = x.At.Format(time.RFC3339)
		}
		return out
	})
	return struct {
		Invariants int          `json:"invariants"`
		Failed     bool         `json:"failed"`
		Breaches   []jsonBreach `json:"breaches"`
		More       int          `json:"more"`
		Unproved   []string     `json:"unproved"`
	}{p.Invariants, p.Failed(), breaches, p.More, append([]string{}, p.Unproved...)}
}

type jsonAccess struct {
	From     string    `json:"from"`
	To       string    `json:"to"`
	Port     string    `json:"port"`
	Request  string    `json:"request"`
	When     string    `json:"when"`
	Rule     *jsonRule `json:"rule"`
	DeniedBy *jsonRule `json:"denied_by"`
}

func diffJSON(d policy.Diff) any {
	access := func(list []policy.Access) []jsonAccess {
		return mapped(list, func(a policy.Access) jsonAccess {
			return jsonAccess{a.Src, a.Dst, a.Port, a.Request, a.When, ruleJSON(a.Rule), ruleJSON(a.DeniedBy)}
		})
	}
	return struct {
		Workloads   []string     `json:"workloads"`
		Gained      []jsonAccess `json:"gained"`
		Lost        []jsonAccess `json:"lost"`
		Guarded     []jsonAccess `json:"guarded"`
		Unguarded   []jsonAccess `json:"unguarded"`
		Inexact     []string     `json:"inexact"`
		More        int          `json:"more"`
		OnlyRemoves bool         `json:"only_removes"`
	}{mapped(d.Workloads, same), access(d.Gained), access(d.Lost), access(d.Guarded), access(d.Unguarded), mapped(d.Inexact(), same), d.More, d.OnlyRemoves()}
}

type jsonChange struct {
	From    string    `json:"from"`
	To      string    `json:"to"`
	Port    string    `json:"port"`
	Request string    `json:"request"`
	Was     string    `json:"was"`
	Will    string    `json:"will"`
	Rule    *jsonRule `json:"rule"`
	Count   int       `json:"count"`
	Last    time.Time `json:"last"`
}

func impactJSON(i policy.Impact) any {
	changes := func(list []policy.Change) []jsonChange {
		return mapped(list, func(c policy.Change) jsonChange {
			return jsonChange{c.Src, c.Dst, c.Port, c.Request, c.Was.String(), c.Will.String(), ruleJSON(c.Rule), c.Count, c.Last.UTC()}
		})
	}
	return struct {
		Refused []jsonChange `json:"refused"`
		Allowed []jsonChange `json:"allowed"`
		Unknown []jsonChange `json:"unknown"`
		Same    int          `json:"same"`
		Ignored int          `json:"ignored"`
		Unused  []*jsonRule  `json:"unused"`
	}{changes(i.Refused), changes(i.Allowed), changes(i.Unknown), i.Same, i.Ignored, mapped(i.Unused, ruleJSON)}
}

type jsonSelector struct {
	Workload string            `json:"workload,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	ID       string            `json:"id,omitempty"`
}

type jsonSuggestion struct {
	To    string          `json:"to"`
	Ports []string        `json:"ports"`
	From  []jsonSelector  `json:"from"`
	HTTP  []jsonHTTPMatch `json:"http"`
	Count int             `json:"count"`
	Last  time.Time       `json:"last"`
}

type jsonHTTPMatch struct {
	Methods []string `json:"methods"`
	Paths   []string `json:"paths"`
}

func suggestionsJSON(all []policy.Suggestion) any {
	file := ""
	if len(all) > 0 {
		file = string(policy.SuggestionFile(all))
	}
	return struct {
		Suggestions []jsonSuggestion `json:"suggestions"`
		File        string           `json:"file"`
	}{mapped(all, func(s policy.Suggestion) jsonSuggestion {
		return jsonSuggestion{
			s.To.Name, mapped(s.Ports, same),
			mapped(s.From, func(f policy.Selector) jsonSelector { return jsonSelector{f.Workload, f.Labels, f.ID} }),
			mapped(s.HTTP, func(m policy.HTTPMatch) jsonHTTPMatch {
				return jsonHTTPMatch{mapped(m.Methods, same), mapped(m.Paths, same)}
			}),
			s.Count, s.Last.UTC(),
		}
	}), file}
}

// printJSON writes v on one line.
func (c *cli) printJSON(v any) error { return json.NewEncoder(c.stdout).Encode(v) }
