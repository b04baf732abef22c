package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func TestAllowedConnectionThroughTwoSidecars(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 42, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	conn := c.dial(t)
	roundTrip(t, conn, "hello")
	require.NoError(t, conn.CloseWrite())
	_, err := conn.Read(make([]byte, 1))
	if err != io.EOF {
		t.Errorf("end of the app's answer: got %v, want io.EOF", err)
	}
	in, out := only(t, s.flows), only(t, c.flows)
	want := flow.Flow{
		Request:  policy.Request{Src: orders, Dst: payments, Port: 7000},
		Decision: policy.Decision{Effect: policy.Allow, Would: policy.Allow, Rule: allow(orders).Ref},
		ID:       in.ID, Start: in.Start, Duration: in.Duration, Side: flow.Inbound, Outcome: flow.Closed,
		PortName: "tcp", Revision: "1.42", Sent: 5, Received: 5,
	}
	if in != want || !flow.ValidID(in.ID) || in.Duration <= 0 {
		t.Errorf("destination's record:\ngot  %+v\nwant %+v", in, want)
	}
	want.Start, want.Duration, want.Side = out.Start, out.Duration, flow.Outbound
	want.Rule, want.Revision = policy.RuleRef{}, "" // the caller's side does not know
	if out != want {
		t.Errorf("caller's record:\ngot  %+v\nwant %+v", out, want)
	}
}

func TestServerSpeaksFirstAndClientHalfCloses(t *testing.T) {
	w := newWorld(t)
	app := w.app("tcp", func(c *net.TCPConn) {
		fmt.Fprintln(c, "220 ready")
		all, err := io.ReadAll(c) // ends with the client's half-close only
		fmt.Fprintf(c, "%d %v\n", len(all), err)
	})
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, app)
	c := w.client(orders, "payments.shop:7000", s.endpoint("a"))
	conn := c.dial(t)
	r := bufio.NewReader(conn)
	if line, err := r.ReadString('\n'); line != "220 ready\n" {
		t.Fatalf("greeting: got %q, %v", line, err)
	}
	big := bytes.Repeat([]byte("x"), 1<<20)
	_, err := conn.Write(big)
	require.NoError(t, err)
	require.NoError(t, conn.CloseWrite())
	rest, err := io.ReadAll(r)
	if string(rest) != "1048576 <nil>\n" || err != nil {
		t.Errorf("after half-close: got %q, %v", rest, err)
	}
	if f := only(t, s.flows); f.Sent != 1<<20 || f.Received != 24 || f.Outcome != flow.Closed {
		t.Errorf("record: %+v", f)
	}
}

func TestAppOnAUnixSocket(t *testing.T) {
	w := newWorld(t)
	path := filepath.Join(t.TempDir(), "app.sock")
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if c, err := ln.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}
	}()
	defer func() { _ = ln.Close(); <-done }()
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, App{Port: "tcp", Network: "unix", Address: path})
	conn := w.client(orders, "/shop/payments:tcp", s.endpoint("a")).dial(t)
	roundTrip(t, conn, "over the socket")
	require.NoError(t, conn.CloseWrite())
	_, err = io.Copy(io.Discard, conn)
	require.NoError(t, err)
}

// expectReset checks that the end of c cannot be taken for an empty answer.
func expectReset(t *testing.T, c net.Conn) {
	t.Helper()
	n, err := c.Read(make([]byte, 1))
	if n != 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %d bytes, %v; want a reset", n, err)
	}
}

// expectRefused dials and checks that the connection is reset, be it before the
// dial returns.
func expectRefused(t *testing.T, c *client) {
	t.Helper()
	conn, err := net.Dial("tcp", c.Addrs()[0].String())
	if errors.Is(err, syscall.ECONNRESET) {
		return
	}
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	expectReset(t, conn)
}

