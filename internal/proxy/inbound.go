package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/capture"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/relay"
	"github.com/sallyport-mesh/sallyport/internal/tunnel"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Limits of the inbound side.
const (
	DefaultMaxConns      = 16384            // connections at once; more wait in the kernel's queue
	DefaultMaxHandshakes = 512              // TLS handshakes at once
	handshakeLimit       = 10 * time.Second // from accepting to an authenticated peer
	appDialLimit         = 5 * time.Second
)

// alpn is what both sides offer. The listener decides the protocol, never ALPN:
// it is there for tools in between.
const alpn = "h2"

// App is where the app serves one declared port.
type App struct {
	Port    string // declared name
	Network string // "tcp" or "unix"
	Address string
}

// InboundConfig holds what an [Inbound] needs. Listen, Source, Views and Sink
// are required.
type InboundConfig struct {
	Listen        string // HOST:PORT of the tunnel listener
	Apps          []App
	Source        identity.Source
	Views         *Views
	Sink          flow.Sink
	Idle          time.Duration // connections on which nothing moves are closed after this; 0: never
	MaxConns      int           // 0: DefaultMaxConns
	MaxHandshakes int           // 0: DefaultMaxHandshakes
	Now           func() time.Time
	Log           hclog.Logger
}

// Inbound is the way to the app: it authenticates peers, has policy decide, and
// relays to the app's declared ports and nothing else.
type Inbound struct {
	cfg        InboundConfig
	apps       map[string]App // :: declared port name → where the app listens
	ln         *capture.Listener
	tls        *tls.Config
	conns      conns
	handshakes chan struct{}
	failures   failures
	draining   atomic.Bool
}

