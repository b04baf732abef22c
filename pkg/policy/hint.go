package policy

import (
	"fmt"
	"strings"
)

// didYouMean suggests the candidate closest to what was written, or "" when
// none is close.
func didYouMean(written string, candidates []string) string {
	if c := closest(written, candidates); c != "" {
		return fmt.Sprintf("did you mean %q?", c)
	}
	return ""
}

// closest gives the candidate closest to what was written, or "" when none is
// close. Ties go to the first.
func closest(written string, candidates []string) string {
	best, limit := "", 1+min(len(written), 9)/4
	for _, c := range candidates {
		if d := distance(strings.ToLower(written), strings.ToLower(c), limit); d <= limit {
			best, limit = c, d-1
		}
	}
	return best
}

// maxDistanceLen bounds the strings that are compared, in bytes.
const maxDistanceLen = 128

// distance is the number of insertions, deletions, replacements and swaps of
// neighbours that turn a into b (optimal string alignment), or limit+1 when it
// is more than limit.
func distance(a, b string, limit int) int {
	if len(a)-len(b) > limit || len(b)-len(a) > limit || len(a) > maxDistanceLen || len(b) > maxDistanceLen {
		return limit + 1
	}
	var rows [3][maxDistanceLen + 1]int
	before, last, row := &rows[0], &rows[1], &rows[2]
	for j := range len(b) + 1 {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return min(last[len(b)], limit+1)
}
