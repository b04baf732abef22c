package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"
)

// RemovalPatch gives a unified diff, for `git apply` and `patch -p1`, that takes
// allows out of the files from which sets were parsed: nothing else, and with them
// the comments directly above them. A Policy that has no other rules goes as a whole
// document, and a file that has nothing else is deleted. Names in it are prefix and
// the file's, with slashes. What it leaves is parsed and compared before it is given
// out; a file that is written in too unusual a way for that is an error.
func RemovalPatch(sets []*Set, allows []RuleRef, prefix string) ([]byte, error) {
	byFile := map[string][]RuleRef{}
	for _, r := range allows {
		byFile[r.File] = append(byFile[r.File], r)
	}
	var out bytes.Buffer
	for _, file := range slices.Sorted(maps.Keys(byFile)) {
		i := slices.IndexFunc(sets, func(s *Set) bool { return s.Name == byFile[file][0].Set && s.sources[file] != nil })
		if i < 0 {
			return nil, fmt.Errorf("removing rules: no set has the file %s", file)
		}
		r := remover{src: sets[i].sources[file]}
		if err := r.remove(byFile[file]); err != nil {
			return nil, fmt.Errorf("removing rules from %s: %w", file, err)
		}
		r.diff(&out, prefix+file)
	}
	return out.Bytes(), nil
}

// errLayout is told where text cannot be cut at the lines that are meant.
var errLayout = errors.New("it is written in a way that cannot be edited safely: remove them by hand")

// remover edits one file.
type remover struct {
	src   []byte
	lines []int // :: line from 0 → where it begins; one more for the end
	cuts  []textCut
	docs  []*yaml.Node
	want  []*yaml.Node // docs as they shall be
}

// textCut replaces src[from:to].
type textCut struct {
	from, to int
	text     string
}

// remove finds what to cut and checks what is left.
func (r *remover) remove(allows []RuleRef) error {
	r.lines = append(r.lines, 0)
	for i, c := range r.src {
		if c == '\n' {
			r.lines = append(r.lines, i+1)
		}
	}
	var err error
	if r.docs, err = loadDocuments(r.src); err != nil {
		return err
	}
	for _, d := range r.docs {
		keep, err := r.document(d, allows)
		if err != nil {
			return err
		}
		if keep {
			r.want = append(r.want, d)
		}
	}
	if len(r.cuts) == 0 {
		return errors.New("it has none of them")
	}
	return r.check()
}

// check orders the cuts and compares what they leave with what was meant.
func (r *remover) check() error {
	slices.SortFunc(r.cuts, func(a, b textCut) int { return a.from - b.from })
	for i := range max(0, len(r.cuts)-1) {
		if r.cuts[i].to > r.cuts[i+1].from {
			return errLayout
		}
	}
	got, err := loadDocuments(r.edited())
	if err != nil || !slices.EqualFunc(got, r.want, sameNode) {
		return errLayout
	}
	return nil
}

// edited gives the file without what was cut.
func (r *remover) edited() []byte {
	var out []byte
	at := 0
	for _, c := range r.cuts {
		out = append(append(out, r.src[at:c.from]...), c.text...)
		at = c.to
	}
	return append(out, r.src[at:]...)
}

// document cuts rules out of one document, and out of its tree; false if all of it
// goes.
func (r *remover) document(doc *yaml.Node, allows []RuleRef) (bool, error) {
	_, kind := mappingField(doc, "kind")
	_, meta := mappingField(doc, "metadata")
	_, name := mappingField(meta, "name")
	_, spec := mappingField(doc, "spec")
	key, allow := mappingField(spec, "allow")
	if kind == nil || kind.Value != "Policy" || name == nil || allow == nil || allow.Kind != yaml.SequenceNode {
		return true, nil
	}
	goes := make([]bool, len(allow.Content))
	n := 0
	for i, item := range allow.Content {
		goes[i] = slices.ContainsFunc(allows, func(a RuleRef) bool { return a.Policy == name.Value && a.Line == item.Line })
		if goes[i] {
			n++
		}
	}
	_, deny := mappingField(spec, "deny")
	flow := allow.Style&yaml.FlowStyle != 0
	var err error
	switch {
	case n == 0:
		return true, nil
	case n == len(goes) && (deny == nil || len(deny.Content) == 0):
		r.wholeDocument(doc)
		return false, nil
	case n == len(goes) && spec.Style&yaml.FlowStyle != 0:
		err = r.emptyList(allow)
		allow.Content = nil
		return true, err
	case n == len(goes):
		err = r.wholeField(key, allow)
		i := slices.Index(spec.Content, key)
		spec.Content = slices.Delete(spec.Content, i, i+2)
		return true, err
	case flow:
		err = r.flowItems(allow, goes)
	default:
		for i, item := range allow.Content {
			if goes[i] && err == nil {
				err = r.blockItem(item)
			}
		}
	}
	var left []*yaml.Node
	for i, item := range allow.Content {
		if !goes[i] {
			left = append(left, item)
		}
	}
	allow.Content = left
	return true, err
}