func TestRefusals(t *testing.T) {
	reached := make(chan struct{}, 10)
	w := newWorld(t)
	app := w.app("tcp", func(*net.TCPConn) { reached <- struct{}{} })
	for _, c := range []struct {
		name    string
		target  string
		rules   []policy.Rule
		outcome flow.Outcome
		rule    policy.RuleRef
		told    string // reason in the caller's record
		why     string // error in the destination's record
	}{
		{"no rule", "/shop/payments:tcp", nil, flow.Refused, policy.RuleRef{}, "", ""},
		{"deny rule", "/shop/payments:tcp", []policy.Rule{allow(orders), deny(orders, "freeze until May")},
			flow.Refused, deny(orders, "").Ref, "freeze until May", ""},
		{"other source only", "/shop/payments:tcp", []policy.Rule{allow(intruder)}, flow.Refused, policy.RuleRef{}, "", ""},
		{"declared, not served", "/shop/payments:idle", []policy.Rule{allow(orders)}, flow.Failed, allow(orders).Ref, "",
			"port idle is not served by this instance"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := w.serve(payments, 9, c.rules, app)
			cl := w.client(orders, c.target, s.endpoint("a"))
			expectRefused(t, cl)
			in, out := only(t, s.flows), only(t, cl.flows)
			if in.Outcome != c.outcome || in.Rule != c.rule || in.Error != c.why || in.Src != orders || in.Revision != "1.9" {
				t.Errorf("destination's record: %+v", in)
			}
			if out.Effect != policy.Deny || out.Reason != c.told || !out.Rule.IsZero() || out.Outcome != c.outcome {
				t.Errorf("caller's record: %+v", out)
			}
			if in.ID != out.ID {
				t.Errorf("decision ids differ: %s and %s", in.ID, out.ID)
			}
		})
	}
	if len(reached) > 0 {
		t.Error("a refused connection reached the app")
	}
}

func TestUndeclaredPort(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	e := s.endpoint("a")
	e.Ports = append(e.Ports, 9999)
	c := w.client(orders, "/shop/payments:9999", e)
	// A caller with an older view still believes in the port.
	c.views.Apply(xds.Update{Kind: xds.Endpoints, Services: map[spiffeid.ID]xds.Service{
		payments: {ID: payments, Ports: []policy.Port{{Name: "old", Number: 9999, Protocol: policy.TCP}}, Endpoints: []xds.Endpoint{e}},
	}})
	expectRefused(t, c)
	if f := only(t, s.flows); f.Outcome != flow.Refused || f.Error != "port is not declared" || f.Effect != policy.Deny {
		t.Errorf("record: %+v", f)
	}
	if f := only(t, c.flows); f.Outcome != flow.Refused || !strings.Contains(f.Error, "not declared") {
		t.Errorf("caller's record: %+v", f)
	}
}

// Nothing passes before the first policy, and readiness says what is missing.
func TestBeforeTheFirstPolicy(t *testing.T) {
	w := newWorld(t)
	s := w.listen(payments, w.app("tcp", echo))
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	expectRefused(t, c)
	if f := only(t, s.flows); f.Outcome != flow.Refused || f.Error != "no policy received yet" {
		t.Errorf("record: %+v", f)
	}
	if err := s.views.Ready(); err == nil || err.Error() != "waiting for the first bundles, endpoints, rules from the control plane" {
		t.Errorf("ready: %v", err)
	}
	s.apply(1, allow(orders))
	s.views.Apply(xds.Update{Kind: xds.Endpoints})
	if err := s.views.Ready(); err == nil {
		t.Error("ready without bundles")
	}
	s.views.Apply(xds.Update{Kind: xds.Bundles})
	if err := s.views.Ready(); err != nil {
		t.Errorf("ready: %v", err)
	}
	roundTrip(t, c.dial(t), "now")
}

