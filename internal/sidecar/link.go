package sidecar

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/proxy"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Limits of the connection to the control plane.
const (
	dialLimit     = 10 * time.Second
	handoverLimit = 2 * time.Second        // for the new connection to announce before the old one goes
	firstRetry    = 100 * time.Millisecond // grows by a quarter each time, so that a restart of some seconds is noticed within two
	lastRetry     = 5 * time.Second
	steadyAfter   = time.Second // a connection that held this long was a good one
	spentCheck    = time.Second // a tainted issuer has half a minute left when it is told
)

// backoff is the pause before another attempt.
type backoff struct{ d time.Duration }

// next returns the pause, half to one and a half times the nominal one.
func (b *backoff) next() time.Duration {
	b.d = min(max(b.d*5/4, firstRetry), lastRetry)
	return min(b.d/2+rand.N(b.d), lastRetry)
}

func (b *backoff) reset() { b.d = 0 }

// session is one connection to the control plane and the streams on it.
type session struct {
	conn      *grpc.ClientConn
	since     time.Time
	svid      *x509svid.SVID // what it presented, or a predecessor of that; nil where there was none
	until     time.Time      // when that ends
	cancel    context.CancelFunc
	wg        sync.WaitGroup
	announced chan struct{} // closed with the first answer to an announcement
	resources chan struct{} // closed when the resource stream has ended
	flows     chan struct{} // closed when the flow stream has ended
	ended     chan error    // cap 1: why the resource stream ended
}

// end closes the streams and the connection and waits for them.
func (c *session) end() error {
	c.cancel()
	c.wg.Wait()
	return c.conn.Close()
}

// keepLink stays connected to the control plane until ctx ends. A connection is
// replaced, before the old one is dropped, when half of what its SVID had left
// has passed, or when that is about to be refused and there is another: the control
// plane ends streams with the SVID that opened them.
func (s *Sidecar) keepLink(ctx context.Context) error {
	select {
	case <-s.agent.Ready():
	case <-ctx.Done():
		return nil
	}
	client, err := s.newClient()
	if err != nil {
		return err
	}
	var current *session
	defer func() {
		if current != nil {
			_ = current.end() // closing a connection that we drop anyway
		}
	}()
	var pause backoff
	for {
		next, err := s.connect(ctx)
		if ctx.Err() != nil {
			if next != nil {
				_ = next.end() // as above
			}
			return nil
		}
		var wait time.Duration
		if err != nil {
			s.linkLost(err, current)
			wait = pause.next()
		} else {
			s.handover(ctx, client, current, next)
			current = next
			s.linkUp()
			wait = s.renewIn(current)
		}
		if current = s.watch(ctx, current, wait, &pause); ctx.Err() != nil {
			return nil
		}
	}
}

