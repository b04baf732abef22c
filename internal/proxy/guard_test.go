package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/tunnel"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// limited starts an Inbound of payments that orders may reach, as cfg says.
func (w *world) limited(cfg InboundConfig) *server {
	w.t.Helper()
	s := &server{views: &Views{}, flows: flow.NewRing(10)}
	cfg.Listen, cfg.Apps, cfg.Source = "127.0.0.1:0", []App{w.app("tcp", echo)}, w.source(payments)
	s.book, s.near = w.book(cfg.Source)
	cfg.Views, cfg.Book, cfg.Neighbours, cfg.Sink, cfg.Log = s.views, s.book, s.near, s.flows, hclog.NewNullLogger()
	in, err := ListenInbound(cfg)
	require.NoError(w.t, err)
	s.Inbound = in
	s.stop = w.run(in.Serve)
	s.apply(1, allow(orders))
	return s
}

// Strangers who connect and say nothing must not take the place of those who do.
func TestSilentConnectionsKeepNobodyOut(t *testing.T) {
	w := newWorld(t)
	s := w.limited(InboundConfig{MaxConns: 8, MaxHandshakes: 8})
	for range 32 {
		conn, err := net.Dial("tcp", s.Addr().String())
		require.NoError(t, err)
		defer conn.Close()
	}
	start := time.Now()
	roundTrip(t, w.client(orders, "/shop/payments:tcp", s.endpoint("a")).dial(t), "me too")
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("served after %v", d)
	}
	require.Eventually(t, func() bool { return s.HandshakeFailures()["evicted"] >= 32-8/2 }, 5*time.Second, time.Millisecond,
		"all that exceed half of the connections are evicted")
}

// A peer that proved who it is and asks for nothing has a share only, and that
// not for long.
func TestSilentPeerHasAShare(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.limited(InboundConfig{MaxConns: 2 * minPeerConns})
	config := identity.ClientTLS(identity.TLSConfig{Source: w.source(intruder), NextProtos: []string{alpn}}, identity.ExactPattern(payments))
	connect := func() *tls.Conn {
		conn, err := tls.Dial("tcp", s.Addr().String(), config)
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		require.NoError(t, conn.SetDeadline(time.Now().Add(requestLimit+2*time.Second)))
		return conn
	}
	first, err := tunnel.Client(t.Context(), connect(), tunnel.Config{}) // sends its preface at least
	require.NoError(t, err)
	for range minPeerConns - 1 {
		connect()
	}
	settled := func() int {
		s.shares.mu.Lock()
		defer s.shares.mu.Unlock()
		return s.shares.n[intruder]
	}
	require.Eventually(t, func() bool { return settled() == minPeerConns }, 2*time.Second, time.Millisecond)
	if _, err := io.Copy(io.Discard, connect()); errors.Is(err, os.ErrDeadlineExceeded) || s.HandshakeFailures()["too-many"] != 1 {
		t.Errorf("one more than the share: %v, %v", err, s.HandshakeFailures())
	}
	roundTrip(t, w.client(orders, "/shop/payments:tcp", s.endpoint("a")).dial(t), "others are served")
	require.Eventually(t, func() bool { return settled() == 0 }, requestLimit+2*time.Second, 5*time.Millisecond,
		"peers that ask for nothing hold their place")
	require.NoError(t, first.Close())
	if n := s.HandshakeFailures()["timeout"]; n != minPeerConns {
		t.Errorf("timeouts: got %d, want %d", n, minPeerConns)
	}
}

// trust replaces what a source trusts, as the sidecar does with new bundles.
func trust(source identity.Source, views *Views, ca *authority) {
	source.(*identity.Live).SetBundles(identity.Bundles{td: spiffebundle.FromX509Authorities(td, []*x509.Certificate{ca.cert})})
	views.Apply(xds.Update{Kind: xds.Bundles})
}

func TestLiveConnectionsFollowTheBundles(t *testing.T) {
	w := newWorld(t)
	var late atomic.Int64
	s := w.limited(InboundConfig{Now: func() time.Time { return time.Now().Add(time.Duration(late.Load())) }})
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	other := newAuthority(t, td)
	conn := c.dial(t)
	roundTrip(t, conn, "trusted")

	late.Store(int64(2 * time.Hour)) // every certificate has expired by now
	trust(s.cfg.Source, s.views, w.ca)
	s.apply(2, allow(orders))
	trust(c.cfg.Source, c.views, w.ca)
	roundTrip(t, conn, "expired, still trusted")

	trust(s.cfg.Source, s.views, other)
	expectReset(t, conn)
	if f := only(t, s.flows); f.Outcome != flow.Cut || !strings.Contains(f.Error, "issuer is no longer trusted") || f.Revision != "1.2" {
		t.Errorf("destination's record: %+v", f)
	}
	only(t, c.flows)

	late.Store(0)
	trust(s.cfg.Source, s.views, w.ca)
	conn = c.dial(t)
	roundTrip(t, conn, "trusted again")
	trust(c.cfg.Source, c.views, other)
	expectReset(t, conn)
	require.Eventually(t, func() bool { return c.flows.Len() == 2 }, 5*time.Second, time.Millisecond)
	if f := c.flows.Newest(1, nil)[0]; f.Outcome != flow.Cut || !strings.Contains(f.Error, "issuer is no longer trusted") {
		t.Errorf("caller's record: %+v", f)
	}
}

// Bundles that change between a handshake and its request are asked again.
func TestBundlesChangeBeforeTheRequest(t *testing.T) {
	w := newWorld(t)
	s := w.limited(InboundConfig{})
	svid := w.ca.svid(t, orders)
	who := identity.Peer{ID: orders, Leaf: svid.Certificates[0], Chain: svid.Certificates}
	p := &proof{who, time.Now(), s.views.Load().trust}
	q := policy.Request{Src: orders, Dst: payments, Port: tcpPort.Number}
	admitted := func() bool {
		_, c, v := s.admit(t.Context(), q, p)
		defer s.conns.remove(c)
		return v.allowed()
	}
	if !admitted() {
		t.Error("refused with the bundles of the handshake")
	}
	trust(s.cfg.Source, s.views, newAuthority(t, td))
	if admitted() {
		t.Error("admitted though its issuer was removed")
	}
}

func TestUnresolvedDoors(t *testing.T) {
	w := newWorld(t)
	s := w.listen(payments)
	served := s.endpoint("a")
	served.Ports = []uint16{tcpPort.Number}
	for target, want := range map[string]string{
		"/shop/payments:tcp":  "",
		"payments:http":       "no workload spiffe://shop.example/payments; name it by its ID path or mesh name as in spec.id",
		"/shop/payments:smtp": "workload spiffe://shop.example/shop/payments declares no port smtp; declared: tcp, http, idle",
		"/shop/payments:http": "no running instance of spiffe://shop.example/shop/payments serves port http",
	} {
		c := w.client(orders, target, served)
		got := strings.Join(c.Unresolved(), "\n")
		if want == "" && got != "" || !strings.Contains(got, want) || got != "" && !strings.HasPrefix(got, "outbound 127.0.0.1:0 → "+target+": ") {
			t.Errorf("%s: got %q, want %q", target, got, want)
		}
	}
	if got := (&Outbound{cfg: OutboundConfig{Views: &Views{}, Doors: []Door{{To: "a:b"}}}}).Unresolved(); got != nil {
		t.Errorf("before the first view: %v", got)
	}
}
