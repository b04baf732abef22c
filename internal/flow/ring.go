package flow

import (
	"context"
	"sync"
)

// Ring holds the newest records in memory and lets any number of followers read
// along. Recording costs one short lock and never waits for a follower: one
// that falls behind by more than the ring's size loses records and is told how
// many.
type Ring struct {
	size uint64

	mu   sync.Mutex
	buf  []Flow        // guarded by mu; record number i is at i modulo size
	next uint64        // guarded by mu; number of the next record
	more chan struct{} // guarded by mu; nil unless somebody waits; closed by Record
}

// NewRing returns a ring of the newest size records (at least one). Memory is
// taken as records come, some 400 bytes each.
func NewRing(size int) *Ring { return &Ring{size: uint64(max(size, 1))} }

// Record implements [Sink]. It drops the oldest record when the ring is full.
func (r *Ring) Record(f Flow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if uint64(len(r.buf)) < r.size {
		r.buf = append(r.buf, f)
	} else {
		r.buf[r.next%r.size] = f
	}
	r.next++
	if r.more != nil {
		close(r.more)
		r.more = nil
	}
}

// Newest returns at most n held records that match, oldest first; all of them
// if n <= 0. A nil match takes every record.
func (r *Ring) Newest(n int, match func(*Flow) bool) []Flow {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.copy(r.back(n, match), r.next, match)
}

// Find returns the newest held record for which ok is true.
func (r *Ring) Find(ok func(*Flow) bool) (Flow, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := r.next; i > r.oldest(); i-- {
		if f := &r.buf[(i-1)%r.size]; ok(f) {
			return *f, true
		}
	}
	return Flow{}, false
}

// Len returns how many records are held.
func (r *Ring) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.buf)
}

// Follow calls fn with the newest n held records that match (all if n < 0, none
// if 0), oldest first, then with each one as it comes. dropped counts the
// records, matching or not, that this follower has missed so far because it was
// too slow. A nil match takes every record. Follow returns when ctx ends, with
// its error, or with fn's first error.
func (r *Ring) Follow(ctx context.Context, n int, match func(*Flow) bool, fn func(f Flow, dropped uint64) error) error {
	r.mu.Lock()
	at := r.next
	if n != 0 {
		at = r.back(n, match)
	}
	r.mu.Unlock()
	var dropped uint64
	for {
		flows, to, skipped, more := r.after(at, match)
		at, dropped = to, dropped+skipped
		for _, f := range flows {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := fn(f, dropped); err != nil {
				return err
			}
		}
		if more == nil {
			continue
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// after returns the matching ones among the next records from number at on, the
// number to go on with, and how many from at on are no longer held. When there
// was no record at all, more is closed by the next one.
func (r *Ring) after(at uint64, match func(*Flow) bool) (flows []Flow, to, skipped uint64, more <-chan struct{}) {
	const batch = 256 // records looked at under one lock
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.oldest(); at < old {
		skipped, at = old-at, old
	}
	if at == r.next {
		if r.more == nil {
			r.more = make(chan struct{})
		}
		return nil, at, skipped, r.more
	}
	to = min(r.next, at+batch)
	return r.copy(at, to, match), to, skipped, nil
}

// oldest is the number of the oldest held record. The caller holds mu.
func (r *Ring) oldest() uint64 { return r.next - uint64(len(r.buf)) }

// back is the number from which on n held records match, or the oldest. The
// caller holds mu.
func (r *Ring) back(n int, match func(*Flow) bool) uint64 {
	at, old := r.next, r.oldest()
	if n <= 0 {
		return old
	}
	for ; at > old && n > 0; at-- {
		if match == nil || match(&r.buf[(at-1)%r.size]) {
			n--
		}
	}
	return at
}

// copy returns the matching ones of records from to to-1. The caller holds mu.
func (r *Ring) copy(from, to uint64, match func(*Flow) bool) []Flow {
	var out []Flow
	for i := from; i < to; i++ {
		if f := &r.buf[i%r.size]; match == nil || match(f) {
			out = append(out, *f)
		}
	}
	return out
}