// watch waits until it is time for another connection, and returns the present
// one if it still stands.
func (s *Sidecar) watch(ctx context.Context, current *session, wait time.Duration, pause *backoff) *session {
	var ended <-chan error
	if current != nil {
		ended = current.ended
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	look := time.NewTicker(spentCheck)
	defer look.Stop()
	for {
		select {
		case <-t.C:
			return current
		case <-look.C:
			if s.spent(current) {
				return current
			}
		case <-ctx.Done():
			return current
		case err := <-ended:
			if ctx.Err() != nil {
				return current
			}
			s.linkLost(err, nil)
			_ = current.end() // it is broken already
			if s.now().Sub(current.since) > steadyAfter {
				pause.reset()
			}
			sleep(ctx, pause.next())
			return nil
		}
	}
}

// spent reports whether the SVID that a connection presented is refused, or soon
// will be, and there is another to present.
func (s *Sidecar) spent(c *session) bool {
	if c == nil || c.svid == nil {
		return false
	}
	now, err := s.agent.Source().GetX509SVID()
	list := s.book.List(c.svid.ID.TrustDomain())
	return err == nil && now != c.svid && list != nil && refuses(list, c.svid, s.now()) && !refuses(list, now, s.now())
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (s *Sidecar) newClient() (*xds.Client, error) {
	self := s.agent.ID()
	var wanted []spiffeid.ID
	aliases := false
	for i, o := range s.cfg.Outbound {
		ref, _, err := proxy.SplitTarget(o.To)
		if err != nil {
			return nil, fmt.Errorf("outbound[%d].to: %w", i, err)
		}
		id, err := identity.ParseRef(self.TrustDomain(), ref)
		if err != nil {
			return nil, fmt.Errorf("outbound[%d].to: %w", i, err)
		}
		wanted = append(wanted, id)
		aliases = aliases || mayHoldAlias(ref)
	}
	return xds.NewClient(xds.ClientConfig{
		Node: self, Instance: s.agent.Instance(), Subscribe: wanted, Reachable: aliases, Log: s.log.Named("xds"),
	}), nil
}

// mayHoldAlias reports whether ref may be the name of a foreign destination, with
// its trust domain's alias as the last label. Whose alias that is, only the
// destinations themselves say.
func mayHoldAlias(ref string) bool {
	return !strings.Contains(ref, "/") && strings.Contains(strings.TrimSuffix(ref, ".mesh"), ".")
}

// connect opens a connection and announces on it.
func (s *Sidecar) connect(ctx context.Context) (*session, error) {
	dialCtx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	svid, _ := s.agent.Source().GetX509SVID() // read first: the connection presents this SVID or a newer one
	until := s.agent.Status().NotAfter
	conn, err := s.agent.Dial(dialCtx)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	c := &session{
		conn: conn, since: s.now(), svid: svid, until: until, cancel: stop,
		announced: make(chan struct{}), resources: make(chan struct{}), flows: make(chan struct{}),
		ended: make(chan error, 1),
	}
	first := sync.OnceFunc(func() { close(c.announced) })
	c.wg.Go(func() {
		s.again(ctx, func() error {
			err := s.announce.run(metadata.AppendToOutgoingContext(ctx, sallyportv1.InstanceMetadata, s.agent.Instance()), conn, func(string) {
				first()
				s.health.Set(componentAnnounce, admin.OK, "")
			})
			if ctx.Err() == nil {
				s.announceFailed(err)
			}
			return err
		})
	})
	return c, nil
}

// handover moves the streams from old, which may be nil, to next. The endpoint
// is announced on next before old goes, so that it never vanishes; of the other
// streams there may be only one each, so they follow one another.
func (s *Sidecar) handover(ctx context.Context, client *xds.Client, old, next *session) {
	if old == nil {
		old = &session{resources: make(chan struct{}), flows: make(chan struct{})}
		close(old.resources)
		close(old.flows)
	} else {
		if s.announce.published() {
			t := time.NewTimer(handoverLimit)
			select {
			case <-next.announced:
			case <-t.C:
			case <-ctx.Done():
			}
			t.Stop()
		}
		old.cancel()
		next.wg.Go(func() { _ = old.end() }) // what it carried is on next now
	}
	streams, stop := context.WithCancel(ctx)
	announcing := next.cancel
	next.cancel = func() { stop(); announcing() }
	next.wg.Go(func() {
		defer close(next.resources)
		<-old.resources
		next.ended <- client.Run(streams, next.conn, s.apply)
	})
	next.wg.Go(func() {
		defer close(next.flows)
		<-old.flows
		s.again(streams, func() error { return s.stream.Run(streams, next.conn) })
	})
}

// again repeats run, with pauses, until ctx ends. A stream that is refused for
// reasons of its own must not take the others with it.
func (s *Sidecar) again(ctx context.Context, run func() error) {
	var pause backoff
	for ctx.Err() == nil {
		start := s.now()
		err := run()
		if ctx.Err() != nil {
			return
		}
		s.log.Debug("stream ended, trying again", "error", err)
		if s.now().Sub(start) > steadyAfter {
			pause.reset()
		}
		sleep(ctx, pause.next())
	}
}

// renewIn is how long a connection stays, with some jitter. While there is no
// newer SVID than its own, there is no use in another connection.
func (s *Sidecar) renewIn(c *session) time.Duration {
	left := c.until.Sub(s.now())
	d := left/2 - rand.N(max(left/8, 1))
	return max(d, 500*time.Millisecond)
}
