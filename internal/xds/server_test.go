package xds

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

type request = discoveryv3.DeltaDiscoveryRequest

func node(instance string) *corev3.Node { return &corev3.Node{Id: instance} }

func TestRawWildcardAndNames(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	h.SetSnapshot(m.snapshot())
	r := h.raw(t, id("/front"))

	// The empty legacy form and "*" mean the same: what policy lets it reach.
	r.send(&request{Node: node("i"), TypeUrl: ClusterType})
	resp := r.recv()
	require.Equal(t, []string{id("/orders").String()}, names(resp))
	require.Equal(t, "1.1", resp.SystemVersionInfo)
	r.send(&request{TypeUrl: ClusterType, ResponseNonce: resp.Nonce})
	r.send(&request{TypeUrl: EndpointType, ResourceNamesSubscribe: []string{"*"}})
	resp = r.recv()
	require.Equal(t, EndpointType, resp.TypeUrl)
	require.Equal(t, []string{id("/orders").String()}, names(resp))
	r.send(&request{TypeUrl: EndpointType, ResponseNonce: resp.Nonce})

	// By name it gets any service of the mesh; unknown names are said not to exist.
	r.send(&request{TypeUrl: ClusterType, ResourceNamesSubscribe: []string{id("/payments").String(), "spiffe://shop.example/none"}})
	resp = r.recv()
	require.Equal(t, []string{id("/payments").String()}, names(resp))
	require.Equal(t, []string{"spiffe://shop.example/none"}, resp.RemovedResources)
	r.send(&request{TypeUrl: ClusterType, ResponseNonce: resp.Nonce})

	// What it knows to be absent arrives when it comes into being.
	m.services = append(m.services, service("/none"))
	h.SetSnapshot(m.next())
	resp = r.recv()
	require.Equal(t, []string{"spiffe://shop.example/none"}, names(resp))
	require.Empty(t, resp.RemovedResources)
	r.send(&request{TypeUrl: ClusterType, ResponseNonce: resp.Nonce})

	// A removed service is removed, an unreachable one leaves the wildcard.
	m.services = m.services[:3]
	m.rules = m.rules[:1]
	h.SetSnapshot(m.next())
	removed := map[string][]string{}
	for range 2 {
		resp = r.recv()
		require.Empty(t, names(resp))
		removed[resp.TypeUrl] = resp.RemovedResources
	}
	require.Equal(t, map[string][]string{
		ClusterType:  {"spiffe://shop.example/none", id("/orders").String()},
		EndpointType: {id("/orders").String()},
	}, removed)
}

func TestRawResubscribeSendsAgain(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	h.SetSnapshot(shopMesh(t).snapshot())
	r := h.raw(t, id("/front"))
	name := id("/payments").String()
	r.send(&request{Node: node("i"), TypeUrl: ClusterType, ResourceNamesSubscribe: []string{name}})
	resp := r.recv()
	version := resp.Resources[0].Version
	for range 2 { // the client says that it has forgotten: once after the ACK, once before it
		r.send(&request{TypeUrl: ClusterType, ResponseNonce: resp.Nonce, ResourceNamesSubscribe: []string{name}})
		resp = r.recv()
		require.Equal(t, []string{name}, names(resp))
		require.Equal(t, version, resp.Resources[0].Version)
	}
	r.send(&request{TypeUrl: ClusterType, ResourceNamesSubscribe: []string{name}})
	r.send(&request{TypeUrl: ClusterType, ResponseNonce: resp.Nonce})
	resp = r.recv()
	require.Equal(t, []string{name}, names(resp))

	// Unsubscribed, it is not sent again; another type's answer shows that.
	r.send(&request{TypeUrl: ClusterType, ResponseNonce: resp.Nonce, ResourceNamesUnsubscribe: []string{name}})
	r.send(&request{TypeUrl: SecretType})
	require.Equal(t, SecretType, r.recv().TypeUrl)
}

func TestRawInitialVersions(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	h.SetSnapshot(shopMesh(t).snapshot())
	payments, orders := id("/payments").String(), id("/orders").String()
	r := h.raw(t, id("/front"))
	r.send(&request{Node: node("i"), TypeUrl: ClusterType, ResourceNamesSubscribe: []string{payments, orders}})
	held := map[string]string{}
	for _, res := range r.recv().Resources {
		held[res.Name] = res.Version
	}
	held[orders] = "out-of-date"
	held["spiffe://shop.example/gone"] = "1"
	r = h.raw(t, id("/front"))
	r.send(&request{Node: node("i"), TypeUrl: ClusterType, ResourceNamesSubscribe: []string{payments, orders}, InitialResourceVersions: held})
	resp := r.recv()
	require.Equal(t, []string{orders}, names(resp))
	require.Equal(t, []string{"spiffe://shop.example/gone"}, resp.RemovedResources)
}