// ListenInbound opens the tunnel listener; nothing is accepted before Serve. An
// error is one line that says what to do.
func ListenInbound(cfg InboundConfig) (*Inbound, error) {
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = DefaultMaxConns
	}
	if cfg.MaxHandshakes <= 0 {
		cfg.MaxHandshakes = DefaultMaxHandshakes
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	ln, err := capture.Listen(capture.Config{
		Key: "tunnel.listen", Listen: cfg.Listen, Remote: true, MaxConns: cfg.MaxConns, Log: cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	in := &Inbound{
		cfg: cfg, ln: ln, apps: make(map[string]App),
		tls:        identity.ServerTLS(identity.TLSConfig{Source: cfg.Source, Now: cfg.Now, NextProtos: []string{alpn}}),
		handshakes: make(chan struct{}, cfg.MaxHandshakes),
	}
	for _, a := range cfg.Apps {
		in.apps[a.Port] = a
	}
	markVerification(in.tls)
	cfg.Views.Watch(in.recheck)
	return in, nil
}

// Addr returns the address of the tunnel listener.
func (in *Inbound) Addr() net.Addr { return in.ln.Addr() }

// Live returns how many connections are being decided or relayed.
func (in *Inbound) Live() int { return in.conns.len() }

// Connections lists live connections, oldest first.
func (in *Inbound) Connections() []Connection { return in.conns.describe() }

// HandshakeFailures counts handshakes that gave no authenticated peer, by class.
func (in *Inbound) HandshakeFailures() map[string]uint64 { return in.failures.counts() }

// Serves returns the declared ports of v that the app serves here, by number,
// and the configured app ports that are not declared; both sorted.
func (in *Inbound) Serves(v *View) (ports []uint16, undeclared []string) {
	declared := make(map[string]bool)
	for n, p := range v.ports {
		declared[p.Name] = true
		if _, ok := in.apps[p.Name]; ok {
			ports = append(ports, n)
		}
	}
	for _, a := range in.cfg.Apps {
		if !declared[a.Port] {
			undeclared = append(undeclared, a.Port)
		}
	}
	slices.Sort(ports)
	slices.Sort(undeclared)
	return ports, undeclared
}

// Serve accepts connections until Drain or the end of ctx and returns when all
// have ended. The end of ctx ends live connections at once. Call it once.
func (in *Inbound) Serve(ctx context.Context) error { return in.ln.Serve(ctx, in.serve) }

// Close closes the listener of an Inbound that never served.
func (in *Inbound) Close() error { return in.ln.Close() }

// Drain accepts nothing more, waits for live connections until ctx ends, ends
// what is left and returns how many that were.
func (in *Inbound) Drain(ctx context.Context) int {
	in.draining.Store(true)
	if err := in.ln.Close(); err != nil {
		in.cfg.Log.Warn("closing the tunnel listener", "error", err)
	}
	in.conns.wait(ctx)
	return in.conns.endAll(errDrained)
}

// recheck decides every live connection again and cuts those that v denies.
func (in *Inbound) recheck(v *View) {
	for _, c := range in.conns.all() {
		if d := v.decide(c.Request); !d.allowed() {
			c.cancel(&cutError{d})
		}
	}
}

// serve owns one accepted connection.
func (in *Inbound) serve(ctx context.Context, raw net.Conn) {
	conn, peer, err := in.handshake(ctx, raw)
	if err != nil {
		in.failures.add(err)
		in.cfg.Log.Debug("handshake ended without a peer", "error", err)
		return
	}
	session, err := tunnel.Server(ctx, conn, tunnel.Config{})
	if err != nil {
		in.failures.add(err)
		in.cfg.Log.Debug("no tunnel session", "peer", peer.ID, "error", err)
		return
	}
	var streams sync.WaitGroup
	for {
		req, err := session.Accept(ctx)
		if err != nil {
			break
		}
		streams.Go(func() { in.stream(ctx, peer, req) })
	}
	streams.Wait()
	_ = session.Close() // always nil; it waits for the connection's end
}

// handshake authenticates the client. It closes raw when it returns an error.
func (in *Inbound) handshake(ctx context.Context, raw net.Conn) (net.Conn, identity.Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeLimit)
	defer cancel()
	fail := func(err error) (net.Conn, identity.Peer, error) {
		_ = raw.Close()
		return nil, identity.Peer{}, fmt.Errorf("authenticating client: %w", err)
	}
	select {
	case in.handshakes <- struct{}{}:
		defer func() { <-in.handshakes }()
	case <-ctx.Done():
		return fail(ctx.Err())
	}
	conn := tls.Server(raw, in.tls)
	if err := conn.HandshakeContext(ctx); err != nil {
		return fail(err)
	}
	peer, err := identity.PeerOf(conn.ConnectionState())
	if err != nil {
		return fail(err)
	}
	return conn, peer, nil
}

// admit registers a connection and then decides it, in this order: either the
// decision sees a new view or the recheck of that view sees the connection, and
// none slips through between the two. What recheck takes back ends the context
// with a cutError.
func (in *Inbound) admit(ctx context.Context, q policy.Request) (context.Context, *conn, verdict) {
	ctx, c := in.conns.add(ctx, flow.Inbound, q, in.cfg.Now())
	return ctx, c, in.cfg.Views.Load().decide(q)
}

// stream decides one request, carries it, and records it.
func (in *Inbound) stream(ctx context.Context, peer identity.Peer, req *tunnel.Incoming) {
	self, err := in.cfg.Source.GetX509SVID()
	if err != nil { // we had one a moment ago, for the handshake
		_ = req.Refuse(http.StatusServiceUnavailable, newID(), "") // the peer may have gone
		return
	}
	ctx, c, v := in.admit(ctx, policy.Request{Src: peer.ID, Dst: self.ID, Port: req.Target.Port})
	defer in.conns.remove(c)
	f := flow.Flow{Request: c.Request, ID: c.id, Start: c.start, Side: flow.Inbound}
	defer func() {
		f.Duration = in.cfg.Now().Sub(c.start)
		in.cfg.Sink.Record(f)
	}()
	if v.allowed() && !namesUs(req.Target.Host, self.ID) {
		v = verdict{status: http.StatusNotFound, why: "addressed to another name", portName: v.portName, revision: v.revision}
	}
	if !v.allowed() {
		refuse(req, &f, v)
		return
	}
	f.Decision, f.PortName, f.Revision = v.Decision, v.portName, v.revision
	app, err := in.dial(ctx, v.portName)
	var cut *cutError
	if errors.As(context.Cause(ctx), &cut) { // newer rules deny it, and nothing has begun
		if err == nil {
			_ = app.Close()
		}
		refuse(req, &f, cut.verdict)
		return
	}
	if err != nil {
		_ = req.Refuse(http.StatusServiceUnavailable, f.ID, "") // the peer may have gone
		f.Outcome, f.Error = flow.Failed, flow.Text(err.Error())
		return
	}
	stream, err := req.Accept(f.ID)
	if err != nil {
		_ = app.Close()
		f.Outcome, f.Error = flow.Failed, flow.Text(err.Error())
		return
	}
	f.Received, f.Sent, err = relay.Pipe(ctx, app, stream, in.cfg.Idle)
	finish(&f, err, context.Cause(ctx))
}

// refuse tells the peer as much as it may know and the record everything.
func refuse(req *tunnel.Incoming, f *flow.Flow, v verdict) {
	f.Decision, f.PortName, f.Revision = v.Decision, v.portName, v.revision
	f.Outcome, f.Error = flow.Refused, v.why
	_ = req.Refuse(v.status, f.ID, v.toldReason()) // the peer may have gone; the record stays
}

// dial connects to the app.
func (in *Inbound) dial(ctx context.Context, port string) (net.Conn, error) {
	if in.draining.Load() {
		return nil, errDrained
	}
	app, ok := in.apps[port]
	if !ok {
		return nil, fmt.Errorf("port %s is not served by this instance", port)
	}
	conn, err := dialer(appDialLimit).DialContext(ctx, app.Network, app.Address)
	if err != nil {
		return nil, fmt.Errorf("reaching the app: %w", err)
	}
	return conn, nil
}

func dialer(limit time.Duration) *net.Dialer {
	d := &net.Dialer{Timeout: limit}
	d.SetMultipathTCP(false) // kernel sandboxes see plain TCP only
	return d
}

// namesUs reports whether a request is addressed to self: by mesh name, or by
// any address, since who we are was proved and addresses say nothing.
func namesUs(host string, self spiffeid.ID) bool {
	if name, ok := identity.MeshName(self); ok && host == name {
		return true
	}
	_, err := netip.ParseAddr(host)
	return err == nil
}
