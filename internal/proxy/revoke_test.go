package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/tunnel"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// F6: a caller that is revoked loses its live connection, and gets no other.
func TestF6RevokedCallerIsCut(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders), allow(intruder)}, w.app("tcp", echo))
	loser := w.client(intruder, "/shop/payments:tcp", s.endpoint("a"))
	keeper := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	lost, kept := loser.dial(t), keeper.dial(t)
	roundTrip(t, lost, "a")
	roundTrip(t, kept, "b")

	offer(t, s.book, w.revoke(1, intruder))
	expectReset(t, lost)
	f := only(t, s.flows)
	if f.Outcome != flow.Cut || f.Src != intruder || !strings.HasPrefix(f.Error, "revoked: SVIDs of "+intruder.String()) || f.Revision != "1.1" {
		t.Errorf("record: %+v", f)
	}
	if n := s.Revoked(); n != 1 {
		t.Errorf("%d connections counted, want 1", n)
	}
	roundTrip(t, kept, "still here")
	expectRefused(t, loser)
	require.Eventually(t, func() bool { return s.HandshakeFailures()["revoked"] == 1 }, 5*time.Second, time.Millisecond)
	offer(t, s.book, w.revoke(2, intruder))
	roundTrip(t, kept, "and here")
	loser.cfg.Source.(*identity.Live).SetSVID(w.ca.svid(t, intruder)) // from before now too
	expectRefused(t, loser)
}

// F6: so does a server.
func TestF6RevokedServerIsCut(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	conn := c.dial(t)
	roundTrip(t, conn, "a")
	offer(t, c.book, w.revoke(1, payments))
	expectReset(t, conn)
	if f := only(t, c.flows); f.Outcome != flow.Cut || !strings.HasPrefix(f.Error, "revoked: SVIDs of "+payments.String()) {
		t.Errorf("record: %+v", f)
	}
	if n := c.Revoked(); n != 1 {
		t.Errorf("%d connections counted, want 1", n)
	}
	expectRefused(t, c)
	require.Eventually(t, func() bool { return c.flows.Len() == 2 }, 5*time.Second, time.Millisecond)
	if f := c.flows.Newest(1, nil)[0]; f.Outcome != flow.Failed || !strings.Contains(f.Error, "revoked: SVIDs of") {
		t.Errorf("record: %+v", f)
	}
}

// C1: a session of before the revocation cannot be resumed.
func TestC1NoResumptionAfterRevocation(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	config := identity.ClientTLS(identity.TLSConfig{Source: w.source(orders), NextProtos: []string{alpn}}, identity.ExactPattern(payments))
	config.SessionTicketsDisabled = false
	config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	served := func() bool {
		conn, err := tls.Dial("tcp", s.Addr().String(), config)
		require.NoError(t, err)
		defer conn.Close()
		require.NoError(t, conn.SetDeadline(time.Now().Add(5*time.Second)))
		_, err = conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
		require.NoError(t, err)
		n, _ := io.ReadFull(conn, make([]byte, 9)) // a frame of the server, after what may resume
		if conn.ConnectionState().DidResume {
			t.Error("the session was resumed")
		}
		return n == 9
	}
	for range 2 {
		if !served() {
			t.Fatal("not served before the revocation")
		}
	}
	offer(t, s.book, w.revoke(1, orders))
	if served() {
		t.Error("served after the revocation")
	}
}

// A list that comes while a connection is admitted is seen by the one or by the
// other: this hammers the few instructions in between, as TestAdmitRacesSwap does.
func TestAdmitRacesRevocation(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)})
	svid := w.ca.svid(t, orders)
	who := identity.Peer{ID: orders, Leaf: svid.Certificates[0], Chain: svid.Certificates}
	p := &proof{who, time.Now(), s.views.Load().trust}
	q := policy.Request{Src: orders, Dst: payments, Port: tcpPort.Number}
	allowed := 0
	for round := range int64(500) {
		offer(t, s.book, w.revoke(2*round+1))
		list := w.revoke(2*round+2, orders)
		var admitted [4]context.Context
		var wg sync.WaitGroup
		for i := range admitted {
			wg.Go(func() {
				time.Sleep(time.Duration(round%25) * 20 * time.Microsecond) // about as long as reading a list takes
				ctx, c, v := s.admit(t.Context(), q, p)
				if v.allowed() {
					admitted[i] = ctx
				} else {
					s.conns.remove(c)
				}
			})
		}
		offer(t, s.book, list)
		wg.Wait()
		for _, ctx := range admitted {
			if ctx == nil {
				continue
			}
			allowed++
			if ctx.Err() == nil {
				t.Fatalf("round %d: a connection of a revoked peer lives on", round)
			}
		}
		for _, c := range s.conns.all() {
			s.conns.remove(c)
		}
	}
	if allowed == 0 {
		t.Error("every connection was refused: nothing was tested")
	}
}