func TestHTTPCallerReadsWhyItWasRefused(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{deny(orders, "freeze")}, w.app("http", echo))
	c := w.client(orders, "/shop/payments:http", s.endpoint("a"))
	url := "http://" + c.Addrs()[0].String() + "/v1/charges"
	tr := &http.Transport{DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	hc := &http.Client{Transport: tr, Timeout: 10 * time.Second}

	resp, err := hc.Post(url, "text/plain", strings.NewReader(strings.Repeat("body ", 10_000)))
	require.NoError(t, err)
	defer resp.Body.Close()
	var body map[string]string
	require.NoError(t, json.NewDecoder(resp.Body).Decode(&body))
	in := only(t, s.flows)
	want := map[string]string{"error": "refused by policy", "decision_id": in.ID, "reason": "freeze"}
	if resp.StatusCode != 403 || fmt.Sprint(body) != fmt.Sprint(want) || resp.Header.Get("Sallyport-Decision-Id") != in.ID {
		t.Errorf("got %d %v\nwant 403 %v", resp.StatusCode, body, want)
	}

	head, err := hc.Head(url)
	require.NoError(t, err)
	defer head.Body.Close()
	if b, err := io.ReadAll(head.Body); head.StatusCode != 403 || len(b) != 0 || err != nil {
		t.Errorf("HEAD: got %d, %d bytes, %v", head.StatusCode, len(b), err)
	}

	c.know() // nobody serves it now
	resp, err = hc.Get(url)
	require.NoError(t, err)
	defer resp.Body.Close()
	body = nil
	require.NoError(t, json.NewDecoder(resp.Body).Decode(&body))
	if resp.StatusCode != 503 || body["error"] != "destination unreachable" || !strings.Contains(body["reason"], "no running instance") {
		t.Errorf("got %d %v, want 503", resp.StatusCode, body)
	}

	conn := c.dial(t)
	_, err = conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	require.NoError(t, err)
	expectReset(t, conn) // HTTP/1 words would only confuse it
}

func TestAppDown(t *testing.T) {
	w := newWorld(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, App{Port: "tcp", Network: "tcp", Address: ln.Addr().String()})
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	expectRefused(t, c)
	if f := only(t, s.flows); f.Outcome != flow.Failed || f.Effect != policy.Allow || !strings.Contains(f.Error, "connection refused") {
		t.Errorf("record: %+v", f)
	}
	if f := only(t, c.flows); f.Outcome != flow.Failed || !strings.Contains(f.Error, "503") || f.ID != only(t, s.flows).ID {
		t.Errorf("caller's record: %+v", f)
	}
	if got := s.AppErrors(); len(got) != 1 || !strings.HasPrefix(got[0], "port tcp: ") {
		t.Errorf("app errors: %q", got)
	}
	ln, err = net.Listen("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer ln.Close()
	_ = c.dial(t)
	app, err := ln.Accept()
	require.NoError(t, err)
	defer app.Close()
	require.Eventually(t, func() bool { return len(s.AppErrors()) == 0 }, 5*time.Second, time.Millisecond)
}

func TestCutOnSwap(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders), allow(intruder)}, w.app("tcp", echo))
	loser := w.client(intruder, "/shop/payments:tcp", s.endpoint("a"))
	keeper := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	lost, kept := loser.dial(t), keeper.dial(t)
	roundTrip(t, lost, "a")
	roundTrip(t, kept, "b")

	s.apply(2, allow(orders), deny(intruder, "found out"))
	expectReset(t, lost)
	f := only(t, s.flows)
	if f.Outcome != flow.Cut || f.Rule != deny(intruder, "").Ref || f.Revision != "1.2" || f.Effect != policy.Deny || f.Src != intruder {
		t.Errorf("record: %+v", f)
	}
	roundTrip(t, kept, "still here")

	// The port itself is withdrawn.
	s.views.Apply(xds.Update{Kind: xds.Rules, Rev: xds.Revision{Epoch: 1, N: 3},
		Rules: policy.NewRuleset([]policy.Rule{allow(orders)}), Ports: []policy.Port{httpPort}})
	expectReset(t, kept)
}

