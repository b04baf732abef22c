package xds

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second // for machines under load

var shop = spiffeid.RequireTrustDomainFromString("shop.example")

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(shop, path) }

func pattern(t testing.TB, s string) identity.Pattern {
	p, err := identity.ParsePattern(s)
	require.NoError(t, err)
	return p
}

// root makes a self-signed CA certificate.
func root(t testing.TB, name string) *x509.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		URIs: []*url.URL{shop.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	c, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return c
}

func allow(t testing.TB, name, from, to string, ports ...uint16) policy.Rule {
	return policy.Rule{
		Ref: policy.RuleRef{Policy: name, File: name + ".yaml", Line: 7}, Effect: policy.Allow,
		From: []identity.Pattern{pattern(t, from)}, To: []identity.Pattern{pattern(t, to)}, Ports: ports,
	}
}

func service(path string, instances ...string) Service {
	s := Service{ID: id(path), Ports: []policy.Port{{Name: "http", Number: 8080, Protocol: policy.HTTP}}}
	for i, name := range instances {
		s.Endpoints = append(s.Endpoints, Endpoint{
			Instance: name, Addr: netip.MustParseAddrPort(fmt.Sprintf("127.0.0.1:%d", 15100+i)), Ports: []uint16{8080},
		})
	}
	return s
}

// longPath makes things big with few of them.
func longPath(i int) string { return fmt.Sprintf("/%d/%s", i, strings.Repeat("x", 1900)) }

// mesh is a snapshot in the making.
type mesh struct {
	rev      Revision
	rules    []policy.Rule
	services []Service
	roots    []*x509.Certificate
	plain    bool // do not compile the rules: no wildcard then, but any rule goes
}

func (m mesh) snapshot() *Snapshot {
	s := &Snapshot{Rev: m.rev, Services: map[spiffeid.ID]Service{}}
	s.Bundles = identity.Bundles{shop: spiffebundle.FromX509Authorities(shop, m.roots)}
	for _, v := range m.services {
		s.Services[v.ID] = v
	}
	if s.Rules = policy.NewRuleset(m.rules); !m.plain {
		s.Rules = m.compile()
	}
	return s
}

// compile writes the mesh as policy files and compiles them, as the control
// plane does. A policy NAME is in NAME.yaml.
func (m mesh) compile() *policy.Ruleset {
	files := map[string][]byte{}
	for i, s := range m.services {
		var b strings.Builder
		fmt.Fprintf(&b, "apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: w%d}\nspec:\n  id: %s\n  attest: [{kind: join-token}]\n", i, s.ID.Path())
		if len(s.Ports) > 0 {
			b.WriteString("  ports:\n")
		}
		for _, p := range s.Ports {
			fmt.Fprintf(&b, "    - {name: %s, port: %d, protocol: %s}\n", p.Name, p.Number, p.Protocol)
		}
		files[fmt.Sprintf("w%d.yaml", i)] = []byte(b.String())
	}
	for _, r := range m.rules {
		ports := "all"
		if len(r.Ports) > 0 {
			ports = fmt.Sprint(r.Ports[0])
		}
		files[r.Ref.Policy+".yaml"] = fmt.Appendf(nil, "apiVersion: sallyport.dev/v1\nkind: Policy\nmetadata: {name: %s}\nspec:\n  to: {id: %s}\n  %s:\n    - {from: [{id: %s}], ports: [%s]}\n",
			r.Ref.Policy, r.To[0], r.Effect, r.From[0], ports)
	}
	set, err := policy.ParseFiles("", files)
	if err != nil {
		panic(err)
	}
	rules, err := policy.Compile(shop, []*policy.Set{set})
	if err != nil {
		panic(err)
	}
	return rules
}

// next is the same mesh one revision later.
func (m *mesh) next() *Snapshot {
	m.rev.N++
	return m.snapshot()
}

func shopMesh(t testing.TB) *mesh {
	return &mesh{
		rev: Revision{1, 1},
		rules: []policy.Rule{
			allow(t, "orders-pay", "spiffe://shop.example/orders", "spiffe://shop.example/payments", 8080),
			allow(t, "front-orders", "spiffe://shop.example/front", "spiffe://shop.example/orders", 8080),
		},
		services: []Service{service("/payments", "p1", "p2"), service("/orders", "o1"), service("/front")},
		roots:    []*x509.Certificate{root(t, "one")},
	}
}

// peerStream carries the caller that a TLS handshake would have proved.
type peerStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s peerStream) Context() context.Context { return s.ctx }

// withPeer takes the caller from a header, which stands in for a client
// certificate.
func withPeer(leaf *x509.Certificate) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		md, _ := metadata.FromIncomingContext(ss.Context())
		ctx := ss.Context()
		if v := md.Get("peer"); len(v) == 1 {
			ctx = identity.ContextWithPeer(ctx, identity.Peer{ID: spiffeid.RequireFromString(v[0]), Leaf: leaf})
		}
		return h(srv, peerStream{ss, ctx})
	}
}

