package configfile

import (
	"fmt"
	"strings"
)

// closest gives the candidate that what was written may have been meant to be,
// or "". Ties go to the first.
func closest(written string, candidates []string) string {
	if len(written) > maxCompared {
		return ""
	}
	best, limit := "", 1+min(len(written), 9)/4
	for _, c := range candidates {
		if d := distance(strings.ToLower(written), strings.ToLower(c)); d <= limit {
			best, limit = c, d-1
		}
	}
	return best
}

// maxCompared bounds the keys that are compared, in bytes.
const maxCompared = 64

// distance is the number of insertions, deletions and replacements that turn a
// into b (Levenshtein); two neighbours swapped count as one.
func distance(a, b string) int {
	var before []int
	last := make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row := make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			change := last[j]
			if a[i] != b[j] {
				change++
			}
			row[j+1] = min(change, last[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}

// quote shows what was written, cut where it is long.
func quote(s string) string {
	const most = 60
	if r := []rune(s); len(r) > most {
		s = string(r[:most]) + "…"
	}
	return fmt.Sprintf("%q", s)
}
