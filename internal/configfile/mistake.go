package configfile

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// MaxMistakes is how many mistakes are told at once; the others are counted.
const MaxMistakes = 20

// Mistake is one thing wrong with a file, told to the person who wrote it.
type Mistake struct {
	File    string
	Line    int // from 1; 0 when the whole file is meant
	Col     int // in characters, from 1; 0 when the whole file is meant
	Msg     string
	Hint    string // what to do, or ""
	Snippet string // the line, and below it a caret; "" where Line is 0
}

// Error gives FILE:LINE:COL: MSG, then the snippet and the hint on lines of
// their own.
func (m *Mistake) Error() string {
	var b strings.Builder
	b.WriteString(m.File)
	if m.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", m.Line, m.Col)
	}
	if m.File != "" {
		b.WriteString(": ")
	}
	b.WriteString(m.Msg)
	if m.Snippet != "" {
		b.WriteString("\n    " + strings.ReplaceAll(m.Snippet, "\n", "\n    "))
	}
	if m.Hint != "" {
		b.WriteString("\n    hint: " + m.Hint)
	}
	return b.String()
}

// Mistakes are the mistakes of one file, ordered by place and never empty when
// returned as an error. At most [MaxMistakes] are kept; the last element then
// counts the rest.
type Mistakes []*Mistake

// Error gives all of them, each as [Mistake.Error] does.
func (m Mistakes) Error() string {
	parts := make([]string, len(m))
	for i, one := range m {
		parts[i] = one.Error()
	}
	return strings.Join(parts, "\n")
}

// collector gathers mistakes.
type collector struct {
	kept Mistakes
	more int
}

func (c *collector) full() bool { return len(c.kept) >= MaxMistakes }

func (c *collector) add(m *Mistake) {
	if c.full() {
		c.more++
		return
	}
	c.kept = append(c.kept, m)
}

func (c *collector) err() error {
	if len(c.kept) == 0 {
		return nil
	}
	out := slices.Clone(c.kept)
	slices.SortStableFunc(out, func(a, b *Mistake) int {
		return cmp.Or(a.Line-b.Line, a.Col-b.Col)
	})
	if c.more > 0 {
		out = append(out, &Mistake{File: out[0].File, Msg: fmt.Sprintf("and %d more mistakes", c.more)})
	}
	return out
}

// snippetWidth bounds what is shown of one line, in characters.
const snippetWidth = 100

// Snippet gives the given line of src and a caret below col, both from 1, or ""
// when src has no such line. What is not printable is shown as "?".
func Snippet(src []byte, line, col int) string {
	text, ok := lineOf(src, line)
	if !ok || col < 1 {
		return ""
	}
	shown := []rune(printable(text))
	at := min(col-1, len(shown))
	if from := at - snippetWidth*3/4; from > 0 && len(shown) > snippetWidth {
		shown, at = shown[from:], at-from
	}
	if len(shown) > snippetWidth {
		shown = append(shown[:snippetWidth:snippetWidth], '…')
	}
	return strings.TrimRight(string(shown), " ") + "\n" + strings.Repeat(" ", at) + "^"
}

// lineOf gives a line of src, counted from 1, without its end.
func lineOf(src []byte, line int) ([]byte, bool) {
	for n := 1; line > 0; n++ {
		text, rest, more := bytes.Cut(src, []byte("\n"))
		if n == line {
			return bytes.TrimSuffix(text, []byte("\r")), true
		}
		if !more {
			break
		}
		src = rest
	}
	return nil, false
}

// printable replaces what a terminal would not show as one character.
func printable(text []byte) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' ' // one column, as the column counts it
		case !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, string(text))
}
