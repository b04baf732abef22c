package proxy

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	td       = spiffeid.RequireTrustDomainFromString("shop.example")
	orders   = spiffeid.RequireFromString("spiffe://shop.example/orders")
	payments = spiffeid.RequireFromString("spiffe://shop.example/shop/payments")
	intruder = spiffeid.RequireFromString("spiffe://shop.example/intruder")
)

var (
	tcpPort  = policy.Port{Name: "tcp", Number: 7000, Protocol: policy.TCP}
	httpPort = policy.Port{Name: "http", Number: 8080, Protocol: policy.HTTP}
	idle     = policy.Port{Name: "idle", Number: 7001, Protocol: policy.TCP} // no app serves it
)

// authority is a CA of one certificate.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, td spiffeid.TrustDomain) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test " + td.Name()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return &authority{cert, key}
}

func (a *authority) svid(t *testing.T, id spiffeid.ID) *x509svid.SVID {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{id.URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}
}

// world is a mesh without a control plane: the test says what views there are.
type world struct {
	t    *testing.T
	ca   *authority
	late atomic.Int64 // by how much the clock of those who fetch lists goes ahead
}

func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.late.Load())) }

func newWorld(t *testing.T) *world { return &world{t: t, ca: newAuthority(t, td)} }

func (w *world) bundle() *spiffebundle.Bundle {
	return spiffebundle.FromX509Authorities(td, []*x509.Certificate{w.ca.cert})
}

func (w *world) source(id spiffeid.ID) *identity.Live {
	live := &identity.Live{}
	live.SetBundles(identity.Bundles{td: w.bundle()})
	live.SetSVID(w.ca.svid(w.t, id))
	return live
}

// book makes a book and who shares it with neighbours.
func (w *world) book(source identity.Source) (*revocation.Book, *Neighbours) {
	b := revocation.NewBook(source, nil)
	n := NewNeighbours(NeighboursConfig{Source: source, Book: b, Now: w.now, Log: hclog.NewNullLogger()})
	b.Watch(n.Spread)
	w.run(n.Run)
	return b, n
}

// revoke signs list number n, which refuses what was issued to ids so far.
func (w *world) revoke(n int64, ids ...spiffeid.ID) []byte {
	w.t.Helper()
	m := &sallyportv1.RevocationList{TrustDomain: td.Name(), Number: n, Issued: timestamppb.Now()}
	for _, id := range ids {
		m.Ids = append(m.Ids, &sallyportv1.RevokedID{Path: id.Path(), NotBefore: timestamppb.Now()})
	}
	env, err := revocation.Sign(m, w.ca.svid(w.t, spiffeid.RequireFromPath(td, identity.ControlPlanePath)))
	require.NoError(w.t, err)
	return env
}

// offer puts a list in force.
func offer(t *testing.T, b *revocation.Book, envelope []byte) {
	t.Helper()
	newer, err := b.Offer(envelope)
	require.NoError(t, err)
	require.True(t, newer)
}

// server is a sidecar's inbound half.
type server struct {
	*Inbound
	views *Views
	book  *revocation.Book
	near  *Neighbours
	flows *flow.Ring
	stop  func()
}

// serve starts an Inbound for id in front of apps, with rules in force.
func (w *world) serve(id spiffeid.ID, rev int64, rules []policy.Rule, apps ...App) *server {
	w.t.Helper()
	s := w.listen(id, apps...)
	s.apply(rev, rules...)
	return s
}

// listen starts an Inbound that has no view yet.
func (w *world) listen(id spiffeid.ID, apps ...App) *server {
	w.t.Helper()
	s := &server{views: &Views{}, flows: flow.NewRing(10_000)}
	source := w.source(id)
	s.book, s.near = w.book(source)
	in, err := ListenInbound(InboundConfig{
		Listen: "127.0.0.1:0", Apps: apps, Source: source, Views: s.views, Book: s.book, Neighbours: s.near, Sink: s.flows, Log: hclog.NewNullLogger(),
	})
	require.NoError(w.t, err)
	s.Inbound = in
	s.stop = w.run(in.Serve)
	return s
}