// No interleaving of a decision with a swap may leave a connection that the new
// view denies: this hammers the few instructions where that could happen.
func TestAdmitRacesSwap(t *testing.T) {
	s := newWorld(t).listen(payments)
	q := policy.Request{Src: orders, Dst: payments, Port: tcpPort.Number}
	p := &proof{trust: s.views.Load().trust}
	allowed := 0
	for round := range int64(3000) {
		s.apply(2*round, allow(orders))
		var admitted [4]context.Context
		var wg sync.WaitGroup
		for i := range admitted {
			wg.Go(func() {
				ctx, c, v := s.admit(t.Context(), q, p)
				if v.allowed() {
					admitted[i] = ctx
				} else {
					s.conns.remove(c)
				}
			})
		}
		s.apply(2*round + 1)
		wg.Wait()
		for _, ctx := range admitted {
			if ctx == nil {
				continue
			}
			allowed++
			if ctx.Err() == nil {
				t.Fatalf("round %d: a connection admitted by the old view outlived the swap", round)
			}
		}
		s.conns.endAll(nil)
		for _, c := range s.conns.all() {
			s.conns.remove(c)
		}
	}
	if allowed == 0 {
		t.Error("every connection was refused: nothing was tested")
	}
}

// While views swap under load, a connection that the newest view denies must
// not live: each is either refused or cut.
func TestOldOrNewNeverNeither(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				conn, err := net.Dial("tcp", c.Addrs()[0].String())
				if err != nil {
					continue
				}
				_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
				_, _ = conn.Write([]byte("x"))
				_, err = io.Copy(io.Discard, conn) // until it is cut or refused
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error("a connection outlived a swap that denies it")
				}
				_ = conn.Close()
			}
		})
	}
	rev := int64(1)
	for end := time.Now().Add(700 * time.Millisecond); time.Now().Before(end); {
		rev++
		s.apply(rev, allow(orders))
		time.Sleep(time.Duration(rev%7) * time.Millisecond)
		rev++
		s.apply(rev) // nothing is allowed
	}
	cancel()
	wg.Wait()
	count := map[flow.Outcome]int{}
	for _, f := range s.flows.Newest(0, nil) {
		count[f.Outcome]++
	}
	t.Logf("%d swaps, %v", rev, count)
	if count[flow.Cut] == 0 || count[flow.Refused] == 0 || count[flow.Closed] > 0 {
		t.Errorf("got %v: want some cut, some refused, none closed", count)
	}
}

func TestEndpointFailover(t *testing.T) {
	w := newWorld(t)
	rules := []policy.Rule{allow(orders)}
	good := w.serve(payments, 1, rules, w.app("tcp", echo))
	wrong := w.serve(intruder, 1, rules, w.app("tcp", echo)) // another workload sits at a stale address
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	dead := xds.Endpoint{Instance: "dead", Addr: netip.MustParseAddrPort(ln.Addr().String()), Ports: []uint16{7000}}

	c := w.client(orders, "/shop/payments:tcp", dead, wrong.endpoint("wrong"), good.endpoint("good"))
	for range 20 {
		conn := c.dial(t)
		roundTrip(t, conn, "ping")
		_ = conn.Close()
	}
	if n := len(wrong.flows.Newest(0, nil)); n != 0 {
		t.Errorf("the wrong workload saw %d requests", n)
	}
	// What failed is left alone for a while: at most one try each.
	c.balancer.mu.Lock()
	defer c.balancer.mu.Unlock()
	if l := c.balancer.known[dead.Addr]; l != nil && l.live != 0 {
		t.Errorf("the dead endpoint still counts %d connections", l.live)
	}
}

