package store

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// memoryHistory is the least number of revisions that a Memory keeps for
	// watchers; one that falls further behind may get ErrCompacted.
	memoryHistory = 10_000
	// memorySlack is how many more it lets come before it forgets some.
	memorySlack = memoryHistory / 10
)

// Memory is a Store in this process's memory: for tests and for tools that need
// no durability.
type Memory struct {
	mu        sync.Mutex // guards everything below
	rev       int64
	keys      map[string]item // :: key → what it holds
	leases    map[LeaseID]*lease
	lastLease LeaseID
	log       []change      // newest revisions, oldest first
	compacted int64         // watches from an earlier revision are refused
	changed   chan struct{} // closed and replaced with each revision and by Close
	closed    bool
}

type item struct {
	value []byte
	rev   int64
	lease LeaseID
}

type lease struct {
	ttl   time.Duration
	ends  time.Time
	timer *time.Timer
}

type change struct {
	rev    int64
	events []Event // in key order
}

// NewMemory returns an empty store at revision 1.
func NewMemory() *Memory {
	return &Memory{
		rev:     1,
		keys:    map[string]item{},
		leases:  map[LeaseID]*lease{},
		changed: make(chan struct{}),
	}
}

// enter locks m for one call; the caller unlocks when err is nil.
func (m *Memory) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return ErrClosed
	}
	return nil
}

// Get implements [Store].
func (m *Memory) Get(ctx context.Context, key string) (KV, error) {
	if err := m.enter(ctx); err != nil {
		return KV{}, err
	}
	defer m.mu.Unlock()
	it, ok := m.keys[key]
	if !ok {
		return KV{}, fmt.Errorf("reading %s: %w", key, ErrNotFound)
	}
	return it.kv(key), nil
}

func (i item) kv(key string) KV {
	return KV{Key: key, Value: slices.Clone(i.value), Rev: i.rev}
}

// List implements [Store].
func (m *Memory) List(ctx context.Context, prefix string) ([]KV, int64, error) {
	if err := m.enter(ctx); err != nil {
		return nil, 0, err
	}
	defer m.mu.Unlock()
	var kvs []KV
	for key, it := range m.keys {
		if strings.HasPrefix(key, prefix) {
			kvs = append(kvs, it.kv(key))
		}
	}
	slices.SortFunc(kvs, func(a, b KV) int { return cmp.Compare(a.Key, b.Key) })
	return kvs, m.rev, nil
}

// Txn implements [Store].
func (m *Memory) Txn(ctx context.Context, cmps []Cmp, ops []Op) (int64, error) {
	if err := CheckTxn(cmps, ops); err != nil {
		return 0, err
	}
	if err := m.enter(ctx); err != nil {
		return 0, err
	}
	defer m.mu.Unlock()
	for _, c := range cmps {
		if m.keys[c.Key].rev != c.Rev {
			return 0, fmt.Errorf("comparing %s: %w", c.Key, ErrConflict)
		}
	}
	for _, op := range ops {
		if op.Lease != 0 && !op.Delete && m.leases[op.Lease] == nil {
			return 0, fmt.Errorf("writing %s under lease %d: %w", op.Key, op.Lease, ErrNotFound)
		}
	}
	m.apply(ops)
	return m.rev, nil
}

// apply writes ops as one revision, or none where they change nothing. m.mu is held.
func (m *Memory) apply(ops []Op) {
	next := m.rev + 1
	var events []Event
	for _, op := range ops {
		if op.Delete {
			if _, ok := m.keys[op.Key]; !ok {
				continue
			}
			delete(m.keys, op.Key)
			events = append(events, Event{KV: KV{Key: op.Key, Rev: next}, Deleted: true})
			continue
		}
		it := item{value: slices.Clone(op.Value), rev: next, lease: op.Lease}
		m.keys[op.Key] = it
		events = append(events, Event{KV: it.kv(op.Key)})
	}
	if len(events) == 0 {
		return
	}
	slices.SortFunc(events, func(a, b Event) int { return cmp.Compare(a.Key, b.Key) })
	m.rev = next
	m.log = append(m.log, change{next, events})
	if over := len(m.log) - memoryHistory; over >= memorySlack {
		m.compacted = m.log[over-1].rev
		m.log = slices.Delete(m.log, 0, over)
	}
	m.wake()
}

