package catalog

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// watchRetry is how long Watch waits after the store failed it.
const watchRetry = 200 * time.Millisecond

// callbackError carries an error of Watch's fn out of the loops around it.
type callbackError struct{ error }

// Watch calls fn with the state in force at once, and then with each new one in
// order; states that were overtaken while fn was busy are left out. The state
// before the first Apply has no sets and denies everything.
//
// It returns fn's error, ctx's, or that the store was closed; it outlives
// everything else that may happen to the store. A revision that this version of
// the program cannot use (it was written by another one) is logged, told by
// Problem and left out: what was in force before stays.
func (c *Catalog) Watch(ctx context.Context, fn func(State) error) error {
	var last Rev
	for {
		err := c.follow(ctx, &last, fn)
		var stop callbackError
		switch {
		case errors.As(err, &stop):
			return stop.error
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, store.ErrClosed):
			return err
		case errors.Is(err, store.ErrCompacted), errors.Is(err, errOvertaken):
			// The next round begins with what is in force now.
		default:
			c.Log.Warn("watching the policy sets was interrupted", "error", err, "retry_in", watchRetry)
		}
		if err := pause(ctx, watchRetry); err != nil {
			return err
		}
	}
}

// follow delivers the state in force, where it is not last, and what follows it.
func (c *Catalog) follow(ctx context.Context, last *Rev, fn func(State) error) error {
	kvs, at, err := c.Store.List(ctx, keyCurrent)
	if err != nil {
		return err
	}
	rev := Rev{Epoch: 1}
	if len(kvs) > 0 {
		if err := decodeJSON(kvs[0], &rev); err != nil {
			return err
		}
	}
	if err := c.deliver(ctx, rev, last, fn); err != nil {
		return err
	}
	return c.Store.Watch(ctx, keyCurrent, at, func(_ int64, events []store.Event) error {
		newest := events[len(events)-1]
		if newest.Deleted {
			return fmt.Errorf("the pointer to the current revision was deleted from the store")
		}
		var rev Rev
		if err := decodeJSON(newest.KV, &rev); err != nil {
			return err
		}
		return c.deliver(ctx, rev, last, fn)
	})
}

// deliver gives the state at rev to fn, unless that was the last one.
func (c *Catalog) deliver(ctx context.Context, rev Rev, last *Rev, fn func(State) error) error {
	if rev == *last {
		return nil
	}
	var e entry
	var err error
	if rev.N > 0 {
		if e, err = c.readEntry(ctx, rev); err != nil {
			return err
		}
	}
	k, err := c.load(ctx, e.Sets)
	if err != nil {
		return err
	}
	*last = rev
	c.setBroken(rev, k.err)
	if k.err != nil {
		return nil
	}
	if err := fn(State{Rev: rev, Sets: k.list(), Rules: k.rules}); err != nil {
		return callbackError{err}
	}
	return nil
}

// setBroken notes whether the newest revision can be used.
func (c *Catalog) setBroken(rev Rev, err error) {
	problem := ""
	if err != nil {
		problem = fmt.Sprintf("revision %s cannot be used by this version, so the one before stays in force; apply a corrected one:\n%s", rev, err)
		c.Log.Error("the newest policy revision cannot be used; the one before stays in force", "revision", rev, "error", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.broken = problem
}
