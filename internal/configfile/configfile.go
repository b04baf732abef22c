// Package configfile reads the configuration files of the daemons strictly:
// every mistake in one go, each with file, line and column, the line itself and
// a caret, in words that need no knowledge of Go.
//
// It knows YAML and the shape of a Go value. What a value may be is for the
// daemon to check; it reports what it finds through [File.Report]. Policy files
// have a reader of their own in pkg/policy.
package configfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
	"go.yaml.in/yaml/v4/plugin/loaderlimits"
)

const (
	// MaxSize bounds a configuration file, in bytes.
	MaxSize  = 1 << 20
	maxDepth = 32 // nested values; configurations need 4
)

// Decode reads data, the content of the file at path, into the struct that into
// points to. Keys that are absent or empty leave what is there, so that defaults
// may be set before. The error is [Mistakes]; into then holds what could be read.
func Decode(path string, data []byte, into any) error {
	f, err := Parse(path, data)
	if err != nil {
		return err
	}
	f.Decode(into)
	return f.Err()
}

// File is a configuration file that is YAML, and what was found wrong with it.
type File struct {
	path   string
	src    []byte
	root   *yaml.Node          // nil where the file holds nothing but comments
	broken map[*yaml.Node]bool // values that a mistake was reported for
	meant  map[string]bool     // :: key → was suggested for an unknown one
	found  collector
}

// Open reads the file at path and parses it.
func Open(path string) (*File, error) {
	r, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading configuration: %w", err)
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("reading configuration %s: %w", path, err)
	}
	return Parse(path, data)
}

// Parse takes data as the content of the file at path. The error is [Mistakes]:
// data is not one plain YAML document.
func Parse(path string, data []byte) (*File, error) {
	f := &File{path: path, src: bytes.TrimPrefix(data, []byte("\ufeff")), broken: map[*yaml.Node]bool{}, meant: map[string]bool{}}
	if f.checkText() {
		f.load()
	}
	if f.root != nil {
		f.checkPlain(f.root)
	}
	if err := f.Err(); err != nil {
		return nil, err
	}
	return f, nil
}

// Report records a mistake in the value of key, as in "outbound[0].to", unless
// reading it has failed already. A key that is absent is reported at the value
// that it belongs in.
func (f *File) Report(key string, err error) {
	n := f.root
	for rest := key; n != nil && rest != ""; {
		if f.broken[n] {
			return
		}
		child, after := step(n, rest)
		if child == nil {
			if f.meant[key] {
				return
			}
			break
		}
		n, rest = child, after
	}
	switch {
	case n == nil || n == f.root:
		f.fail(0, 0, "", "%s: %v", key, err)
	case !f.broken[n]:
		f.fail(n.Line, n.Column, "", "%s: %v", key, err)
	}
}

// step goes from n to the value that key begins with, and gives what is left of
// key. Names of mapping keys may contain dots themselves: the longest match wins.
func step(n *yaml.Node, key string) (child *yaml.Node, rest string) {
	switch n.Kind {
	case yaml.MappingNode:
		best := -1
		for i := 0; i+1 < len(n.Content); i += 2 {
			name := n.Content[i].Value
			after, ok := strings.CutPrefix(key, name)
			if ok && len(name) > best && (after == "" || after[0] == '.' || after[0] == '[') {
				child, rest, best = n.Content[i+1], strings.TrimPrefix(after, "."), len(name)
			}
		}
	case yaml.SequenceNode:
		number, after, ok := strings.Cut(strings.TrimPrefix(key, "["), "]")
		if i, err := strconv.Atoi(number); ok && err == nil && i >= 0 && i < len(n.Content) {
			return n.Content[i], strings.TrimPrefix(after, ".")
		}
	}
	return child, rest
}

// Err gives what was found wrong so far, ordered by place, as [Mistakes]; or nil.
func (f *File) Err() error { return f.found.err() }

// fail records a mistake; line 0 is the whole file.
func (f *File) fail(line, col int, hint, format string, args ...any) {
	m := &Mistake{File: f.path, Line: line, Col: col, Msg: fmt.Sprintf(format, args...), Hint: hint}
	if !f.found.full() {
		m.Snippet = Snippet(f.src, line, col)
	}
	f.found.add(m)
}

