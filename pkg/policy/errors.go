package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// ErrNoWorkload is reported by [Compile] when no set defines a Workload: more
// likely a folder that vanished than a wish to deny everything to everyone.
var ErrNoWorkload = errors.New("no Workload in any set")

// Error is one mistake in the files, told to the person who wrote them.
type Error struct {
	File    string // path below the policy folder, with slashes; "" where no file is to blame
	Line    int    // from 1; 0 when the whole file is meant
	Col     int    // in characters, from 1; 0 when the whole file is meant
	Msg     string
	Hint    string // what to do, or ""
	Snippet string // the line, and below it a caret; "" where Line is 0

	err error
}

// Error gives FILE:LINE:COL: MSG, then the snippet and the hint on lines of
// their own.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Position())
	if b.Len() > 0 {
		b.WriteString(": ")
	}
	b.WriteString(e.Msg)
	if e.Snippet != "" {
		for line := range strings.SplitSeq(e.Snippet, "\n") {
			b.WriteString("\n    ")
			b.WriteString(line)
		}
	}
	if e.Hint != "" {
		b.WriteString("\n    hint: ")
		b.WriteString(e.Hint)
	}
	return b.String()
}

// Position gives FILE:LINE:COL, or less where less is known.
func (e *Error) Position() string {
	if e.Line == 0 {
		return e.File
	}
	return fmt.Sprintf("%s:%d:%d", e.File, e.Line, e.Col)
}

// Unwrap gives the cause, where there is one: an I/O error or a sentinel.
func (e *Error) Unwrap() error { return e.err }

// Errors are the mistakes found in one go, ordered by place and never empty
// when returned as an error. At most [MaxErrors] are kept; the last element
// then counts the rest.
type Errors []*Error

// Error gives all of them, each as [Error.Error] does.
func (e Errors) Error() string {
	parts := make([]string, len(e))
	for i, err := range e {
		parts[i] = err.Error()
	}
	return strings.Join(parts, "\n")
}

// Unwrap gives the elements, for errors.Is and errors.As.
func (e Errors) Unwrap() []error {
	out := make([]error, len(e))
	for i, err := range e {
		out[i] = err
	}
	return out
}

// collector gathers mistakes. Callers compute costly hints only while it is not
// full.
type collector struct {
	errs Errors
	more int
	cut  bool // checking ended early: there may be more than counted
}

func (c *collector) full() bool { return len(c.errs) >= MaxErrors }

func (c *collector) add(e *Error) {
	if c.full() {
		c.more++
		return
	}
	c.errs = append(c.errs, e)
}

// count is how many were added, also those that are not kept.
func (c *collector) count() int { return len(c.errs) + c.more }

// failed reports whether anything was added.
func (c *collector) failed() bool { return len(c.errs) > 0 }

// err gives what was gathered, ordered by place, or nil.
func (c *collector) err() error {
	if !c.failed() {
		return nil
	}
	out := slices.Clone(c.errs)
	slices.SortStableFunc(out, comparePlace)
	switch {
	case c.cut:
		out = append(out, &Error{Msg: "and perhaps more mistakes"})
	case c.more > 0:
		out = append(out, &Error{Msg: fmt.Sprintf("and %d more mistakes", c.more)})
	}
	return out
}

// snippetWidth bounds what is shown of one line, in characters.
const snippetWidth = 100

// snippet gives the line at p of src and a caret below the column, or "" when
// src has no such line. What is not printable is shown as "?".
func snippet(src []byte, p pos) string {
	line, ok := lineOf(src, p.line)
	if !ok || p.col < 1 {
		return ""
	}
	text := printable(line)
	col := min(p.col-1, len(text))
	if start := col - snippetWidth*3/4; start > 0 && len(text) > snippetWidth {
		text, col = text[start:], col-start
	}
	if len(text) > snippetWidth {
		text = append(text[:snippetWidth:snippetWidth], '…')
	}
	return strings.TrimRight(string(text), " ") + "\n" + strings.Repeat(" ", col) + "^"
}

// lineOf gives line n of src, counted from 1, without its end.
func lineOf(src []byte, n int) ([]byte, bool) {
	if n < 1 {
		return nil, false
	}
	for ; n > 1; n-- {
		i := slices.Index(src, '\n')
		if i < 0 {
			return nil, false
		}
		src = src[i+1:]
	}
	if i := slices.Index(src, '\n'); i >= 0 {
		src = src[:i]
	}
	return src, true
}

func printable(line []byte) []rune {
	out := make([]rune, 0, len(line))
	for len(line) > 0 {
		r, size := utf8.DecodeRune(line)
		line = line[size:]
		switch {
		case r == '\t':
			r = ' ' // one column, as the column counts it
		case r == '\r' && len(line) == 0:
			continue
		case r == utf8.RuneError && size == 1, !unicode.IsPrint(r):
			r = '?'
		}
		out = append(out, r)
	}
	return out
}
