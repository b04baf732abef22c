package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/sallyport-mesh/sallyport/internal/capture"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/relay"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/tunnel"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Door is a local listener with one destination.
type Door struct {
	Key    string // configuration key, named in errors: "outbound[0].listen"
	Listen string // loopback IP:PORT or unix:/path
	To     string // REF:PORT, see SplitTarget
}

// SplitTarget takes REF:PORT apart: REF as [identity.ParseRef] reads it, PORT a
// declared port's name or number.
func SplitTarget(to string) (ref, port string, err error) {
	i := strings.LastIndexByte(to, ':')
	if i <= 0 || i == len(to)-1 || strings.Contains(to[i:], "/") {
		return "", "", fmt.Errorf("destination %q: want WORKLOAD:PORT, as in payments:http", to)
	}
	return to[:i], to[i+1:], nil
}

// OutboundConfig holds what an [Outbound] needs. Source, Views and Sink are
// required.
type OutboundConfig struct {
	Doors      []Door
	AllowUIDs  []uint32 // who may use the doors
	Source     identity.Source
	Views      *Views
	Book       *revocation.Book // which servers are revoked; nil: none
	Neighbours *Neighbours      // with whom the revocation list is shared; nil: nobody
	Sink       flow.Sink
	Idle       time.Duration // connections on which nothing moves are closed after this; 0: never
	Now        func() time.Time
	Log        hclog.Logger
}

// Outbound takes the app's connections to other workloads: it picks an endpoint,
// proves who we are, makes sure of who they are, and relays. Whether the
// connection may be is decided at the other end.
type Outbound struct {
	cfg      OutboundConfig
	doors    []*capture.Listener // in the order of cfg.Doors
	conns    conns
	balancer balancer
}

// ListenOutbound opens the doors; nothing is accepted before Serve. An error is
// one line that names the configuration key and what to do.
func ListenOutbound(cfg OutboundConfig) (*Outbound, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Book == nil {
		cfg.Book = revocation.NewBook(cfg.Source, cfg.Now)
	}
	o := &Outbound{cfg: cfg}
	for _, d := range cfg.Doors {
		ln, err := capture.Listen(capture.Config{
			Key: d.Key, Listen: d.Listen, AllowUIDs: cfg.AllowUIDs, Log: cfg.Log,
		})
		if err != nil {
			_ = o.Close()
			return nil, err
		}
		o.doors = append(o.doors, ln)
	}
	cfg.Views.Watch(o.recheck)
	cfg.Book.Watch(o.recheckRevoked)
	return o, nil
}

// Addrs returns the doors' addresses, in the order of the configuration.
func (o *Outbound) Addrs() []net.Addr {
	var out []net.Addr
	for _, d := range o.doors {
		out = append(out, d.Addr())
	}
	return out
}

// Live returns how many connections are being opened or relayed.
func (o *Outbound) Live() int { return o.conns.len() }

// Revoked counts connections that were cut because the server was revoked.
func (o *Outbound) Revoked() uint64 { return o.conns.revoked.Load() }

// Connections lists live connections, oldest first.
func (o *Outbound) Connections() []Connection { return o.conns.describe() }

// RefusedLocal counts callers that were turned away because of their uid.
func (o *Outbound) RefusedLocal() uint64 {
	var n uint64
	for _, d := range o.doors {
		n += d.Refused()
	}
	return n
}

// Serve accepts connections until Drain or the end of ctx and returns when all
// have ended. The end of ctx ends live connections at once. Call it once.
func (o *Outbound) Serve(ctx context.Context) error {
	var g errgroup.Group
	for i, d := range o.doors {
		front := capture.Explicit(o.cfg.Doors[i].To)
		g.Go(func() error {
			return d.Serve(ctx, func(ctx context.Context, c net.Conn) { o.serve(ctx, c, front) })
		})
	}
	return g.Wait()
}

// Close closes the doors. Connections go on.
func (o *Outbound) Close() error {
	var errs []error
	for _, d := range o.doors {
		errs = append(errs, d.Close())
	}
	return errors.Join(errs...)
}

// Drain accepts nothing more, waits for live connections until ctx ends, ends
// what is left and returns how many that were.
func (o *Outbound) Drain(ctx context.Context) int {
	if err := o.Close(); err != nil {
		o.cfg.Log.Warn("closing local listeners", "error", err)
	}
	o.conns.wait(ctx)
	return o.conns.endAll(errDrained)
}

// recheck cuts live connections whose peer is not verified by new bundles, and
// those to a foreign destination that is offered no more. In the own trust domain
// the other end cuts, by the same rules; another's knows nothing of ours.
func (o *Outbound) recheck(v *View, changed xds.Kind) {
	if changed != xds.Bundles && changed != xds.Endpoints {
		return
	}
	for _, c := range o.conns.all() {
		switch {
		case changed == xds.Bundles && c.distrusted(o.cfg.Source):
			c.cancel(&cutError{verdict{}.distrust(untrusted)})
		case changed == xds.Endpoints && v.withdrawn(c.Request):
			c.cancel(&cutError{v.notOffered()})
		}
	}
}

// recheckRevoked cuts live connections whose server is revoked now.
func (o *Outbound) recheckRevoked(*revocation.List) {
	o.conns.cutRevoked(o.cfg.Book, func(*conn) verdict { return verdict{} })
}

