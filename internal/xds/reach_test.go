package xds

import (
	"net/netip"
	"slices"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

const templatedMesh = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: cluster}
spec:
  id: /ns/{namespace}/sa/{serviceAccount}
  attest: [{kind: kubernetes}]
  ports: [{name: http, port: 8080, protocol: http}]
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: orders}
spec: {attest: [{kind: join-token}]}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: shop}
spec:
  to: {id: /ns/shop/sa/*}
  allow: [{from: [{workload: orders}, {id: /ns/shop/sa/web}], ports: [http]}]
`

// What a wildcard stands for follows the endpoints of templated destinations, under
// the same rules, and never goes beyond what these allow.
func TestF8WildcardFollowsTemplateInstances(t *testing.T) {
	set, err := policy.ParseFiles("", map[string][]byte{"a.yaml": []byte(templatedMesh)})
	require.NoError(t, err)
	rules, err := policy.Compile(shop, []*policy.Set{set})
	require.NoError(t, err)
	ledger, web, stock, idle := id("/ns/shop/sa/ledger"), id("/ns/shop/sa/web"), id("/ns/stock/sa/ledger"), id("/ns/shop/sa/idle")
	m := shopMesh(t)
	serving := func(ids ...spiffeid.ID) *Snapshot {
		snap := m.next()
		snap.Rules, snap.Services = rules, map[spiffeid.ID]Service{id("/orders"): {ID: id("/orders")}}
		for _, v := range ids {
			ports := []policy.Port{{Name: "http", Number: 8080, Protocol: policy.HTTP}}
			ends := []Endpoint{{Instance: "i", Addr: netip.MustParseAddrPort("192.0.2.1:15008"), Ports: []uint16{8080}}}
			if v == idle {
				ends = nil
			}
			snap.Services[v] = Service{ID: v, Ports: ports, Endpoints: ends}
		}
		return snap
	}
	h := serve(t, ServerConfig{}, nil)
	h.SetSnapshot(serving(idle))
	type follower struct {
		*raw
		last *discoveryv3.DeltaDiscoveryResponse
	}
	var all []*follower
	for _, who := range []spiffeid.ID{id("/orders"), web, stock} {
		f := &follower{raw: h.raw(t, who)}
		f.send(&request{Node: node("i"), TypeUrl: EndpointType})
		if f.last = f.recv(); len(f.last.Resources) != 0 {
			t.Fatalf("%s: told of %v before anybody serves", who, names(f.last))
		}
		f.send(&request{TypeUrl: EndpointType, ResponseNonce: f.last.Nonce})
		all = append(all, f)
	}
	for step, c := range []struct {
		serving    []spiffeid.ID
		come, gone []spiffeid.ID
	}{
		{serving: []spiffeid.ID{idle, ledger, stock}, come: []spiffeid.ID{ledger}},
		{serving: []spiffeid.ID{idle, ledger, stock, web}, come: []spiffeid.ID{web}},
		{serving: []spiffeid.ID{idle, stock, web}, gone: []spiffeid.ID{ledger}},
		{serving: []spiffeid.ID{ledger}, come: []spiffeid.ID{ledger}, gone: []spiffeid.ID{web}},
	} {
		h.SetSnapshot(serving(c.serving...))
		for _, f := range all[:2] {
			f.last = f.recv()
			if got, gone := names(f.last), f.last.RemovedResources; !slices.Equal(got, text(c.come)) || !slices.Equal(gone, text(c.gone)) {
				t.Errorf("step %d: got %v and lost %v, want %v and %v", step, got, gone, text(c.come), text(c.gone))
			}
			f.send(&request{TypeUrl: EndpointType, ResponseNonce: f.last.Nonce})
		}
	}
	all[2].barrier(SecretType) // nothing came before that
}

func text(ids []spiffeid.ID) []string {
	var out []string
	for _, v := range ids {
		out = append(out, v.String())
	}
	return out
}
