package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// PlaceKind says what a [Place] is.
type PlaceKind string

// Kinds of place.
const (
	OwnWorkload  PlaceKind = "workload"  // of this trust domain
	OfTemplate   PlaceKind = "template"  // IDs that a template may give; nobody can list them
	Foreign      PlaceKind = "foreign"   // of another trust domain
	Outside      PlaceKind = "external"  // a destination outside every mesh
	NoWorkload   PlaceKind = "id"        // an ID that a rule or a question names and no workload has
	OfPattern    PlaceKind = "pattern"   // IDs that a pattern matches; nobody can list them
	WithoutAnyID PlaceKind = "anonymous" // callers without an identity
)

// Place is one end of a [Way]: an identity, or all those of a pattern that the
// rules do not tell apart.
type Place struct {
	Name   string // as people call it
	ID     string // a SPIFFE ID, or a pattern; "" for callers without identity
	Kind   PlaceKind
	Except []string `json:",omitempty"` // names of those of the pattern that are not meant; they are listed by themselves if they pass too

	vector vector
	except []vector
}

// Way is one way from a source to a port of a destination, by one rule.
type Way struct {
	From, To     Place
	Port         Port
	Requests     string    // which, as in "POST /v1/charges"; "" is the whole connection
	Since, Until time.Time `json:",omitzero"`
	Rule         RuleRef   // the allow, or the open door
	Door         bool      // no rule allows it: it is let through by the open door that Rule is
	Audited      RuleRef   `json:",omitzero"` // the deny that only records it, if any
	Path         []string  // names, from where the question began, or to where it ends
}

// Reached is what [Ruleset.Ways] gives.
type Reached struct {
	Ways  []Way    // the shortest paths first; then by name, port, requests and time
	Notes []string `json:",omitempty"` // what the ways do not tell
	More  int      // ways that are not listed
}

// String gives a table, and the notes below it.
func (r Reached) String() string {
	if len(r.Ways) == 0 {
		return strings.Join(append([]string{"nothing"}, r.notes()...), "\nnote: ") + "\n"
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "FROM\tTO\tPORT\tONLY\tRULE\tPATH")
	for _, way := range r.Ways {
		path := ""
		if len(way.Path) > 2 {
			path = strings.Join(way.Path, " → ")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", way.From, way.To, portList([]Port{way.Port}), cmp.Or(way.Only(), "-"), way.by(), path)
	}
	w.Flush() // to a Builder, which takes everything
	var out strings.Builder
	for line := range strings.Lines(b.String()) {
		out.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
	for _, n := range r.notes() {
		fmt.Fprintf(&out, "note: %s\n", n)
	}
	return out.String()
}

// notes are the Notes, and what is not listed.
func (r Reached) notes() []string {
	if r.More == 0 {
		return r.Notes
	}
	return append(slices.Clone(r.Notes), fmt.Sprintf("and %d more", r.More))
}

// String gives the name, and what it is where that is not plain.
func (p Place) String() string {
	var about []string
	switch p.Kind {
	case OfTemplate:
		about = append(about, "template")
	case OfPattern:
		about = append(about, "any such ID")
	case NoWorkload:
		about = append(about, "no workload")
	case Foreign:
		about = append(about, "foreign")
	}
	if len(p.Except) > 0 {
		about = append(about, "except "+some(p.Except))
	}
	if len(about) == 0 {
		return p.Name
	}
	return p.Name + " (" + strings.Join(about, ", ") + ")"
}

// Only says to which requests and to which time the way is limited, or "".
func (w Way) Only() string {
	parts := []string{w.Requests, windowText(w.Since, w.Until)}
	if w.From.Kind == WithoutAnyID && !w.Port.Plaintext.IsZero() {
		parts = append(parts, "plaintext "+windowText(time.Time{}, w.Port.Plaintext))
	}
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), "; ")
}

// by names the rule that lets it pass.
func (w Way) by() string {
	s := "-"
	if !w.Rule.IsZero() {
		s = w.Rule.short()
	}
	if w.Door {
		s += " (open door)"
	}
	if !w.Audited.IsZero() {
		s += " (" + w.Audited.short() + " only records)"
	}
	return s
}

// compareWays is the order in which ways are listed.
func compareWays(a, b Way) int {
	return cmp.Or(
		len(a.Path)-len(b.Path),
		cmp.Compare(a.From.Name, b.From.Name), cmp.Compare(a.To.Name, b.To.Name),
		cmp.Compare(a.Port.Number, b.Port.Number), cmp.Compare(a.Requests, b.Requests), a.Since.Compare(b.Since),
		cmp.Compare(a.Rule.short(), b.Rule.short()), slices.Compare(a.Path, b.Path),
	)
}

// Dot gives a graph in the language of Graphviz: an edge for each pair of places,
// with its ports; dashed where only some requests or only some time pass, dotted
// where an open door lets them through.
func (r Reached) Dot() string {
	var b strings.Builder
	b.WriteString("digraph reach {\n  rankdir=LR;\n  node [shape=box];\n")
	told := map[string]bool{}
	var order [][2]string
	edges := map[[2]string][]Way{} // :: keys of two places →
	for _, w := range r.Ways {
		for _, p := range []Place{w.From, w.To} {
			if !told[p.key()] {
				told[p.key()] = true
				fmt.Fprintf(&b, "  %s [label=%s%s];\n", dotText(p.key()), dotText(p.String()), p.shape())
			}
		}
		pair := [2]string{w.From.key(), w.To.key()}
		if edges[pair] == nil {
			order = append(order, pair)
		}
		edges[pair] = append(edges[pair], w)
	}
	for _, pair := range order {
		var labels []string
		style := "dotted" // if all of them are
		for _, w := range edges[pair] {
			label := portList([]Port{w.Port})
			if only := w.Only(); only != "" {
				label += " " + only
			}
			labels = append(labels, label+"\n"+w.by())
			switch {
			case w.Only() == "" && !w.Door:
				style = "solid"
			case !w.Door && style == "dotted":
				style = "dashed"
			}
		}
		fmt.Fprintf(&b, "  %s -> %s [label=%s, style=%s];\n", dotText(pair[0]), dotText(pair[1]), dotText(strings.Join(labels, "\n")), style)
	}
	for i, n := range r.notes() {
		fmt.Fprintf(&b, "  %s [label=%s, shape=note];\n", dotText(fmt.Sprintf("note %d", i+1)), dotText(n))
	}
	b.WriteString("}\n")
	return b.String()
}

// key is one text for each place.
func (p Place) key() string {
	return strings.Join(append([]string{cmp.Or(p.ID, p.Name)}, p.Except...), " ")
}

func (p Place) shape() string {
	switch p.Kind {
	case OfTemplate, OfPattern:
		return ", style=dashed"
	case Foreign, Outside:
		return ", shape=ellipse"
	}
	return ""
}

// dotText quotes a text for Graphviz.
func dotText(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}
