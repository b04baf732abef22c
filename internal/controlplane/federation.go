package controlplane

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/catalog"
	"github.com/sallyport-mesh/sallyport/internal/federation"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// trustServers are the endpoints that give our keys to others: to foreign trust
// domains by https_spiffe, and by https_web also to relying parties of OIDC.
type trustServers struct {
	bundle, web net.Listener // nil where not configured
	cert        *federation.WebCert
}

// listenTrust opens what is configured and nothing else.
func (c *ControlPlane) listenTrust(ctx context.Context) (err error) {
	t := &c.trust
	if addr := c.cfg.Listen.Bundle; addr != "" {
		if t.bundle, err = admin.Listen(ctx, addr); err != nil {
			return fmt.Errorf("listen.bundle: %w", err)
		}
	}
	if addr := c.cfg.Listen.Web; addr != "" {
		if t.cert, err = federation.LoadWebCert(c.cfg.Web.CertFile, c.cfg.Web.KeyFile, c.opts.Now, c.log.Named("web")); err != nil {
			return fmt.Errorf("web.certFile: %w", err)
		}
		if t.web, err = admin.Listen(ctx, addr); err != nil {
			return fmt.Errorf("listen.web: %w", err)
		}
	}
	return nil
}

// addTrustParts adds what has to run for federation.
func (c *ControlPlane) addTrustParts(parts map[string]func(context.Context) error) {
	parts["federation"] = c.federation.Run
	log := c.log.Named("trust")
	if ln := c.trust.bundle; ln != nil {
		parts["bundle endpoint"] = func(ctx context.Context) error {
			return federation.Serve(ctx, ln, federation.SPIFFETLS(c.authority.ServerSVID(), c.opts.Now), federation.BundleHandler(c.authority.Bundle), log)
		}
	}
	if ln := c.trust.web; ln != nil {
		parts["web endpoint"] = func(ctx context.Context) error {
			h, err := federation.WebHandler(c.cfg.JWTIssuer, c.authority.Bundle)
			if err != nil {
				return err
			}
			return federation.Serve(ctx, ln, c.trust.cert.TLS(), h, log)
		}
	}
}

// TrustAddrs are the addresses of listen.bundle and listen.web; "" where not
// configured.
func (c *ControlPlane) TrustAddrs() (bundle, web string) {
	for p, ln := range map[*string]net.Listener{&bundle: c.trust.bundle, &web: c.trust.web} {
		if ln != nil {
			*p = ln.Addr().String()
		}
	}
	return bundle, web
}

// openFederation makes the manager of foreign bundles.
func (c *ControlPlane) openFederation() error {
	roots, err := c.cfg.Federation.roots()
	if err != nil {
		return err
	}
	c.federation = federation.NewManager(federation.Config{
		Own: c.authority.TrustDomain(), OwnBundle: c.authority.Bundle, Store: c.store,
		Publish: func(b identity.Bundles) { c.reconciler.setForeign(b) }, WebRoots: roots,
		Audit: func(td spiffeid.TrustDomain, detail string) store.Op {
			return c.audit.Op(audit.Record{Actor: "federation", Origin: "bundle endpoint", Action: "federation.bundle", Subject: td.Name(), Detail: detail, Result: "in force"})
		},
		MinRefresh: c.opts.BundleRefresh, MaxRefresh: c.opts.BundleRefresh,
		Now: c.opts.Now, Log: c.log.Named("federation"),
	})
	c.health.Set(componentFederation, admin.OK, "")
	c.health.BeforeReport(c.checkFederation)
	c.metrics.MustRegister(federationMetrics{c.federation, c.opts.Now})
	return nil
}

// checkFederation is asked before each health report. A foreign trust domain in
// trouble is degraded: the last good bundles hold.
func (c *ControlPlane) checkFederation() {
	var problems []string
	for _, s := range c.federation.Status() {
		if s.Problem != "" {
			problems = append(problems, s.TrustDomain.Name()+": "+s.Problem)
		}
	}
	if c.trust.cert != nil {
		if p := c.trust.cert.Problem(); p != "" {
			problems = append(problems, "listen.web: "+p)
		}
	}
	if len(problems) > 0 {
		c.health.Set(componentFederation, admin.Degraded, strings.Join(problems, "; "))
		return
	}
	c.health.Set(componentFederation, admin.OK, "")
}

// setPeers tells the manager whom the documents in force name.
func (c *ControlPlane) setPeers(s catalog.State) {
	var peers []federation.Peer
	for _, d := range s.Rules.TrustDomains() {
		p := federation.Peer{TrustDomain: d.Domain, Bootstrap: d.Bundle}
		if e := d.Endpoint; e != nil {
			p.URL, p.Profile, p.EndpointID = e.URL, federation.Profile(e.Profile), e.ID
		}
		peers = append(peers, p)
	}
	c.federation.SetPeers(peers)
}