// loadDocuments parses the documents of a file that hold something.
func loadDocuments(src []byte) ([]*yaml.Node, error) {
	var out []*yaml.Node
	loader, err := yaml.NewLoader(bytes.NewReader(src))
	if err != nil {
		return nil, fmt.Errorf("reading YAML: %w", err)
	}
	for {
		var doc yaml.Node
		err := loader.Load(&doc)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("reading YAML: %w", err)
		}
		if !isEmpty(&doc) {
			out = append(out, doc.Content[0])
		}
	}
}

// mappingField gives a key and its value, or nil.
func mappingField(n *yaml.Node, name string) (key, value *yaml.Node) {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil, nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			return n.Content[i], n.Content[i+1]
		}
	}
	return nil, nil
}

// diff writes what was cut as hunks of whole lines.
func (r *remover) diff(out *bytes.Buffer, name string) {
	const context = 3
	if strings.Contains(name, " ") {
		name += "\t" // or the name would end there
	}
	fmt.Fprintf(out, "--- a/%s\n", name)
	total := len(r.lines) - 1
	if len(bytes.TrimSpace(r.edited())) == 0 {
		fmt.Fprintf(out, "+++ /dev/null\n@@ -1,%d +0,0 @@\n", total)
		r.print(out, '-', 0, total)
		return
	}
	fmt.Fprintf(out, "+++ b/%s\n", name)
	changes := r.changes()
	shift := 0 // how much later a line stands in the new file
	for len(changes) > 0 {
		n := 1
		for n < len(changes) && changes[n].from-changes[n-1].to <= 2*context {
			n++
		}
		hunk := changes[:n]
		changes = changes[n:]
		from, to := max(0, hunk[0].from-context), min(total, hunk[n-1].to+context)
		more := 0
		for _, c := range hunk {
			more += strings.Count(c.text, "\n") - (c.to - c.from)
		}
		fmt.Fprintf(out, "@@ -%s +%s @@\n", lineRange(from, to-from), lineRange(from+shift, to-from+more))
		shift += more
		at := from
		for _, c := range hunk {
			r.print(out, ' ', at, c.from)
			r.print(out, '-', c.from, c.to)
			for line := range strings.Lines(c.text) {
				out.WriteString("+" + line)
			}
			at = c.to
		}
		r.print(out, ' ', at, to)
	}
}

// changes gives the cuts as ranges of lines, with what stands there then.
func (r *remover) changes() []textCut {
	var out []textCut
	for _, c := range r.cuts {
		first, last := r.lineAt(c.from), r.lineAt(c.to)
		if c.to > r.lines[last] || c.from > r.lines[first] && c.to == r.lines[last] {
			last++ // only a part of the line goes, or what goes ends with a line that begins before
		}
		change := textCut{first, last, string(r.src[r.lines[first]:c.from]) + c.text + string(r.src[c.to:r.lines[last]])}
		if n := len(out); n > 0 && out[n-1].to > first { // on one line with the one before
			was := &out[n-1]
			was.text = was.text[:len(was.text)-(r.lines[was.to]-c.from)] + c.text + string(r.src[c.to:r.lines[last]])
			was.to = last
			continue
		}
		out = append(out, change)
	}
	return out
}

func (r *remover) print(out *bytes.Buffer, mark byte, from, to int) {
	for line := range strings.Lines(string(r.src[r.lines[from]:r.lines[to]])) {
		out.WriteByte(mark)
		out.WriteString(line)
	}
}

// lineRange gives START,COUNT from a line counted from 0; of nothing, START is the
// line before.
func lineRange(from, n int) string {
	if n > 0 {
		from++
	}
	return fmt.Sprintf("%d,%d", from, n)
}
