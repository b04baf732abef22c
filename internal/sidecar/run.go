package sidecar

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/admin"
)

// withdrawLimit is how long a stop waits for the control plane to take the
// endpoint away.
const withdrawLimit = 2 * time.Second

// layer is work that stops together.
type layer struct {
	cancel context.CancelFunc
	start  func(run func(context.Context) error)
	wg     sync.WaitGroup
}

// newLayer returns a layer that outlives ctx until it is stopped. fail hears
// about work that ends with an error.
func newLayer(ctx context.Context, fail context.CancelCauseFunc) *layer {
	l := &layer{}
	ctx, l.cancel = context.WithCancel(context.WithoutCancel(ctx))
	l.start = func(run func(context.Context) error) {
		l.wg.Go(func() {
			if err := run(ctx); err != nil {
				fail(err)
			}
		})
	}
	return l
}

func (l *layer) stop() {
	l.cancel()
	l.wg.Wait()
}

// Run enrols, serves and stays connected to the control plane until ctx ends.
// Then it withdraws its endpoint, lets live connections finish within the
// configured limit, and returns nil. It returns an error, one line that says
// what to do, when the sidecar cannot go on: enrolment is refused, or a listener
// breaks. Call it once.
func (s *Sidecar) Run(ctx context.Context) error {
	working, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	// In the order of stopping: what makes flow records goes before what carries
	// them away, and who answers for all goes last.
	traffic, link, base := newLayer(ctx, fail), newLayer(ctx, fail), newLayer(ctx, fail)

	base.start(s.agent.Run)
	base.start(s.book.Run)
	base.start(s.keeper.Run)
	base.start(s.near.Run)
	base.start(s.views.Run)
	if s.flowLog != nil {
		base.start(s.flowLog.Run)
	}
	if s.adminHTTP != nil {
		h := admin.Handler(s.health, s.ready, s.metrics)
		base.start(func(ctx context.Context) error { return admin.Serve(ctx, s.adminHTTP, h) })
	}
	if s.adminSocket != nil {
		h := admin.DebugHandler(s.debugParts())
		base.start(func(ctx context.Context) error { return admin.Serve(ctx, s.adminSocket, h) })
	}
	if s.wallet != nil {
		base.start(s.wallet.Run)
	}
	if s.endpoint != nil {
		base.start(s.endpoint.Serve)
	}
	for _, f := range s.files {
		base.start(f.Run)
	}
	link.start(s.keepLink)
	traffic.start(s.inbound.Serve)
	traffic.start(s.outbound.Serve)
	s.log.Info("sidecar started", "tunnel", s.TunnelAddr(), "outbound", len(s.cfg.Outbound), "admin", s.AdminAddr())
	s.sayIsolation()

	<-working.Done()
	err := context.Cause(working)
	if ctx.Err() != nil {
		err = nil
		s.drain(context.WithoutCancel(ctx))
	}
	for _, l := range []*layer{traffic, link, base} {
		l.stop()
	}
	if err == nil {
		s.log.Info("sidecar stopped")
	}
	return err
}

// drain withdraws the endpoint, and then lets connections end by themselves for
// a while. Outbound goes on until inbound is done: an app that finishes its last
// requests may still have to call others.
func (s *Sidecar) drain(ctx context.Context) {
	s.draining.Store(true)
	s.health.Set(componentTunnel, admin.Degraded, "stopping: no new connections are accepted")
	s.log.Info("stopping", "live_inbound", s.inbound.Live(), "live_outbound", s.outbound.Live(), "limit", s.cfg.Drain)
	withdraw, cancel := context.WithTimeout(ctx, withdrawLimit)
	defer cancel()
	if err := s.announce.withdraw(withdraw); err != nil {
		s.log.Warn("the endpoint was not withdrawn in time; callers notice when it is gone", "error", err)
	}
	ctx, cancel = context.WithTimeout(ctx, s.cfg.Drain)
	defer cancel()
	if n := s.inbound.Drain(ctx) + s.outbound.Drain(ctx); n > 0 {
		s.log.Warn("connections were cut at the drain limit", "count", n, "limit", s.cfg.Drain)
	}
}

// ready tells when traffic can be sent here: identity, every kind of view, and an
// endpoint that the control plane has published. It stays ready while the control
// plane is away, and ends with the beginning of a stop.
func (s *Sidecar) ready() error {
	if s.draining.Load() {
		return errors.New("stopping: no new connections are accepted")
	}
	select {
	case <-s.agent.Ready():
	default:
		return errors.New("waiting for the first SVID: " + s.agent.Status().Detail)
	}
	if err := s.views.Ready(); err != nil {
		return err
	}
	if !s.announce.published() {
		return fmt.Errorf("waiting for the control plane to publish this endpoint: %s", s.health.Get(componentAnnounce).Message)
	}
	return nil
}