// F8: whatever a caller asks for, it gets what is its own and nobody else's.
func TestF8OwnResourcesOnly(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	h.SetSnapshot(shopMesh(t).snapshot())
	r := h.raw(t, id("/front"))
	r.send(&request{Node: node("i"), TypeUrl: ListenerType, ResourceNamesSubscribe: []string{"*", id("/payments").String(), id("/front").String()}})
	resp := r.recv()
	require.Equal(t, []string{id("/front").String()}, names(resp))
	require.Equal(t, []string{id("/payments").String()}, resp.RemovedResources)
	r.send(&request{TypeUrl: ExtensionType, ResourceNamesSubscribe: []string{AllowRules, id("/payments").String() + "/" + AllowRules}})
	resp = r.recv()
	require.Equal(t, []string{AllowRules}, names(resp))
	got, err := parseResource(id("/front"), ExtensionType, resp.Resources[0])
	require.NoError(t, err)
	if rules := got.(rbacRules).rules; len(rules) != 0 {
		t.Errorf("front was sent rules of others: %v", rules)
	}
	r.send(&request{TypeUrl: SecretType})
	require.Equal(t, []string{"spiffe://shop.example"}, names(r.recv()))
}

func TestF8IdentityClaims(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	h.SetSnapshot(shopMesh(t).snapshot())
	for name, c := range map[string]struct {
		who  spiffeid.ID
		node string
		want codes.Code
	}{
		"no certificate":    {spiffeid.ID{}, "i", codes.Unauthenticated},
		"another's ID":      {id("/front"), id("/payments").String(), codes.PermissionDenied},
		"own ID":            {id("/front"), id("/front").String(), codes.PermissionDenied},
		"no instance":       {id("/front"), "", codes.InvalidArgument},
		"long instance":     {id("/front"), strings.Repeat("i", 65), codes.InvalidArgument},
		"odd instance":      {id("/front"), "a\nb", codes.InvalidArgument},
		"instance at limit": {id("/front"), strings.Repeat("i", 64), codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if !c.who.IsZero() {
				ctx = asPeer(ctx, c.who)
			}
			ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(h.conn).DeltaAggregatedResources(ctx)
			require.NoError(t, err)
			_ = ads.Send(&request{Node: node(c.node), TypeUrl: ClusterType})
			_, err = ads.Recv()
			if got := status.Code(err); got != c.want {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	r := h.raw(t, id("/front"))
	r.send(&request{Node: node("i"), TypeUrl: ClusterType})
	r.recv()
	r.send(&request{Node: node("j"), TypeUrl: SecretType})
	if err := r.end(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("changed instance: got %v, want PermissionDenied", err)
	}
}

// F9: what a hostile node can make the server hold or do is bounded.
func TestF9Limits(t *testing.T) {
	h := serve(t, ServerConfig{MaxStreams: 2, MaxSubscriptions: 10}, nil)
	h.SetSnapshot(shopMesh(t).snapshot())
	many := map[string]string{}
	for i := range 11 {
		many[fmt.Sprintf("spiffe://shop.example/%d", i)] = "1"
	}
	for name, req := range map[string]*request{
		"subscriptions":    {ResourceNamesSubscribe: sortedKeys(many)},
		"initial versions": {InitialResourceVersions: many},
		"request size":     {ResourceNamesUnsubscribe: slices.Repeat([]string{strings.Repeat("n", 2000)}, maxRequest/2000)},
	} {
		r := h.raw(t, id("/front"))
		req.Node, req.TypeUrl = node("i"), ClusterType
		r.send(req)
		if err := r.end(); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s: got %v, want ResourceExhausted", name, err)
		}
	}
	for name, req := range map[string]*request{
		"long name":    {ResourceNamesSubscribe: []string{strings.Repeat("n", maxName+1)}},
		"empty name":   {ResourceNamesSubscribe: []string{""}},
		"long version": {InitialResourceVersions: map[string]string{"n": strings.Repeat("v", 65)}},
	} {
		r := h.raw(t, id("/front"))
		req.Node, req.TypeUrl = node("i"), ClusterType
		r.send(req)
		if err := r.end(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: got %v, want InvalidArgument", name, err)
		}
	}
	h.waitNodes(t, 0)
	for range 2 {
		h.raw(t, id("/front"))
	}
	h.waitNodes(t, 2)
	if err := h.raw(t, id("/front")).end(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("third stream: got %v, want ResourceExhausted", err)
	}
	h.raw(t, id("/orders")) // others are not concerned
	h.waitNodes(t, 3)
}

// F9: neither wrong nonces nor refusals without end make the server repeat
// itself.
func TestF9NonceLoop(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	h.SetSnapshot(m.snapshot())
	r := h.raw(t, id("/orders"))
	r.send(&request{Node: node("i"), TypeUrl: ExtensionType})
	resp := r.recv()
	require.Equal(t, []string{AllowRules, DenyRules}, names(resp))
	no := &rpcstatus.Status{Message: "no"}
	r.send(&request{TypeUrl: ExtensionType, ResponseNonce: "made-up", ErrorDetail: no})
	r.barrier(SecretType)
	require.Empty(t, h.Nodes()[0].Nack, "an answer to nothing counts")
	for range 20 {
		r.send(&request{TypeUrl: ExtensionType, ResponseNonce: resp.Nonce, ErrorDetail: no})
		r.send(&request{TypeUrl: ExtensionType, ResponseNonce: "made-up"})
	}
	r.barrier(ListenerType) // were anything sent again, it would come first
	require.Equal(t, "TypedExtensionConfig: no", h.Nodes()[0].Nack)

	// Endpoints move: rules stay refused. Rules move: they are sent together,
	// also the half that stays as it was refused.
	m.services[0] = service("/payments", "p1")
	h.SetSnapshot(m.snapshot())
	m.rules = append(m.rules, allow(t, "x", "spiffe://shop.example/x", "spiffe://shop.example/orders"))
	h.SetSnapshot(m.snapshot())
	resp = r.recv()
	require.Equal(t, ExtensionType, resp.TypeUrl)
	require.Equal(t, []string{AllowRules, DenyRules}, names(resp))

	// Each revision is one more chance for the same content.
	r.send(&request{TypeUrl: ExtensionType, ResponseNonce: resp.Nonce, ErrorDetail: no})
	h.SetSnapshot(m.next())
	resp = r.recv()
	require.Equal(t, []string{AllowRules, DenyRules}, names(resp))
	require.Equal(t, "1.2", resp.SystemVersionInfo)
}

// A node that does not read is cut off, while a send to it blocks, and holds up
// nobody.
func TestSlowClientIsCut(t *testing.T) {
	var offset atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	h := serve(t, ServerConfig{Now: now}, &x509.Certificate{NotAfter: time.Now().AddDate(10, 0, 0)})
	m := shopMesh(t)
	m.plain = true
	subscribe := &request{Node: node("slow")}
	for i := range 100 {
		m.services = append(m.services, service(longPath(i), "i"))
		subscribe.ResourceNamesSubscribe = append(subscribe.ResourceNamesSubscribe, id(longPath(i)).String())
	}
	h.SetSnapshot(m.snapshot())
	slow := h.raw(t, id("/payments"))
	for _, typeURL := range []string{ClusterType, EndpointType} {
		subscribe.TypeUrl = typeURL
		slow.send(subscribe)
	}
	quick := newSidecar("/orders")
	quick.start(t, h)
	quick.view(t)
	h.waitNodes(t, 2)
	require.Eventually(t, func() bool { return h.Nodes()[0].Acked == m.rev }, patience, time.Millisecond)
	require.Eventually(t, func() bool { // as soon as the server has begun to send to it
		offset.Add(int64(31 * time.Second))
		h.SetSnapshot(m.next())
		return len(h.Nodes()) == 1
	}, patience, 10*time.Millisecond)
	acked, _ := h.waitAcked(t, m.rev)
	require.Len(t, acked, 1, "the slow node is gone, the quick one is up to date")
	if err := slow.end(); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v, want DeadlineExceeded", err)
	}
}

func TestStreamEndsWithCertificate(t *testing.T) {
	h := serve(t, ServerConfig{}, &x509.Certificate{NotAfter: time.Now().Add(200 * time.Millisecond)})
	h.SetSnapshot(shopMesh(t).snapshot())
	_, ended := newSidecar("/orders").start(t, h)
	if err := <-ended; status.Code(err) != codes.Unauthenticated {
		t.Errorf("got %v, want Unauthenticated", err)
	}
}

func TestCloseEndsStreams(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	s := newSidecar("/orders")
	_, ended := s.start(t, h)
	h.waitNodes(t, 1)
	h.Close()
	if err := <-ended; status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want Unavailable", err)
	}
	_, ended = s.start(t, h)
	if err := <-ended; status.Code(err) != codes.Unavailable {
		t.Errorf("after Close: got %v, want Unavailable", err)
	}
}

