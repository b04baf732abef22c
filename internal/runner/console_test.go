package runner

import (
	"bytes"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
)

func TestConsolePrintsWholeBoundedLines(t *testing.T) {
	for _, c := range []struct {
		name   string
		writes []string
		want   string
	}{
		{"whole line", []string{"a\n"}, "app  | a\n"},
		{"in pieces", []string{"a", "b", "c\nd", "\n"}, "app  | abc\napp  | d\n"},
		{"unfinished", []string{"a\nb"}, "app  | a\napp  | b\n"},
		{"nothing", []string{""}, ""},
		{"empty line", []string{"\n"}, "app  | \n"},
		{"carriage return", []string{"a\r\n"}, "app  | a\n"},
		{"control characters", []string{"a\rforged | b\x1b[2J\tc\n"}, "app  | a\\x0dforged | b\\x1b[2J\tc\n"},
		{"as long as may be", []string{strings.Repeat("x", maxLine) + "\n"}, "app  | " + strings.Repeat("x", maxLine) + "\n"},
		{"too long", []string{strings.Repeat("x", maxLine-1), "yzz", "z\nnext\n"}, "app  | " + strings.Repeat("x", maxLine-1) + "y … (3 bytes more)\napp  | next\n"},
	} {
		var out bytes.Buffer
		w := (&console{width: 4, out: &out}).writer("app", 0)
		for _, s := range c.writes {
			if n, err := w.Write([]byte(s)); n != len(s) || err != nil {
				t.Errorf("%s: Write gives %d %v", c.name, n, err)
			}
		}
		w.end()
		if out.String() != c.want {
			t.Errorf("%s:\n got %q\nwant %q", c.name, out.String(), c.want)
		}
	}
}

func TestConsoleColoursTheNameOnly(t *testing.T) {
	var out bytes.Buffer
	w := (&console{width: 4, color: true, out: &out}).writer("app", 1)
	fmt.Fprintln(w, "hello")
	if want := "\x1b[33mapp \x1b[0m | hello\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestConsoleLeavesOutWhatIsMuted(t *testing.T) {
	var out bytes.Buffer
	w := (&console{width: 4, out: &out}).writer("app", 0)
	w.mute = "known"
	fmt.Fprint(w, "first\n[WARN] well known\nlast\n")
	if want := "app  | first\napp  | last\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

// slowWriter lets others run between any two bytes.
type slowWriter struct{ out []byte }

func (w *slowWriter) Write(p []byte) (int, error) {
	for _, b := range p {
		w.out = append(w.out, b)
		runtime.Gosched()
	}
	return len(p), nil
}

func TestConsoleNeverMixesLines(t *testing.T) {
	var out slowWriter
	c := &console{out: &out, err: &out}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			name := strings.Repeat(string(rune('a'+i)), 20)
			w := c.writer(name, i)
			for range 50 {
				for _, part := range []string{name[:7], name[7:], "\n"} {
					_, _ = w.Write([]byte(part))
				}
			}
		})
	}
	wg.Wait()
	lines := strings.Split(strings.TrimSuffix(string(out.out), "\n"), "\n")
	if len(lines) != 8*50 {
		t.Errorf("%d lines, want %d", len(lines), 8*50)
	}
	for _, l := range lines {
		if name, text, _ := strings.Cut(l, " | "); name != text {
			t.Fatalf("mixed line %q", l)
		}
	}
}
