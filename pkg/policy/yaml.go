package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
	"go.yaml.in/yaml/v4/plugin/loaderlimits"
)

const (
	maxDepth  = 32      // nested values in one document; the language needs 8
	maxValues = 200_000 // marks that can begin a value in one document: in memory a value takes 500 bytes, its text 2
)

// fileReader turns one file into resources of a set and collects the mistakes.
type fileReader struct {
	set  *Set
	file string // as reported
	src  []byte
	errs *collector
}

// fail records a mistake at p.
func (f *fileReader) fail(p pos, hint, format string, args ...any) {
	e := &Error{File: f.file, Line: p.line, Col: p.col, Msg: fmt.Sprintf(format, args...), Hint: hint}
	if !f.errs.full() {
		e.Snippet = snippet(f.src, p)
	}
	f.errs.add(e)
}

// read parses every document of the file.
func (f *fileReader) read() {
	if !f.checkText() {
		return
	}
	loader, err := yaml.NewLoader(bytes.NewReader(f.src),
		yaml.WithPlugin(loaderlimits.New(loaderlimits.DepthValue(maxDepth))))
	if err != nil {
		f.fail(pos{}, "", "reading YAML: %v", err)
		return
	}
	for {
		var doc yaml.Node
		err := loader.Load(&doc)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			f.failYAML(err)
			return // what follows a syntax error cannot be trusted
		}
		if isEmpty(&doc) || !f.checkPlain(&doc) {
			continue
		}
		f.document(doc.Content[0])
	}
}

// isEmpty reports whether a document holds nothing but comments.
func isEmpty(doc *yaml.Node) bool {
	if len(doc.Content) == 0 {
		return true
	}
	n := doc.Content[0]
	return n.Kind == yaml.ScalarNode && n.Value == "" && n.Style == 0 && n.Anchor == ""
}

// checkText refuses what is not plain, complete text, before the YAML parser
// sees it. Characters that YAML or a terminal may take for a line break, or that
// reorder text on a screen, could hide a rule from its reviewer.
func (f *fileReader) checkText() bool {
	switch {
	case len(f.src) > MaxFileSize:
		f.fail(pos{}, "", "%s", tooBig(int64(len(f.src))))
		return false
	case len(f.src) == 0:
		f.fail(pos{}, "delete the file or write a comment into it", "the file is empty: it may be half-written")
		return false
	case bytes.HasPrefix(f.src, []byte("\xef\xbb\xbf")):
		f.fail(pos{1, 1}, "save the file as UTF-8 without one", "the file begins with a byte order mark")
		return false
	}
	line, start := 1, 0
	values, most := 0, 0 // in this document, in any
	for i := 0; i < len(f.src); {
		r, size := utf8.DecodeRune(f.src[i:])
		if problem := badRune(r, size, f.src[i:]); problem != "" {
			f.fail(pos{line, 1 + utf8.RuneCount(f.src[start:i])}, "", "%s", problem)
			return false
		}
		i += size
		switch r {
		case '\n':
			line, start = line+1, i
			if isMarker(f.src[i:]) {
				values = 0
			}
			values++
		case ',', ':', '[', '{', '-', '?':
			values++
		}
		most = max(most, values)
	}
	if start != len(f.src) {
		f.failUnended(start)
		return false
	}
	if most > maxValues {
		f.fail(pos{}, "split the document", "more than %d values in one document", maxValues)
		return false
	}
	return true
}

// failUnended reports that the last line, which begins at start, has no end. It
// points behind the last line that has text.
func (f *fileReader) failUnended(start int) {
	src, hint := f.src, "end the last line with a newline"
	if len(bytes.TrimSpace(src[start:])) == 0 {
		src, hint = bytes.TrimRight(src, " \t\r\n"), "only blanks follow this line: end the file with a newline"
	}
	p := pos{1 + bytes.Count(src, []byte{'\n'}), 1 + utf8.RuneCount(src[bytes.LastIndexByte(src, '\n')+1:])}
	if len(src) == 0 {
		p, hint = pos{}, "delete the file or write a comment into it"
	}
	f.fail(p, hint, "the file does not end with a newline: it may be half-written")
}

