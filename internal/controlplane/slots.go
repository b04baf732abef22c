package controlplane

import (
	"slices"
	"sync"

	"golang.org/x/time/rate"
)

const (
	// maxStreamsPerInstance: one, a second while a sidecar replaces its
	// connection, and a third that is dead and not noticed yet.
	maxStreamsPerInstance = 3
	// announcePerSecond and announceBurst bound what one instance may write.
	announcePerSecond = 2
	announceBurst     = 10
)

// slots knows which Announce streams speak for the same instance. The newest one
// that has announced is the endpoint; when it ends, the one before it speaks up
// again. The zero value is ready.
type slots struct {
	mu  sync.Mutex
	all map[string]*slot // guarded by mu :: workload and instance → its streams
}

type slot struct {
	streams []*announceStream // in the order in which they opened
	limit   *rate.Limiter     // of all of them together
}

// key keeps an instance that is only claimed within the caller's own ID.
func (s *announceStream) key() string { return s.caller.String() + "|" + s.instance }

// enter adds a stream. With too many, the oldest is told to end.
func (t *slots) enter(s *announceStream) *rate.Limiter {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.all == nil {
		t.all = map[string]*slot{}
	}
	sl := t.all[s.key()]
	if sl == nil {
		sl = &slot{limit: rate.NewLimiter(announcePerSecond, announceBurst)}
		t.all[s.key()] = sl
	}
	if len(sl.streams) == maxStreamsPerInstance {
		close(sl.streams[0].replaced)
		sl.streams = slices.Delete(sl.streams, 0, 1)
	}
	sl.streams = append(sl.streams, s)
	return sl.limit
}

// leave removes a stream, and asks the newest that is left to speak up: its
// endpoint may be the one that s had replaced.
func (t *slots) leave(s *announceStream) {
	t.mu.Lock()
	defer t.mu.Unlock()
	sl := t.all[s.key()]
	if sl == nil {
		return
	}
	sl.streams = slices.DeleteFunc(sl.streams, func(o *announceStream) bool { return o == s })
	if len(sl.streams) == 0 {
		delete(t.all, s.key())
		return
	}
	select {
	case sl.streams[len(sl.streams)-1].again <- struct{}{}:
	default:
	}
}