// A large set of services comes in several responses; rules never do.
func TestSplitResponses(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	m.plain = true
	var all []spiffeid.ID
	for i := range 500 {
		s := service(longPath(i))
		m.services, all = append(m.services, s), append(all, s.ID)
		r := allow(t, fmt.Sprintf("p%d", i), s.ID.String(), "spiffe://shop.example/orders")
		r.Reason = strings.Repeat("r", 2000)
		m.rules = append(m.rules, r)
	}
	h.SetSnapshot(m.snapshot())
	r := h.raw(t, id("/orders"))
	req := &request{Node: node("i"), TypeUrl: ClusterType}
	for _, s := range all {
		req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, s.String())
	}
	r.send(req)
	got, messages := 0, 0
	for got < len(all) {
		resp := r.recv()
		if status := h.Nodes()[0]; status.Acked != (Revision{}) {
			t.Fatalf("counts as acknowledged at %s with resources missing", status.Acked)
		}
		got, messages = got+len(resp.Resources), messages+1
		r.send(&request{TypeUrl: ClusterType, ResponseNonce: resp.Nonce})
	}
	if got != len(all) || messages < 2 {
		t.Errorf("got %d resources in %d responses, want %d in several", got, messages, len(all))
	}
	r.send(&request{TypeUrl: ExtensionType})
	require.Equal(t, []string{AllowRules, DenyRules}, names(r.recv()))
}

