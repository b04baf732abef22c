package policy

import (
	"slices"
	"strings"
)

// maxRegions bounds the regions of one destination. They can grow exponentially
// in the number of crossing patterns, and do not in practice.
const maxRegions = 4096

// fresh is a segment that no SPIFFE ID can have, so that an ID made of it
// matches a pattern only by wildcard.
const fresh = "?"

// vector is an ID with wildcards, of one trust domain: each "*" one segment; a
// final "**" one or more.
type vector struct {
	td   string
	segs []string // without the "**"
	rest bool     // a final "**"
}

func parseVector(pattern string) vector {
	segs := strings.Split(trimScheme(pattern), "/")
	v := vector{td: segs[0], segs: segs[1:]}
	if n := len(v.segs); n > 0 && v.segs[n-1] == "**" {
		v.segs, v.rest = v.segs[:n-1], true
	}
	return v
}

// String gives the form of identity.Pattern.
func (v vector) String() string {
	segs := append([]string{"spiffe://" + v.td}, v.segs...)
	if v.rest {
		segs = append(segs, "**")
	}
	return strings.Join(segs, "/")
}

// minLen is the number of segments of the shortest ID that v matches.
func (v vector) minLen() int {
	if v.rest {
		return len(v.segs) + 1
	}
	return len(v.segs)
}

// witness gives an ID that matches v and, of the patterns that v was made from,
// none that does not match all of v.
func (v vector) witness() string {
	segs := slices.Clone(v.segs)
	for i, s := range segs {
		if s == "*" {
			segs[i] = fresh
		}
	}
	return vector{td: v.td, segs: append(segs, slices.Repeat([]string{fresh}, v.minLen()-len(segs))...)}.String()
}

// covers reports whether every ID that o matches is matched by v.
func (v vector) covers(o vector) bool {
	if v.td != o.td || o.rest && !v.rest || o.minLen() < v.minLen() || !v.rest && len(o.segs) != len(v.segs) {
		return false
	}
	for i, s := range v.segs {
		if s != "*" && (i >= len(o.segs) || o.segs[i] != s) {
			return false
		}
	}
	return true
}

// ofLength gives the part of v that has n segments, without "**".
func (v vector) ofLength(n int) (vector, bool) {
	if n < v.minLen() || !v.rest && n > len(v.segs) {
		return vector{}, false
	}
	segs := append(slices.Clone(v.segs), slices.Repeat([]string{"*"}, n-len(v.segs))...)
	return vector{td: v.td, segs: segs}, true
}

// meet gives what two vectors of equal length and without "**" both match.
func (v vector) meet(o vector) (vector, bool) {
	if v.td != o.td || len(v.segs) != len(o.segs) {
		return vector{}, false
	}
	segs := slices.Clone(v.segs)
	for i, s := range o.segs {
		switch {
		case segs[i] == "*":
			segs[i] = s
		case s != "*" && s != segs[i]:
			return vector{}, false
		}
	}
	return vector{td: v.td, segs: segs}, true
}

// regions are the parts into which patterns cut the IDs that could exist: IDs in
// one region match the same patterns. For each length of ID, up to one more than
// any pattern spells out (beyond it all lengths are alike), they are the
// patterns and all their intersections.
type regions struct {
	atoms    []vector
	patterns []patternRegions
}

// patternRegions is a pattern and the regions that consist of its own IDs.
type patternRegions struct {
	vector vector
	atoms  []int // indexes of regions.atoms; never empty
}

// cutRegions gives the regions of patterns; false when there are too many, and
// then only some.
func cutRegions(patterns []string) (regions, bool) {
	var out regions
	vectors := make([]vector, len(patterns))
	longest := 0
	for i, p := range patterns {
		vectors[i] = parseVector(p)
		longest = max(longest, vectors[i].minLen())
	}
	slices.SortStableFunc(vectors, func(a, b vector) int { return a.literals() - b.literals() }) // the widest first
	at := map[string]int{}                                                                       // :: region → index of atoms
	for n := 1; n <= longest+1; n++ {
		for _, v := range vectors {
			part, ok := v.ofLength(n)
			if !ok {
				continue
			}
			if !out.close(at, part, n) {
				return out, false
			}
		}
	}
	for _, v := range vectors {
		pr := patternRegions{vector: v}
		for n := v.minLen(); n <= longest+1; n++ {
			if part, ok := v.ofLength(n); ok {
				pr.atoms = append(pr.atoms, at[part.String()])
			}
		}
		out.patterns = append(out.patterns, pr)
	}
	for i, v := range out.atoms {
		if len(v.segs) == longest+1 { // stands for all longer ones
			out.atoms[i].segs, out.atoms[i].rest = v.segs[:longest], true
		}
	}
	return out, true
}

// close adds v and what it has in common with the regions of its length n.
func (r *regions) close(at map[string]int, v vector, n int) bool {
	found := []vector{v}
	for _, a := range r.atoms {
		if len(a.segs) != n {
			continue
		}
		if m, ok := a.meet(v); ok {
			found = append(found, m)
		}
	}
	for _, m := range found {
		key := m.String()
		if _, known := at[key]; known {
			continue
		}
		if len(r.atoms) == maxRegions {
			return false
		}
		at[key] = len(r.atoms)
		r.atoms = append(r.atoms, m)
	}
	return true
}

func (v vector) literals() int {
	n := 0
	for _, s := range v.segs {
		if s != "*" {
			n++
		}
	}
	return n
}
