package host

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Limits of the connection over which bundles are pushed.
const (
	dialLimit  = 10 * time.Second
	firstRetry = 100 * time.Millisecond
	lastRetry  = 5 * time.Second
	leastLife  = 500 * time.Millisecond // of a connection
)

// Run enrols and serves until ctx ends, and returns nil then; watchers are told to
// come again. It returns an error, one line that says what to do, when the agent
// cannot go on: enrolment is refused, or a listener breaks. Call it once.
func (h *Host) Run(ctx context.Context) error {
	working, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var wg sync.WaitGroup
	start := func(run func(context.Context) error) {
		wg.Go(func() {
			if err := run(working); err != nil {
				fail(err)
			}
		})
	}
	start(h.agent.Run)
	start(h.wallet.Run)
	start(h.book.Run)
	start(h.keeper.Run)
	start(h.keepBundles)
	if h.endpoint != nil {
		start(h.endpoint.Serve)
	}
	for _, f := range h.files {
		start(f.Run)
	}
	if h.adminHTTP != nil {
		handler := admin.Handler(h.health, h.ready, h.metrics)
		start(func(ctx context.Context) error { return admin.Serve(ctx, h.adminHTTP, handler) })
	}
	if h.adminSocket != nil {
		handler := admin.DebugHandler(h.debugParts())
		start(func(ctx context.Context) error { return admin.Serve(ctx, h.adminSocket, handler) })
	}
	h.log.Info("agent started", "socket", h.cfg.WorkloadAPI.Socket, "files", len(h.files), "admin", h.AdminAddr())
	<-working.Done()
	h.stopping.Store(true)
	wg.Wait()
	if ctx.Err() == nil {
		return context.Cause(working)
	}
	h.log.Info("agent stopped")
	return nil
}

// keepBundles stays connected to the control plane, which pushes trust bundles:
// JWT keys and federated trust domains come no other way. A connection is replaced
// when half of what its SVID had left has passed.
func (h *Host) keepBundles(ctx context.Context) error {
	select {
	case <-h.agent.Ready():
	case <-ctx.Done():
		return nil
	}
	client := xds.NewClient(xds.ClientConfig{Node: h.agent.ID(), Instance: h.agent.Instance(), Log: h.log.Named("xds")})
	for pause := firstRetry; ctx.Err() == nil; {
		begin := h.now()
		err := h.receive(ctx, client)
		if ctx.Err() != nil {
			return nil
		}
		if h.now().Sub(begin) > lastRetry {
			pause = firstRetry
		}
		if err == nil { // it is only being replaced
			continue
		}
		h.linkLost(err)
		sleep(ctx, pause/2+rand.N(pause))
		pause = min(pause*5/4, lastRetry)
	}
	return nil
}

// receive follows one connection; nil: its time was over.
func (h *Host) receive(ctx context.Context, client *xds.Client) error {
	dialCtx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	left := h.agent.Status().NotAfter.Sub(h.now())
	conn, err := h.agent.Dial(dialCtx)
	if err != nil {
		return err
	}
	life := max(left/2-rand.N(max(left/8, 1)), leastLife)
	streamCtx, stop := context.WithTimeout(ctx, life)
	defer stop()
	err = client.Run(streamCtx, conn, h.apply)
	if streamCtx.Err() != nil {
		err = nil
	}
	return errors.Join(err, conn.Close())
}

// apply takes bundles and the revocation list; what else is pushed is for those who
// carry traffic.
func (h *Host) apply(u xds.Update) error {
	h.linkUp()
	switch {
	case u.Kind == xds.Bundles:
		return h.agent.SetBundles(u.Bundles)
	case u.Kind == xds.Revocations && u.Revocations != nil:
		_, err := h.book.Offer(u.Revocations)
		return err
	}
	return nil
}

// refused renews what a new list refuses. Peers learn of it by themselves; here it
// ends the streams of apps that were revoked.
func (h *Host) refused(l *revocation.List) {
	if l.TrustDomain() == h.agent.ID().TrustDomain() {
		h.keeper.Note(h.book.Envelope(l.TrustDomain()))
	}
	refused := func(p identity.Peer) bool { return l.Names(p.Chain) || l.Check(p, h.now()) != nil }
	if svid, err := h.agent.Source().GetX509SVID(); err == nil &&
		refused(identity.Peer{ID: svid.ID, Leaf: svid.Certificates[0], Chain: svid.Certificates}) {
		h.log.Info("this agent's SVID is refused, or soon will be; renewing it", "version", l.Version())
		h.agent.RenewNow()
	}
	h.wallet.RenewIf(refused)
}

func (h *Host) linkUp() {
	if h.health.Get(componentLink).Status != admin.OK {
		h.log.Info("connected to the control plane", "address", h.cfg.ControlPlane)
	}
	h.health.Set(componentLink, admin.OK, "")
}

func (h *Host) linkLost(err error) {
	if status.Code(err) == codes.Unauthenticated { // the SVID is as good as none; the list may not come
		h.agent.RenewNow()
	}
	if h.health.Get(componentLink).Status == admin.OK {
		h.log.Warn("no connection to the control plane; identities are served from what is there", "error", err)
	}
	h.health.Set(componentLink, admin.Degraded, fmt.Sprintf("%v; trying again, and identities are served from what is there", err))
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
