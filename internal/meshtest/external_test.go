package meshtest

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/issuer/external/issuertest"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const outsidePolicy = `apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: pay}
spec:
  to: {workload: payments}
  allow:
    - {from: [{workload: orders}], ports: [http]}
`

const templated = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: cluster}
spec:
  id: /ns/{namespace}/sa/{serviceAccount}
  attest: [{kind: kubernetes}]
  ports: [{name: http, port: 8080, protocol: http}]
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: shop}
spec:
  to: {id: /ns/shop/sa/ledger}
  allow:
    - {from: [{id: /ns/shop/sa/web}], ports: [http]}
`

// TestTemplatedWorkloads: sidecars whose IDs a template gives are served, found and
// decided about as any others.
func TestTemplatedWorkloads(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("test.example")
	issuer := issuertest.New(t, td)
	m := New(t, Config{Files: map[string]string{"w.yaml": templated}, Change: func(c *controlplane.Config) {
		c.ExternalIssuer.WorkloadAPI = issuer.Serve(spiffeid.RequireFromPath(td, identity.ControlPlanePath))
		c.ExternalIssuer.Bundle.File = issuer.WriteBundle(filepath.Join(t.TempDir(), "bundle.json"))
	}})
	const door = "/ns/shop/sa/ledger:http"
	start := func(id string, serve map[string]string, outbound ...string) *Sidecar {
		return m.Sidecar(SidecarConfig{Workload: "cluster", Identity: issuer.Serve(spiffeid.RequireFromPath(td, id)), Serve: serve, Outbound: outbound})
	}
	start("/ns/shop/sa/ledger", map[string]string{"http": serveHTTP(t)})
	web, other := start("/ns/shop/sa/web", nil, door), start("/ns/stock/sa/web", nil, door)
	wantHTTP(t, "http://"+web.Out[door], http.StatusOK)
	wantHTTP(t, "http://"+other.Out[door], http.StatusForbidden)
	s, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range s.GetProblems() {
		t.Errorf("a problem: %s", p)
	}
}

// TestExternalIssuer: control plane and sidecars have their identities from
// another issuer's Workload API, which replaces them and its root; the mesh
// authorises by ID alone.
func TestExternalIssuer(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("test.example")
	issuer := issuertest.New(t, td)
	path := issuer.WriteBundle(filepath.Join(t.TempDir(), "bundle.json"))
	m := New(t, Config{
		Files: map[string]string{"w.yaml": workloadB + fmt.Sprintf(workloadA, "orders") + fmt.Sprintf(workloadA, "tester") + outsidePolicy},
		Change: func(c *controlplane.Config) {
			c.ExternalIssuer.WorkloadAPI = issuer.Serve(spiffeid.RequireFromPath(td, identity.ControlPlanePath))
			c.ExternalIssuer.Bundle.File = path
		},
	})
	start := func(name, id string, serve map[string]string, outbound ...string) *Sidecar {
		return m.Sidecar(SidecarConfig{Workload: name, Identity: issuer.Serve(spiffeid.RequireFromPath(td, id)), Serve: serve, Outbound: outbound})
	}
	start("payments", "/shop/payments", map[string]string{"http": serveHTTP(t), "echo": serveEcho(t)})
	orders := start("orders", "/orders", nil, "payments.shop.mesh:http")
	tester := start("tester", "/tester", nil, "/shop/payments:http")
	check := func() {
		t.Helper()
		wantHTTP(t, "http://"+orders.Out["payments.shop.mesh:http"], http.StatusOK)
		wantHTTP(t, "http://"+tester.Out["/shop/payments:http"], http.StatusForbidden)
	}
	check()
	issuer.Rotate()
	issuer.WriteBundle(path)
	Eventually(t, "the new root", func() error {
		s, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
		if err == nil && len(s.GetAuthorities()) != 2 {
			err = fmt.Errorf("authorities %v", s.GetAuthorities())
		}
		return err
	})
	check()
	s, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range s.GetWorkloads() {
		if i := w.GetInstances(); len(i) != 1 || !i[0].GetConnected() {
			t.Errorf("%s has the instances %v, want one that is connected", w.GetName(), i)
		}
	}
}

// TestExternalIssuerAnotherName: the other issuer knows the control plane by an ID of
// its own, and so do the sidecars; what that signs is believed.
func TestExternalIssuerAnotherName(t *testing.T) {
	const name = "/infra/mesh"
	td := spiffeid.RequireTrustDomainFromString("test.example")
	issuer := issuertest.New(t, td)
	m := New(t, Config{
		Files: map[string]string{"w.yaml": workloadB + fmt.Sprintf(workloadA, "orders") + outsidePolicy},
		Change: func(c *controlplane.Config) {
			c.ExternalIssuer.ID = name
			c.ExternalIssuer.WorkloadAPI = issuer.Serve(spiffeid.RequireFromPath(td, name))
			c.ExternalIssuer.Bundle.File = issuer.WriteBundle(filepath.Join(t.TempDir(), "bundle.json"))
		},
	})
	start := func(name, id string, serve map[string]string, outbound ...string) *Sidecar {
		return m.Sidecar(SidecarConfig{
			Workload: name, Identity: issuer.Serve(spiffeid.RequireFromPath(td, id)), ControlPlaneID: td.IDString() + "/infra/mesh",
			Serve: serve, Outbound: outbound,
		})
	}
	payments := start("payments", "/shop/payments", map[string]string{"http": serveHTTP(t), "echo": serveEcho(t)})
	const door = "payments.shop.mesh:http"
	orders := start("orders", "/orders", nil, door)
	wantHTTP(t, "http://"+orders.Out[door], http.StatusOK)
	_, err := m.Admin.Revoke(t.Context(), &sallyportv1.RevokeRequest{Subject: "orders", Reason: "test", Wait: durationpb.New(Deadline)})
	if err != nil {
		t.Fatal(err)
	}
	if admitted(t, payments.Tunnel, issuer.Leaf(spiffeid.RequireFromPath(td, "/orders"), nil)) {
		t.Error("the revoked is taken")
	}
	s, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range s.GetProblems() {
		if !strings.Contains(p, "orders: revoked by") {
			t.Errorf("a problem: %s", p)
		}
	}
}
