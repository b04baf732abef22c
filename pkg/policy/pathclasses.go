package policy

import (
	"fmt"
	"slices"
	"strings"
)

// pathClass is a set of paths that the same patterns match.
type pathClass struct {
	witness string
	name    string // the narrowest of the patterns, or "other paths"
	matched []int  // indexes of the patterns, ascending
}

// pathClasses gives one class for each set of patterns that some canonical path
// matches, and no others; false when there are too many, and then only some.
//
// It walks all ways to write a path, segment by segment, where a segment is one
// that some pattern spells out there or stands for all others, and does not go on
// from where it has been with the same patterns left.
func pathClasses(patterns []string) ([]pathClass, bool) {
	w := pathWalk{fresh: "-", seen: map[string]bool{}, classes: map[string]pathClass{}}
	for _, p := range patterns {
		w.patterns = append(w.patterns, pathPattern{text: p, segs: strings.Split(p[1:], "/")})
		for strings.Contains(p, w.fresh) {
			w.fresh += "-"
		}
	}
	all := make([]int, len(patterns))
	for i := range all {
		all[i] = i
	}
	w.walk(nil, all, nil)
	longest := 0
	for _, p := range w.patterns {
		longest = max(longest, len(p.segs))
	}
	w.found(append(slices.Repeat([]string{w.fresh}, longest+1), ""), nil) // which none matches
	out := make([]pathClass, 0, len(w.classes))
	for _, key := range w.order {
		out = append(out, w.classes[key])
	}
	return out, w.nodes <= maxPathNodes
}

type pathPattern struct {
	text string
	segs []string
}

type pathWalk struct {
	patterns []pathPattern
	fresh    string // a segment that no pattern spells out
	nodes    int
	seen     map[string]bool
	classes  map[string]pathClass // :: patterns that match → class
	order    []string
}

// walk goes on from a prefix. left are the patterns that match it and go on; rest
// those that match whatever follows, as long as no segment is empty.
func (w *pathWalk) walk(prefix []string, left, rest []int) {
	depth := len(prefix)
	key := fmt.Sprint(depth == 0, left, rest)
	if depth > 0 { // where the patterns are depends on how far they have come
		for _, i := range left {
			key += fmt.Sprint(" ", len(w.patterns[i].segs)-depth)
		}
	}
	if w.seen[key] || w.nodes > maxPathNodes {
		return
	}
	w.seen[key] = true
	w.nodes++
	choices := []string{w.fresh, ""}
	for _, i := range left {
		if seg := w.patterns[i].segs[depth]; seg != "*" && seg != "**" && seg != "" && !slices.Contains(choices, seg) {
			choices = append(choices, seg)
		}
	}
	for _, seg := range choices {
		next := append(slices.Clone(prefix), seg)
		var ends, goOn, open []int
		if seg != "" {
			open = slices.Clone(rest)
		}
		for _, i := range left {
			p := w.patterns[i]
			want := p.segs[depth]
			switch {
			case want == "**":
				if seg != "" {
					open = append(open, i)
				}
			case want == seg || want == "*" && seg != "":
				if len(p.segs) == depth+1 {
					ends = append(ends, i)
				} else {
					goOn = append(goOn, i)
				}
			}
		}
		w.found(next, append(slices.Clone(ends), open...))
		if seg != "" && len(goOn)+len(open) > 0 {
			w.walk(next, goOn, open)
		}
	}
}

// found notes that a path matches exactly these patterns.
func (w *pathWalk) found(segs []string, matched []int) {
	slices.Sort(matched)
	key := fmt.Sprint(matched)
	if _, known := w.classes[key]; known {
		return
	}
	c := pathClass{witness: "/" + strings.Join(segs, "/"), name: "other paths", matched: matched}
	best := -1
	for _, i := range matched {
		if n := w.patterns[i].literals(); n > best {
			best, c.name = n, w.patterns[i].text
		}
	}
	w.classes[key] = c
	w.order = append(w.order, key)
}

// literals tells how narrow a pattern is.
func (p pathPattern) literals() int {
	n := 0
	for _, s := range p.segs {
		switch s {
		case "**":
		case "*":
			n++
		default:
			n += 2
		}
	}
	return n
}
