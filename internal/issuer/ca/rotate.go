package ca

import (
	"context"
	"errors"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	// maxTick bounds how late a change of the clock is noticed.
	maxTick = time.Minute
	minTick = 20 * time.Millisecond
)

// Run rotates by the clock and follows what other replicas publish, until ctx
// ends; it returns nil then. Whatever goes wrong is logged and tried again: the
// CA goes on signing with what it has.
func (c *CA) Run(ctx context.Context) error {
	changed := make(chan struct{}, 1)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.follow(ctx, changed) })
	g.Go(func() error {
		timer := time.NewTimer(0)
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
			case <-timer.C:
			}
			if err := c.Advance(ctx); err != nil && ctx.Err() == nil {
				c.log.Error("rotating the CA; going on with the present keys", "error", err)
			}
			timer.Reset(c.untilNext())
		}
	})
	return g.Wait()
}

// follow says when the records in the store have changed, or may have while nobody
// watched.
func (c *CA) follow(ctx context.Context, changed chan<- struct{}) error {
	poke := func(int64, []store.Event) error {
		select {
		case changed <- struct{}{}:
		default:
		}
		return nil
	}
	for ctx.Err() == nil {
		_, rev, err := c.cfg.Store.List(ctx, storePrefix)
		if err == nil {
			err = errors.Join(poke(rev, nil), c.cfg.Store.Watch(ctx, storePrefix, rev, poke))
		}
		if ctx.Err() == nil {
			c.log.Warn("watching the CA's records; trying again", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}
	return nil
}

// untilNext is how long Run may sleep: until the control plane's own SVID is to
// be renewed or an anchor becomes active, and never long, since an injected or
// corrected clock can jump.
func (c *CA) untilNext() time.Duration {
	now, next := c.cfg.Now(), maxTick
	s := c.state.Load()
	for _, a := range slices.Concat(s.roots, s.jwts) {
		if d := a.activeFrom.Sub(now); d > 0 {
			next = min(next, d)
		}
	}
	return max(min(c.cfg.SVIDTTL/24, next), minTick)
}

// Advance does all that is due by the clock: the first root and JWT key, the
// next ones at half of the active ones' lives, a new intermediate, the control
// plane's own SVID. Run calls it; it is safe to call at any time. Each step leaves
// a state that opens, and an error leaves the CA as it was.
func (c *CA) Advance(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.advanceLocked(ctx)
}

func (c *CA) advanceLocked(ctx context.Context) error {
	err := c.retry(func() error { return c.advance(ctx, c.cfg.Now()) })
	c.problem.Store(&err)
	return err
}

// retry runs do again after a conflict, which means that another replica rotates
// at this very moment: do looks again at what it left to do.
func (c *CA) retry(do func() error) (err error) {
	for range 3 {
		if err = do(); !errors.Is(err, store.ErrConflict) {
			break
		}
	}
	return err
}

func (c *CA) advance(ctx context.Context, now time.Time) error {
	b, err := c.readBook(ctx)
	if err != nil {
		return err
	}
	if err := c.fixTrustDomain(b); err != nil {
		return err
	}
	next := &state{superseded: make(chan struct{})}
	if err := c.advanceAnchors(ctx, b, next, now); err != nil {
		return err
	}
	c.describe(next, b, now)
	server, err := c.advanceServer(next, now)
	if err != nil {
		return err
	}
	c.install(next, server)
	c.checkToken(b, next, now)
	return errors.Join(b.problems...)
}

// advanceAnchors makes what is due of roots, JWT keys and this replica's
// intermediate, and fills in who signs and what is published.
func (c *CA) advanceAnchors(ctx context.Context, b *book, next *state, now time.Time) (err error) {
	upstream := c.cfg.Signer.Upstream != (Upstream{})
	for _, l := range lines {
		if l == rootLine && upstream {
			continue
		}
		if err := c.attachKeys(ctx, b, l, now); err != nil {
			return err
		}
	}
	if upstream {
		next.signer, next.active, err = c.followUpstream(ctx, b, now)
	} else {
		next.active, err = c.advanceLine(ctx, b, rootLine, now)
	}
	if err != nil {
		return err
	}
	if next.jwt, err = c.advanceLine(ctx, b, jwtLine, now); err != nil {
		return err
	}
	// What cannot be forgotten stays in the bundle a while longer, and peers do
	// not believe it.
	if err := c.forget(ctx, b, now); err != nil {
		b.problems = append(b.problems, err)
	}
	if upstream {
		err = c.recordIssuer(ctx, b, next.signer, next.active, now)
	} else {
		next.signer, next.active, err = c.advanceIntermediate(ctx, b, next.active, now)
	}
	if err != nil {
		return err
	}
	next.roots, next.jwts = b.of(rootLine), b.of(jwtLine)
	next.bundle, err = c.makeBundle(next, b)
	return err
}

// install publishes a new state, unless nothing changed, and the server's SVID.
func (c *CA) install(next *state, server *serverSVID) {
	old := c.state.Load()
	if old == nil || !old.bundle.Equal(next.bundle) || !old.active.cert.Equal(next.active.cert) ||
		!old.jwt.cert.Equal(next.jwt.cert) || !old.signer.cert.Equal(next.signer.cert) ||
		!slices.Equal(old.authorities, next.authorities) || !sameTaints(old.tainted, next.tainted) || !sameCerts(old.cross, next.cross) {
		c.state.Store(next)
		if old != nil {
			close(old.superseded)
		}
	}
	if server != c.server {
		c.live.SetBundles(identity.Bundles{c.td: server.bundle})
		c.live.SetSVID(server.svid)
		c.server = server
	}
}
