package flow

import (
	"container/heap"
	"reflect"
)

// footprint estimates the memory that a held record takes, in bytes: the
// record, its texts, its places in a ring and what the allocator rounds up.
func (f *Flow) footprint() int {
	n := flowSize
	for _, s := range []string{
		f.Src.String(), f.Dst.String(), f.Reason, f.Rule.Set, f.Rule.Policy, f.Rule.File,
		f.ID, string(f.Side), string(f.Outcome), f.Error, f.PortName, f.Reporter, f.Instance, f.Revision,
	} {
		n += len(s)
	}
	return n
}

var flowSize = int(reflect.TypeFor[Flow]().Size()) + 128

// shares says which reporter holds which of a ring's records. The ring's lock
// guards it.
type shares struct {
	of      map[string]*share // :: Flow.Reporter → its share
	largest shareHeap
}

// share is what one reporter holds.
type share struct {
	reporter string
	records  []entry // oldest first, never empty
	size     int     // footprint in bytes
	index    int     // in the heap
}

type entry struct {
	number uint64
	size   int
}

func newShares() shares { return shares{of: make(map[string]*share)} }

// add notes a new record.
func (s *shares) add(reporter string, number uint64, size int) {
	h := s.of[reporter]
	if h == nil {
		h = &share{reporter: reporter}
		s.of[reporter] = h
	}
	h.records, h.size = append(h.records, entry{number, size}), h.size+size
	if len(h.records) == 1 {
		heap.Push(&s.largest, h)
	} else {
		heap.Fix(&s.largest, h.index)
	}
}

// popLargest removes the oldest record of the reporter that holds most and
// returns its number. There must be one.
func (s *shares) popLargest() uint64 {
	h := s.largest[0]
	oldest := h.records[0]
	h.records, h.size = h.records[1:], h.size-oldest.size
	if len(h.records) == 0 {
		heap.Pop(&s.largest)
		delete(s.of, h.reporter)
	} else {
		heap.Fix(&s.largest, 0)
	}
	return oldest.number
}

// shareHeap has the largest share on top; of equal ones that with the oldest
// record. It implements [heap.Interface].
type shareHeap []*share

func (h shareHeap) Len() int { return len(h) }

func (h shareHeap) Less(i, j int) bool {
	if h[i].size != h[j].size {
		return h[i].size > h[j].size
	}
	return h[i].records[0].number < h[j].records[0].number
}

func (h shareHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *shareHeap) Push(x any) {
	s := x.(*share)
	s.index = len(*h)
	*h = append(*h, s)
}

func (h *shareHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return last
}