func TestWaitAckedEndsWithContext(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	h.SetSnapshot(shopMesh(t).snapshot())
	r := h.raw(t, id("/orders"))
	r.send(&request{Node: node("mute"), TypeUrl: ClusterType})
	r.recv()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	acked, pending, nacks := h.WaitAcked(ctx, Revision{1, 1})
	require.Empty(t, acked)
	require.Empty(t, nacks)
	require.Len(t, pending, 1)
	require.Equal(t, "mute", pending[0].Instance)
}

// A service that has no wire form keeps its last good one; the rest goes on.
func TestSnapshotKeepsLastGoodForm(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	h.SetSnapshot(m.snapshot())
	s := newSidecar("/orders", id("/payments"), id("/front"))
	s.start(t, h)
	require.Len(t, s.view(t)[Endpoints].Services, 2)
	m.plain = true
	good := m.services[0]
	for i, bad := range []Service{
		{ID: good.ID, Ports: good.Ports, Endpoints: []Endpoint{{Instance: "without an address"}}},
		{ID: good.ID, Ports: []policy.Port{{Name: "http"}}},
	} {
		m.services[0] = bad
		m.services[2] = service("/front", fmt.Sprintf("f%d", i))
		h.SetSnapshot(m.next())
		u := s.next(t)
		for u.Kind != Endpoints {
			u = s.next(t)
		}
		require.Equal(t, fmt.Sprintf("f%d", i), u.Services[id("/front")].Endpoints[0].Instance)
		require.Equal(t, good, u.Services[id("/payments")])
	}
}

