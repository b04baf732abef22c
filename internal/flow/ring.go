package flow

import (
	"cmp"
	"context"
	"slices"
	"sync"
)

// maxBytes bounds what a ring holds, by the estimate of [Flow.footprint].
const maxBytes = 64 << 20

// Ring holds the newest records in memory and lets any number of followers read
// along. Recording costs one short lock and never waits for a follower: one
// that falls behind by more than the ring holds loses records and is told how
// many.
//
// A full ring drops the oldest record of the reporter that holds most: however
// much one reporter sends, the others keep what they hold up to an equal share.
type Ring struct {
	records, bytes int // bounds; the newest record is held even if it alone is over

	mu     sync.Mutex
	slots  []slot        // guarded by mu; ascending by number, at most half of them empty
	held   int           // guarded by mu; records held
	size   int           // guarded by mu; their footprint in bytes
	shares shares        // guarded by mu
	next   uint64        // guarded by mu; number of the next record
	more   chan struct{} // guarded by mu; nil unless somebody waits; closed by Record
}

// slot is a record's place in the order of arrival.
type slot struct {
	number uint64
	flow   *Flow // nil: dropped
}

// NewRing returns a ring of at most size records (at least one) and 64 MiB.
// Memory is taken as records come, some 600 bytes each.
func NewRing(size int) *Ring {
	return &Ring{records: max(size, 1), bytes: maxBytes, shares: newShares()}
}

// Record implements [Sink]. It drops records to make room.
func (r *Ring) Record(f Flow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	size := f.footprint()
	for r.held > 0 && (r.held >= r.records || r.size+size > r.bytes) {
		r.drop(r.shares.popLargest())
	}
	r.slots = append(r.slots, slot{r.next, &f})
	r.shares.add(f.Reporter, r.next, size)
	r.held, r.size = r.held+1, r.size+size
	r.next++
	if r.more != nil {
		close(r.more)
		r.more = nil
	}
}

// drop empties a record's slot. The caller holds mu.
func (r *Ring) drop(number uint64) {
	s := &r.slots[r.slotOf(number)]
	r.held, r.size = r.held-1, r.size-s.flow.footprint()
	s.flow = nil
	if r.held < len(r.slots)/2 {
		r.slots = slices.DeleteFunc(r.slots, func(s slot) bool { return s.flow == nil })
	}
}

// slotOf is the index of the first slot from number on. The caller holds mu.
func (r *Ring) slotOf(number uint64) int {
	i, _ := slices.BinarySearchFunc(r.slots, number, func(s slot, n uint64) int { return cmp.Compare(s.number, n) })
	return i
}

// Newest returns at most n held records that match, oldest first; all of them
// if n <= 0. A nil match takes every record.
func (r *Ring) Newest(n int, match func(*Flow) bool) []Flow {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []Flow
	for _, s := range r.slots[r.slotOf(r.back(n, match)):] {
		if s.flow != nil && (match == nil || match(s.flow)) {
			out = append(out, *s.flow)
		}
	}
	return out
}

// Find returns the oldest held record for which ok is true.
func (r *Ring) Find(ok func(*Flow) bool) (Flow, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.slots {
		if s.flow != nil && ok(s.flow) {
			return *s.flow, true
		}
	}
	return Flow{}, false
}

// Len returns how many records are held.
func (r *Ring) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held
}

// Follow calls fn with the newest n held records that match (all if n < 0, none
// if 0), oldest first, then with each one as it comes. dropped counts the
// records, matching or not, that came since and that this follower missed
// because it was too slow. A nil match takes every record. Follow returns when
// ctx ends, with its error, or with fn's first error.
func (r *Ring) Follow(ctx context.Context, n int, match func(*Flow) bool, fn func(f Flow, dropped uint64) error) error {
	r.mu.Lock()
	at, began := r.next, r.next
	if n != 0 {
		at = r.back(n, match)
	}
	r.mu.Unlock()
	var dropped uint64
	for {
		b := r.after(at, began, match)
		at, dropped = b.to, dropped+b.skipped
		for _, f := range b.flows {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := fn(f, dropped); err != nil {
				return err
			}
		}
		if b.more == nil {
			continue
		}
		select {
		case <-b.more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// batch is what a follower reads under one lock.
type batch struct {
	flows   []Flow
	to      uint64          // number to go on with
	skipped uint64          // records that are no longer held
	more    <-chan struct{} // nil, or there was none; closed by the next record
}

// after returns the matching ones among the next 256 held records from number
// at on, and how many before them, from number began on, are no longer held.
func (r *Ring) after(at, began uint64, match func(*Flow) bool) batch {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := batch{to: at}
	if at == r.next {
		if r.more == nil {
			r.more = make(chan struct{})
		}
		b.more = r.more
		return b
	}
	looked := 0
	for _, s := range r.slots[r.slotOf(at):] {
		if s.flow == nil {
			continue
		}
		if looked++; looked > 256 {
			break
		}
		if lost := max(b.to, began); s.number > lost {
			b.skipped += s.number - lost
		}
		b.to = s.number + 1
		if match == nil || match(s.flow) {
			b.flows = append(b.flows, *s.flow)
		}
	}
	return b
}

// back is the number from which on n held records match, or 0 for all. The
// caller holds mu.
func (r *Ring) back(n int, match func(*Flow) bool) uint64 {
	if n <= 0 {
		return 0
	}
	for i := len(r.slots) - 1; i >= 0; i-- {
		s := r.slots[i]
		if s.flow != nil && (match == nil || match(s.flow)) {
			if n--; n == 0 {
				return s.number
			}
		}
	}
	return 0
}
