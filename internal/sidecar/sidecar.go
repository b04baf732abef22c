// Package sidecar composes one sidecar: identity from package agent, a view of
// the mesh from package xds, the data path of package proxy, and how it shows
// itself from package admin.
//
// It decides nothing and carries no byte: it starts, connects and stops those
// who do. docs/sidecar.md is its manual.
package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/agent/endpoint"
	"github.com/sallyport-mesh/sallyport/internal/agent/pemfile"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/proxy"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	// flowLogQueue is how many records may wait for the disk.
	flowLogQueue = 16384
	// enrollWithin is how long a first start waits for the control plane. One
	// that has enrolled before waits for ever.
	enrollWithin = 30 * time.Second
)

// Options are a sidecar's surroundings.
type Options struct {
	Log     hclog.Logger     // required
	Now     func() time.Time // nil: time.Now
	Version string           // shown in the metrics
}

// provider is where the identity comes from: enrolment, or a Workload API socket.
type provider interface {
	Run(context.Context) error
	Ready() <-chan struct{}
	Status() agent.Status
	ID() spiffeid.ID
	Instance() string
	Source() identity.Source
	SetBundles(identity.Bundles) error
	Dial(context.Context) (*grpc.ClientConn, error)
	RenewNow()
}

var _, _ provider = (*agent.Agent)(nil), (*agent.Borrowed)(nil)

// Sidecar is one workload's door. Make it with [New], let it work with Run.
type Sidecar struct {
	cfg Config
	log hclog.Logger
	now func() time.Time

	agent    provider
	wallet   *agent.Wallet    // nil: the app has neither socket nor files
	endpoint *endpoint.Server // nil: the app has no socket to ask at
	files    []*agent.Files
	views    proxy.Views
	book     *revocation.Book
	near     *proxy.Neighbours
	keeper   *revocation.Keeper
	heard    atomic.Int64 // when the control plane was last connected, in Unix nanoseconds; 0: never
	inbound  *proxy.Inbound
	outbound *proxy.Outbound
	announce *announcer

	stream  *flow.Stream
	flowLog *flow.JSONL // nil: none
	sink    flow.Sink   // all of the above and the metrics

	health      *admin.Health
	warned      map[string]bool // lines that the last view gave; owned by viewChanged, which Views orders
	draining    atomic.Bool
	metrics     *prometheus.Registry
	adminHTTP   net.Listener // nil: none
	adminSocket net.Listener // nil: none
}

// New opens every listener and file and reads the state folder, so that what is
// wrong shows at once; it contacts nobody. An error is one line that says what to
// do. cfg comes from [Load].
func New(ctx context.Context, cfg Config, opts Options) (*Sidecar, error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	s := &Sidecar{cfg: cfg, log: opts.Log, now: opts.Now, metrics: prometheus.NewRegistry()}
	if err := s.open(ctx, opts); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *Sidecar) open(ctx context.Context, opts Options) error {
	err := s.openIdentity()
	if err != nil {
		return err
	}
	s.openBook()
	s.stream = flow.NewStream(flow.StreamConfig{Node: s.agent.Instance()})
	sinks := []flow.Sink{s.stream}
	if s.cfg.FlowLog != "" {
		if s.flowLog, err = flow.OpenJSONL(s.cfg.FlowLog, flowLogQueue, s.log.Named("flows")); err != nil {
			return err
		}
		sinks = append(sinks, s.flowLog)
	}
	s.sink = stamped{s.agent, flow.Tee(append(sinks, admin.NewMetrics(s.metrics, opts.Version, s.sources()))...)}
	if err := s.openProxy(); err != nil {
		return err
	}
	s.announce = newAnnouncer(s.log.Named("announce"))
	s.openHealth()
	s.views.Now = s.now
	s.views.Watch(s.viewChanged)
	s.watchBook()
	return s.openAdmin(ctx)
}

func (s *Sidecar) openProxy() error {
	var apps []proxy.App
	for name, addr := range s.cfg.App {
		a, err := app(name, addr)
		if err != nil {
			return fmt.Errorf("app.%s: %w", name, err)
		}
		apps = append(apps, a)
	}
	var err error
	s.inbound, err = proxy.ListenInbound(proxy.InboundConfig{
		Listen: s.cfg.Tunnel.Listen, Apps: apps, Source: s.agent.Source(), Views: &s.views,
		Book: s.book, Neighbours: s.near, Stale: s.stale, Sink: s.sink, Idle: s.cfg.Idle, Now: s.now,
		Log: s.log.Named("inbound"),
	})
	if err != nil {
		return err
	}
	var doors []proxy.Door
	for i, o := range s.cfg.Outbound {
		doors = append(doors, proxy.Door{Key: fmt.Sprintf("outbound[%d].listen", i), Listen: o.Listen, To: o.To})
	}
	s.outbound, err = proxy.ListenOutbound(proxy.OutboundConfig{
		Doors: doors, AllowUIDs: s.cfg.AllowUIDs, Source: s.agent.Source(), Views: &s.views,
		Book: s.book, Neighbours: s.near, Sink: s.sink, Idle: s.cfg.Idle, Now: s.now, Log: s.log.Named("outbound"),
	})
	return err
}