// wake lets every watcher look again. m.mu is held.
func (m *Memory) wake() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// Compact forgets the changes up to rev: watches that would need them get
// ErrCompacted. Tests use it to show that a reader recovers.
func (m *Memory) Compact(rev int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.compacted = max(m.compacted, min(rev, m.rev))
	m.log = slices.DeleteFunc(m.log, func(c change) bool { return c.rev <= m.compacted })
	m.wake()
}

// Watch implements [Store].
func (m *Memory) Watch(ctx context.Context, prefix string, rev int64, fn func(int64, []Event) error) error {
	for {
		batch, changed, err := m.since(ctx, prefix, &rev)
		if err != nil {
			return err
		}
		for _, c := range batch {
			if err := fn(c.rev, c.events); err != nil {
				return err
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// since returns the changes after *rev that touch prefix, and moves *rev past
// all that it has seen.
func (m *Memory) since(ctx context.Context, prefix string, rev *int64) ([]change, <-chan struct{}, error) {
	if err := m.enter(ctx); err != nil {
		return nil, nil, err
	}
	defer m.mu.Unlock()
	if *rev < m.compacted {
		return nil, nil, fmt.Errorf("watching %s from revision %d: %w", prefix, *rev, ErrCompacted)
	}
	var batch []change
	from, _ := slices.BinarySearchFunc(m.log, *rev+1, func(c change, r int64) int { return cmp.Compare(c.rev, r) })
	for _, c := range m.log[from:] {
		var events []Event
		for _, e := range c.events {
			if strings.HasPrefix(e.Key, prefix) {
				e.Value = slices.Clone(e.Value)
				events = append(events, e)
			}
		}
		if len(events) > 0 {
			batch = append(batch, change{c.rev, events})
		}
	}
	*rev = max(*rev, m.rev)
	return batch, m.changed, nil
}

// Grant implements [Store].
func (m *Memory) Grant(ctx context.Context, ttl time.Duration) (LeaseID, error) {
	if ttl <= 0 {
		return 0, fmt.Errorf("granting a lease: ttl %s is not positive", ttl)
	}
	if err := m.enter(ctx); err != nil {
		return 0, err
	}
	defer m.mu.Unlock()
	m.lastLease++
	id := m.lastLease
	m.leases[id] = &lease{
		ttl:   ttl,
		ends:  time.Now().Add(ttl),
		timer: time.AfterFunc(ttl, func() { m.expire(id) }),
	}
	return id, nil
}

// expire ends a lease whose time has come; a renewal that came first wins.
func (m *Memory) expire(id LeaseID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.leases[id]
	if l == nil || m.closed {
		return
	}
	if left := time.Until(l.ends); left > 0 {
		l.timer.Reset(left)
		return
	}
	m.end(id)
}

// end deletes a lease and its keys as one revision. m.mu is held.
func (m *Memory) end(id LeaseID) {
	m.leases[id].timer.Stop()
	delete(m.leases, id)
	var ops []Op
	for key, it := range m.keys {
		if it.lease == id {
			ops = append(ops, Op{Key: key, Delete: true})
		}
	}
	m.apply(ops)
}

// KeepAlive implements [Store].
func (m *Memory) KeepAlive(ctx context.Context, id LeaseID) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	defer m.mu.Unlock()
	l := m.leases[id]
	if l == nil {
		return fmt.Errorf("renewing lease %d: %w", id, ErrNotFound)
	}
	l.ends = time.Now().Add(l.ttl)
	l.timer.Reset(l.ttl)
	return nil
}

// Revoke implements [Store]. ErrNotFound says that the lease had ended.
func (m *Memory) Revoke(ctx context.Context, id LeaseID) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	defer m.mu.Unlock()
	if m.leases[id] == nil {
		return fmt.Errorf("revoking lease %d: %w", id, ErrNotFound)
	}
	m.end(id)
	return nil
}

// Close implements [Store]: everything held is forgotten and watches end.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	for _, l := range m.leases {
		l.timer.Stop()
	}
	m.wake()
	return nil
}
