package etcd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

const (
	watchBackoff    = 100 * time.Millisecond
	watchBackoffMax = 2 * time.Second
)

// Watch implements [store.Store].
//
// etcd's client resumes a broken stream by itself; what it gives up on (no
// leader, a member that is being replaced) is begun again here after the last
// revision seen. Fragments stay off, so that one response holds all events of a
// revision; progress notices move the starting point on when nothing happens,
// so that a later resume does not ask for compacted revisions.
func (c *client) Watch(ctx context.Context, prefix string, rev int64, fn func(int64, []store.Event) error) error {
	backoff := watchBackoff
	for {
		select {
		case <-c.done:
			return store.ErrClosed
		default:
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		begun := rev
		err, final := c.watchOnce(ctx, prefix, &rev, fn)
		if final {
			return err
		}
		select {
		case <-c.done: // that is what interrupted it
			return store.ErrClosed
		default:
		}
		if rev > begun {
			backoff = watchBackoff
		}
		c.log.Warn("watching the store was interrupted", "prefix", prefix, "revision", rev, "error", err, "retry_in", backoff)
		select {
		case <-time.After(backoff/2 + rand.N(backoff/2)):
		case <-ctx.Done():
		case <-c.done:
		}
		backoff = min(2*backoff, watchBackoffMax)
	}
}

// watchOnce follows one watch until it ends. final tells that trying again is
// of no use; *rev is the last revision fully delivered.
func (c *client) watchOnce(ctx context.Context, prefix string, rev *int64, fn func(int64, []store.Event) error) (err error, final bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch := c.etcd.Watch(clientv3.WithRequireLeader(ctx), c.prefix+prefix,
		clientv3.WithPrefix(), clientv3.WithRev(*rev+1), clientv3.WithProgressNotify())
	for resp := range ch {
		err := resp.Err()
		if resp.CompactRevision != 0 || errors.Is(err, rpctypes.ErrCompacted) {
			return fmt.Errorf("watching %s from revision %d: %w", prefix, *rev, store.ErrCompacted), true
		}
		if err != nil {
			return err, false
		}
		if resp.IsProgressNotify() {
			*rev = max(*rev, resp.Header.Revision)
		}
		if err := c.deliver(resp.Events, rev, fn); err != nil {
			return err, true
		}
	}
	if err := ctx.Err(); err != nil {
		return err, true
	}
	return errors.New("the stream ended"), false
}

// deliver calls fn once for each revision in events, which are in order.
func (c *client) deliver(events []*clientv3.Event, rev *int64, fn func(int64, []store.Event) error) error {
	for len(events) > 0 {
		at := events[0].Kv.ModRevision
		var batch []store.Event
		for len(events) > 0 && events[0].Kv.ModRevision == at {
			batch = append(batch, c.event(events[0]))
			events = events[1:]
		}
		if err := fn(at, batch); err != nil {
			return err
		}
		*rev = at
	}
	return nil
}

func (c *client) event(e *clientv3.Event) store.Event {
	return store.Event{
		KV:      store.KV{Key: string(e.Kv.Key[len(c.prefix):]), Value: e.Kv.Value, Rev: e.Kv.ModRevision},
		Deleted: e.Type == clientv3.EventTypeDelete,
	}
}
