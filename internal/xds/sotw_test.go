package xds

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// world is a client of the bare state-of-the-world protocol.
type world struct {
	t   testing.TB
	ads discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient
}

type wish = discoveryv3.DiscoveryRequest

func (h *harness) world(t testing.TB, who spiffeid.ID) *world {
	ctx, cancel := context.WithTimeout(asPeer(context.Background(), who), patience)
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(h.conn).StreamAggregatedResources(ctx)
	require.NoError(t, err)
	t.Cleanup(func() {
		cancel()
		for err == nil {
			_, err = ads.Recv()
		}
	})
	return &world{t, ads}
}

func (w *world) send(r *wish) {
	w.t.Helper()
	require.NoError(w.t, w.ads.Send(r))
}

func (w *world) recv() *discoveryv3.DiscoveryResponse {
	w.t.Helper()
	r, err := w.ads.Recv()
	require.NoError(w.t, err)
	return r
}

// ask asks for names of a type, for the first time, and acknowledges the answer,
// whose resources it gives by name.
func (w *world) ask(typeURL string, names ...string) map[string]proto.Message {
	w.t.Helper()
	w.send(&wish{Node: node("i"), TypeUrl: typeURL, ResourceNames: names})
	r := w.recv()
	require.Equal(w.t, typeURL, r.TypeUrl)
	w.send(&wish{TypeUrl: typeURL, ResourceNames: names, VersionInfo: r.VersionInfo, ResponseNonce: r.Nonce})
	return w.open(r)
}

func (w *world) open(r *discoveryv3.DiscoveryResponse) map[string]proto.Message {
	w.t.Helper()
	out := map[string]proto.Message{}
	for _, a := range r.Resources {
		m := newMessage(r.TypeUrl)
		require.NoError(w.t, unpackAny(a, r.TypeUrl, m))
		switch m := m.(type) {
		case *listenerv3.Listener:
			out[m.Name] = m
		case *clusterv3.Cluster:
			out[m.Name] = m
		case *endpointv3.ClusterLoadAssignment:
			out[m.ClusterName] = m
		}
	}
	return out
}

// end waits for the end of the stream.
func (w *world) end() error {
	for {
		if _, err := w.ads.Recv(); err != nil {
			return err
		}
	}
}

// rpcMesh is shopMesh with grpc ports.
func rpcMesh(t testing.TB) *mesh {
	m := shopMesh(t)
	for i := range m.services {
		m.services[i].Ports[0].Protocol = policy.GRPC
	}
	m.services[0].Endpoints = []Endpoint{{Instance: "direct", Addr: netip.MustParseAddrPort("10.0.0.7:8080"), Ports: []uint16{8080}, Direct: true}}
	return m
}

const orderServer = ServerListeners + "0.0.0.0:8080"

// F8: gRPC is told what policy lets it reach and what its own address lets in,
// whatever it asks for, by name or by wildcard.
func TestF8ProxylessOwnResourcesOnly(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	h.SetSnapshot(rpcMesh(t).snapshot())
	foreign := []string{
		"*", "front.mesh:8080", "orders.mesh:8080", "orders.mesh:8081", "payments:8080", "payments.mesh:08080", "payments.mesh",
		id("/payments").String(), id("/orders").String(), AllowRules, HTTPAllowRules, "spiffe://shop.example",
		ServerListeners + "0.0.0.0:8081", ServerListeners + "orders:8080", ServerListeners, ServerListeners + "[fe80::1%eth0]:8080",
	}
	own := map[string][]string{
		ListenerType: {orderServer, "payments.mesh:8080"}, ClusterType: {"payments.mesh:8080"}, EndpointType: {"payments.mesh:8080"},
		SecretType: {}, ExtensionType: {}, RevocationType: {},
	}
	for typeURL, want := range own {
		w := h.world(t, id("/orders"))
		got := w.ask(typeURL, append([]string{orderServer, "payments.mesh:8080"}, foreign...)...)
		require.ElementsMatch(t, want, sortedKeys(got), typeURL)
		// The empty wish means everything in this protocol. Here it means nothing.
		require.Empty(t, h.world(t, id("/orders")).ask(typeURL), typeURL)
	}
	// Nor is who is no workload, whatever patterns match its ID.
	m := rpcMesh(t)
	m.rules = []policy.Rule{allow(t, "all", "spiffe://shop.example/**", "spiffe://shop.example/**")}
	m.services = append(m.services[:1:1], m.services[2])
	all := serve(t, ServerConfig{}, nil)
	all.SetSnapshot(m.snapshot())
	require.Len(t, all.world(t, id("/front")).ask(ListenerType, "payments.mesh:8080"), 1)
	require.Empty(t, all.world(t, id("/orders")).ask(ListenerType, orderServer, "payments.mesh:8080"))
	// Who may not call payments is not told that there is a payments.
	require.Empty(t, h.world(t, id("/front")).ask(ListenerType, "payments.mesh:8080"))
	require.Empty(t, h.world(t, id("/front")).ask(EndpointType, "payments.mesh:8080"))
}

