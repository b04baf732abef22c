package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"
)

// Format gives the canonical form of a file: fields in the order of docs/policy.md,
// two blanks for each level, short mappings and lists on one line, quotes only where
// they are needed. It keeps every comment, every separator of documents, and what
// the file says. file is what mistakes are reported for; a file that does not parse
// gives [Errors].
func Format(file string, src []byte) ([]byte, error) {
	var errs collector
	f := fileReader{set: &Set{sources: map[string][]byte{}}, file: file, src: src, errs: &errs}
	f.read()
	checkDuplicates([]*Set{f.set}, &errs)
	if err := errs.err(); err != nil {
		return nil, err
	}
	parts, err := readParts(src)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	w := writer{plain: map[string]bool{}}
	for _, p := range parts {
		w.section(p)
	}
	if w.Len() == 0 {
		w.WriteString("\n") // an empty file might be half-written
	}
	out := []byte(w.String())
	if err := unchanged(parts, out); err != nil {
		return nil, fmt.Errorf("%s: cannot be formatted: %w", file, err)
	}
	return out, nil
}

// section is one document of a file with the separator before it.
type section struct {
	separator string // "---", "..." or, at the beginning of a file, ""
	beside    string // the comment on the separator's line
	doc       *yaml.Node
	root      *element // of doc; nil where the document is empty
	head      []comment
	gap       bool // an empty line between head and the document
	comments  []comment
}

// comment is one comment of a file.
type comment struct {
	line, col int // as of a node
	text      string
	own       bool // nothing else stands on the line
	gap       bool // an empty line stands before it
}

// readParts splits a file that parses.
func readParts(src []byte) ([]*section, error) {
	docs, err := loadAll(src)
	if err != nil {
		return nil, err
	}
	t := newText(src)
	var parts []*section
	for from := 1; from <= len(t.lines); {
		p := &section{}
		to := from + 1
		if s := separator(t.line(from)); s != "" {
			p.separator = s
		}
		for to <= len(t.lines) && separator(t.line(to)) == "" {
			to++
		}
		for _, d := range docs {
			if d.Line >= from && d.Line < to {
				p.doc = d
			}
		}
		if err := p.read(t, from, to); err != nil {
			return nil, err
		}
		if p.separator != "" || p.doc != nil || len(p.comments) > 0 { // or only empty lines
			parts = append(parts, p)
		}
		from = to
	}
	return parts, nil
}

// loadAll gives the documents that are not empty.
func loadAll(src []byte) ([]*yaml.Node, error) {
	loader, err := yaml.NewLoader(bytes.NewReader(src))
	if err != nil {
		return nil, err
	}
	var out []*yaml.Node
	for {
		var n yaml.Node
		err := loader.Load(&n)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if !isEmpty(&n) {
			out = append(out, n.Content[0])
		}
	}
}

// separator gives what separates documents on this line, or "".
func separator(line []rune) string {
	if len(line) < 3 || len(line) > 3 && line[3] != ' ' && line[3] != '\t' {
		return ""
	}
	if s := string(line[:3]); s == "---" || s == "..." {
		return s
	}
	return ""
}

// read finds the comments of the lines from (inclusive) to (exclusive), and what
// they belong to.
func (p *section) read(t *text, from, to int) error {
	for n := from; n < to; n++ {
		if line := t.line(n); len(line) > 0 && line[0] == '%' {
			return errors.New("YAML directives are not supported; remove the line that begins with %")
		}
	}
	if p.doc != nil {
		top, _ := documentShape(kinds).of(kindOf(p.doc))
		p.root = newElement(nil, p.doc, top)
		t.hide(p.root, to)
	}
	p.comments = t.comments(from, to)
	for _, c := range p.comments {
		switch {
		case c.line == from && p.separator != "" && !c.own && (p.root == nil || p.root.start.line > from):
			p.beside = c.text
		case p.root == nil || c.own && c.line < p.root.start.line:
			p.head = append(p.head, c)
		default:
			p.root.place(c)
		}
	}
	if p.root != nil {
		p.gap = p.root.kids[0].gap(t)
		p.root.gaps(t)
	}
	return nil
}

func kindOf(doc *yaml.Node) string {
	for i := 0; i+1 < len(doc.Content); i += 2 {
		if doc.Content[i].Value == "kind" {
			return doc.Content[i+1].Value
		}
	}
	return ""
}

// unchanged holds what was written to what was read. It is the last guard: a file
// is rather left alone than changed in what it says.
func unchanged(parts []*section, out []byte) error {
	again, err := readParts(out)
	if err != nil {
		return err
	}
	if len(again) != len(parts) {
		return fmt.Errorf("there would be %d documents instead of %d", len(again), len(parts))
	}
	for i, p := range parts {
		a, b := p.texts(), again[i].texts()
		if p.separator != again[i].separator || !slices.Equal(a, b) {
			return fmt.Errorf("comments of document %d would change", i+1)
		}
		if (p.doc == nil) != (again[i].doc == nil) || p.doc != nil && !sameNode(p.doc, again[i].doc) {
			return fmt.Errorf("document %d would change", i+1)
		}
	}
	return nil
}

// texts gives what the comments say, sorted: comments move with what they are about.
func (p *section) texts() []string {
	var out []string
	for _, c := range p.comments {
		out = append(out, c.text)
	}
	slices.Sort(out)
	return out
}

// sameNode compares what two values say. The order of fields says nothing.
func sameNode(a, b *yaml.Node) bool {
	if a.Kind != b.Kind || a.Tag != b.Tag || a.Value != b.Value || len(a.Content) != len(b.Content) {
		return false
	}
	if a.Kind != yaml.MappingNode {
		return slices.EqualFunc(a.Content, b.Content, sameNode)
	}
	other := map[string]*yaml.Node{}
	for i := 0; i+1 < len(b.Content); i += 2 {
		other[b.Content[i].Tag+b.Content[i].Value] = b.Content[i+1]
	}
	for i := 0; i+1 < len(a.Content); i += 2 {
		v, ok := other[a.Content[i].Tag+a.Content[i].Value]
		if !ok || !sameNode(a.Content[i+1], v) {
			return false
		}
	}
	return true
}

// text is a file by line and character.
type text struct {
	lines  [][]rune
	hidden [][]bool // inside of scalars that could hold a "#"; nil: nothing of the line
}

func newText(src []byte) *text {
	lines := strings.Split(strings.TrimSuffix(string(src), "\n"), "\n")
	t := &text{lines: make([][]rune, len(lines)), hidden: make([][]bool, len(lines))}
	for i, l := range lines {
		t.lines[i] = []rune(strings.TrimSuffix(l, "\r"))
	}
	return t
}

func (t *text) line(n int) []rune { return t.lines[n-1] }

// blank reports whether a line is empty, or is not there.
func (t *text) blank(n int) bool {
	return n < 1 || n > len(t.lines) || strings.TrimSpace(string(t.line(n))) == ""
}

// comments gives those of the lines from (inclusive) to (exclusive): a "#" at the
// beginning of a line or behind a blank, outside of scalars.
func (t *text) comments(from, to int) (out []comment) {
	for n := from; n < to; n++ {
		line, hidden := t.line(n), t.hidden[n-1]
		for i, r := range line {
			if r != '#' || hidden != nil && hidden[i] || i > 0 && line[i-1] != ' ' && line[i-1] != '\t' {
				continue
			}
			own := strings.TrimSpace(string(line[:i])) == ""
			out = append(out, comment{line: n, col: i + 1, text: strings.TrimRight(string(line[i:]), " \t"), own: own, gap: n > from && t.blank(n-1)})
			break
		}
	}
	return out
}