func TestDrainingEndpointIsPassedOver(t *testing.T) {
	w := newWorld(t)
	rules := []policy.Rule{allow(orders)}
	leaving := w.serve(payments, 1, rules, w.app("tcp", echo))
	staying := w.serve(payments, 1, rules, w.app("tcp", echo))
	leaving.draining.Store(true) // its listener is still open, as in the moment before it closes
	c := w.client(orders, "/shop/payments:tcp", leaving.endpoint("a"), staying.endpoint("b"))
	for range 10 {
		roundTrip(t, c.dial(t), "ping")
	}
	if l, s := leaving.Live(), staying.Live(); l != 0 || s != 10 {
		t.Errorf("%d connections on the endpoint that drains, %d on the other; want 0 and 10", l, s)
	}
}

func TestNobodyElseCanBeTheServer(t *testing.T) {
	w := newWorld(t)
	impostor := w.serve(intruder, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	c := w.client(orders, "/shop/payments:tcp", impostor.endpoint("a"))
	expectRefused(t, c)
	if f := only(t, c.flows); f.Outcome != flow.Failed || !strings.Contains(f.Error, "server is "+intruder.String()) {
		t.Errorf("record: %+v", f)
	}
}

func TestHandshakesThatFailAreCounted(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	expect := func(class string, provoke func()) {
		t.Helper()
		before := s.HandshakeFailures()[class]
		provoke()
		require.Eventually(t, func() bool { return s.HandshakeFailures()[class] == before+1 }, 5*time.Second, time.Millisecond,
			"class %s, have %v", class, s.HandshakeFailures())
	}
	expect("not-tls", func() {
		conn, err := net.Dial("tcp", s.Addr().String())
		require.NoError(t, err)
		_, _ = conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		_ = conn.Close()
	})
	expect("peer-gone", func() {
		conn, err := net.Dial("tcp", s.Addr().String())
		require.NoError(t, err)
		_ = conn.Close()
	})
	expect("peer-not-verified", func() { // somebody else's CA
		other := newWorld(t)
		c := other.client(orders, "/shop/payments:tcp", s.endpoint("a"))
		// It trusts the real CA, so that only the server can refuse.
		live := c.cfg.Source.(*identity.Live)
		live.SetBundles(identity.Bundles{td: spiffebundle.FromX509Authorities(td, []*x509.Certificate{w.ca.cert})})
		expectRefused(t, c)
	})
	if len(s.flows.Newest(0, nil)) != 0 {
		t.Error("a handshake without a peer left a flow record")
	}
}

func TestNoIdentityYet(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	s.cfg.Source.(*identity.Live).SetSVID(nil)
	expectRefused(t, c)
	require.Eventually(t, func() bool { return s.HandshakeFailures()["no-identity"] > 0 }, 5*time.Second, time.Millisecond)

	c.cfg.Source.(*identity.Live).SetSVID(nil)
	expectRefused(t, c)
	// The caller learns of the refusal before the record is made.
	require.Eventually(t, func() bool { return c.flows.Newest(1, nil)[0].Error == identity.ErrNoIdentity.Error() }, 5*time.Second, time.Millisecond,
		"the record says that there is no identity")
}

func TestDrain(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	quick, slow := c.dial(t), c.dial(t)
	roundTrip(t, quick, "q")
	roundTrip(t, slow, "s")
	if got := s.Connections(); len(got) != 2 || got[0].Src != orders.String() || got[0].Port != 7000 {
		t.Errorf("connections: %+v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cut := make(chan int)
	go func() { cut <- s.Drain(ctx) }()
	// Nobody new gets in ...
	require.Eventually(t, func() bool {
		conn, err := net.Dial("tcp", s.Addr().String())
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	}, 5*time.Second, time.Millisecond)
	// ... whoever is in may finish ...
	roundTrip(t, slow, "still")
	roundTrip(t, quick, "done")
	require.NoError(t, quick.CloseWrite())
	_, err := io.Copy(io.Discard, quick)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return s.Live() == 1 }, 5*time.Second, time.Millisecond)
	// ... and at the limit the rest ends.
	cancel()
	if n := <-cut; n != 1 {
		t.Errorf("cut %d connections, want 1", n)
	}
	expectReset(t, slow)
	s.stop()
	flows := s.flows.Newest(0, nil)
	if len(flows) != 2 || flows[0].Outcome != flow.Closed || flows[1].Outcome != flow.Drained {
		t.Errorf("records: %+v", flows)
	}
	c.stop()
}

func TestStopEndsEverythingAtOnce(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	conn := c.dial(t)
	roundTrip(t, conn, "x")
	start := time.Now()
	c.stop()
	s.stop()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("stopping took %v", d)
	}
	if f := only(t, c.flows); f.Outcome != flow.Drained {
		t.Errorf("record: %+v", f)
	}
}

