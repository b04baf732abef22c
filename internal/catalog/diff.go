package catalog

import (
	"bytes"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

const (
	// shownFiles and shownLines bound what a diff shows: files by name, and lines
	// of one file.
	shownFiles = 100
	shownLines = 20
	// shownNames bounds a summary.
	shownNames = 3
)

// fileChange is one file that differs between two states.
type fileChange struct {
	path          string // set/file
	before, after []byte // nil: not there
}

// changed names the sets that differ.
func changed(old, next *compiled) []string {
	var names []string
	for name := range union(old.sets, next.sets) {
		if was, is := old.sets[name], next.sets[name]; was == nil || is == nil || was.sum != is.sum {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func union[V any](a, b map[string]V) map[string]V {
	all := maps.Clone(a)
	if all == nil {
		all = map[string]V{}
	}
	maps.Copy(all, b)
	return all
}

// fileChanges lists the files that differ, by path.
func fileChanges(old, next *compiled) []fileChange {
	var out []fileChange
	for _, name := range changed(old, next) {
		var before, after map[string][]byte
		if s := old.sets[name]; s != nil {
			before = s.files
		}
		if s := next.sets[name]; s != nil {
			after = s.files
		}
		for _, file := range slices.Sorted(maps.Keys(union(before, after))) {
			if was, is := before[file], after[file]; !bytes.Equal(was, is) {
				out = append(out, fileChange{path.Join(name, file), was, is})
			}
		}
	}
	return out
}

// describe tells people what differs: files and lines first, then who gains or
// loses access.
func describe(old, next *compiled) string {
	var b strings.Builder
	files := fileChanges(old, next)
	for i, f := range files {
		if i == shownFiles {
			fmt.Fprintf(&b, "… and %d more files\n", len(files)-i)
			break
		}
		f.write(&b)
	}
	if old.err != nil {
		b.WriteString("(the revision before could not be used by this version, so it counts as empty here)\n")
	}
	access := policy.Compare(old.rules, next.rules)
	if access.Empty() {
		b.WriteString("nobody gains or loses access\n")
	} else {
		b.WriteString(strings.TrimRight(access.String(), "\n") + "\n")
	}
	return b.String()
}

// write shows one file's change: the lines between the beginning and the end
// that both have in common.
func (f fileChange) write(b *strings.Builder) {
	from, minus, plus := middle(lines(f.before), lines(f.after))
	switch {
	case f.before == nil:
		fmt.Fprintf(b, "+ %s (new, %d lines)\n", f.path, len(plus))
		return
	case f.after == nil:
		fmt.Fprintf(b, "- %s (removed, %d lines)\n", f.path, len(minus))
		return
	}
	fmt.Fprintf(b, "~ %s from line %d: %d lines out, %d in\n", f.path, from, len(minus), len(plus))
	writeLines(b, "-", minus)
	writeLines(b, "+", plus)
}

func writeLines(b *strings.Builder, sign string, lines []string) {
	for i, line := range lines {
		if i == shownLines {
			fmt.Fprintf(b, "    %s … and %d more lines\n", sign, len(lines)-i)
			return
		}
		fmt.Fprintf(b, "    %s %s\n", sign, line)
	}
}

func lines(content []byte) []string {
	if len(content) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(content), "\n"), "\n")
}

// middle strips what a and b have in common at both ends, and tells the line,
// from 1, where they begin to differ.
func middle(a, b []string) (from int, minus, plus []string) {
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		a, b = a[1:], b[1:]
		from++
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	return from + 1, a, b
}

// summary is one line about what p changed.
func summary(p plan, old, next *compiled) string {
	var names [3][]string // added, changed, removed
	for _, f := range fileChanges(old, next) {
		switch {
		case f.before == nil:
			names[0] = append(names[0], f.path)
		case f.after == nil:
			names[2] = append(names[2], f.path)
		default:
			names[1] = append(names[1], f.path)
		}
	}
	var parts []string
	for i, verb := range []string{"added", "changed", "removed"} {
		if n := names[i]; len(n) > shownNames {
			parts = append(parts, fmt.Sprintf("%s %s and %d more", verb, strings.Join(n[:shownNames], ", "), len(n)-shownNames))
		} else if len(n) > 0 {
			parts = append(parts, verb+" "+strings.Join(n, ", "))
		}
	}
	text := strings.Join(parts, "; ")
	if p.about != "" {
		text = p.about + ": " + text
	}
	return text
}