// Unresolved tells of each door that leads nowhere in the newest view, and what to
// do; nothing before the first endpoints and the first SVID.
func (o *Outbound) Unresolved() []string {
	v := o.cfg.Views.Load()
	if _, ok := v.revs[xds.Endpoints]; !ok {
		return nil
	}
	if _, err := o.cfg.Source.GetX509SVID(); err != nil {
		return nil
	}
	var out []string
	for _, door := range o.cfg.Doors {
		d, err := o.resolve(door.To)
		if err == nil && !d.served() {
			err = d.notServed()
		}
		if err != nil {
			out = append(out, fmt.Sprintf("outbound %s → %s: %v", door.Listen, door.To, err))
		}
	}
	return out
}

// destination is where a connection goes.
type destination struct {
	policy.Request
	port    policy.Port // zero Name: the destination is not known (yet)
	service xds.Service
}

func (d destination) served() bool {
	return slices.ContainsFunc(d.service.Endpoints, func(e xds.Endpoint) bool { return slices.Contains(e.Ports, d.Port) })
}

func (d destination) notServed() error {
	return fmt.Errorf("no running instance of %s serves port %s; start one whose app has the port", d.Dst, d.port.Name)
}

// resolve finds target in the newest view. On error the request says as much as
// is known.
func (o *Outbound) resolve(target string) (destination, error) {
	var d destination
	self, err := o.cfg.Source.GetX509SVID()
	if err != nil {
		return d, err
	}
	d.Src = self.ID
	ref, port, err := SplitTarget(target)
	if err != nil {
		return d, err
	}
	if d.Dst, err = identity.ParseRef(self.ID.TrustDomain(), ref); err != nil {
		return d, err
	}
	view := o.cfg.Views.Load()
	service, ok := view.Service(d.Dst)
	if !ok {
		if service, ok = view.named(ref); ok {
			d.Dst = service.ID
		}
	}
	if d.service = service; !ok {
		return d, fmt.Errorf("no workload %s; name it by its ID path or mesh name as in spec.id", d.Dst)
	}
	var names []string
	number, numErr := strconv.ParseUint(port, 10, 16)
	for _, p := range d.service.Ports {
		if p.Name == port || numErr == nil && p.Number == uint16(number) {
			d.Port, d.port = p.Number, p
			return d, nil
		}
		names = append(names, p.Name)
	}
	return d, fmt.Errorf("workload %s declares no port %s; declared: %s", d.Dst, port, strings.Join(names, ", "))
}

// serve owns one connection of the app.
func (o *Outbound) serve(ctx context.Context, local net.Conn, front capture.Front) {
	start := o.cfg.Now()
	ask, err := front(ctx, local)
	if err != nil {
		_ = local.Close()
		return
	}
	d, err := o.resolve(ask.Target)
	ctx, c := o.conns.add(ctx, flow.Outbound, d.Request, start)
	defer o.conns.remove(c)
	f := flow.Flow{Request: d.Request, ID: c.id, Start: start, Side: flow.Outbound, PortName: d.port.Name}
	defer func() {
		f.Duration = o.cfg.Now().Sub(start)
		o.cfg.Sink.Record(f)
	}()
	var up *upstream
	if err == nil {
		up, err = o.open(ctx, d)
	}
	if err != nil {
		o.reject(ctx, ask, d.port, &f, err)
		return
	}
	defer func() { o.close(up) }()
	f.Effect, f.Would = policy.Allow, policy.Allow
	if id := up.decision; flow.ValidID(id) {
		f.ID = id
		o.conns.rename(c, id)
	}
	if why := c.proved(up.proof, judge{o.cfg.Views, o.cfg.Source, o.cfg.Book}); why != "" {
		c.cancel(&cutError{verdict{}.distrust(why)}) // and the relay ends as it begins
	}
	if v := o.cfg.Views.Load(); v.withdrawn(d.Request) { // it was looked up before c was among those that recheck sees
		c.cancel(&cutError{v.notOffered()})
	}
	if err := ask.Answer(nil); err != nil {
		_, _ = up.stream.Close(), ask.Conn.Close() // both are given up
		f.Outcome, f.Error = flow.Failed, flow.Text(err.Error())
		return
	}
	f.Sent, f.Received, err = relay.Pipe(ctx, ask.Conn, up.stream, o.cfg.Idle)
	finish(&f, err, context.Cause(ctx))
}

// reject tells the app that its connection cannot be, as far as the port's
// protocol has words for it, and closes it.
func (o *Outbound) reject(ctx context.Context, ask capture.Ask, port policy.Port, f *flow.Flow, err error) {
	r := rejection{Status: http.StatusServiceUnavailable, Error: "destination unreachable", Reason: flow.Text(err.Error())}
	f.Outcome, f.Error = flow.Failed, r.Reason
	var no *tunnel.Refused
	if errors.As(err, &no) && flow.ValidID(no.DecisionID) {
		f.ID = no.DecisionID
	}
	if no != nil && no.Status < 500 {
		f.Outcome, f.Reason, f.Error = flow.Refused, flow.Text(no.Reason), ""
		r.Reason = f.Reason
		if no.Status == http.StatusForbidden {
			r.Status, r.Error = http.StatusForbidden, "refused by policy"
		} else {
			r.Error = fmt.Sprintf("destination answered %d: port %d is not declared there", no.Status, f.Port)
			f.Error = r.Error
		}
	} else if cause := context.Cause(ctx); cause != nil {
		f.Outcome = flow.Drained
	}
	r.DecisionID = f.ID
	if port.Protocol == policy.HTTP && r.write(ctx, ask.Conn) == nil {
		return
	}
	_ = ask.Answer(err) // what it cannot word shows as a reset
	_ = ask.Conn.Close()
}