func asPeer(ctx context.Context, who spiffeid.ID) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "peer", who.String())
}

type harness struct {
	*Server
	conn *grpc.ClientConn
}

// serve runs a server on loopback until the test ends.
func serve(t testing.TB, cfg ServerConfig, leaf *x509.Certificate) *harness {
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if leaf == nil {
		leaf = &x509.Certificate{NotAfter: time.Now().Add(time.Hour)}
	}
	s := NewServer(cfg)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	g := grpc.NewServer(grpc.ChainStreamInterceptor(withPeer(leaf)), grpc.WaitForHandlers(true))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() {
		conn.Close()
		s.Close()
		g.Stop()
		<-done
	})
	return &harness{s, conn}
}

// sidecar runs a Client and hands its updates to the test.
type sidecar struct {
	*Client
	who     spiffeid.ID
	updates chan Update
	refuse  func(Update) error // asked first; set before start
}

func newSidecar(path string, subscribe ...spiffeid.ID) *sidecar {
	return &sidecar{
		Client: NewClient(ClientConfig{Node: id(path), Instance: "i1", Subscribe: subscribe, Log: hclog.NewNullLogger()}),
		who:    id(path), updates: make(chan Update, 100),
		refuse: func(Update) error { return nil },
	}
}

// start runs the client until stop is called or the test ends; ended gives
// Run's error.
func (s *sidecar) start(t testing.TB, h *harness) (stop func(), ended chan error) {
	ctx, cancel := context.WithCancel(asPeer(context.Background(), s.who))
	ended = make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		ended <- s.Run(ctx, h.conn, func(u Update) error {
			if err := s.refuse(u); err != nil {
				return err
			}
			s.updates <- u
			return nil
		})
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop, ended
}

func (s *sidecar) next(t testing.TB) Update {
	t.Helper()
	select {
	case u := <-s.updates:
		return u
	case <-time.After(patience):
		require.FailNow(t, "no update")
		return Update{}
	}
}

// view collects the first update of each kind.
func (s *sidecar) view(t testing.TB) map[Kind]Update {
	t.Helper()
	got := map[Kind]Update{}
	for range 3 {
		u := s.next(t)
		got[u.Kind] = u
	}
	require.Len(t, got, 3)
	return got
}

func (s *sidecar) quiet(t testing.TB) {
	t.Helper()
	select {
	case u := <-s.updates:
		t.Fatalf("got an update of %s at %s, want none", u.Kind, u.Rev)
	default:
	}
}

// waitAcked fails the test when a node stays pending.
func (h *harness) waitAcked(t testing.TB, rev Revision) (acked, nacks []NodeStatus) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	acked, pending, nacks := h.WaitAcked(ctx, rev)
	if len(pending) > 0 {
		require.FailNowf(t, "nodes are pending", "%d of them, one is %s", len(pending), pending[0])
	}
	return acked, nacks
}

// waitNodes waits until want streams are open.
func (h *harness) waitNodes(t testing.TB, want int) {
	t.Helper()
	require.Eventually(t, func() bool { return len(h.Nodes()) == want }, patience, time.Millisecond)
}

// raw is a client of the bare protocol.
type raw struct {
	t   testing.TB
	ads discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
}

func (h *harness) raw(t testing.TB, who spiffeid.ID) *raw {
	ctx, cancel := context.WithTimeout(asPeer(context.Background(), who), patience)
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(h.conn).DeltaAggregatedResources(ctx, grpc.MaxCallRecvMsgSize(maxMessage))
	require.NoError(t, err)
	t.Cleanup(func() {
		cancel()
		for err == nil {
			_, err = ads.Recv()
		}
	})
	return &raw{t, ads}
}

func (r *raw) send(req *discoveryv3.DeltaDiscoveryRequest) {
	r.t.Helper()
	if err := r.ads.Send(req); err != nil {
		_, err = r.ads.Recv()
		require.NoError(r.t, err)
	}
}

func (r *raw) recv() *discoveryv3.DeltaDiscoveryResponse {
	r.t.Helper()
	resp, err := r.ads.Recv()
	require.NoError(r.t, err)
	return resp
}

// barrier asks for a type for the first time and acknowledges the answer, which
// must be the next response.
func (r *raw) barrier(typeURL string) {
	r.t.Helper()
	r.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL})
	resp := r.recv()
	require.Equal(r.t, typeURL, resp.TypeUrl)
	r.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: resp.Nonce})
}

// end returns the error that ends the stream.
func (r *raw) end() error {
	for {
		if _, err := r.ads.Recv(); err != nil {
			return err
		}
	}
}

func names(resp *discoveryv3.DeltaDiscoveryResponse) []string {
	out := []string{}
	for _, r := range resp.GetResources() {
		out = append(out, r.GetName())
	}
	return out
}
