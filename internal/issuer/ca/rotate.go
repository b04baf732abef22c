package ca

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
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

// follow says when the keys in the store have changed, or may have while nobody
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
	next := &state{superseded: make(chan struct{})}
	for _, s := range []*shelf{&b.roots, &b.jwt} {
		if err := c.attachKeys(ctx, b, s, now); err != nil {
			return err
		}
	}
	if next.roots, next.active, err = c.advanceShelf(ctx, b, &b.roots, now); err != nil {
		return err
	}
	if next.jwt, next.jwtActive, err = c.advanceShelf(ctx, b, &b.jwt, now); err != nil {
		return err
	}
	// Before the bundle is made: what it holds no longer must have been counted.
	if err := c.forgetExpired(ctx, b, now); err != nil {
		return err
	}
	if err := c.describe(next, b); err != nil {
		return err
	}
	if next.signer, err = c.advanceIntermediate(next.active, next.taintedKeys(), now); err != nil {
		return err
	}
	server, err := c.advanceServer(next, now)
	if err != nil {
		return err
	}
	c.install(next, server)
	return nil
}

// advanceShelf makes the first key, or the next one when half of the active one's
// life is over or the newest is tainted.
func (c *CA) advanceShelf(ctx context.Context, b *book, s *shelf, now time.Time) ([]*root, *root, error) {
	all, active := c.schedule(s, now)
	due := active == nil
	if active != nil {
		newest := all[len(all)-1]
		half := !now.Before(made(active.cert).Add(life(active.cert) / 2))
		due = half && newest == active || !newest.taintedAt.IsZero()
	}
	if !due {
		return all, active, nil
	}
	if active == nil && len(s.records) > 0 && s.kind == b.roots.kind {
		c.log.Error("every root has expired while no control plane ran; all sidecars need new join tokens")
	}
	if err := c.add(ctx, b, s, now); err != nil {
		return nil, nil, err
	}
	all, active = c.schedule(s, now)
	return all, active, nil
}

// describe completes a state with what is published of it.
func (c *CA) describe(s *state, b *book) error {
	s.sequence = b.sequence
	for _, hash := range slices.Sorted(maps.Keys(b.tainted)) {
		s.tainted = append(s.tainted, b.tainted[hash])
	}
	s.published = spiffebundle.FromX509Authorities(c.td, s.bundle())
	for _, r := range s.jwt {
		if err := s.published.AddJWTAuthority(r.cert.Subject.CommonName, r.cert.PublicKey); err != nil {
			return fmt.Errorf("publishing JWT key %s: %w", r.cert.Subject.CommonName, err)
		}
	}
	s.published.SetSequenceNumber(s.sequence)
	s.published.SetRefreshHint(min(max(c.cfg.RootTTL/100, time.Second), maxRefreshHint).Truncate(time.Second))
	return nil
}

// advanceIntermediate returns this replica's intermediate: the one on disk while
// the active root signed it and half of its life is not over, else a new one.
// Peers learn it from each chain, so it needs no publication.
func (c *CA) advanceIntermediate(active *root, tainted map[string]bool, now time.Time) (*authority, error) {
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
		if c.usable(have, active, now) && !tainted[keyHash(have.cert)] {
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

// same reports whether signers, bundle and taints are those of o.
func (s *state) same(o *state) bool {
	return s.published.Equal(o.published) && s.active.cert.Equal(o.active.cert) && s.signer.cert.Equal(o.signer.cert) &&
		s.jwtActive.cert.Equal(o.jwtActive.cert) && slices.Equal(s.tainted, o.tainted)
}

// install publishes a new state, unless nothing changed, and the server's SVID.
func (c *CA) install(next *state, server *serverSVID) {
	old := c.state.Load()
	if old == nil || !old.same(next) {
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
