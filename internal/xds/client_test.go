package xds

import (
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func ask(src, dst string, port uint16) policy.Request {
	return policy.Request{Src: id(src), Dst: id(dst), Port: port}
}

func TestFullCycle(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	s := newSidecar("/orders")
	s.start(t, h)
	h.waitNodes(t, 1)
	h.SetSnapshot(m.snapshot()) // a node may be there before the first snapshot

	got := s.view(t)
	require.True(t, got[Bundles].Bundles[shop].X509Authorities()[0].Equal(m.roots[0]))
	require.Equal(t, m.services[0], got[Endpoints].Services[id("/payments")])
	require.Len(t, got[Endpoints].Services, 1)
	require.Equal(t, m.services[1].Ports, got[Rules].Ports)
	d := got[Rules].Rules.Decide(ask("/front", "/orders", 8080))
	require.Equal(t, policy.Allow, d.Effect)
	require.Equal(t, "front-orders (front-orders.yaml:7)", d.Rule.String())
	require.Equal(t, policy.Deny, got[Rules].Rules.Decide(ask("/payments", "/orders", 8080)).Effect)

	acked, nacks := h.waitAcked(t, Revision{1, 1})
	require.Empty(t, nacks)
	require.Len(t, acked, 1)
	require.Equal(t, id("/orders"), acked[0].ID)
	require.Equal(t, "i1", acked[0].Instance)
}

// An edit sends what it changed to whom it concerns, and counts as acknowledged
// everywhere.
func TestEditSendsOnlyWhatChanged(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	h.SetSnapshot(m.snapshot())
	orders, payments := newSidecar("/orders"), newSidecar("/payments")
	orders.start(t, h)
	payments.start(t, h)
	orders.view(t)
	payments.view(t)
	h.waitAcked(t, m.rev)

	m.rules = append(m.rules, allow(t, "ledger-pay", "spiffe://shop.example/ledger", "spiffe://shop.example/payments"))
	h.SetSnapshot(m.next())
	u := payments.next(t)
	require.Equal(t, Rules, u.Kind)
	require.Equal(t, Revision{1, 2}, u.Rev)
	require.Equal(t, policy.Allow, u.Rules.Decide(ask("/ledger", "/payments", 1)).Effect)
	acked, _ := h.waitAcked(t, m.rev)
	require.Len(t, acked, 2)

	m.services[0] = service("/payments", "p1") // an instance is gone; the revision stays
	h.SetSnapshot(m.snapshot())
	u = orders.next(t)
	require.Equal(t, Endpoints, u.Kind)
	require.Len(t, u.Services[id("/payments")].Endpoints, 1)

	m.roots = append(m.roots, root(t, "two"))
	h.SetSnapshot(m.snapshot())
	require.Len(t, orders.next(t).Bundles[shop].X509Authorities(), 2)
	require.Len(t, payments.next(t).Bundles[shop].X509Authorities(), 2)
	h.waitAcked(t, m.rev)
	orders.quiet(t)
	payments.quiet(t)
}

// What a node refuses keeps its last good state, and other kinds go on.
func TestNackKeepsLastGood(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	h.SetSnapshot(m.snapshot())
	s := newSidecar("/orders")
	s.refuse = func(u Update) error {
		if u.Kind == Rules && u.Rules.Decide(ask("/bad", "/orders", 1)).Effect == policy.Allow {
			return errors.New("these rules are bad")
		}
		return nil
	}
	stop, _ := s.start(t, h)
	s.view(t)
	h.waitAcked(t, m.rev)

	good := m.rules
	m.rules = append(good[:2:2], allow(t, "bad", "spiffe://shop.example/bad", "spiffe://shop.example/orders"))
	m.services[0] = service("/payments", "p9")
	h.SetSnapshot(m.next())
	u := s.next(t)
	require.Equal(t, Endpoints, u.Kind)
	require.Equal(t, "p9", u.Services[id("/payments")].Endpoints[0].Instance)
	acked, nacks := h.waitAcked(t, m.rev)
	require.Empty(t, acked)
	require.Len(t, nacks, 1)
	require.Equal(t, "TypedExtensionConfig: these rules are bad", nacks[0].Nack)
	require.Equal(t, m.rev, nacks[0].NackRev)
	s.quiet(t)

	// The refused rules are not remembered: a new stream is offered them again.
	stop()
	h.waitNodes(t, 0)
	s.start(t, h)
	h.waitNodes(t, 1)
	_, nacks = h.waitAcked(t, m.rev)
	require.Len(t, nacks, 1)
	s.quiet(t)

	m.rules = good
	h.SetSnapshot(m.next())
	acked, _ = h.waitAcked(t, m.rev)
	require.Len(t, acked, 1, "nothing to send: the node holds the good rules already")
	require.Empty(t, acked[0].Nack)

	m.rules = append(good[:2:2], allow(t, "fine", "spiffe://shop.example/fine", "spiffe://shop.example/orders"))
	h.SetSnapshot(m.next())
	require.Equal(t, policy.Allow, s.next(t).Rules.Decide(ask("/fine", "/orders", 1)).Effect)
}

// Neither a lost stream nor a restarted control plane makes anything flap.
func TestReconnectSendsNothingTwice(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	h.SetSnapshot(m.snapshot())
	s := newSidecar("/orders", id("/payments"), id("/none"))
	stop, _ := s.start(t, h)
	s.view(t)
	h.waitAcked(t, m.rev)
	stop()
	h.waitNodes(t, 0)
	_, ended := s.start(t, h)
	h.waitNodes(t, 1)
	h.waitAcked(t, m.rev)
	s.quiet(t)

	restarted := serve(t, ServerConfig{}, nil)
	restarted.SetSnapshot(m.snapshot())
	h.Close()
	<-ended
	s.start(t, restarted)
	restarted.waitNodes(t, 1)
	restarted.waitAcked(t, m.rev)
	s.quiet(t)

	m.services[0] = service("/payments", "p7")
	restarted.SetSnapshot(m.next())
	require.Equal(t, "p7", s.next(t).Services[id("/payments")].Endpoints[0].Instance)
	restarted.waitAcked(t, m.rev)
	s.quiet(t)
}

// F9: revisions only go forward; a new epoch is forward whatever its number.
func TestF9OlderRevisionRefused(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	m.rev = Revision{1, 9}
	h.SetSnapshot(m.snapshot())
	s := newSidecar("/orders")
	s.start(t, h)
	s.view(t)
	h.waitAcked(t, m.rev)

	m.rules = nil
	m.rev = Revision{1, 8}
	h.SetSnapshot(m.snapshot())
	require.Eventually(t, func() bool { return strings.Contains(h.Nodes()[0].Nack, "1.8 is older than 1.9") }, patience, time.Millisecond)
	s.quiet(t)

	m.rev = Revision{2, 1}
	h.SetSnapshot(m.snapshot())
	got := map[Kind]Update{}
	for range 2 {
		u := s.next(t)
		got[u.Kind] = u
	}
	require.Equal(t, policy.Deny, got[Rules].Rules.Decide(ask("/front", "/orders", 8080)).Effect)
	require.Empty(t, got[Endpoints].Services)
}

// deliver hands resp to a client without a network.
func deliver(t *testing.T, c *Client, typeURL, rev string, removed []string, res ...*Resource) ([]Update, error) {
	t.Helper()
	var got []Update
	err := c.accept(&discoveryv3.DeltaDiscoveryResponse{
		TypeUrl: typeURL, SystemVersionInfo: rev, Resources: res, RemovedResources: removed,
	}, func(u Update) error { got = append(got, u); return nil })
	return got, err
}

// A new port and the rules that guard it take effect together, in whichever
// order they arrive: in between, the port must not be open under old rules.
func TestPortsAndRulesSwapTogether(t *testing.T) {
	orders := id("/orders")
	http := policy.Port{Name: "http", Number: 80, Protocol: policy.TCP}
	admin := policy.Port{Name: "admin", Number: 90, Protocol: policy.TCP}
	open := allow(t, "open", "spiffe://shop.example/**", "spiffe://shop.example/orders")
	guard := allow(t, "guard", "spiffe://shop.example/**", "spiffe://shop.example/orders", 90)
	guard.Effect = policy.Deny
	before, err := ownResources(orders, door{ports: []policy.Port{http}}, policy.NewRuleset([]policy.Rule{open}), policy.CurrentLevel)
	require.NoError(t, err)
	after, err := ownResources(orders, door{ports: []policy.Port{http, admin}}, policy.NewRuleset([]policy.Rule{open, guard}), policy.CurrentLevel)
	require.NoError(t, err)
	for _, order := range [][]string{{ListenerType, ExtensionType}, {ExtensionType, ListenerType}} {
		c := newSidecar("/orders").Client
		for i, typeURL := range order {
			got, err := deliver(t, c, typeURL, "1.1", nil, before[typeURL]...)
			require.NoError(t, err)
			require.Len(t, got, i, "the first half is not a view")
		}
		got, err := deliver(t, c, order[0], "1.2", nil, after[order[0]]...)
		require.NoError(t, err)
		require.Empty(t, got, "half an edit took effect")
		got, err = deliver(t, c, order[1], "1.2", nil, after[order[1]]...)
		require.NoError(t, err)
		require.Len(t, got, 1)
		require.Len(t, got[0].Ports, 2)
		require.Equal(t, policy.Deny, got[0].Rules.Decide(ask("/x", "/orders", 90)).Effect)
		require.Equal(t, policy.Allow, got[0].Rules.Decide(ask("/x", "/orders", 80)).Effect)
	}
}

// Denies and allows that were made for different ports are no rules.
func TestMixedRulesRefused(t *testing.T) {
	one, err := ownResources(id("/orders"), door{ports: nil}, nil, policy.CurrentLevel)
	require.NoError(t, err)
	two, err := ownResources(id("/orders"), door{ports: service("/orders").Ports}, nil, policy.CurrentLevel)
	require.NoError(t, err)
	c := newSidecar("/orders").Client
	_, err = deliver(t, c, ListenerType, "1.1", nil, one[ListenerType]...)
	require.NoError(t, err)
	for _, mixed := range [][]*Resource{{one[ExtensionType][0], two[ExtensionType][1]}, {two[ExtensionType][0], one[ExtensionType][1]}} {
		got, err := deliver(t, c, ExtensionType, "1.1", nil, mixed...)
		if err == nil || len(got) > 0 {
			t.Errorf("got %d updates and %v, want an error", len(got), err)
		}
	}
}

// Withdrawn rules deny everything, also where only the denies are withdrawn.
func TestRemovedRulesDeny(t *testing.T) {
	for _, gone := range []struct{ typeURL, name string }{
		{ExtensionType, DenyRules}, {ExtensionType, AllowRules}, {ListenerType, id("/orders").String()},
	} {
		c := newSidecar("/orders").Client
		res, err := ownResources(id("/orders"), door{ports: nil}, policy.NewRuleset(shopMesh(t).rules), policy.CurrentLevel)
		require.NoError(t, err)
		_, err = deliver(t, c, ListenerType, "1.1", nil, res[ListenerType]...)
		require.NoError(t, err)
		got, err := deliver(t, c, ExtensionType, "1.1", nil, res[ExtensionType]...)
		require.NoError(t, err)
		require.Equal(t, policy.Allow, got[0].Rules.Decide(ask("/front", "/orders", 8080)).Effect)
		got, err = deliver(t, c, gone.typeURL, "1.2", []string{gone.name})
		require.NoError(t, err)
		require.Len(t, got, 1, gone.name)
		if d := got[0].Rules.Decide(ask("/front", "/orders", 8080)); d != (policy.Decision{}) {
			t.Errorf("without %s: got %+v, want the zero decision", gone.name, d)
		}
	}
}

func TestClientRefuses(t *testing.T) {
	others, err := ownResources(id("/payments"), door{ports: nil}, nil, policy.CurrentLevel)
	require.NoError(t, err)
	cluster, err := clusterResource(service("/payments"))
	require.NoError(t, err)
	secret, err := secretResource(shop, []*x509.Certificate{root(t, "one")})
	require.NoError(t, err)
	for name, c := range map[string]struct {
		typeURL, rev string
		removed      []string
		res          *Resource
		want         string
	}{
		"unknown type":        {"x", "1.1", nil, cluster, "not asked for"},
		"another's listener":  {ListenerType, "1.1", nil, others[ListenerType][0], "not the listener of"},
		"unwanted cluster":    {ClusterType, "1.1", nil, cluster, "not asked for"},
		"no revision":         {SecretType, "", nil, secret, "want EPOCH.N"},
		"bundle withdrawn":    {SecretType, "1.1", []string{"spiffe://shop.example"}, nil, "no trust bundle"},
		"type in the wrong d": {ClusterType, "1.1", nil, secret, "not asked for"},
	} {
		s := newSidecar("/orders", id("/front"))
		var res []*Resource
		if c.res != nil {
			res = append(res, c.res)
		}
		got, err := deliver(t, s.Client, c.typeURL, c.rev, c.removed, res...)
		if err == nil || len(got) > 0 || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %d updates and %v, want %q", name, len(got), err, c.want)
		}
		if h := s.held[c.typeURL]; h != nil && (len(h.versions) > 0 || h.rev != (Revision{})) {
			t.Errorf("%s: it is remembered", name)
		}
	}
}

func TestRunRefusesInstance(t *testing.T) {
	c := NewClient(ClientConfig{Node: id("/a"), Instance: "a b"})
	if err := c.Run(t.Context(), nil, nil); err == nil {
		t.Error("got no error for an instance with a space")
	}
}