func TestIdleConnectionEnds(t *testing.T) {
	w := newWorld(t)
	s := &server{views: &Views{}, flows: flow.NewRing(10)}
	in, err := ListenInbound(InboundConfig{
		Listen: "127.0.0.1:0", Apps: []App{w.app("tcp", echo)}, Source: w.source(payments), Views: s.views,
		Sink: s.flows, Idle: 100 * time.Millisecond, Log: hclog.NewNullLogger(),
	})
	require.NoError(t, err)
	s.Inbound = in
	w.run(in.Serve)
	s.apply(1, allow(orders))
	conn := w.client(orders, "/shop/payments:tcp", s.endpoint("a")).dial(t)
	roundTrip(t, conn, "x")
	expectReset(t, conn)
	if f := only(t, s.flows); f.Outcome != flow.Failed || !strings.Contains(f.Error, "idle") {
		t.Errorf("record: %+v", f)
	}
}

func TestUnknownDestination(t *testing.T) {
	w := newWorld(t)
	for target, want := range map[string]string{
		"stock:tcp":            "no workload ",
		"/shop/payments:smtp":  "declares no port smtp",
		"/shop/payments:70000": "declares no port 70000",
	} {
		c := w.client(orders, target)
		expectRefused(t, c)
		if f := only(t, c.flows); f.Outcome != flow.Failed || !strings.Contains(f.Error, want) {
			t.Errorf("%s: got %+v, want %q", target, f, want)
		}
	}
}

func TestForeignUserIsTurnedAway(t *testing.T) {
	w := newWorld(t)
	views := &Views{}
	out, err := ListenOutbound(OutboundConfig{
		Doors:     []Door{{Key: "outbound[0].listen", Listen: "127.0.0.1:0", To: "payments:tcp"}},
		AllowUIDs: []uint32{uint32(os.Geteuid()) + 1}, Source: w.source(orders), Views: views, Sink: flow.NewRing(1), Log: hclog.NewNullLogger(),
	})
	require.NoError(t, err)
	w.run(out.Serve)
	conn, err := net.Dial("tcp", out.Addrs()[0].String())
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(5*time.Second)))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("got %d bytes, %v", n, err)
	}
	if out.RefusedLocal() != 1 || out.Live() != 0 {
		t.Errorf("refused %d, live %d; want 1, 0", out.RefusedLocal(), out.Live())
	}
}

func TestPortInUse(t *testing.T) {
	w := newWorld(t)
	s := w.listen(payments)
	_, err := ListenInbound(InboundConfig{Listen: s.Addr().String(), Views: &Views{}, Log: hclog.NewNullLogger()})
	if err == nil || !strings.Contains(err.Error(), "tunnel.listen") || !strings.Contains(err.Error(), "in use") {
		t.Errorf("tunnel: got %v", err)
	}
	_, err = ListenOutbound(OutboundConfig{
		Doors: []Door{{Key: "outbound[0].listen", Listen: "127.0.0.1:0"}, {Key: "outbound[1].listen", Listen: s.Addr().String()}},
		Log:   hclog.NewNullLogger(),
	})
	if err == nil || !strings.Contains(err.Error(), "outbound[1].listen") {
		t.Errorf("door: got %v", err)
	}
}
