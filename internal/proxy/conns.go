package proxy

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Reasons for which a live connection is ended from outside.
var errDrained = errors.New("the sidecar is stopping")

// cutError is the cause of a connection that newer rules deny, whose peer's issuer
// newer bundles do not hold, or whose peer was revoked.
type cutError struct{ verdict verdict }

func (e *cutError) Error() string {
	if e.verdict.why != "" {
		return "cut: " + e.verdict.why
	}
	return fmt.Sprintf("cut by policy revision %s: %s", e.verdict.revision, e.verdict.Rule)
}

// conn is one connection from before its decision until its end.
type conn struct {
	policy.Request
	id     string // changed by rename only
	side   flow.Side
	start  time.Time
	cancel context.CancelCauseFunc
	peer   atomic.Pointer[proof] // nil until the peer is authenticated

	revoked atomic.Bool // cut because of that
}

// conns is the connections of one side. The zero value is ready.
type conns struct {
	mu    sync.Mutex
	live  map[*conn]struct{} // guarded by mu
	empty chan struct{}      // guarded by mu; nil unless somebody waits

	revoked atomic.Uint64 // connections cut because their peer was revoked
}

// add registers a connection and returns the context that ends with it.
func (t *conns) add(ctx context.Context, side flow.Side, q policy.Request, now time.Time) (context.Context, *conn) {
	c := &conn{Request: q, id: newID(), side: side, start: now}
	ctx, c.cancel = context.WithCancelCause(ctx)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.live == nil {
		t.live = make(map[*conn]struct{})
	}
	t.live[c] = struct{}{}
	return ctx, c
}

func (t *conns) remove(c *conn) {
	c.cancel(nil)
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.live, c)
	if len(t.live) == 0 && t.empty != nil {
		close(t.empty)
		t.empty = nil
	}
}

// rename gives c the id under which the other end records it.
func (t *conns) rename(c *conn, id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.id = id
}

func (t *conns) all() []*conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*conn, 0, len(t.live))
	for c := range t.live {
		out = append(out, c)
	}
	return out
}

func (t *conns) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.live)
}

// wait returns when no connection is left or ctx ends.
func (t *conns) wait(ctx context.Context) {
	t.mu.Lock()
	if len(t.live) == 0 {
		t.mu.Unlock()
		return
	}
	if t.empty == nil {
		t.empty = make(chan struct{})
	}
	empty := t.empty
	t.mu.Unlock()
	select {
	case <-empty:
	case <-ctx.Done():
	}
}

// endAll ends what is left and returns how many that were.
func (t *conns) endAll(cause error) int {
	all := t.all()
	for _, c := range all {
		c.cancel(cause)
	}
	return len(all)
}

// Connection describes a live connection.
type Connection struct {
	ID    string    `json:"id"`
	Side  flow.Side `json:"side"`
	Src   string    `json:"src"`
	Dst   string    `json:"dst"`
	Port  uint16    `json:"port"`
	Start time.Time `json:"start"`
}

// describe lists live connections, oldest first.
func (t *conns) describe() []Connection {
	out := []Connection{}
	t.mu.Lock()
	for c := range t.live {
		out = append(out, Connection{c.id, c.side, c.Src.String(), c.Dst.String(), c.Port, c.start})
	}
	t.mu.Unlock()
	slices.SortFunc(out, func(a, b Connection) int {
		return cmp.Or(a.Start.Compare(b.Start), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// newID returns a fresh decision id: 64 random bits, 16 hex digits.
func newID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // crypto/rand never returns an error
	return hex.EncodeToString(b[:])
}

// finish completes f with how its relay ended: err is nil only if both ends
// finished regularly, and cause is why its context ended, if it did.
func finish(f *flow.Flow, err, cause error) {
	var cut *cutError
	switch {
	case err == nil:
		f.Outcome = flow.Closed
	case errors.As(cause, &cut):
		f.Outcome, f.Error = flow.Cut, cut.verdict.why
		f.Decision, f.Revision = cut.verdict.Decision, cut.verdict.revision
	case cause != nil:
		f.Outcome = flow.Drained
	default:
		f.Outcome, f.Error = flow.Failed, flow.Text(err.Error())
	}
}