// F8: as with sidecars, the certificate says who the node is.
func TestF8ProxylessIdentityClaims(t *testing.T) {
	h := serve(t, ServerConfig{InstanceOf: func(identity.Peer) string { return "i" }}, nil)
	h.SetSnapshot(rpcMesh(t).snapshot())
	for name, c := range map[string]struct {
		who  spiffeid.ID
		node string
		want codes.Code
	}{
		"no certificate":     {spiffeid.ID{}, "i", codes.Unauthenticated},
		"another's ID":       {id("/front"), id("/payments").String(), codes.PermissionDenied},
		"another's instance": {id("/front"), "j", codes.PermissionDenied},
		"no instance":        {id("/front"), "", codes.InvalidArgument},
		"its own":            {id("/front"), "i", codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if !c.who.IsZero() {
				ctx = asPeer(ctx, c.who)
			}
			ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(h.conn).StreamAggregatedResources(ctx)
			require.NoError(t, err)
			_ = ads.Send(&wish{Node: node(c.node), TypeUrl: ListenerType, ResourceNames: []string{"a"}})
			if _, err = ads.Recv(); status.Code(err) != c.want {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

// F9: answers without news, old and invented nonces, and refusals lead to no
// response; what one stream can ask for is bounded.
func TestF9ProxylessNonceLoop(t *testing.T) {
	h := serve(t, ServerConfig{MaxSubscriptions: 3}, nil)
	m := rpcMesh(t)
	h.SetSnapshot(m.snapshot())
	w := h.world(t, id("/orders"))
	names := []string{"payments.mesh:8080"}
	w.send(&wish{Node: node("i"), TypeUrl: ClusterType, ResourceNames: names})
	first := w.recv()
	for _, nonce := range []string{first.Nonce, first.Nonce, "", "77", first.Nonce} {
		w.send(&wish{TypeUrl: ClusterType, ResourceNames: names, VersionInfo: first.VersionInfo, ResponseNonce: nonce})
	}
	for range 3 {
		w.send(&wish{TypeUrl: ClusterType, ResourceNames: names, ResponseNonce: first.Nonce, ErrorDetail: &rpcstatus.Status{Message: "no"}})
	}
	require.Len(t, w.ask(ListenerType, orderServer), 1) // and no Cluster before it

	w.send(&wish{TypeUrl: EndpointType, ResourceNames: []string{"a", "b", "c", "d"}})
	if err := w.end(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("too many names: got %v, want ResourceExhausted", err)
	}
}

// What is gone is missing in the next response, which repeats all the rest.
func TestProxylessStateOfTheWorld(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := rpcMesh(t)
	m.rules = append(m.rules, allow(t, "orders-front", "spiffe://shop.example/orders", "spiffe://shop.example/front", 8080))
	h.SetSnapshot(m.snapshot())
	w := h.world(t, id("/orders"))
	all := []string{"front.mesh:8080", orderServer, "payments.mesh:8080"}
	require.Equal(t, all, sortedKeys(w.ask(ListenerType, all...)))
	acked, _ := h.waitAcked(t, m.rev)
	require.Len(t, acked, 1)
	require.True(t, acked[0].Proxyless)

	m.rules = m.rules[:2]
	h.SetSnapshot(m.next())
	r := w.recv()
	require.Equal(t, "1.2", r.VersionInfo)
	require.Equal(t, all[1:], sortedKeys(w.open(r)))
	w.send(&wish{TypeUrl: ListenerType, ResourceNames: all[1:], ResponseNonce: r.Nonce})

	m.services = m.services[:1] // orders is no workload any more
	m.rules = nil
	h.SetSnapshot(m.next())
	r = w.recv()
	require.Empty(t, r.Resources)
}

// Where a port is served without tunnel: instances without sidecar, and direct
// listeners.
func TestProxylessEndpoints(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := rpcMesh(t)
	m.services[0].Ports[0].Direct = 9443
	m.services[0].Endpoints = append(m.services[0].Endpoints, Endpoint{Instance: "p2", Addr: netip.MustParseAddrPort("10.0.0.8:15008"), Ports: []uint16{8080}})
	h.SetSnapshot(m.snapshot())
	got := h.world(t, id("/orders")).ask(EndpointType, "payments.mesh:8080")["payments.mesh:8080"].(*endpointv3.ClusterLoadAssignment)
	var addrs []string
	for _, e := range got.Endpoints[0].LbEndpoints {
		a, err := parseAddr(e.GetEndpoint().GetAddress())
		require.NoError(t, err)
		addrs = append(addrs, a.String())
	}
	require.Equal(t, []string{"10.0.0.7:8080", "10.0.0.8:9443"}, addrs)
}

// Who is revoked is refused by name, as far as rules let it in, and is nobody's
// destination.
func TestF6ProxylessRefusesTheRevoked(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := rpcMesh(t)
	snap := m.snapshot()
	snap.Revoked = map[spiffeid.ID]bool{id("/front"): true, id("/payments"): true, id("/stranger"): true}
	h.SetSnapshot(snap)
	w := h.world(t, id("/orders"))
	got := w.ask(ListenerType, orderServer, "payments.mesh:8080")
	require.Equal(t, []string{orderServer}, sortedKeys(got))
	text := prototext.Format(got[orderServer])
	require.Contains(t, text, "rbac-revoked")
	require.Contains(t, text, id("/front").String())
	require.NotContains(t, text, "stranger")
	require.Less(t, strings.Index(text, "rbac-revoked"), strings.Index(text, AllowRules))
	require.Empty(t, h.world(t, id("/front")).ask(ListenerType, ServerListeners+"0.0.0.0:8080"))
}

// With every field of the language a gRPC server lets no request through that is
// denied, and is sent nothing that it refuses.
func TestF9ProxylessReadsNoWider(t *testing.T) {
	allowed := 0
	rapid.Check(t, func(t *rapid.T) {
		node := drawID(t)
		rules := policy.NewRuleset(rapid.SliceOfN(rapid.Custom(drawFullRule), 0, 8).Draw(t, "rules"))
		narrow, _ := rules.ForProxyless()
		mine := narrow.For(node)
		filters, err := newGRPCFilters(node, mine)
		if err != nil {
			t.Fatal(err)
		}
		deny, allow := &httprbacv3.RBAC{}, &httprbacv3.RBAC{}
		if proto.Unmarshal(filters.deny.Value, deny) != nil || proto.Unmarshal(filters.allow.Value, allow) != nil {
			t.Fatal("unreadable rules")
		}
		if text := prototext.Format(deny) + prototext.Format(allow); strings.Contains(text, "metadata") || strings.Contains(text, "shadow") || strings.Contains(text, "condition") {
			t.Fatalf("gRPC refuses %s", text)
		}
		for _, src := range append(rapid.SliceOfN(rapid.Custom(drawID), 1, 6).Draw(t, "sources"), spiffeid.ID{}) {
			for _, port := range []uint16{1, 80, 444} {
				q := policy.Request{Src: src, Dst: node, Port: port, HTTP: drawRequest(t)}
				if !filterPasses(t, deny, q) || !filterPasses(t, allow, q) {
					continue
				}
				allowed++
				for _, at := range []time.Time{time.Unix(0, 0), time.Unix(1e9, 0), time.Unix(2e9, 0), time.Unix(3e9, 0)} {
					if d := rules.At(at).Decide(q); d.Effect != policy.Allow {
						t.Fatalf("%+v (%+v) at %v: gRPC allows what is denied: %+v", q, q.HTTP, at, d)
					}
				}
			}
		}
	})
	if allowed == 0 {
		t.Error("nothing was allowed: nothing was tested")
	}
}
