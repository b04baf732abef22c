package proxy

import (
	"container/list"
	"context"
	"errors"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Reasons for which a connection is closed to make room.
var (
	errEvicted = errors.New("a newer connection took the handshake's place")
	errTooMany = errors.New("this workload has too many connections here")
)

// gate bounds how many handshakes are under way. A newcomer never waits: when
// the gate is full the oldest handshake ends for it, so that peers who say
// nothing cannot keep out those who do.
type gate struct {
	max int

	mu     sync.Mutex
	inside list.List // guarded by mu; of context.CancelCauseFunc, oldest first
}

// enter returns the context of one handshake, which ends with errEvicted when
// another one needs the place, and what to call when it is over.
func (g *gate) enter(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside.Len() == g.max {
		g.inside.Remove(g.inside.Front()).(context.CancelCauseFunc)(errEvicted)
	}
	place := g.inside.PushBack(cancel)
	return ctx, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.inside.Remove(place) // does nothing once evicted
		cancel(nil)
	}
}

// shares bounds how many connections each peer has, so that no identity takes
// the place of all others.
type shares struct {
	max int

	mu sync.Mutex
	n  map[spiffeid.ID]int // guarded by mu
}

// take counts a connection of id until give; false when id has its share.
func (s *shares) take(id spiffeid.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n == nil {
		s.n = make(map[spiffeid.ID]int)
	}
	if s.n[id] >= s.max {
		return false
	}
	s.n[id]++
	return true
}

func (s *shares) give(id spiffeid.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n[id]--; s.n[id] == 0 {
		delete(s.n, id)
	}
}
