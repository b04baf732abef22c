// Package controlplane is the control plane put together: it opens the store,
// runs issuer, catalogue and xDS server, reconciles them into one view per
// node, and serves Announce and the operator's API.
//
// It is composition. How SVIDs are issued, sets applied or resources pushed is
// told in the packages that it wires; the only state it owns itself is which
// endpoints are published.
package controlplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/catalog"
	"github.com/sallyport-mesh/sallyport/internal/federation"
	"github.com/sallyport-mesh/sallyport/internal/insight"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/external"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/internal/store/etcd"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Options is what a program or a test gives besides the configuration.
type Options struct {
	Log     hclog.Logger
	Now     func() time.Time
	Version string
	// Store replaces the one that the configuration names; it is closed by Run.
	Store store.Store
	// BundleRefresh is the time between two fetches of a foreign bundle, for tests;
	// zero: what the bundle says, within 1 min and 1 h.
	BundleRefresh time.Duration
}

// ControlPlane is one replica. New opens everything that can be refused, so
// that Run only serves.
type ControlPlane struct {
	cfg  Config
	opts Options
	log  hclog.Logger

	store      store.Store
	authority  authority
	ca         *ca.CA           // nil with an external issuer
	external   *external.Issuer // nil with the own CA
	audit      *audit.Log
	registry   *registry.Registry
	catalog    *catalog.Catalog
	xds        *xds.Server
	flows      *insight.Collector
	endpoints  *endpoints
	announcer  *announcer
	auth       *authenticator
	reconciler *reconciler
	federation *federation.Manager
	trust      trustServers
	revoker    *revoker
	health     *admin.Health
	metrics    *prometheus.Registry
	passed     atomic.Bool // readiness was reached once

	verifiers verifiers // of evidence

	grpcListener, metricsListener, adminListener net.Listener
}

// New opens state and listeners. cfg must be complete and valid (WithDefaults,
// Validate).
func New(ctx context.Context, cfg Config, opts Options) (_ *ControlPlane, err error) {
	c := &ControlPlane{cfg: cfg, opts: opts, log: opts.Log, metrics: prometheus.NewRegistry()}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := c.listen(ctx); err != nil {
		return nil, err
	}
	if c.store, err = c.openStore(ctx); err != nil {
		return nil, err
	}
	if err := c.openVerifiers(); err != nil {
		return nil, err
	}
	if err := c.openAuthority(ctx); err != nil {
		return nil, err
	}
	c.build()
	if err := c.openFederation(); err != nil {
		return nil, err
	}
	return c, nil
}

