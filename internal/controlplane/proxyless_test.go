package controlplane_test

import (
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/stretchr/testify/require"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
	"github.com/sallyport-mesh/sallyport/internal/xds"
)

// rpcFiles is a mesh whose server has no sidecar, with a rule that no gRPC server
// can enforce.
func rpcFiles() map[string]string {
	workload := func(name, spec string) string {
		return "apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: " + name + "}\nspec:\n  attest: [{kind: join-token}]\n" + spec + "---\n"
	}
	return map[string]string{
		"rpc.yaml": workload("server", "  ports: [{name: rpc, port: 9000, protocol: grpc}]\n  endpoints: [\"10.0.0.7:9000\"]\n") +
			workload("behind", "  ports: [{name: rpc, port: 9000, protocol: grpc, direct: 9443}]\n") + workload("client", "") + workload("other", ""),
		"rules.yaml": `apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: calls}
spec:
  to: {workload: server}
  allow:
    - {from: [{workload: client}], ports: [rpc]}
    - {from: [{workload: client}], ports: [rpc], until: 2100-01-01T00:00:00Z}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: others}
spec:
  to: {workload: behind}
  allow: [{from: [{workload: other}], ports: [rpc]}]
`,
	}
}

// TestShortLivesWhereNobodyRevokes: SVIDs that gRPC without sidecar verifies live an
// hour, others a day.
func TestShortLivesWhereNobodyRevokes(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: rpcFiles()})
	for name, want := range map[string]time.Duration{"client": time.Hour, "behind": time.Hour, "other": 24 * time.Hour} {
		a := m.Agent(name)
		if got := time.Until(a.Status().NotAfter).Round(time.Minute); got != want {
			t.Errorf("the SVID of %s lives %v, want %v", name, got, want)
		}
	}
}

// TestStatusTellsOfRulesThatGRPCCannotEnforce: and lists the address of a server that
// cannot announce itself.
func TestStatusTellsOfRulesThatGRPCCannotEnforce(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: rpcFiles()})
	server := m.Agent("server")
	name := xds.ServerListeners + "0.0.0.0:9000"
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(m.Dial(server)).StreamAggregatedResources(t.Context())
	require.NoError(t, err)
	require.NoError(t, ads.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: instanceOf(t, server)}, TypeUrl: xds.ListenerType, ResourceNames: []string{name}}))
	r, err := ads.Recv()
	require.NoError(t, err)
	require.Len(t, r.Resources, 1)
	require.NoError(t, ads.Send(&discoveryv3.DiscoveryRequest{TypeUrl: xds.ListenerType, ResourceNames: []string{name}, ResponseNonce: r.Nonce, VersionInfo: r.VersionInfo}))
	meshtest.Eventually(t, "status", func() error {
		s, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
		require.NoError(t, err)
		problems := strings.Join(s.GetProblems(), "\n")
		require.Contains(t, problems, "a gRPC server without sidecar, cannot enforce calls (rules.yaml:8)")
		for _, w := range s.GetWorkloads() {
			if w.GetName() == "server" {
				require.Equal(t, "10.0.0.7:9000", w.GetInstances()[0].GetEndpoint())
			}
		}
		return nil
	})
}

func instanceOf(t *testing.T, a *agent.Agent) string {
	t.Helper()
	svid, err := a.Source().GetX509SVID()
	require.NoError(t, err)
	return svid.Certificates[0].Subject.SerialNumber
}

// C8: gRPC checks the control plane by name. So its certificate has one, which no
// workload's has.
func TestC8OnlyTheControlPlaneHasAName(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: rpcFiles()})
	svid, err := m.Agent("client").Source().GetX509SVID()
	require.NoError(t, err)
	if leaf := svid.Certificates[0]; len(leaf.DNSNames)+len(leaf.IPAddresses) != 0 {
		t.Errorf("a workload's certificate names %v %v", leaf.DNSNames, leaf.IPAddresses)
	}
	pool := x509.NewCertPool()
	bundle, err := m.Agent("other").Source().GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	require.NoError(t, err)
	for _, root := range bundle.X509Authorities() {
		pool.AddCert(root)
	}
	for name, taken := range map[string]bool{"127.0.0.1": true, "127.0.0.2": false, "controlplane.example": false} {
		conn, err := tls.Dial("tcp", m.GRPC, &tls.Config{RootCAs: pool, ServerName: name})
		if err == nil {
			_ = conn.Close()
		}
		if (err == nil) != taken {
			t.Errorf("as %s: %v", name, err)
		}
	}
}