// addForeign puts the destinations and bundles of other trust domains into a
// snapshot. A bundle whose document is gone is left out, whatever the manager
// still holds.
func addForeign(s *xds.Snapshot, bundles identity.Bundles) {
	for _, d := range s.Rules.TrustDomains() {
		if b := bundles[d.Domain]; b != nil {
			s.Bundles[d.Domain] = b
		}
		for _, w := range d.Workloads {
			s.Services[w.ID] = foreignService(d.Name, w)
		}
	}
}

func foreignService(alias string, w policy.ForeignWorkload) xds.Service {
	out := xds.Service{ID: w.ID, Ports: w.Ports}
	out.MeshName, _ = identity.ForeignMeshName(w.ID, alias) // not every ID has one
	var ports []uint16
	for _, p := range w.Ports {
		ports = append(ports, p.Number)
	}
	for _, addr := range w.Endpoints {
		out.Endpoints = append(out.Endpoints, xds.Endpoint{Instance: addr.String(), Addr: addr, Ports: ports})
	}
	return out
}

// federated is the foreign trust domains for status output, and what is wrong
// with them.
func federated(m *federation.Manager) (out []*sallyportv1.FederatedDomain, problems []string) {
	for _, s := range m.Status() {
		d := &sallyportv1.FederatedDomain{TrustDomain: s.TrustDomain.Name(), Profile: string(s.Profile), Url: s.URL, Problem: s.Problem}
		if s.Bundle != nil {
			d.Authorities = uint32(len(s.Bundle.X509Authorities()))
		}
		if !s.Success.IsZero() {
			d.LastSuccess = timestamppb.New(s.Success)
		}
		out = append(out, d)
		if s.Problem != "" {
			hint := "the last good bundle holds"
			if s.Bundle == nil {
				hint = "nothing of it is trusted"
			}
			problems = append(problems, fmt.Sprintf("foreign trust domain %s (%s): %s", d.GetTrustDomain(), hint, s.Problem))
		}
	}
	return out, problems
}

// TrustBundle implements the RPC.
func (a *adminServer) TrustBundle(_ context.Context, req *sallyportv1.TrustBundleRequest) (*sallyportv1.TrustBundleResponse, error) {
	td, bundle := a.trustDomain, a.bundle()
	if name := req.GetTrustDomain(); name != "" && name != td.Name() {
		var err error
		if td, err = spiffeid.TrustDomainFromString(name); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "%q is not a trust domain: %v", name, err)
		}
		if bundle, err = a.foreignBundle(td); err != nil {
			return nil, err
		}
	}
	if bundle == nil {
		return nil, errStarting()
	}
	data, err := identity.MarshalBundle(bundle)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &sallyportv1.TrustBundleResponse{TrustDomain: td.Name(), Bundle: data}, nil
}

func (a *adminServer) foreignBundle(td spiffeid.TrustDomain) (*spiffebundle.Bundle, error) {
	for _, s := range a.federation.Status() {
		if s.TrustDomain != td {
			continue
		}
		if s.Bundle == nil {
			return nil, status.Errorf(codes.FailedPrecondition, "no bundle of %s is held: %s", td.Name(), s.Problem)
		}
		return s.Bundle, nil
	}
	return nil, status.Errorf(codes.NotFound, "no TrustDomain document names %s", td.Name())
}

// federationMetrics reads the manager's status at each scrape.
type federationMetrics struct {
	m   *federation.Manager
	now func() time.Time
}

// Describe implements prometheus.Collector.
func (f federationMetrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(f, ch) }

// Collect implements prometheus.Collector.
func (f federationMetrics) Collect(ch chan<- prometheus.Metric) {
	label := []string{"trust_domain"}
	problem := prometheus.NewDesc("sallyport_federation_problem", "1 while the bundle of a foreign trust domain cannot be renewed.", label, nil)
	age := prometheus.NewDesc("sallyport_federation_bundle_age_seconds", "Seconds since the bundle was last fetched.", label, nil)
	failures := prometheus.NewDesc("sallyport_federation_fetch_failures_total", "Fetches that failed.", label, nil)
	for _, s := range f.m.Status() {
		name, bad := s.TrustDomain.Name(), 0.0
		if s.Problem != "" {
			bad = 1
		}
		ch <- prometheus.MustNewConstMetric(problem, prometheus.GaugeValue, bad, name)
		ch <- prometheus.MustNewConstMetric(failures, prometheus.CounterValue, float64(s.Failures), name)
		if !s.Success.IsZero() {
			ch <- prometheus.MustNewConstMetric(age, prometheus.GaugeValue, f.now().Sub(s.Success).Seconds(), name)
		}
	}
}