// listen comes first: a port in use is found before anything is written.
func (c *ControlPlane) listen(ctx context.Context) (err error) {
	if err := os.MkdirAll(c.cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("making dataDir: %w", err)
	}
	if c.grpcListener, err = admin.Listen(ctx, c.cfg.Listen.GRPC); err != nil {
		return fmt.Errorf("listen.grpc: %w", err)
	}
	if c.metricsListener, err = admin.Listen(ctx, c.cfg.Listen.Metrics); err != nil {
		return fmt.Errorf("listen.metrics: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(c.cfg.AdminSocket), 0o700); err != nil {
		return fmt.Errorf("making the folder of adminSocket: %w", err)
	}
	if c.adminListener, err = admin.ListenUnix(ctx, c.cfg.AdminSocket); err != nil {
		return fmt.Errorf("adminSocket: %w", err)
	}
	return c.listenTrust(ctx)
}

func (c *ControlPlane) openStore(ctx context.Context) (store.Store, error) {
	if c.opts.Store != nil {
		return c.opts.Store, nil
	}
	if len(c.cfg.Etcd.Endpoints) == 0 {
		return etcd.Embedded(ctx, etcd.EmbeddedConfig{Dir: filepath.Join(c.cfg.DataDir, "etcd"), Log: c.log.Named("etcd")})
	}
	tls, err := c.cfg.Etcd.tlsConfig()
	if err != nil {
		return nil, err
	}
	return etcd.Dial(ctx, etcd.Config{Endpoints: c.cfg.Etcd.Endpoints, TLS: tls, Prefix: c.cfg.Etcd.Prefix, Log: c.log.Named("etcd")})
}

func (c *ControlPlane) build() {
	td, now := c.authority.TrustDomain(), c.opts.Now
	c.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	c.health = admin.NewHealth(now, componentPolicy, componentXDS)
	c.audit = audit.New(c.store, now)
	c.registry = registry.New(registry.Config{
		Store: c.store, Audit: c.audit, RootHash: c.rootHash, Issuers: c.verifiers.count(),
		SVIDTTL: c.cfg.CA.SVIDTTL, Now: now, Log: c.log,
	})
	c.catalog = catalog.New(catalog.Config{Store: c.store, Audit: c.audit, TrustDomain: td, Now: now, Log: c.log.Named("catalog")})
	c.flows = insight.New(insight.Config{Registry: c.metrics, Log: c.log.Named("flows")})
	c.xds = xds.NewServer(xds.ServerConfig{
		Log: c.log.Named("xds"), Now: now,
		InstanceOf: c.instanceInCertificate(),
	})
	c.auth = &authenticator{trustDomain: td, member: c.member, revoked: c.refuseRevoked, now: now}
	c.reconciler = newReconciler(td, c.publish, c.setWorkloads, c.log.Named("reconcile"))
	c.revoker = &revoker{
		trustDomain: td, registry: c.registry, source: c.authority.ServerSVID(), backdate: c.backdate(),
		publish: c.reconciler.setRevocations, now: now, log: c.log.Named("revocation"),
		changed: make(chan struct{}, 1), book: revocation.NewBook(c.authority.ServerSVID(), now),
	}
	c.reconciler.revoked = c.revoker.atGRPC
	if ext, err := c.cfg.ExternalIssuer.config(c.cfg.TrustDomain); err == nil { // else it is our CA
		c.revoker.book.Expect(ext.ID)
	}
	c.endpoints = &endpoints{store: c.store, log: c.log.Named("endpoints"), renew: leaseRenew}
	c.announcer = &announcer{
		endpoints: c.endpoints, ranges: c.cfg.Announce.Ranges, ports: c.declaredPorts,
		instance: c.instanceOf, log: c.log.Named("announce"), drain: make(chan struct{}),
	}
	if c.external != nil {
		c.health.BeforeReport(c.checkExternal)
	} else {
		c.health.BeforeReport(c.checkAuthority)
	}
	c.registerMetrics()
}

// setWorkloads tells who may enrol, and has the IDs revoked that nobody has any
// more.
func (c *ControlPlane) setWorkloads(list []policy.CompiledWorkload) {
	c.registry.SetWorkloads(list)
	c.revoker.workloadsChanged()
}

func (c *ControlPlane) refuseRevoked(p identity.Peer, orphan bool) error {
	return c.revoker.refuse(p, orphan)
}

// member is nil if the caller's workload exists. Before the first snapshot nobody
// knows; that is an error that invites another try.
func (c *ControlPlane) member(p identity.Peer) error {
	if c.reconciler.current() == nil {
		return errStarting()
	}
	if _, ok := c.declaredPorts(p.ID); !ok {
		return status.Errorf(codes.PermissionDenied, "no Workload has the ID %s", p.ID)
	}
	return nil
}

func (c *ControlPlane) declaredPorts(id spiffeid.ID) ([]policy.Port, bool) {
	state := c.reconciler.current()
	if state == nil {
		return nil, false
	}
	w, ok := state.Rules.Workload(id)
	return w.Ports, ok
}

// instanceOf reads the instance out of the caller's certificate and checks that
// it still is one. An external issuer's certificates do not say it.
func (c *ControlPlane) instanceOf(ctx context.Context, p identity.Peer) (string, error) {
	if c.external != nil {
		return claimedInstance(ctx)
	}
	name := ca.Instance(p.Leaf)
	return name, c.registry.Entitled(ctx, p.ID, name)
}

// publish hands a snapshot to the sidecars. One whose workload is no more gets a
// view in which everything is denied; its other streams end.
func (c *ControlPlane) publish(s *xds.Snapshot) {
	c.xds.SetSnapshot(s)
	c.revoker.goesOut(s.Revocations)
	c.auth.recheck()
	c.health.Set(componentXDS, admin.OK, "")
}

func (c *ControlPlane) grpcServer() *grpc.Server {
	s := grpc.NewServer(append(networkServerOptions(),
		grpc.Creds(serverCredentials(identity.TLSConfig{Source: c.authority.ServerSVID(), Now: c.opts.Now})),
		grpc.ChainUnaryInterceptor(c.refuseEnrolmentUnary, c.auth.unary), grpc.ChainStreamInterceptor(c.refuseEnrolmentStream, c.auth.stream))...)
	sallyportv1.RegisterEnrollmentServer(s, c.enrolment())
	sallyportv1.RegisterAnnouncerServer(s, c.announcer)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(s, c.xds)
	accesslogv3.RegisterAccessLogServiceServer(s, c.flows)
	return s
}

func (c *ControlPlane) adminServer() *grpc.Server {
	source := "sallyport apply"
	if c.cfg.PolicyDir != "" {
		source = "watched folder " + c.cfg.PolicyDir
	}
	s := grpc.NewServer(grpc.Creds(localCredentials{}), grpc.MaxRecvMsgSize(maxAdminMessage), grpc.MaxSendMsgSize(maxAdminMessage))
	sallyportv1.RegisterAdminServer(s, &adminServer{
		trustDomain: c.authority.TrustDomain(), catalog: c.catalog, audit: c.audit, registry: c.registry,
		xds: c.xds, flows: c.flows, reconciler: c.reconciler, revoker: c.revoker, ca: c.ca, verifiers: c.verifiers, federation: c.federation, bundle: c.authority.Bundle, enrolment: c.refuseToken, now: c.opts.Now,
		status: &statusReporter{
			version: c.opts.Version, source: source, started: c.opts.Now(), problems: []func() string{c.catalog.Problem, c.authorityTrouble, c.revoker.trouble},
			authorities: c.authorities, instances: c.instances, xds: c.xds, reconciler: c.reconciler,
			federation: c.federation, revocations: c.registry.Revocations,
			doors: &doorman{catalog: c.catalog, flows: c.flows}, now: c.opts.Now,
		},
	})
	return s
}

func (c *ControlPlane) close() error {
	var errs []error
	for _, l := range []net.Listener{c.grpcListener, c.metricsListener, c.adminListener, c.trust.bundle, c.trust.web} {
		if l != nil {
			if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	if c.store != nil {
		errs = append(errs, c.store.Close())
	}
	return errors.Join(errs...)
}

// Addrs are the addresses in use, for tests that listen on port 0.
func (c *ControlPlane) Addrs() (grpc, metrics, adminSocket string) {
	return c.grpcListener.Addr().String(), c.metricsListener.Addr().String(), c.cfg.AdminSocket
}
