package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/capture"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/relay"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/tunnel"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Limits of the inbound side.
const (
	DefaultMaxConns      = 16384            // connections at once; more wait in the kernel's queue
	DefaultMaxHandshakes = 512              // TLS handshakes at once; one more ends the oldest
	handshakeLimit       = 10 * time.Second // from accepting to an authenticated peer
	requestLimit         = 3 * time.Second  // from there to the end of its request's headers
	peerShare            = 2                // of MaxConns, one identity has one in this many …
	minPeerConns         = 64               // … but always as many as this
)

// alpn is what both sides offer. The listener decides the protocol, never ALPN:
// it is there for tools in between.
const alpn = "h2"

// InboundConfig holds what an [Inbound] needs. Listen, Source, Views and Sink
// are required.
type InboundConfig struct {
	Listen        string // HOST:PORT of the tunnel listener
	Apps          []App
	Source        identity.Source
	Views         *Views
	Book          *revocation.Book     // which peers are revoked; nil: none
	Neighbours    *Neighbours          // with whom the revocation list is shared; nil: nobody
	Stale         func() time.Duration // for how long revocations may have gone unnoticed; nil: none ever does
	Sink          flow.Sink
	Idle          time.Duration // connections on which nothing moves are closed after this; 0: never
	MaxConns      int           // 0: DefaultMaxConns
	MaxHandshakes int           // 0: DefaultMaxHandshakes; never more than half of MaxConns
	Now           func() time.Time
	Log           hclog.Logger
}

// Inbound is the way to the app, by tunnels and at direct ports: it authenticates peers, has policy decide, and
// relays to the app's declared ports and nothing else.
type Inbound struct {
	cfg        InboundConfig
	served     map[string]App // :: declared port name → where the app listens
	ln         *capture.Listener
	tls        *tls.Config
	conns      conns
	handshakes gate
	shares     shares
	failures   failures
	apps       appStates
	draining   atomic.Bool
	directs    *directs
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
	cfg.MaxHandshakes = max(1, min(cfg.MaxHandshakes, cfg.MaxConns/2)) // strangers leave room for peers
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Book == nil {
		cfg.Book = revocation.NewBook(cfg.Source, cfg.Now)
	}
	ln, err := capture.Listen(capture.Config{
		Key: "tunnel.listen", Listen: cfg.Listen, Remote: true, MaxConns: cfg.MaxConns, Log: cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	in := &Inbound{
		cfg: cfg, ln: ln, served: make(map[string]App),
		tls:        identity.ServerTLS(identity.TLSConfig{Source: cfg.Source, Check: cfg.Book.Check, Now: cfg.Now, NextProtos: []string{alpn}}),
		handshakes: gate{max: cfg.MaxHandshakes},
		shares:     shares{max: max(cfg.MaxConns/peerShare, minPeerConns)},
	}
	for _, a := range cfg.Apps {
		in.served[a.Port] = a
	}
	markVerification(in.tls)
	in.directs = newDirects(in)
	cfg.Views.Watch(in.recheck)
	cfg.Book.Watch(in.recheckRevoked)
	return in, nil
}

// Addr returns the address of the tunnel listener.
func (in *Inbound) Addr() net.Addr { return in.ln.Addr() }

// Live returns how many connections are being decided or relayed.
func (in *Inbound) Live() int { return in.conns.len() }

// Revoked counts connections that were cut because their peer was revoked.
func (in *Inbound) Revoked() uint64 { return in.conns.revoked.Load() }

// Connections lists live connections, oldest first.
func (in *Inbound) Connections() []Connection { return in.conns.describe() }

// HandshakeFailures counts connections that ended before a request, by class.
func (in *Inbound) HandshakeFailures() map[string]uint64 { return in.failures.counts() }

// Serves returns the declared ports of v that the app serves here, by number,
// those for which no app is configured, and the configured app ports that are not
// declared; all sorted.
func (in *Inbound) Serves(v *View) (ports []uint16, unserved, undeclared []string) {
	declared := make(map[string]bool)
	for n, p := range v.ports {
		declared[p.Name] = true
		if _, ok := in.served[p.Name]; ok {
			ports = append(ports, n)
		} else {
			unserved = append(unserved, p.Name)
		}
	}
	for _, a := range in.cfg.Apps {
		if !declared[a.Port] {
			undeclared = append(undeclared, a.Port)
		}
	}
	slices.Sort(ports)
	slices.Sort(unserved)
	slices.Sort(undeclared)
	return ports, unserved, undeclared
}

// AppErrors returns, sorted, why the app could not be reached when each port was
// last dialled; nothing of ports where that went well.
func (in *Inbound) AppErrors() []string { return in.apps.errors() }

// Serve accepts connections until Drain or the end of ctx and returns when all
// have ended. The end of ctx ends live connections at once. Call it once.
func (in *Inbound) Serve(ctx context.Context) error {
	var direct sync.WaitGroup
	direct.Go(func() { in.directs.run(ctx) })
	err := in.ln.Serve(ctx, in.serve)
	in.directs.close()
	direct.Wait()
	return err
}

// Close closes the listener of an Inbound that never served.
func (in *Inbound) Close() error { return in.ln.Close() }

// Drain accepts nothing more, waits for live connections until ctx ends, ends
// what is left and returns how many that were.
func (in *Inbound) Drain(ctx context.Context) int {
	in.draining.Store(true)
	in.directs.close()
	if err := in.ln.Close(); err != nil {
		in.cfg.Log.Warn("closing the tunnel listener", "error", err)
	}
	in.conns.wait(ctx)
	return in.conns.endAll(errDrained)
}

// recheck decides every live connection again and cuts those that v denies; with
// new bundles also those whose peer is not verified by them.
func (in *Inbound) recheck(v *View, changed xds.Kind) {
	in.directs.look()
	for _, c := range in.conns.all() {
		d := v.decide(c.Request)
		if changed == xds.Bundles && c.distrusted(in.cfg.Source) {
			d = d.distrust(untrusted)
		}
		if !d.allowed() {
			c.cancel(&cutError{d})
		}
	}
}

// recheckRevoked cuts live connections whose peer is revoked now.
func (in *Inbound) recheckRevoked(*revocation.List) {
	v := in.cfg.Views.Load()
	in.conns.cutRevoked(in.cfg.Book, func(c *conn) verdict { return v.decide(c.Request) })
}

// serve owns one accepted connection.
func (in *Inbound) serve(ctx context.Context, raw net.Conn) {
	conn, peer, ok := in.meet(ctx, raw, in.tls)
	if !ok {
		return
	}
	defer in.shares.give(peer.id)
	neighbour := in.cfg.Neighbours.join(peer.id)
	session, err := tunnel.Server(ctx, conn, tunnel.Config{HandshakeTimeout: requestLimit, Messages: neighbour.messages()})
	if err != nil {
		in.failures.add(err)
		in.cfg.Log.Debug("no tunnel session", "peer", peer.id, "error", err)
		return
	}
	neighbour.start(session)
	defer neighbour.leave()
	var streams sync.WaitGroup
	for {
		req, err := session.Accept(ctx)
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) { // it never asked for anything
				in.failures.add(err)
			}
			break
		}
		streams.Go(func() { in.stream(ctx, peer, req) })
	}
	streams.Wait()
	_ = session.Close() // always nil; it waits for the connection's end
}

