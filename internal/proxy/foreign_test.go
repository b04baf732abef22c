package proxy

import (
	"crypto/x509"
	"io"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// twoMeshes is a caller in another trust domain than payments.
type twoMeshes struct {
	home, partner *world
	caller        *client
	server        *server
	foreign       spiffeid.ID // the caller
}

func newTwoMeshes(t *testing.T, target string, rules func(foreign spiffeid.ID) []policy.Rule) *twoMeshes {
	t.Helper()
	partnerTD := spiffeid.RequireTrustDomainFromString("partner.example")
	m := &twoMeshes{home: newWorld(t), foreign: spiffeid.RequireFromPath(partnerTD, "/orders")}
	m.partner = &world{t: t, ca: newAuthority(t, partnerTD)}
	bundles := identity.Bundles{
		td:        spiffebundle.FromX509Authorities(td, []*x509.Certificate{m.home.ca.cert}),
		partnerTD: spiffebundle.FromX509Authorities(partnerTD, []*x509.Certificate{m.partner.ca.cert}),
	}
	m.server = m.home.serve(payments, 1, rules(m.foreign), m.home.app("tcp", echo))
	m.caller = m.partner.client(m.foreign, target)
	for _, source := range []identity.Source{m.server.cfg.Source, m.caller.cfg.Source} {
		source.(*identity.Live).SetBundles(bundles)
	}
	m.offer(m.server.endpoint("a"), tcpPort, httpPort)
	return m
}

// offer tells the caller's sidecar of payments.
func (m *twoMeshes) offer(e xds.Endpoint, ports ...policy.Port) {
	m.caller.views.Apply(xds.Update{Kind: xds.Endpoints, Rev: xds.Revision{Epoch: 1, N: 2}, Services: map[spiffeid.ID]xds.Service{
		payments: {ID: payments, Ports: ports, Endpoints: []xds.Endpoint{e}, MeshName: "payments.shop.home.mesh"},
	}})
}

// TestForeignDestination: by alias or full ID, to the exact ID under the foreign
// bundle; the destination decides about the foreign caller.
func TestForeignDestination(t *testing.T) {
	allowed := func(id spiffeid.ID) []policy.Rule { return []policy.Rule{allow(id)} }
	for _, target := range []string{"payments.shop.home.mesh:tcp", "payments.shop.home:7000", payments.String() + ":tcp"} {
		m := newTwoMeshes(t, target, allowed)
		roundTrip(t, m.caller.dial(t), "hello")
		if got := m.server.Connections(); len(got) != 1 || got[0].Src != m.foreign.String() || got[0].Dst != payments.String() {
			t.Errorf("%s: the destination sees %+v", target, got)
		}
	}
	t.Run("refused there", func(t *testing.T) {
		m := newTwoMeshes(t, "payments.shop.home.mesh:tcp", func(spiffeid.ID) []policy.Rule { return []policy.Rule{allow(orders)} })
		expectRefused(t, m.caller)
		if f := only(t, m.server.flows); f.Outcome != flow.Refused || f.Src != m.foreign {
			t.Errorf("record: %+v", f)
		}
	})
	t.Run("C7 the foreign CA vouches for an ID of ours", func(t *testing.T) {
		m := newTwoMeshes(t, payments.String()+":tcp", func(spiffeid.ID) []policy.Rule { return []policy.Rule{allow(orders)} })
		m.caller.cfg.Source.(*identity.Live).SetSVID(m.partner.ca.svid(t, orders))
		expectRefused(t, m.caller)
		if n := m.server.Live(); n != 0 {
			t.Errorf("%d connections came through", n)
		}
	})
	t.Run("C8 the foreign bundle is missing", func(t *testing.T) {
		for _, blind := range []func(*twoMeshes) (*identity.Live, *world){
			func(m *twoMeshes) (*identity.Live, *world) { return m.caller.cfg.Source.(*identity.Live), m.partner },
			func(m *twoMeshes) (*identity.Live, *world) { return m.server.cfg.Source.(*identity.Live), m.home },
		} {
			m := newTwoMeshes(t, payments.String()+":tcp", allowed)
			live, w := blind(m)
			own, err := live.GetX509SVID()
			require.NoError(t, err)
			live.SetBundles(identity.Bundles{own.ID.TrustDomain(): spiffebundle.FromX509Authorities(own.ID.TrustDomain(), []*x509.Certificate{w.ca.cert})})
			expectRefused(t, m.caller)
			if f := only(t, m.caller.flows); f.Outcome != flow.Failed || f.Sent != 0 {
				t.Errorf("record: %+v", f)
			}
		}
	})
	t.Run("C8 another workload at the endpoint", func(t *testing.T) {
		m := newTwoMeshes(t, payments.String()+":tcp", allowed)
		m.server.cfg.Source.(*identity.Live).SetSVID(m.home.ca.svid(t, intruder))
		expectRefused(t, m.caller)
		if f := only(t, m.caller.flows); f.Outcome != flow.Failed || f.Sent != 0 {
			t.Errorf("record: %+v", f)
		}
	})
	t.Run("unknown alias", func(t *testing.T) {
		m := newTwoMeshes(t, "payments.shop.elsewhere.mesh:tcp", allowed)
		expectRefused(t, m.caller)
	})
}

// TestForeignNameOfTwo: a name that two destinations bear leads nowhere.
func TestForeignNameOfTwo(t *testing.T) {
	other := spiffeid.RequireFromString("spiffe://third.example/payments")
	var views Views
	views.Apply(xds.Update{Kind: xds.Endpoints, Services: map[spiffeid.ID]xds.Service{
		payments: {ID: payments, MeshName: "payments.home.mesh"}, other: {ID: other, MeshName: "payments.home.mesh"},
	}})
	if s, ok := views.Load().named("payments.home.mesh"); ok {
		t.Errorf("it leads to %s", s.ID)
	}
}

// TestForeignWithdrawn: a live connection ends when its foreign destination, or
// only its port, is offered no more; other connections and other edits do not
// touch it.
func TestForeignWithdrawn(t *testing.T) {
	for name, withdraw := range map[string]func(*twoMeshes){
		"destination": func(m *twoMeshes) {
			m.caller.views.Apply(xds.Update{Kind: xds.Endpoints, Rev: xds.Revision{Epoch: 1, N: 3}})
		},
		"port": func(m *twoMeshes) { m.offer(m.server.endpoint("a"), httpPort) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newTwoMeshes(t, "payments.shop.home.mesh:tcp", func(id spiffeid.ID) []policy.Rule { return []policy.Rule{allow(id)} })
			conn := m.caller.dial(t)
			roundTrip(t, conn, "one")
			m.offer(m.server.endpoint("another instance"), tcpPort) // what is offered has changed, not whether
			roundTrip(t, conn, "two")
			withdraw(m)
			require.NoError(t, conn.SetReadDeadline(time.Now().Add(5*time.Second)))
			if _, err := io.ReadAll(conn); err == nil {
				t.Error("the connection ended as if the other side had finished")
			}
			if f := only(t, m.caller.flows); f.Outcome != flow.Cut || f.Error != "the destination is not offered any more" {
				t.Errorf("record: %+v", f)
			}
		})
	}
	t.Run("own trust domain", func(t *testing.T) { // there the other end cuts
		w := newWorld(t)
		s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
		c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
		conn := c.dial(t)
		roundTrip(t, conn, "one")
		c.views.Apply(xds.Update{Kind: xds.Endpoints, Rev: xds.Revision{Epoch: 1, N: 3}})
		roundTrip(t, conn, "two")
	})
}