// A list between the handshake and the request counts for the request.
func TestRevokedBeforeTheRequest(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	config := identity.ClientTLS(identity.TLSConfig{Source: w.source(orders), NextProtos: []string{alpn}}, identity.ExactPattern(payments))
	conn, err := tls.Dial("tcp", s.Addr().String(), config)
	require.NoError(t, err)
	settled := func() bool {
		s.shares.mu.Lock()
		defer s.shares.mu.Unlock()
		return s.shares.n[orders] == 1
	}
	require.Eventually(t, settled, 5*time.Second, time.Millisecond)
	offer(t, s.book, w.revoke(1, orders))
	session, err := tunnel.Client(t.Context(), conn, tunnel.Config{})
	require.NoError(t, err)
	defer session.Close()
	_, err = session.Open(t.Context(), tunnel.Target{Host: "payments.shop.mesh", Port: tcpPort.Number})
	var no *tunnel.Refused
	if !errors.As(err, &no) || no.Status != 403 || no.Reason != "" {
		t.Errorf("got %v, want 403 and no reason", err)
	}
	if f := only(t, s.flows); f.Outcome != flow.Refused || !strings.HasPrefix(f.Error, "revoked: ") {
		t.Errorf("record: %+v", f)
	}
}

// A workload may refuse new callers while its sidecar cannot know who is revoked.
func TestMaxStale(t *testing.T) {
	w := newWorld(t)
	var stale atomic.Int64
	s := w.limited(InboundConfig{Stale: func() time.Duration { return time.Duration(stale.Load()) }})
	limit := func(m policy.MaxStale) {
		s.views.Apply(xds.Update{
			Kind: xds.Rules, Rev: xds.Revision{Epoch: 1, N: 2}, Rules: policy.NewRuleset([]policy.Rule{allow(orders)}),
			Ports: []policy.Port{tcpPort, httpPort, idle}, MaxStale: m,
		})
	}
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	live := c.dial(t)
	roundTrip(t, live, "before")
	for _, m := range []policy.MaxStale{{}, {After: time.Hour}, {After: 3 * time.Hour, Refuse: true}} {
		stale.Store(int64(2 * time.Hour))
		limit(m)
		roundTrip(t, c.dial(t), "let in")
	}
	limit(policy.MaxStale{After: time.Hour, Refuse: true})
	before := s.flows.Len()
	expectRefused(t, c)
	roundTrip(t, live, "still here")
	require.Eventually(t, func() bool { return c.flows.Len() > 0 && s.flows.Len() > before }, 5*time.Second, time.Millisecond)
	if f := s.flows.Newest(1, nil)[0]; f.Outcome != flow.Refused || f.Error != "for 2h0m0s nothing was heard of revocations, and maxStale is 1h0m0s" {
		t.Errorf("record: %+v", f)
	}
	if f := c.flows.Newest(1, nil)[0]; f.Outcome != flow.Failed || !strings.Contains(f.Error, "status 503") || !strings.Contains(f.Error, staleReason) {
		t.Errorf("caller's record: %+v", f)
	}
	stale.Store(int64(time.Minute))
	require.Eventually(t, func() bool { // once the endpoint is no last resort any more
		conn, err := net.Dial("tcp", c.Addrs()[0].String())
		require.NoError(t, err)
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		_, _ = conn.Write([]byte("x"))
		n, _ := conn.Read(make([]byte, 1))
		return n == 1
	}, 5*time.Second, time.Millisecond)
}
