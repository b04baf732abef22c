package controlplane

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/external"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// authority is whoever signs this trust domain's SVIDs, as far as everything but
// enrolment has to do with it: the own [ca.CA], or an [external.Issuer].
type authority interface {
	TrustDomain() spiffeid.TrustDomain
	ServerSVID() identity.Source
	Bundle() *spiffebundle.Bundle // nil: not known yet
	WatchBundle(context.Context, func(*spiffebundle.Bundle) error) error
	Run(context.Context) error
}

// openAuthority opens the own CA, or where another issuer is configured that one
// and no CA at all.
func (c *ControlPlane) openAuthority(ctx context.Context) error {
	if !c.cfg.ExternalIssuer.configured() {
		if err := c.openCA(ctx); err != nil {
			return err
		}
		c.authority = c.ca
		return nil
	}
	e, err := c.cfg.ExternalIssuer.config(c.cfg.TrustDomain)
	if err != nil {
		return err
	}
	if e.Endpoint.WebRoots, err = c.cfg.Federation.roots(); err != nil {
		return err
	}
	e.Endpoint.MinRefresh, e.Endpoint.MaxRefresh = c.opts.BundleRefresh, c.opts.BundleRefresh
	e.Store, e.Now, e.Log = c.store, c.opts.Now, c.log
	if c.external, err = external.Open(e); err != nil {
		return fmt.Errorf("externalIssuer: %w", err)
	}
	c.authority = c.external
	return nil
}

// names are those for the control plane's own certificate.
func (l Listen) names() []string {
	if l.Names != nil {
		return l.Names
	}
	host, _, err := net.SplitHostPort(l.GRPC)
	if ip := net.ParseIP(host); err != nil || host == "" || ip != nil && ip.IsUnspecified() {
		return nil
	}
	return []string{host}
}

func (c *ControlPlane) openCA(ctx context.Context) (err error) {
	var td spiffeid.TrustDomain // zero: the one that the data has
	if c.cfg.TrustDomain != "" {
		if td, err = spiffeid.TrustDomainFromString(c.cfg.TrustDomain); err != nil {
			return fmt.Errorf("trustDomain %q: %w", c.cfg.TrustDomain, err)
		}
	}
	c.ca, err = ca.Open(ctx, ca.Config{
		TrustDomain: td, KeyDir: filepath.Join(c.cfg.DataDir, "keys"), Store: c.store,
		RootTTL: c.cfg.CA.RootTTL, IntermediateTTL: c.cfg.CA.IntermediateTTL, SVIDTTL: c.cfg.CA.SVIDTTL, JWTKeyTTL: c.cfg.CA.JWTKeyTTL,
		JWTIssuer: c.cfg.JWTIssuer, ServerNames: c.cfg.Listen.names(),
		Signer: ca.SignerConfig{PKCS11: ca.PKCS11(c.cfg.CA.PKCS11), Upstream: ca.Upstream(c.cfg.CA.Upstream)},
		Now:    c.opts.Now, Log: c.log,
	})
	return err
}

// backdate is by how much a certificate's not-before precedes its issue. Of another
// issuer's nothing is known.
func (c *ControlPlane) backdate() time.Duration {
	if c.ca == nil {
		return 0
	}
	return ca.Backdate
}

// authorityList is for status output; an external issuer shows what its bundle has.
func (c *ControlPlane) authorityList() []ca.Authority {
	if c.ca != nil {
		return c.ca.Authorities()
	}
	var out []ca.Authority
	if b := c.external.Bundle(); b != nil {
		for _, cert := range b.X509Authorities() {
			out = append(out, ca.Authority{Kind: "root", Subject: cert.Subject.String(), State: "external", NotAfter: cert.NotAfter})
		}
	}
	return out
}

// checkExternal is asked before each health report.
func (c *ControlPlane) checkExternal() {
	text, down := c.external.Problem()
	switch {
	case text == "":
		c.health.Set(componentIssuer, admin.OK, "")
	case down:
		c.health.Set(componentIssuer, admin.Down, text)
	default:
		c.health.Set(componentIssuer, admin.Degraded, text)
	}
}

// refuseEnrolment answers every RPC of enrolment: who is who, another issuer says.
func (c *ControlPlane) refuseEnrolment(method string) error {
	if c.external == nil || !strings.HasPrefix(method, "/"+sallyportv1.Enrollment_ServiceDesc.ServiceName+"/") {
		return nil
	}
	return c.errExternal(codes.Unimplemented)
}

func (c *ControlPlane) errExternal(code codes.Code) error {
	return status.Errorf(code, "an external issuer signs the SVIDs of %s: take them from its Workload API (identity.workloadAPI in the sidecar's configuration)", c.authority.TrustDomain().Name())
}

// enrolment serves enrolment; where there is none the interceptors say why.
func (c *ControlPlane) enrolment() sallyportv1.EnrollmentServer {
	if c.external != nil {
		return sallyportv1.UnimplementedEnrollmentServer{}
	}
	return c.issuerService()
}

// refuseToken is why no join token can be made; nil: one can.
func (c *ControlPlane) refuseToken() error {
	if c.external == nil {
		return nil
	}
	return c.errExternal(codes.FailedPrecondition)
}

// rootHash goes into join tokens; with an external issuer none are made.
func (c *ControlPlane) rootHash() [sha256.Size]byte {
	if c.ca == nil {
		return [sha256.Size]byte{}
	}
	return c.ca.RootHash()
}

func (c *ControlPlane) refuseEnrolmentUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := c.refuseEnrolment(info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (c *ControlPlane) refuseEnrolmentStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := c.refuseEnrolment(info.FullMethod); err != nil {
		return err
	}
	return next(srv, ss)
}

// instanceInCertificate is nil where certificates do not say it.
func (c *ControlPlane) instanceInCertificate() func(identity.Peer) string {
	if c.external != nil {
		return nil
	}
	return func(p identity.Peer) string { return ca.Instance(p.Leaf) }
}

var instanceName = regexp.MustCompile(`^[a-zA-Z0-9._-]{1,64}$`)

// claimedInstance is what a caller with an external issuer's SVID calls itself.
// Everything that hangs on it is kept under the caller's own ID.
func claimedInstance(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	v := md.Get(sallyportv1.InstanceMetadata)
	if len(v) != 1 || !instanceName.MatchString(v[0]) {
		return "", fmt.Errorf("the metadata %s must name this instance, in 1 to 64 of a-z, A-Z, 0-9, dot, underscore, hyphen", sallyportv1.InstanceMetadata)
	}
	return v[0], nil
}

// instances are those that enrolled or, with an external issuer, those that are
// connected: nobody else is known.
func (c *ControlPlane) instances(ctx context.Context) ([]registry.Instance, error) {
	if c.external == nil {
		return c.registry.Instances(ctx)
	}
	seen := map[node]bool{}
	var out []registry.Instance
	add := func(n node) {
		if n.instance != "" && !seen[n] {
			seen[n] = true
			out = append(out, registry.Instance{ID: n.id, Name: n.instance})
		}
	}
	for _, n := range c.xds.Nodes() {
		add(node{n.ID, n.Instance})
	}
	for id, eps := range c.reconciler.currentEndpoints() {
		for _, e := range eps {
			add(node{id, e.Instance})
		}
	}
	return out, nil
}

var (
	_ authority = (*ca.CA)(nil)
	_ authority = (*external.Issuer)(nil)
)