// isMarker reports whether a line begins a document: "---" in the first column
// does so wherever it stands (YAML 1.2 section 9.1.4).
func isMarker(line []byte) bool {
	return bytes.HasPrefix(line, []byte("---")) && (len(line) == 3 || bytes.IndexByte([]byte(" \t\r\n"), line[3]) >= 0)
}

// badRune says what is wrong with r, which rest begins with, or "".
func badRune(r rune, size int, rest []byte) string {
	switch {
	case r == utf8.RuneError && size == 1:
		return fmt.Sprintf("byte 0x%02x is not UTF-8 text", rest[0])
	case r == '\r' && (len(rest) < 2 || rest[1] != '\n'):
		return "a carriage return without a newline is not allowed"
	case r < ' ' && r != '\n' && r != '\r' && r != '\t', r >= 0x7f && r <= 0x9f:
		return fmt.Sprintf("control character U+%04X is not allowed", r)
	case r == 0x2028, r == 0x2029, r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069, r == 0xfeff:
		return fmt.Sprintf("invisible character U+%04X is not allowed: it can make the file look other than it is", r)
	}
	return ""
}

// failYAML reports a syntax error of the YAML parser.
func (f *fileReader) failYAML(err error) {
	var le *yaml.LoadError
	if !errors.As(err, &le) {
		f.fail(pos{}, "", "not valid YAML: %v", err)
		return
	}
	p := pos{le.Mark.Line, le.Mark.Column}
	if line, ok := lineOf(f.src, p.line); (!ok || len(line) == 0) && le.ContextMark.Line > 0 {
		p = pos{le.ContextMark.Line, le.ContextMark.Column} // where the unfinished thing begins
	}
	hint := ""
	if line, ok := lineOf(f.src, p.line); ok && bytes.HasPrefix(bytes.TrimLeft(line, " "), []byte("\t")) {
		hint = "indent with spaces, not with tabs"
	} else if strings.HasPrefix(le.ContextMsg, "while parsing a ") || strings.HasPrefix(le.ContextMsg, "while scanning a ") {
		hint = fmt.Sprintf("%s that begins on line %d", le.ContextMsg, le.ContextMark.Line)
	}
	f.fail(f.clamp(p), hint, "not valid YAML: %s", shorten(le.Message))
}

// clamp moves a place behind the end of the file to its last line.
func (f *fileReader) clamp(p pos) pos {
	if p.line == 0 {
		return pos{}
	}
	lines := bytes.Count(f.src, []byte{'\n'})
	if p.line > lines {
		return pos{max(lines, 1), 1}
	}
	return pos{p.line, max(p.col, 1)}
}

// checkPlain refuses anchors, aliases, merge keys and tags anywhere in n: each
// lets a line say something other than what stands there.
func (f *fileReader) checkPlain(n *yaml.Node) bool {
	ok := true
	switch {
	case n.Kind == yaml.AliasNode:
		f.fail(at(n), "write the value out", "YAML aliases (*%s) are not allowed", shorten(n.Value))
		return false
	case n.Anchor != "":
		f.fail(at(n), "write the value out where it is needed", "YAML anchors (&%s) are not allowed", shorten(n.Anchor))
		ok = false
	case n.Kind == yaml.ScalarNode && n.Tag == "!!merge":
		f.fail(at(n), "write the fields out", "YAML merge keys (<<) are not allowed")
		return false
	case n.Style&yaml.TaggedStyle != 0:
		f.fail(at(n), "remove it", "YAML tags (%s) are not allowed", shorten(n.Tag))
		ok = false
	}
	for _, c := range n.Content {
		ok = f.checkPlain(c) && ok
	}
	return ok
}

func at(n *yaml.Node) pos { return pos{n.Line, n.Column} }