func TestFanOut(t *testing.T) {
	const streams, workloads = fanOut, 100
	h := serve(t, ServerConfig{}, nil)
	m := &mesh{rev: Revision{1, 1}, roots: shopMesh(t).roots}
	for i := range workloads {
		m.services = append(m.services, service(fmt.Sprintf("/w%d", i), "i"))
		m.rules = append(m.rules, allow(t, fmt.Sprintf("p%d", i), fmt.Sprintf("spiffe://shop.example/w%d", (i+1)%workloads), fmt.Sprintf("spiffe://shop.example/w%d", i), 8080))
	}
	h.SetSnapshot(m.snapshot())
	var mu sync.Mutex
	var last time.Time
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for i := range streams {
		s := newSidecar(fmt.Sprintf("/w%d", i%workloads))
		wg.Go(func() {
			_ = s.Run(asPeer(ctx, s.who), h.conn, func(u Update) error {
				if u.Kind == Rules && u.Rev.N == 2 {
					mu.Lock()
					last = time.Now()
					mu.Unlock()
				}
				return nil
			})
		})
	}
	h.waitNodes(t, streams)
	h.waitAcked(t, m.rev)
	for i := range m.rules {
		m.rules[i].Ports = nil // every node's rules change
	}
	snap := m.next()
	start := time.Now()
	h.SetSnapshot(snap)
	acked, _ := h.waitAcked(t, m.rev)
	all := time.Since(start)
	require.Len(t, acked, streams)
	mu.Lock()
	t.Logf("%d streams: rules in place everywhere after %v, acknowledged after %v", streams, last.Sub(start), all)
	mu.Unlock()

	m.rules[0].Ports = []uint16{8080} // one node's rules change
	snap = m.next()
	start = time.Now()
	h.SetSnapshot(snap)
	acked, _ = h.waitAcked(t, m.rev)
	require.Len(t, acked, streams)
	t.Logf("%d streams, one node concerned: all at the revision after %v", streams, time.Since(start))
}

func BenchmarkSnapshot(b *testing.B) {
	m := shopMesh(b)
	for i := range 1000 {
		m.services = append(m.services, service(fmt.Sprintf("/w%d", i), "i", "j"))
	}
	snap := m.snapshot()
	last := prepare(snap, nil, nil)
	for b.Loop() {
		last = prepare(snap, last, nil)
	}
}

// F8: a foreign destination that the rules do not let the node reach is told to
// nobody, by whatever name it is asked for.
func TestF8ForeignDestination(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	snap := shopMesh(t).snapshot()
	foreign := spiffeid.RequireFromString("spiffe://partner.example/payments")
	snap.Services[foreign] = Service{ID: foreign, Ports: service("/payments").Ports, MeshName: "payments.partner.mesh"}
	h.SetSnapshot(snap)
	r := h.raw(t, id("/front"))
	for _, typeURL := range []string{ClusterType, EndpointType} {
		r.send(&request{Node: node("i"), TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*", foreign.String()}})
		resp := r.recv()
		require.Equal(t, []string{id("/orders").String()}, names(resp))
		require.Equal(t, []string{foreign.String()}, resp.RemovedResources)
		r.send(&request{TypeUrl: typeURL, ResponseNonce: resp.Nonce})
	}
}

// F8: of a foreign destination a node is told the ports that the rules let it call.
func TestF8ForeignPorts(t *testing.T) {
	set, err := policy.ParseFiles("", map[string][]byte{"a.yaml": []byte(`apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: orders}
spec: {attest: [{kind: join-token}]}
---
apiVersion: sallyport.dev/v1
kind: TrustDomain
metadata: {name: partner}
spec:
  trustDomain: partner.example
  bundleEndpoint: {url: "https://partner.example/", profile: https_web}
  workloads:
    - id: /payments
      ports: [{name: http, port: 8080, protocol: http}, {name: admin, port: 9, protocol: tcp}]
      endpoints: ["192.0.2.7:15008"]
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: pay}
spec:
  to: {id: spiffe://partner.example/payments}
  allow: [{from: [{workload: orders}], ports: [http]}]
`)})
	require.NoError(t, err)
	rules, err := policy.Compile(shop, []*policy.Set{set})
	require.NoError(t, err)
	foreign := rules.TrustDomains()[0].Workloads[0]
	snap := shopMesh(t).snapshot()
	snap.Rules, snap.Services = rules, map[spiffeid.ID]Service{
		id("/orders"): {ID: id("/orders")},
		foreign.ID: {ID: foreign.ID, Ports: foreign.Ports, Endpoints: []Endpoint{
			{Instance: "a", Addr: foreign.Endpoints[0], Ports: []uint16{8080, 9}},
		}},
	}
	h := serve(t, ServerConfig{}, nil)
	h.SetSnapshot(snap)
	s := newSidecar("/orders")
	s.start(t, h)
	got := s.view(t)[Endpoints].Services[foreign.ID]
	if len(got.Ports) != 1 || got.Ports[0].Number != 8080 || len(got.Endpoints) != 1 || len(got.Endpoints[0].Ports) != 1 || got.Endpoints[0].Ports[0] != 8080 {
		t.Errorf("told of %+v, want port 8080 alone", got)
	}
}
