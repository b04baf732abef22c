package runner

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
)

// maxLine bounds one line of output, in bytes; what a process writes beyond it
// on the same line is dropped and counted.
const maxLine = 8 << 10

// palette holds the ANSI colours that processes take in turn; red is left out
// because it belongs to problems.
var palette = []string{"36", "33", "32", "35", "34", "96", "93", "92", "95", "94"}

// console prints the lines of many processes, whole lines only, each with the
// name of its process in front.
type console struct {
	width int // of the longest name
	color bool

	mu       sync.Mutex // guards both writers, so that lines never mix
	out, err io.Writer
}

// note prints a line of the runner's own.
func (c *console) note(format string, args ...any) {
	c.write(c.out, c.prefix("sallyport", "1")+fmt.Sprintf(format, args...)+"\n")
}

// problem prints a line that needs a person.
func (c *console) problem(format string, args ...any) {
	c.write(c.err, c.prefix("sallyport", "31")+fmt.Sprintf(format, args...)+"\n")
}

// block prints several lines as they are, together.
func (c *console) block(text string) { c.write(c.out, text) }

func (c *console) prefix(name, color string) string {
	padded := fmt.Sprintf("%-*s", c.width, name)
	if c.color {
		padded = "\x1b[" + color + "m" + padded + "\x1b[0m"
	}
	return padded + " | "
}

// write hands s on in one piece. A terminal that is gone must not stop the
// processes, so errors are dropped.
func (c *console) write(w io.Writer, s string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, _ = io.WriteString(w, s)
}

// writer returns where the process named name writes; i chooses its colour.
func (c *console) writer(name string, i int) *lineWriter {
	return &lineWriter{c: c, prefix: c.prefix(name, palette[i%len(palette)])}
}

// lineWriter cuts one process's output into lines. One goroutine writes to it.
type lineWriter struct {
	c       *console
	prefix  string
	mute    string // lines that hold it are left out; "" is none
	line    []byte // the unfinished line, at most maxLine bytes
	dropped int    // bytes of the unfinished line that did not fit
}

// Write never fails and never keeps p.
func (w *lineWriter) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		end := bytes.IndexByte(rest, '\n')
		part := rest
		if end >= 0 {
			part = rest[:end]
		}
		room := min(maxLine-len(w.line), len(part))
		w.line = append(w.line, part[:room]...)
		w.dropped += len(part) - room
		if end < 0 {
			break
		}
		w.flush()
		rest = rest[end+1:]
	}
	return len(p), nil
}

// flush prints the unfinished line as if it had ended here.
func (w *lineWriter) flush() {
	text := printable(strings.TrimSuffix(string(w.line), "\r"))
	muted := w.mute != "" && strings.Contains(text, w.mute)
	if w.dropped > 0 {
		text += fmt.Sprintf(" … (%d bytes more)", w.dropped)
	}
	if !muted {
		w.c.write(w.c.out, w.prefix+text+"\n")
	}
	w.line, w.dropped = w.line[:0], 0
}

// end prints what the process left without a line end.
func (w *lineWriter) end() {
	if len(w.line) > 0 {
		w.flush()
	}
}

// printable shows control characters instead of sending them to the terminal,
// where they could rewrite another process's lines.
func printable(s string) string {
	control := func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }
	if !strings.ContainsFunc(s, control) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if control(r) {
			fmt.Fprintf(&b, "\\x%02x", r)
			continue
		}
		b.WriteRune(r)
	}
	return b.String()
}
