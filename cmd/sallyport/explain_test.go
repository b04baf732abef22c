package main

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// TestExplainADecision asks about the id that a refused caller was told, once the
// destination's sidecar has sent the record.
func TestExplainADecision(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: map[string]string{"a.yaml": `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: client}
spec: {attest: [{kind: join-token}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: server}
spec: {attest: [{kind: join-token}], ports: [{name: http, port: 8080, protocol: tcp}]}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: p}
spec:
  to: {workload: server}
  allow: [{from: [{workload: client}], ports: [http]}]
`}})
	a := m.Agent("server")
	conn := m.Dial(a)
	s := flow.NewStream(flow.StreamConfig{})
	meshtest.Go(t, "flow stream", func(ctx context.Context) error {
		_ = s.Run(ctx, conn) // it ends with the mesh
		return nil
	})
	id := func(path string) spiffeid.ID { return spiffeid.RequireFromString("spiffe://test.example" + path) }
	s.Record(flow.Flow{
		Request: policy.Request{Src: id("/stranger"), Dst: id("/server"), Port: 8080}, ID: "8f14e45fceea167a",
		Start: time.Now(), Side: flow.Inbound, Outcome: flow.Refused, PortName: "http",
	})
	var out strings.Builder
	meshtest.Eventually(t, "the record", func() error {
		out.Reset()
		var problem strings.Builder
		if code := run(t.Context(), []string{"--socket", m.Socket, "explain", "8f14e45fceea167a"}, &out, &problem); code != 0 {
			return fmt.Errorf("exit code %d: %s", code, problem.String())
		}
		return nil
	})
	for _, want := range []string{
		"DENY  spiffe://test.example/stranger → spiffe://test.example/server:http", "no rule allows it",
		"nearest rule    p (a.yaml:16)", "what it misses  source: rule names client", "recorded by spiffe://test.example/server: refused",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
}
