package controlplane

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/catalog"
	"github.com/sallyport-mesh/sallyport/internal/xds"
)

// Names of health components.
const (
	componentPolicy = "policy"
	componentXDS    = "xds"

	componentFederation = "federation"
	componentIssuer     = "issuer" // an external one
	// componentAuthority says what must be done before signing keys expire.
	componentAuthority = "authority"
)

const (
	// maxAdminMessage bounds what an operator may send, in bytes: the largest
	// set there may be and some room.
	maxAdminMessage = 64 << 20
	// maxNetworkMessage bounds what a sidecar may send, in bytes.
	maxNetworkMessage = 2 << 20
	// maxHeaders bounds the header fields of one RPC, in bytes.
	maxHeaders = 32 << 10
	// idleLimit ends connections without a stream: a sidecar always has some.
	idleLimit = 30 * time.Second
	// pingEvery and pingTimeout find a sidecar that vanished from the network:
	// both together stay below the 15 s in which its endpoint must be gone.
	pingEvery   = 5 * time.Second
	pingTimeout = 5 * time.Second
	// stopTimeout bounds the orderly end of streams on SIGTERM.
	stopTimeout = 5 * time.Second
	// readyTimeout bounds the store's answer to a readiness probe.
	readyTimeout = 2 * time.Second
)

// networkServerOptions shape the server that sidecars reach: small buffers,
// since there are many and they mostly listen; pings, since liveness is the
// stream.
func networkServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingEvery, Timeout: pingTimeout, MaxConnectionIdle: idleLimit}),
		grpc.MaxRecvMsgSize(maxNetworkMessage), grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(16),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.ReadBufferSize(4 << 10), grpc.WriteBufferSize(4 << 10),
	}
}