// checkText refuses what no editor shows as it is read: lines could then not be
// counted or shown.
func (f *File) checkText() bool {
	if len(f.src) > MaxSize {
		f.fail(0, 0, "", "more than %d bytes; is this a configuration file?", MaxSize)
		return false
	}
	line, start := 1, 0
	for i := 0; i < len(f.src); {
		r, size := utf8.DecodeRune(f.src[i:])
		problem := ""
		switch {
		case r == utf8.RuneError && size == 1:
			problem = fmt.Sprintf("byte 0x%02x is not UTF-8 text", f.src[i])
		case r == '\r' && !bytes.HasPrefix(f.src[i+1:], []byte("\n")):
			problem = "a carriage return without a newline is not allowed"
		case r < ' ' && r != '\n' && r != '\r' && r != '\t', r >= 0x7f && r < 0xa0, r == 0x2028, r == 0x2029, r == 0xfeff:
			problem = fmt.Sprintf("invisible character U+%04X is not allowed", r)
		}
		if problem != "" {
			f.fail(line, 1+utf8.RuneCount(f.src[start:i]), "", "%s", problem)
			return false
		}
		i += size
		if r == '\n' {
			line, start = line+1, i
		}
	}
	return true
}

// load parses the YAML, which must be one document.
func (f *File) load() {
	loader, err := yaml.NewLoader(bytes.NewReader(f.src), yaml.WithPlugin(loaderlimits.New(loaderlimits.DepthValue(maxDepth))))
	if err != nil {
		f.fail(0, 0, "", "reading YAML: %v", err)
		return
	}
	var doc, more yaml.Node
	if err := loader.Load(&doc); err != nil {
		if !errors.Is(err, io.EOF) {
			f.failYAML(err)
		}
		return
	}
	switch err := loader.Load(&more); {
	case err == nil:
		f.fail(more.Line, more.Column, `remove what follows "---"`, "more than one YAML document")
		return
	case !errors.Is(err, io.EOF):
		f.failYAML(err)
		return
	}
	if len(doc.Content) > 0 && !isNull(doc.Content[0]) {
		f.root = doc.Content[0]
	}
}

// failYAML reports what the YAML parser stumbled over.
func (f *File) failYAML(err error) {
	var le *yaml.LoadError
	if !errors.As(err, &le) {
		f.fail(0, 0, "", "not valid YAML: %s", printable([]byte(err.Error())))
		return
	}
	line, col := le.Mark.Line, le.Mark.Column
	if text, ok := lineOf(f.src, line); (!ok || len(bytes.TrimSpace(text)) == 0) && le.ContextMark.Line > 0 {
		line, col = le.ContextMark.Line, le.ContextMark.Column // where the unfinished thing begins
	}
	if text, ok := lineOf(f.src, line); line > 1 && (!ok || len(bytes.TrimSpace(text)) == 0) {
		written := bytes.TrimRight(f.src, " \t\r\n") // the file ends too early: show its last word
		line = 1 + bytes.Count(written, []byte("\n"))
		col = utf8.RuneCount(written[1+bytes.LastIndexByte(written, '\n'):])
	}
	hint := ""
	if text, ok := lineOf(f.src, line); ok && bytes.HasPrefix(bytes.TrimLeft(text, " "), []byte("\t")) {
		hint = "indent with spaces, not with tabs"
	} else if le.ContextMark.Line > 0 && le.ContextMark.Line != line {
		hint = fmt.Sprintf("%s that begins on line %d", printable([]byte(le.ContextMsg)), le.ContextMark.Line)
	}
	if line > 0 {
		col = max(col, 1)
	}
	f.fail(line, col, hint, "not valid YAML: %s", printable([]byte(le.Message)))
}

// checkPlain refuses anchors, aliases, merge keys and tags: with them a line
// means something other than what stands there.
func (f *File) checkPlain(n *yaml.Node) {
	const hint = "write the value out where it is needed"
	switch {
	case n.Kind == yaml.AliasNode:
		f.fail(n.Line, n.Column, hint, "YAML aliases are not supported in a configuration")
		return // its content is the anchor's
	case n.Anchor != "":
		f.fail(n.Line, n.Column, hint, "YAML anchors are not supported in a configuration")
	case n.Kind == yaml.ScalarNode && n.ShortTag() == "!!merge":
		f.fail(n.Line, n.Column, hint, "YAML merge keys (<<) are not supported in a configuration")
	case n.Style&yaml.TaggedStyle != 0:
		f.fail(n.Line, n.Column, "remove it", "YAML tags are not supported in a configuration")
	}
	for _, c := range n.Content {
		f.checkPlain(c)
	}
}

func isNull(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}