// peer is who is at the other end of a connection, and how we know.
type peer struct {
	id    spiffeid.ID
	proof *proof
}

// meet authenticates the client and takes a part of its share of connections, which
// the caller gives back. Otherwise it counts why not, and closes raw.
func (in *Inbound) meet(ctx context.Context, raw net.Conn, cfg *tls.Config) (net.Conn, peer, bool) {
	conn, p, err := in.handshake(ctx, raw, cfg)
	if err != nil {
		in.failures.add(err)
		in.cfg.Log.Debug("handshake ended without a peer", "error", err)
		return nil, peer{}, false
	}
	if !in.shares.take(p.id) {
		in.failures.add(errTooMany)
		_ = conn.Close() // refused anyway
		in.cfg.Log.Debug("connection refused", "peer", p.id, "error", errTooMany)
		return nil, peer{}, false
	}
	return conn, p, true
}

// handshake authenticates the client. It closes raw when it returns an error.
func (in *Inbound) handshake(ctx context.Context, raw net.Conn, cfg *tls.Config) (net.Conn, peer, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeLimit)
	defer cancel()
	ctx, leave := in.handshakes.enter(ctx)
	defer leave()
	fail := func(err error) (net.Conn, peer, error) {
		_ = raw.Close()
		if errors.Is(context.Cause(ctx), errEvicted) {
			err = errEvicted
		}
		return nil, peer{}, fmt.Errorf("authenticating client: %w", err)
	}
	trust := in.cfg.Views.Load().trust
	conn := tls.Server(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		return fail(err)
	}
	p, err := identity.PeerOf(conn.ConnectionState())
	if err != nil {
		return fail(err)
	}
	return conn, peer{p.ID, &proof{p, in.cfg.Now(), trust}}, nil
}

// admit registers a connection and then decides it, in this order: either the
// decision sees a new view or list, or the recheck of that sees the connection, and
// none slips through between the two. What recheck takes back ends the context
// with a cutError.
func (in *Inbound) admit(ctx context.Context, q policy.Request, p *proof) (context.Context, *conn, verdict) {
	ctx, c := in.conns.add(ctx, flow.Inbound, q, in.cfg.Now())
	why := c.proved(p, judge{in.cfg.Views, in.cfg.Source, in.cfg.Book})
	v := in.cfg.Views.Load().decide(q)
	if why != "" {
		v = v.distrust(why)
	}
	return ctx, c, v
}

// stream decides one request, carries it, and records it.
func (in *Inbound) stream(ctx context.Context, peer peer, req *tunnel.Incoming) {
	self, err := in.cfg.Source.GetX509SVID()
	if err != nil { // we had one a moment ago, for the handshake
		_ = req.Refuse(http.StatusServiceUnavailable, newID(), "") // the peer may have gone
		return
	}
	ctx, c, v := in.admit(ctx, policy.Request{Src: peer.id, Dst: self.ID, Port: req.Target.Port}, peer.proof)
	defer in.conns.remove(c)
	f := flow.Flow{Request: c.Request, ID: c.id, Start: c.start, Side: flow.Inbound}
	defer func() {
		f.Duration = in.cfg.Now().Sub(c.start)
		in.cfg.Sink.Record(f)
	}()
	if v.allowed() {
		v = in.fresh(v)
	}
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

// namesUs reports whether a request is addressed to self: by mesh name, or by
// any address, since who we are was proved and addresses say nothing.
func namesUs(host string, self spiffeid.ID) bool {
	if name, ok := identity.MeshName(self); ok && host == name {
		return true
	}
	_, err := netip.ParseAddr(host)
	return err == nil
}