// Run serves until ctx ends, then drains and closes. It fails when a part
// fails that the others cannot do without.
func (c *ControlPlane) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	network, operators := c.grpcServer(), c.adminServer()
	parts := map[string]func(context.Context) error{
		"authority":  c.authority.Run,
		"registry":   c.registry.Run,
		"reconciler": c.reconciler.run,
		"revocation": c.revoker.run,
		"signer":     c.revoker.resign,
		"revisor":    c.revoker.revise,
		"bundle": func(ctx context.Context) error {
			return c.authority.WatchBundle(ctx, func(b *spiffebundle.Bundle) error { c.reconciler.setBundle(b); return nil })
		},
		"catalogue": c.watchCatalog,
		"endpoints": func(ctx context.Context) error { return c.endpoints.watch(ctx, c.reconciler.setEndpoints) },
		"lease": func(ctx context.Context) error {
			return c.endpoints.keepLease(ctx, c.announcer.reannounce)
		},
		"metrics": func(ctx context.Context) error {
			return admin.Serve(ctx, c.metricsListener, admin.Handler(c.health, c.ready, c.metrics))
		},
		"admin API": func(context.Context) error { return operators.Serve(c.adminListener) },
		"sidecars":  func(context.Context) error { return network.Serve(c.grpcListener) },
		"stop":      func(ctx context.Context) error { return c.stopServers(ctx, network, operators) },
	}
	if c.ca != nil {
		parts["tainted"] = func(ctx context.Context) error { return c.revoker.refuseTainted(ctx, c.ca, c.ca.TaintGrace()) }
	}
	if c.cfg.PolicyDir != "" {
		parts["policy folder"] = func(ctx context.Context) error { return c.catalog.WatchDir(ctx, c.cfg.PolicyDir) }
	}
	c.addTrustParts(parts)
	for name, run := range parts {
		g.Go(func() error {
			err := run(ctx)
			if errors.Is(err, grpc.ErrServerStopped) && ctx.Err() != nil { // stopped before it began
				return nil
			}
			if err != nil && !errors.Is(err, context.Canceled) {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	grpcAddr, metricsAddr, socket := c.Addrs()
	c.log.Info("serving", "trust_domain", c.authority.TrustDomain().Name(), "sidecars", grpcAddr, "metrics", metricsAddr, "admin", socket)
	err := g.Wait()
	return errors.Join(err, c.close())
}

// stopServers ends the servers when ctx is done: streams first, so that
// sidecars know, then what is left of them.
func (c *ControlPlane) stopServers(ctx context.Context, servers ...*grpc.Server) error {
	<-ctx.Done()
	c.log.Info("stopping")
	close(c.announcer.drain)
	c.xds.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, s := range servers {
			s.GracefulStop()
		}
	}()
	select {
	case <-done:
	case <-time.After(stopTimeout):
		for _, s := range servers {
			s.Stop()
		}
		<-done
	}
	return nil
}

func (c *ControlPlane) watchCatalog(ctx context.Context) error {
	return c.catalog.Watch(ctx, func(s catalog.State) error {
		c.log.Info("revision in force", "revision", s.Rev.String(), "workloads", len(s.Rules.Workloads()))
		c.health.Set(componentPolicy, admin.OK, "")
		c.setPeers(s)
		c.reconciler.setCatalog(s)
		return nil
	})
}

// ready is nil once the first snapshot is out and, where a folder is watched,
// what stands in it has been looked at and handed on.
func (c *ControlPlane) ready() error {
	state := c.reconciler.current()
	if state == nil {
		return errors.Join(errors.New("the first snapshot is not built yet"), problem(c.catalog))
	}
	if c.cfg.PolicyDir == "" {
		return nil
	}
	if !c.catalog.Looked() {
		return fmt.Errorf("policyDir %s has not been read yet", c.cfg.PolicyDir)
	}
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	rev, err := c.catalog.Current(ctx)
	if err != nil {
		return fmt.Errorf("reading the revision in force: %w", err)
	}
	if !c.passed.Load() && xds.Revision(state.Rev).Less(xds.Revision(rev)) {
		return fmt.Errorf("revision %s is not handed on yet", rev)
	}
	c.passed.Store(true) // from then on a revision under way does not make it unready
	return nil
}

func problem(c *catalog.Catalog) error {
	if p := c.Problem(); p != "" {
		return errors.New(p)
	}
	return nil
}

func (c *ControlPlane) checkAuthority() {
	trouble, status := c.authorityTrouble(), admin.OK
	if trouble != "" {
		status = admin.Degraded
	}
	c.health.Set(componentAuthority, status, trouble)
}

// authorityTrouble says what keeps the own CA from rotating; "" when nothing does.
func (c *ControlPlane) authorityTrouble() string {
	if c.ca == nil {
		return ""
	}
	var problems []string
	for _, p := range c.ca.Health() {
		problems = append(problems, p.Error())
	}
	return strings.Join(problems, "; ")
}

func (c *ControlPlane) authorities() []*sallyportv1.Authority {
	var out []*sallyportv1.Authority
	for _, a := range c.authorityList() {
		out = append(out, &sallyportv1.Authority{Kind: a.Kind, Subject: a.Subject, State: a.State, KeyHash: a.KeyHash, NotAfter: timestamppb.New(a.NotAfter)})
	}
	return out
}

func (c *ControlPlane) registerMetrics() {
	gauge := func(name, help string, value func() float64) {
		c.metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("sallyport_controlplane_sidecars", "Sidecars with an open ADS stream.", func() float64 { return float64(len(c.xds.Nodes())) })
	gauge("sallyport_controlplane_nacks", "Sidecars that refuse the present revision.", func() float64 {
		n := 0
		for _, node := range c.xds.Nodes() {
			if node.Nack != "" {
				n++
			}
		}
		return float64(n)
	})
	gauge("sallyport_controlplane_revision", "Number of the policy revision in force.", func() float64 {
		if s := c.reconciler.current(); s != nil {
			return float64(s.Rev.N)
		}
		return 0
	})
	gauge("sallyport_controlplane_policy_problem", "1 while the watched folder is not in force as it stands.", func() float64 {
		if c.catalog.Problem() != "" {
			return 1
		}
		return 0
	})
	gauge("sallyport_controlplane_authority_seconds_left", "Seconds until the first authority in use expires.", func() float64 {
		left := math.Inf(1)
		for _, a := range c.authorityList() {
			if a.State == "active" || a.State == "external" {
				left = min(left, a.NotAfter.Sub(c.opts.Now()).Seconds())
			}
		}
		return left
	})
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "sallyport_build_info", Help: "1; the labels say what runs.", ConstLabels: prometheus.Labels{"version": c.opts.Version},
	})
	build.Set(1)
	c.metrics.MustRegister(build)
}
