package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/capture"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/relay"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// directRetry is how often a direct port that was in use is tried again.
const directRetry = 2 * time.Second

// errNotDirect says that a port has no direct listener any more.
var errNotDirect = errors.New("the port takes no callers without sidecar any more")

// directs are the listeners for callers without sidecar: plain mutual TLS, one
// listener for each declared port that has one. The listener says which port is
// meant, never ALPN. They come and go with the views.
type directs struct {
	in      *Inbound
	host    string        // where the tunnel listens too
	changed chan struct{} // one slot: there is a new view
	stop    sync.Once
	stopped chan struct{} // closed by the first close

	mu    sync.Mutex
	doors map[uint16]*directDoor // guarded by mu; :: direct port →
	errs  map[uint16]error       // guarded by mu; :: direct port → why it is not open
}

type directDoor struct {
	ln     *capture.Listener
	cancel context.CancelCauseFunc // ends its connections
}

func newDirects(in *Inbound) *directs {
	host, _, _ := net.SplitHostPort(in.cfg.Listen) // it listens there already
	return &directs{
		in: in, host: host, changed: make(chan struct{}, 1), stopped: make(chan struct{}),
		doors: make(map[uint16]*directDoor), errs: make(map[uint16]error),
	}
}

// look has run compare its listeners with the newest view.
func (d *directs) look() {
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// close has run close all listeners; connections go on.
func (d *directs) close() { d.stop.Do(func() { close(d.stopped) }) }

// run keeps the listeners until close or the end of ctx, which also ends their
// connections, and returns when all those have ended.
func (d *directs) run(ctx context.Context) {
	var serving sync.WaitGroup
	defer serving.Wait()
	defer func() {
		for n := range d.doors { // nobody else changes it
			d.shut(n)
		}
	}()
	again := time.NewTicker(directRetry)
	defer again.Stop()
	for {
		d.match(ctx, &serving)
		select {
		case <-ctx.Done():
			return
		case <-d.stopped:
			return
		case <-d.changed:
		case <-again.C:
		}
	}
}

// match opens what the newest view wants and is not open, and closes the rest.
func (d *directs) match(ctx context.Context, serving *sync.WaitGroup) {
	wanted := make(map[uint16]bool)
	for _, p := range d.in.cfg.Views.Load().ports {
		if _, ok := d.in.served[p.Name]; ok && p.Direct != 0 {
			wanted[p.Direct] = true
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.DeleteFunc(d.errs, func(n uint16, _ error) bool { return !wanted[n] })
	for n, door := range d.doors {
		if !wanted[n] {
			_ = door.ln.Close()
			door.cancel(errNotDirect)
			delete(d.doors, n)
		}
	}
	for n := range wanted {
		if d.doors[n] != nil {
			continue
		}
		ln, err := capture.Listen(capture.Config{
			Key: fmt.Sprintf("direct port %d", n), Listen: net.JoinHostPort(d.host, strconv.Itoa(int(n))),
			Remote: true, MaxConns: d.in.cfg.MaxConns, Log: d.in.cfg.Log,
		})
		if d.note(n, err); err != nil {
			continue
		}
		ctx, cancel := context.WithCancelCause(ctx)
		d.doors[n] = &directDoor{ln, cancel}
		serving.Go(func() {
			defer cancel(nil)
			_ = ln.Serve(ctx, func(ctx context.Context, raw net.Conn) { d.in.serveDirect(ctx, raw, n) }) // it ends by close
		})
	}
}

// note keeps how opening a port went. The caller holds d.mu.
func (d *directs) note(n uint16, err error) {
	switch {
	case err == nil:
		delete(d.errs, n)
	case d.errs[n] == nil || d.errs[n].Error() != err.Error():
		d.in.cfg.Log.Warn("a direct port cannot be opened; trying again", "error", err)
		d.errs[n] = err
	}
}

func (d *directs) shut(n uint16) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = d.doors[n].ln.Close() // the listener is given up
	delete(d.doors, n)
}

// DirectErrors returns, sorted, why direct ports are not open.
func (in *Inbound) DirectErrors() []string {
	in.directs.mu.Lock()
	defer in.directs.mu.Unlock()
	var out []string
	for _, err := range in.directs.errs {
		out = append(out, err.Error())
	}
	slices.Sort(out)
	return out
}

// DirectAddrs returns the addresses of the direct ports that are open, in order.
func (in *Inbound) DirectAddrs() []net.Addr {
	in.directs.mu.Lock()
	defer in.directs.mu.Unlock()
	var out []net.Addr
	for _, n := range slices.Sorted(maps.Keys(in.directs.doors)) {
		out = append(out, in.directs.doors[n].ln.Addr())
	}
	return out
}

// directPort is the declared port whose direct listener is n.
func (v *View) directPort(n uint16) (policy.Port, bool) {
	for _, p := range v.ports {
		if p.Direct == n {
			return p, true
		}
	}
	return policy.Port{}, false
}

// serveDirect owns one connection that was accepted at direct port n. It is one
// request for the port, decided as one that came through a tunnel.
func (in *Inbound) serveDirect(ctx context.Context, raw net.Conn, n uint16) {
	port, ok := in.cfg.Views.Load().directPort(n)
	if !ok { // the listener is being closed
		_ = raw.Close()
		return
	}
	conn, peer, ok := in.meet(ctx, raw, directTLS(in.tls, port.Protocol))
	if !ok {
		return
	}
	defer in.shares.give(peer.id)
	self, err := in.cfg.Source.GetX509SVID()
	if err != nil { // we had one a moment ago, for the handshake
		_ = conn.Close()
		return
	}
	ctx, c, v := in.admit(ctx, policy.Request{Src: peer.id, Dst: self.ID, Port: port.Number}, peer.proof)
	defer in.conns.remove(c)
	f := flow.Flow{Request: c.Request, ID: c.id, Start: c.start, Side: flow.Inbound}
	defer func() {
		f.Duration = in.cfg.Now().Sub(c.start)
		in.cfg.Sink.Record(f)
	}()
	if v.allowed() {
		v = in.fresh(v)
	}
	f.Decision, f.PortName, f.Revision = v.Decision, v.portName, v.revision
	var app net.Conn
	if v.allowed() {
		app, err = in.dial(ctx, v.portName)
		var cut *cutError
		if errors.As(context.Cause(ctx), &cut) { // newer rules deny it, and nothing has begun
			if err == nil {
				_ = app.Close()
			}
			v = cut.verdict
			f.Decision, f.PortName, f.Revision = v.Decision, v.portName, v.revision
		} else if err != nil {
			v = unreachable(v)
			f.Outcome, f.Error = flow.Failed, flow.Text(err.Error())
			refuseDirect(ctx, conn, port.Protocol, f.ID, v)
			return
		}
	}
	if !v.allowed() {
		f.Outcome, f.Error = flow.Refused, v.why
		refuseDirect(ctx, conn, port.Protocol, f.ID, v)
		return
	}
	f.Received, f.Sent, err = relay.Pipe(ctx, app, conn, in.cfg.Idle)
	finish(&f, err, context.Cause(ctx))
}

// directTLS offers what the port's protocol is negotiated by, where clients insist
// on that: the port says what it is.
func directTLS(base *tls.Config, p policy.Protocol) *tls.Config {
	c := base.Clone()
	c.NextProtos = nil
	if p == policy.GRPC {
		c.NextProtos = []string{alpn}
	}
	return c
}
