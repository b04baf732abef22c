package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Proof is the outcome of the Invariants of some sets.
type Proof struct {
	Invariants int
	Breaches   []Breach // in the order of the sets and their files; one per rule and invariant at most
	More       int      // breaches that are not listed
	// Unproved are invariants that are too large to prove, each with why.
	Unproved []string
}

// Breach is one way past an Invariant.
type Breach struct {
	Invariant string
	File      string // of the invariant
	Line      int
	From, To  Party
	Port      Port
	Request   *HTTPRequest // nil: the whole connection
	At        time.Time    // zero: always
	Rule      RuleRef      // what lets it pass
	Door      bool         // it is an open door
}

// maxBreaches bounds the breaches that a Proof lists.
const maxBreaches = 20

// maxParties bounds the identities that are asked about one selector.
const maxParties = 20_000

// Failed reports whether some Invariant is broken, or could not be proved.
func (p Proof) Failed() bool { return len(p.Breaches) > 0 || len(p.Unproved) > 0 }

// String gives a line for each Invariant that is broken, with what breaks it, in
// the manner of `go test`.
func (p Proof) String() string {
	var b strings.Builder
	for _, x := range p.Breaches {
		fmt.Fprintf(&b, "--- FAIL: %s (%s:%d)\n", x.Invariant, x.File, x.Line)
		b.WriteString(indent(x.String()))
	}
	if p.More > 0 {
		fmt.Fprintf(&b, "and %d more\n", p.More)
	}
	for _, u := range p.Unproved {
		fmt.Fprintf(&b, "--- FAIL: %s\n", u)
	}
	switch {
	case p.Failed():
		fmt.Fprintf(&b, "FAIL: invariants are broken\n")
	case p.Invariants == 0:
		b.WriteString("no invariants\n")
	case p.Invariants == 1:
		b.WriteString("PASS: 1 invariant holds for every identity that could exist\n")
	default:
		fmt.Fprintf(&b, "PASS: %d invariants hold for every identity that could exist\n", p.Invariants)
	}
	return b.String()
}

// String gives the counter-example on three lines.
func (x Breach) String() string {
	what := fmt.Sprintf("port %s", x.Port.Name)
	if x.Port.Number != 0 {
		what = fmt.Sprintf("port %s", portList([]Port{x.Port}))
	}
	if x.Request != nil {
		what += ", " + x.Request.String()
	}
	if !x.At.IsZero() {
		what += ", at " + x.At.Format(time.RFC3339)
	}
	by := "rule"
	if x.Door {
		by = "open door"
	}
	return fmt.Sprintf("from %s\nto   %s\n     %s\nlet through by the %s %s\n", x.From, x.To, what, by, x.Rule)
}

func indent(s string) string {
	return "    " + strings.ReplaceAll(strings.TrimSuffix(s, "\n"), "\n", "\n    ") + "\n"
}

// String names all of a request that rules look at: METHOD PATH, then the rest in
// words.
func (h *HTTPRequest) String() string {
	s := h.Method + " " + h.Path
	if h.Host != "" {
		s += " host " + h.Host
	}
	for _, name := range slices.Sorted(maps.Keys(h.Header)) {
		for _, v := range h.Header[name] {
			s += fmt.Sprintf(" header %s: %q", name, v)
		}
	}
	for _, issuer := range slices.Sorted(maps.Keys(h.Claims)) {
		for _, claim := range slices.Sorted(maps.Keys(h.Claims[issuer])) {
			if values := h.Claims[issuer][claim]; len(values) > 0 {
				s += fmt.Sprintf(" claim %s of %s: %s", claim, issuer, strings.Join(values, ", "))
			}
		}
	}
	return s
}
