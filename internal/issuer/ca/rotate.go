package ca

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
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

// follow says when the roots in the store have changed, or may have while nobody
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
		_, rev, err := c.cfg.Store.List(ctx, rootPrefix)
		if err == nil {
			err = errors.Join(poke(rev, nil), c.cfg.Store.Watch(ctx, rootPrefix, rev, poke))
		}
		if ctx.Err() == nil {
			c.log.Warn("watching the roots; trying again", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}
	return nil
}

// untilNext is how long Run may sleep: until the control plane's own SVID is to
// be renewed, and never long, since an injected or corrected clock can jump.
func (c *CA) untilNext() time.Duration {
	return min(max(c.cfg.SVIDTTL/24, minTick), maxTick)
}

// Advance does all that is due by the clock: the first root, the next one at
// half of the active one's life, a new intermediate, the control plane's own
// SVID. Run calls it; it is safe to call at any time. Each step leaves a state
// that opens, and an error leaves the CA as it was.
func (c *CA) Advance(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	for range 3 {
		// A conflict means that another replica rotates at this very moment: look
		// again at what it left to do.
		if err = c.advance(ctx, c.cfg.Now()); !errors.Is(err, store.ErrConflict) {
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
	if err := c.attachKeys(ctx, b, now); err != nil {
		return err
	}
	next, err := c.advanceRoots(ctx, b, now)
	if err != nil {
		return err
	}
	if next.signer, err = c.advanceIntermediate(next.active, now); err != nil {
		return err
	}
	server, err := c.advanceServer(next, now)
	if err != nil {
		return err
	}
	c.install(next, server)
	return c.forgetExpired(ctx, b, now)
}

// advanceRoots makes the first root, or the next one when half of the active
// one's life is over.
func (c *CA) advanceRoots(ctx context.Context, b *book, now time.Time) (*state, error) {
	roots, active := schedule(b.records, now)
	half := active != nil && !now.Before(made(active.cert).Add(life(active.cert)/2))
	if active == nil || half && roots[len(roots)-1] == active {
		if active == nil && len(b.records) > 0 {
			c.log.Error("every root has expired while no control plane ran; all sidecars need new join tokens")
		}
		if err := c.addRoot(ctx, b, now); err != nil {
			return nil, err
		}
		roots, active = schedule(b.records, now)
	}
	return &state{roots: roots, active: active, superseded: make(chan struct{})}, nil
}

// advanceIntermediate returns this replica's intermediate: the one on disk while
// the active root signed it and half of its life is not over, else a new one.
// Peers learn it from each chain, so it needs no publication.
func (c *CA) advanceIntermediate(active *root, now time.Time) (*authority, error) {
	name := "intermediate-" + c.cfg.Replica
	have, err := c.keys.load(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	default:
		if err := c.checkOwn(have.cert, name); err != nil {
			return nil, err
		}
		if c.usable(have, active, now) {
			return have, nil
		}
	}
	fresh, key, err := c.newIntermediate(&authority{active.cert, active.signer}, now)
	if err != nil {
		return nil, err
	}
	if err := c.keys.save(name, fresh.cert, key); err != nil {
		return nil, err
	}
	c.log.Info("made a new intermediate", "subject", fresh.cert.Subject.CommonName, "not_after", fresh.cert.NotAfter)
	return fresh, nil
}

func (c *CA) usable(a *authority, active *root, now time.Time) bool {
	if a.cert.CheckSignatureFrom(active.cert) != nil {
		return false
	}
	// A configuration with longer SVIDs needs a longer intermediate, as far as
	// its root can give one.
	short := a.cert.NotAfter.Sub(now) < 2*c.cfg.SVIDTTL && a.cert.NotAfter.Before(active.cert.NotAfter)
	return !short && now.Before(made(a.cert).Add(life(a.cert)/2))
}

// install publishes a new state, unless nothing changed, and the server's SVID.
func (c *CA) install(next *state, server *serverSVID) {
	old := c.state.Load()
	if old == nil || !sameCerts(old.bundle(), next.bundle()) || !old.active.cert.Equal(next.active.cert) || !old.signer.cert.Equal(next.signer.cert) {
		c.state.Store(next)
		if old != nil {
			close(old.superseded)
		}
	}
	if server != c.server {
		c.live.SetBundles(identity.Bundles{c.td: spiffebundle.FromX509Authorities(c.td, server.roots)})
		c.live.SetSVID(server.svid)
		c.server = server
	}
}
