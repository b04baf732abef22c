package proxy

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Through 100,000 swaps under load each decision is by the old rules or by the new
// ones, whole: whoever both allow is never refused and never cut, whoever neither
// allows never passes, and of two of whom each allows one, one passes.
func TestF5HundredThousandSwaps(t *testing.T) {
	const swaps = 100_000
	even := spiffeid.RequireFromString("spiffe://shop.example/even")
	odd := spiffeid.RequireFromString("spiffe://shop.example/odd")
	w := newWorld(t)
	s := w.serve(payments, 0, []policy.Rule{allow(orders), allow(even), deny(odd, "")}, w.app("tcp", echo))
	friend := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	stranger := w.client(intruder, "/shop/payments:tcp", s.endpoint("a"))
	kept := friend.dial(t)
	require.NoError(t, kept.SetDeadline(time.Now().Add(5*time.Minute)))
	roundTrip(t, kept, "before")

	var over atomic.Bool
	var asked, dialled, refused atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		for !over.Load() {
			v := s.views.Load()
			q := policy.Request{Src: even, Dst: payments, Port: tcpPort.Number}
			e := v.decide(q).allowed()
			q.Src = odd
			o := v.decide(q).allowed()
			if want := v.revs[xds.Rules].N%2 == 0; e != want || o == want {
				t.Errorf("at %v: even passes %t, odd passes %t", v.revs[xds.Rules], e, o)
				return
			}
			asked.Add(1)
		}
	})
	wg.Go(func() {
		for !over.Load() {
			roundTrip(t, kept, "during")
			conn := friend.dial(t)
			roundTrip(t, conn, "new")
			_ = conn.Close()
			dialled.Add(1)
		}
	})
	wg.Go(func() {
		for !over.Load() {
			conn, err := net.Dial("tcp", stranger.Addrs()[0].String())
			if err != nil {
				continue
			}
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			_, _ = conn.Write([]byte("x"))
			if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Error("a stranger was answered")
			}
			_ = conn.Close()
			refused.Add(1)
		}
	})
	for n := int64(1); n <= swaps && !t.Failed(); n++ {
		if n%2 == 0 {
			s.apply(n, allow(orders), allow(even), deny(odd, ""))
		} else {
			s.apply(n, allow(orders), deny(even, ""), allow(odd))
		}
	}
	over.Store(true)
	wg.Wait()
	roundTrip(t, kept, "after")
	require.NoError(t, kept.Close())
	for _, f := range s.flows.Newest(0, nil) {
		if f.Src == orders && (f.Outcome == flow.Refused || f.Outcome == flow.Cut) || f.Src == intruder && f.Outcome != flow.Refused {
			t.Errorf("recorded %+v", f)
		}
	}
	t.Logf("%d swaps; %d pairs decided, %d friends dialled, %d strangers refused", swaps, asked.Load(), dialled.Load(), refused.Load())
	if asked.Load() == 0 || dialled.Load() == 0 || refused.Load() == 0 {
		t.Error("there was no load")
	}
}
