package controlplane_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
	"github.com/sallyport-mesh/sallyport/internal/store"
)

const payAtPartner = `apiVersion: sallyport.dev/v1
kind: TrustDomain
metadata: {name: partner}
spec:
  trustDomain: partner.example
  bundleEndpoint: {url: "https://127.0.0.1:1/", profile: https_web}
  workloads:
    - {id: /payments, ports: [{name: http, port: 8080, protocol: http}], endpoints: ["127.0.0.1:15008"]}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: pay-at-partner}
spec:
  to: {id: spiffe://partner.example/payments}
  allow:
    - {from: [{workload: client}], ports: [http]}
`

// TestExplainForeign: a destination in another trust domain is explained by the
// rules of this mesh, and the answer says that they are half of the story.
func TestExplainForeign(t *testing.T) {
	f := files()
	f["partner.yaml"] = payAtPartner
	m := meshtest.New(t, meshtest.Config{Files: f})
	ask := func(from, to string) (*sallyportv1.Explanation, error) {
		resp, err := m.Admin.Explain(t.Context(), &sallyportv1.ExplainRequest{From: from, To: to})
		if err != nil {
			return nil, err
		}
		require.Len(t, resp.GetExplanations(), 1)
		return resp.GetExplanations()[0], nil
	}
	for from, want := range map[string]string{"client": "allow", "server": "deny"} {
		var e *sallyportv1.Explanation
		meshtest.Eventually(t, "the documents in force", func() (err error) {
			e, err = ask(from, "spiffe://partner.example/payments")
			return err
		})
		if e.GetVerdict() != want || e.GetPort() != "http" || !strings.Contains(e.GetNote(), "partner.example decides for itself") {
			t.Errorf("from %s: got %v, want %s", from, e, want)
		}
	}
	if _, err := ask("client", "spiffe://partner.example/ledger"); err == nil || !strings.Contains(err.Error(), "no TrustDomain document") {
		t.Errorf("a foreign workload that is not listed: got %v", err)
	}
}

// TestStopBeforeServing: a stop that is faster than the servers' start is a stop.
func TestStopBeforeServing(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 { // who is faster is chance
		cfg := controlplane.Config{TrustDomain: ours.Name(), DataDir: t.TempDir(), Listen: controlplane.Listen{GRPC: "127.0.0.1:0", Metrics: "127.0.0.1:0"}}
		cp, err := controlplane.New(t.Context(), cfg.WithDefaults(), controlplane.Options{
			Log: hclog.NewNullLogger(), Now: time.Now, Version: "test", Store: store.NewMemory(),
		})
		require.NoError(t, err)
		if err := cp.Run(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// A template is many identities: which one is meant is asked for.
func TestExplainATemplate(t *testing.T) {
	f := files()
	f["cluster.yaml"] = "apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: cluster}\nspec:\n  id: /ns/{namespace}/sa/{serviceAccount}\n  attest: [{kind: kubernetes}]\n"
	m := meshtest.New(t, meshtest.Config{Files: f})
	meshtest.Eventually(t, "the documents in force", func() error {
		_, err := m.Admin.Explain(t.Context(), &sallyportv1.ExplainRequest{From: "client", To: "server"})
		return err
	})
	for _, req := range []*sallyportv1.ExplainRequest{{From: "cluster", To: "server"}, {From: "client", To: "cluster"}} {
		_, err := m.Admin.Explain(t.Context(), req)
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "cluster is a template (/ns/{namespace}/sa/{serviceAccount}): name one of its IDs") {
			t.Errorf("%v: got %v", req, err)
		}
	}
}
