package ca

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// holder is a workload as its sidecar keeps it: an SVID that is renewed long
// before it ends, and a bundle that comes by push, a little late.
type holder struct {
	live    identity.Live
	id      spiffeid.ID
	late    int // steps by which news of the bundle arrive late
	renewed time.Time
	queue   []identity.Bundles
}

func (h *holder) step(t *testing.T, c *CA, now time.Time, every time.Duration) {
	h.queue = append(h.queue, identity.Bundles{td: c.Bundle()})
	if len(h.queue) > h.late {
		h.live.SetBundles(h.queue[0])
		h.queue = h.queue[1:]
	}
	if now.Sub(h.renewed) < every {
		return
	}
	key := newECKey(t)
	issued, err := c.Issue(t.Context(), Request{ID: h.id, Key: key.Public()})
	require.NoError(t, err)
	h.live.SetSVID(&x509svid.SVID{ID: h.id, Certificates: issued.Chain, PrivateKey: key})
	h.renewed = now
}

// TestRotationUnderLoad: 100 intermediates and 10 roots follow one another while
// workloads shake hands all the time; no handshake fails.
func TestRotationUnderLoad(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	c := open(t, cfg)
	const step = 5 * time.Hour
	var holders []*holder
	for i := range 4 {
		h := &holder{id: spiffeid.RequireFromPath(td, fmt.Sprintf("/w/%d", i)), late: i}
		h.live.SetBundles(identity.Bundles{td: c.Bundle()})
		h.step(t, c, clk.Now(), 0)
		holders = append(holders, h)
	}
	ctx, stop := context.WithCancel(t.Context())
	g, ctx := errgroup.WithContext(ctx)
	var done atomic.Int64
	var jump sync.RWMutex // hours do not pass within one handshake; all else may happen in it
	for n := range 2 {
		g.Go(func() error {
			for i := n; ctx.Err() == nil; i++ {
				client, server := holders[i%len(holders)], holders[(i/len(holders)+n+1)%len(holders)]
				jump.RLock()
				err := shakeHands(ctx, clk, client, server)
				jump.RUnlock()
				if err != nil && ctx.Err() == nil {
					return fmt.Errorf("handshake %d, %s → %s at %v: %w", done.Load(), client.id, server.id, clk.Now(), err)
				}
				done.Add(1)
			}
			return nil
		})
	}
	intermediates, roots := map[string]bool{}, map[string]bool{}
	for i := 0; (len(intermediates) <= 100 || len(roots) <= 10) && ctx.Err() == nil; i++ {
		jump.Lock()
		clk.Add(step)
		jump.Unlock()
		require.NoError(t, c.Advance(t.Context()))
		for _, h := range holders {
			h.step(t, c, clk.Now(), cfg.SVIDTTL/3)
		}
		s := c.state.Load()
		intermediates[keyHash(s.signer.cert)], roots[keyHash(s.active.cert)] = true, true
		for before := done.Load(); done.Load() < before+2 && ctx.Err() == nil; {
			time.Sleep(time.Millisecond) // some handshakes in each state
		}
	}
	stop()
	require.NoError(t, g.Wait())
	t.Logf("%d handshakes over %d intermediates and %d roots", done.Load(), len(intermediates)-1, len(roots)-1)
}

func shakeHands(ctx context.Context, clk *clock, client, server *holder) error {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	cfg := func(h *holder) identity.TLSConfig { return identity.TLSConfig{Source: &h.live, Now: clk.Now} }
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	served := make(chan error, 1)
	wg.Go(func() {
		conn := tls.Server(b, identity.ServerTLS(cfg(server)))
		err := conn.HandshakeContext(ctx)
		if err == nil {
			_, err = conn.Write([]byte("x"))
		}
		served <- err
	})
	conn := tls.Client(a, identity.ClientTLS(cfg(client), identity.ExactPattern(server.id)))
	if err := conn.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil { // the server has verified the client
		return fmt.Errorf("client: %w", err)
	}
	if err := <-served; err != nil {
		return fmt.Errorf("server: %w", err)
	}
	return nil
}
