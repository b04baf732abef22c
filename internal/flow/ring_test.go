package flow

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func by(reporter string, i int) Flow {
	f := sample(i)
	f.Reporter = reporter
	return f
}

func TestAFloodLeavesTheOthersRecords(t *testing.T) {
	r := NewRing(100)
	for i := range 30 {
		r.Record(by("quiet", i))
	}
	for i := range 1000 {
		r.Record(by("flood", i))
	}
	quiet := r.Newest(0, func(f *Flow) bool { return f.Reporter == "quiet" })
	flood := r.Newest(0, func(f *Flow) bool { return f.Reporter == "flood" })
	if len(quiet) != 30 || len(flood) != 70 || flood[69] != by("flood", 999) {
		t.Errorf("got %d of the quiet one's records and %d of the flood's; want 30 and the newest 70", len(quiet), len(flood))
	}
}

func TestRingIsBoundedByBytes(t *testing.T) {
	r := NewRing(1000)
	r.bytes = 100_000
	for i := range 1000 {
		f := by("loud", i)
		f.Error = strings.Repeat("e", MaxText)
		r.Record(f)
	}
	if r.size > r.bytes || r.Len() < 50 || r.Len() > 200 {
		t.Errorf("got %d records of %d bytes, want at most %d bytes", r.Len(), r.size, r.bytes)
	}
}

// Whatever comes: the bounds hold, the newest record is held, the books are
// right, and whoever holds less than an equal share has lost nothing.
func TestRingInvariants(t *testing.T) {
	one := by("a", 0)
	smallest := one.footprint()
	rapid.Check(t, func(t *rapid.T) {
		r := NewRing(rapid.IntRange(1, 20).Draw(t, "records"))
		r.bytes = rapid.IntRange(1, 20_000).Draw(t, "bytes")
		sent := make(map[string]int) // :: reporter → bytes
		for i := range rapid.IntRange(1, 40).Draw(t, "n") {
			f := by(rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "reporter"), i)
			f.Error = strings.Repeat("e", rapid.IntRange(0, MaxText).Draw(t, "text"))
			r.Record(f)
			sent[f.Reporter] += f.footprint()

			held := r.Newest(0, nil)
			size, of := 0, make(map[string]int)
			for _, f := range held {
				size, of[f.Reporter] = size+f.footprint(), of[f.Reporter]+f.footprint()
			}
			if len(held) == 0 || held[len(held)-1] != f || !slices.IsSortedFunc(held, func(a, b Flow) int { return strings.Compare(a.ID, b.ID) }) {
				t.Fatalf("after %d: got %s", i, ids(held))
			}
			if len(held) != r.Len() || size != r.size || len(of) != len(r.shares.of) || len(r.slots) > 2*len(held)+1 {
				t.Fatalf("after %d: books say %d records, %d bytes; held %d, %d in %d slots", i, r.held, r.size, len(held), size, len(r.slots))
			}
			if len(held) > r.records || size > r.bytes && len(held) > 1 {
				t.Fatalf("after %d: %d records, %d bytes; want %d, %d", i, len(held), size, r.records, r.bytes)
			}
			for reporter, n := range sent {
				if n < min(r.bytes-smallest-MaxText, r.records*smallest)/len(sent) && of[reporter] != n {
					t.Fatalf("after %d: %s lost records: %d of %d bytes", i, reporter, of[reporter], n)
				}
			}
		}
	})
}

func TestFollowPassesGaps(t *testing.T) {
	r := NewRing(3)
	r.Record(by("quiet", 0))
	for i := 1; i < 6; i++ {
		r.Record(by("flood", i)) // leaves 0, 4 and 5
	}
	stop := errors.New("enough")
	var seen []Flow
	var last uint64
	err := r.Follow(t.Context(), -1, nil, func(f Flow, dropped uint64) error {
		if seen, last = append(seen, f), dropped; len(seen) == 3 {
			for i := 6; i < 9; i++ {
				r.Record(by("flood", i)) // leaves 0, 7 and 8
			}
		}
		if len(seen) == 5 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || ids(seen) != "04578" || last != 1 {
		t.Errorf("got %s, dropped %d, %v; want 04578, 1", ids(seen), last, err)
	}
}
