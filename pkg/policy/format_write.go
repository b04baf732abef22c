package policy

import (
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// formatWidth is how long a line may be that could also be several, in characters.
const formatWidth = 100

// writer writes documents in their canonical form.
type writer struct {
	strings.Builder
	plain map[string]bool // :: text in its surroundings → needs no quotes
}

func (w *writer) section(p *section) {
	if p.separator != "" {
		w.WriteString(p.separator)
		if p.beside != "" {
			w.WriteString(" " + p.beside)
		}
		w.WriteString("\n")
	}
	w.comments(p.head, "", true)
	if p.root == nil {
		return
	}
	if p.gap && len(p.head) > 0 {
		w.WriteString("\n")
	}
	w.kids(p.root, "", true)
	w.comments(p.root.foot, "", false)
}

// comments writes comments on lines of their own. Before the first thing of its kind
// there is no empty line.
func (w *writer) comments(list []comment, indent string, first bool) {
	for i, c := range list {
		if c.gap && !(first && i == 0) {
			w.WriteString("\n")
		}
		w.WriteString(indent + c.text + "\n")
	}
}

// kids writes what e holds, one below the other. first says that nothing of e was
// written before.
func (w *writer) kids(e *element, indent string, first bool) {
	for i, k := range e.sorted() {
		head, beside := w.above(k, indent)
		w.comments(head, indent, first && i == 0)
		if k.apart && (i > 0 || len(k.head) > 0 && len(head) > 0) {
			w.WriteString("\n")
		}
		w.WriteString(indent)
		w.entry(k, indent, beside)
	}
}

// above gives the comments to be written above k, and the one beside it.
func (w *writer) above(k *element, indent string) (head []comment, beside string) {
	head = slices.Clone(k.head)
	besides := k.beside
	if _, one := w.oneLine(k, indent); !one && k.key == nil && len(k.kids) > 0 {
		for _, c := range besides { // there is no line of the element's own
			head = append(head, comment{text: c.text})
		}
		besides = nil
		first := k.sorted()[0]
		above, _ := w.above(first, indent+"  ")
		head = append(head, above...)
	}
	for i, c := range besides {
		if i+1 < len(besides) {
			head = append(head, comment{text: c.text})
		} else {
			beside = " " + c.text
		}
	}
	return head, beside
}

// oneLine gives an entry of a mapping or element of a list on one line, if it may
// stand there.
func (w *writer) oneLine(k *element, indent string) (string, bool) {
	if !k.short() {
		return "", false
	}
	line := "- "
	if k.key != nil {
		line = w.scalar(k.key, "key") + ": "
	}
	line += w.flow(k, false)
	return line, len(k.kids) == 0 || utf8.RuneCountInString(indent)+utf8.RuneCountInString(line) <= formatWidth
}

// entry writes one entry of a mapping or element of a list, whose line is indented.
func (w *writer) entry(k *element, indent, beside string) {
	if line, ok := w.oneLine(k, indent); ok {
		w.WriteString(line + beside + "\n")
		return
	}
	lead := "- "
	if k.key != nil {
		lead = w.scalar(k.key, "key") + ":"
	}
	inner := indent + "  "
	switch {
	case k.value.Kind == yaml.ScalarNode:
		w.literal(k, lead, inner, beside)
	case k.key != nil:
		w.WriteString(lead + beside + "\n")
		w.kids(k, inner, true)
		w.comments(k.foot, inner, false)
	default:
		w.WriteString(lead)
		w.item(k, inner)
	}
}

// item writes an element of a list whose first line has begun.
func (w *writer) item(k *element, indent string) {
	for i, kid := range k.sorted() {
		head, beside := w.above(kid, indent)
		if i > 0 {
			w.comments(head, indent, false)
			if kid.apart {
				w.WriteString("\n")
			}
			w.WriteString(indent)
		}
		w.entry(kid, indent, beside)
	}
	w.comments(k.foot, indent, false)
}

// sorted gives the kids in canonical order. What has no order stays where it is.
func (e *element) sorted() []*element {
	if e.value.Kind != yaml.MappingNode || e.shape == nil || e.shape.fields == nil {
		return e.kids
	}
	rank := func(k *element) int {
		return slices.IndexFunc(e.shape.fields, func(f member) bool { return f.name == k.key.Value })
	}
	out := slices.Clone(e.kids)
	slices.SortStableFunc(out, func(a, b *element) int { return rank(a) - rank(b) })
	return out
}

// short reports whether e may stand on one line, if that is not too long: it holds
// no comment, no text of several lines and nothing that is always open.
func (e *element) short() bool {
	if e.value.Kind == yaml.ScalarNode {
		return !strings.Contains(e.value.Value, "\n") || !e.asLiteral()
	}
	if len(e.kids) == 0 {
		return len(e.foot) == 0
	}
	if len(e.foot) > 0 || e.shape != nil && (e.shape.open || e.shape.few > 0 && len(e.kids) > e.shape.few) {
		return false
	}
	wide := 0
	for _, k := range e.kids {
		if len(k.head)+len(k.beside) > 0 || !k.short() {
			return false
		}
		if k.key == nil && k.value.Kind == yaml.MappingNode && len(k.kids) > 1 {
			wide++
		}
	}
	return wide < 2
}

// flow writes a value on one line.
func (w *writer) flow(e *element, inside bool) string {
	surroundings := "block"
	if inside {
		surroundings = "flow"
	}
	var parts []string
	for _, k := range e.sorted() {
		part := w.flow(k, true)
		if k.key != nil {
			part = w.scalar(k.key, "flow key") + ": " + part
		}
		parts = append(parts, part)
	}
	switch e.value.Kind {
	case yaml.MappingNode:
		return "{" + strings.Join(parts, ", ") + "}"
	case yaml.SequenceNode:
		return "[" + strings.Join(parts, ", ") + "]"
	}
	return w.scalar(e.value, surroundings)
}

// scalar writes text without quotes where it is the same text then.
func (w *writer) scalar(n *yaml.Node, surroundings string) string {
	switch {
	case n.Tag == "!!null":
		return "null"
	case n.Tag != "!!str" || w.needsNoQuotes(n.Value, surroundings):
		return n.Value
	case strings.ContainsAny(n.Value, `"\`) && !strings.Contains(n.Value, "'") && !strings.ContainsFunc(n.Value, func(r rune) bool { return !unicode.IsPrint(r) }):
		return "'" + n.Value + "'"
	}
	return strconv.Quote(n.Value) // its escapes are also YAML's
}

// olderWords are truth values in YAML 1.1, and text here.
var olderWords = []string{"y", "n", "yes", "no", "on", "off"}

func (w *writer) needsNoQuotes(s, surroundings string) bool {
	key := surroundings + "\x00" + s
	if ok, there := w.plain[key]; there {
		return ok
	}
	probe := map[string]string{"key": s + ": x\n", "flow key": "{" + s + ": x}\n", "flow": "[" + s + "]\n", "block": "x: " + s + "\n"}[surroundings]
	var doc yaml.Node
	ok := s != "" && !slices.Contains(olderWords, strings.ToLower(s)) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) &&
		yaml.Unmarshal([]byte(probe), &doc) == nil && len(doc.Content) == 1 && len(doc.Content[0].Content) > 0
	if ok {
		n := doc.Content[0].Content[0]
		if surroundings == "block" {
			n = doc.Content[0].Content[1]
		}
		one := len(doc.Content[0].Content) == 1 || surroundings != "flow"
		ok = one && n.Kind == yaml.ScalarNode && n.Tag == "!!str" && n.Value == s && n.Anchor == "" && n.Style == 0
	}
	w.plain[key] = ok
	return ok
}

// asLiteral reports whether text of several lines can stand as it is below a "|".
func (e *element) asLiteral() bool {
	v := e.value.Value
	first := strings.TrimLeft(v, "\n")
	return strings.TrimSpace(v) != "" && first[0] != ' ' && first[0] != '\t' &&
		!strings.ContainsFunc(v, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) })
}

func (w *writer) literal(k *element, lead, indent, beside string) {
	v := k.value.Value
	chomp := ""
	switch body := strings.TrimRight(v, "\n"); len(v) - len(body) {
	case 0:
		chomp = "-"
	case 1:
	default:
		chomp = "+"
	}
	w.WriteString(strings.TrimRight(lead, " ") + " |" + chomp + beside + "\n")
	for line := range strings.Lines(v) {
		if line != "\n" {
			w.WriteString(indent)
		}
		w.WriteString(strings.TrimSuffix(line, "\n") + "\n")
	}
}