// openIdentity prepares the sidecar's own identity, and the socket at which the
// app gets its own SVID.
func (s *Sidecar) openIdentity() error {
	if s.cfg.Identity.WorkloadAPI != "" {
		return s.borrowIdentity()
	}
	a, err := agent.New(agent.Config{
		ControlPlane: s.cfg.ControlPlane, Evidence: s.cfg.evidence(), TrustBundle: s.cfg.TrustBundle,
		StateDir: s.cfg.StateDir, Now: s.now, Log: s.log, EnrollWithin: enrollWithin, Check: s.check,
	})
	if err != nil {
		return err
	}
	s.agent = a
	if s.cfg.WorkloadAPI.Socket == "" && len(s.cfg.Files) == 0 {
		return nil
	}
	log := s.log.Named("workload-api")
	s.wallet = agent.NewWallet(a, agent.WalletConfig{AllowUIDs: s.cfg.AllowUIDs, Log: log})
	for i, file := range s.cfg.Files {
		w, err := pemfile.New(file, s.log.Named("files"))
		if err != nil {
			return fmt.Errorf("files[%d]: %w", i, err)
		}
		if file.GRPC {
			if err := xds.AddBootstrap(w, s.cfg.ControlPlane); err != nil {
				return errors.Join(err, w.Close())
			}
		}
		s.files = append(s.files, agent.NewFiles(s.wallet, w, nil, uint32(os.Geteuid())))
	}
	if s.cfg.WorkloadAPI.Socket == "" {
		return nil
	}
	if s.endpoint, err = endpoint.New(endpoint.Config{Path: s.cfg.WorkloadAPI.Socket, Holder: s.wallet, Log: log, CheckJWT: s.checkJWT}); err != nil {
		return fmt.Errorf("workloadAPI.socket: %w", err)
	}
	return nil
}

func (s *Sidecar) borrowIdentity() error {
	var id spiffeid.ID
	if text := s.cfg.Identity.ControlPlaneID; text != "" {
		var err error
		if id, err = spiffeid.FromString(text); err != nil {
			return fmt.Errorf("identity.controlPlaneID: %w", err)
		}
	}
	b, err := agent.Borrow(agent.BorrowConfig{
		ControlPlane: s.cfg.ControlPlane, WorkloadAPI: s.cfg.Identity.WorkloadAPI, ControlPlaneID: id,
		StateDir: s.cfg.StateDir, Now: s.now, Log: s.log, Check: s.check,
		Trusting: func() { s.keeper.Restore(s.book) }, // before it no bundle verifies the list's signer
	})
	if err != nil {
		return err
	}
	s.agent = b
	return nil
}

func (s *Sidecar) openAdmin(ctx context.Context) (err error) {
	if s.cfg.Admin.Listen != "" {
		if s.adminHTTP, err = admin.Listen(ctx, s.cfg.Admin.Listen); err != nil {
			return fmt.Errorf("admin.listen: %w", err)
		}
	}
	if s.cfg.Admin.Socket != "" {
		if s.adminSocket, err = admin.ListenUnix(ctx, s.cfg.Admin.Socket); err != nil {
			return fmt.Errorf("admin.socket: %w", err)
		}
	}
	return nil
}

// close gives back what New opened, where Run will not.
func (s *Sidecar) close() {
	var errs []error
	if s.inbound != nil {
		errs = append(errs, s.inbound.Close())
	}
	if s.outbound != nil {
		errs = append(errs, s.outbound.Close())
	}
	if s.endpoint != nil {
		errs = append(errs, s.endpoint.Close())
	}
	for _, f := range s.files {
		errs = append(errs, f.Close())
	}
	for _, ln := range []net.Listener{s.adminHTTP, s.adminSocket} {
		if ln != nil {
			errs = append(errs, ln.Close())
		}
	}
	if s.flowLog != nil {
		done, cancel := context.WithCancel(context.Background())
		cancel()
		errs = append(errs, s.flowLog.Run(done)) // closes the file
	}
	if err := errors.Join(errs...); err != nil {
		s.log.Debug("closing after an error", "error", err)
	}
}

// TunnelAddr is the address of the tunnel listener.
func (s *Sidecar) TunnelAddr() net.Addr { return s.inbound.Addr() }

// OutboundAddrs are the addresses of the outbound listeners, in the order of the
// configuration.
func (s *Sidecar) OutboundAddrs() []net.Addr { return s.outbound.Addrs() }

// AdminAddr is the address of health and metrics; nil when there is none.
func (s *Sidecar) AdminAddr() net.Addr {
	if s.adminHTTP == nil {
		return nil
	}
	return s.adminHTTP.Addr()
}

// stamped marks records with who made them.
type stamped struct {
	agent provider
	next  flow.Sink
}

func (s stamped) Record(f flow.Flow) {
	f.Reporter, f.Instance = s.agent.ID().String(), s.agent.Instance()
	s.next.Record(f)
}

// apply puts one kind of resource in force. What it refuses is refused to the
// control plane, and the last good state stays.
func (s *Sidecar) apply(u xds.Update) error {
	switch u.Kind {
	case xds.Bundles:
		if err := s.agent.SetBundles(u.Bundles); err != nil {
			return err
		}
	case xds.Revocations:
		if u.Revocations == nil {
			break // withdrawn: what is in force stays
		}
		if _, err := s.book.Offer(u.Revocations); err != nil {
			return err
		}
	}
	s.views.Apply(u)
	s.log.Debug("view updated", "kind", u.Kind, "revision", u.Rev)
	return nil
}