// run runs f until stop is called or the test ends.
func (w *world) run(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("running: %v", err)
		}
	})
	w.t.Cleanup(stop)
	return stop
}

func (s *server) apply(rev int64, rules ...policy.Rule) {
	s.views.Apply(xds.Update{
		Kind: xds.Rules, Rev: xds.Revision{Epoch: 1, N: rev}, Rules: policy.NewRuleset(rules),
		Ports: []policy.Port{tcpPort, httpPort, idle},
	})
}

func (s *server) endpoint(instance string) xds.Endpoint {
	return xds.Endpoint{
		Instance: instance, Addr: netip.MustParseAddrPort(s.Addr().String()),
		Ports: []uint16{tcpPort.Number, httpPort.Number, idle.Number},
	}
}

// client is a sidecar's outbound half.
type client struct {
	*Outbound
	views *Views
	book  *revocation.Book
	near  *Neighbours
	flows *flow.Ring
	stop  func()
}

// dialer starts an Outbound of id with one door to target.
func (w *world) client(id spiffeid.ID, target string, endpoints ...xds.Endpoint) *client {
	w.t.Helper()
	c := &client{views: &Views{}, flows: flow.NewRing(10_000)}
	c.know(endpoints...)
	source := w.source(id)
	c.book, c.near = w.book(source)
	out, err := ListenOutbound(OutboundConfig{
		Doors:     []Door{{Key: "outbound[0].listen", Listen: "127.0.0.1:0", To: target}},
		AllowUIDs: []uint32{uint32(os.Geteuid())}, Source: source, Views: c.views, Book: c.book, Neighbours: c.near, Sink: c.flows, Log: hclog.NewNullLogger(),
	})
	require.NoError(w.t, err)
	c.Outbound = out
	c.stop = w.run(out.Serve)
	return c
}

// know tells the client where payments runs.
func (c *client) know(endpoints ...xds.Endpoint) {
	c.views.Apply(xds.Update{Kind: xds.Endpoints, Rev: xds.Revision{Epoch: 1, N: 1}, Services: map[spiffeid.ID]xds.Service{
		payments: {ID: payments, Ports: []policy.Port{tcpPort, httpPort, idle}, Endpoints: endpoints},
	}})
}

// dial opens a connection as the app does.
func (c *client) dial(t *testing.T) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", c.Addrs()[0].String())
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	return conn.(*net.TCPConn)
}

// app starts a TCP server that runs handle for each connection.
func (w *world) app(port string, handle func(*net.TCPConn)) App {
	w.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(w.t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				handle(conn.(*net.TCPConn))
			})
		}
	})
	w.t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
	return App{Port: port, Network: "tcp", Address: ln.Addr().String()}
}

func echo(c *net.TCPConn) {
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

// allow is a rule that lets src reach payments on every port.
func allow(src spiffeid.ID) policy.Rule {
	return policy.Rule{
		Ref: policy.RuleRef{Policy: "charge-cards", File: "pay.yaml", Line: 7}, Effect: policy.Allow,
		From: []identity.Pattern{identity.ExactPattern(src)}, To: []identity.Pattern{identity.ExactPattern(payments)},
	}
}

func deny(src spiffeid.ID, reason string) policy.Rule {
	r := allow(src)
	r.Ref = policy.RuleRef{Set: "guard", Policy: "no-entry", File: "guard/no.yaml", Line: 3}
	r.Effect, r.Reason = policy.Deny, reason
	return r
}

// only waits for one record and returns it.
func only(t *testing.T, r *flow.Ring) flow.Flow {
	t.Helper()
	require.Eventually(t, func() bool { return r.Len() > 0 }, 5*time.Second, time.Millisecond)
	flows := r.Newest(0, nil)
	require.Len(t, flows, 1)
	return flows[0]
}

func roundTrip(t *testing.T, c net.Conn, text string) {
	t.Helper()
	_, err := c.Write([]byte(text))
	require.NoError(t, err)
	got := make([]byte, len(text))
	_, err = io.ReadFull(c, got)
	require.NoError(t, err)
	if string(got) != text {
		t.Fatalf("got %q, want %q", got, text)
	}
}
