// Package deploy_test holds the example configurations against the programs
// that read them.
package deploy_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/host"
	"github.com/sallyport-mesh/sallyport/internal/sidecar"
)

func TestExamplesAreRead(t *testing.T) {
	cp, err := controlplane.LoadConfig("controlplane.yaml")
	if err == nil {
		err = cp.WithDefaults().Validate()
	}
	if err != nil {
		t.Errorf("controlplane.yaml: %v", err)
	}
	if _, err := sidecar.Load("proxy.yaml"); err != nil {
		t.Errorf("proxy.yaml: %v", err)
	}
	if _, err := host.Load("agent.yaml"); err != nil {
		t.Errorf("agent.yaml: %v", err)
	}
}

// TestUnitsMatchTheExamples: what a configuration names, its unit provides.
func TestUnitsMatchTheExamples(t *testing.T) {
	read := func(name string) string {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return strings.ReplaceAll(string(content), "%i", "payments")
	}
	cp, err := controlplane.LoadConfig("controlplane.yaml")
	if err != nil {
		t.Fatal(err)
	}
	px, err := sidecar.Load("proxy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	agent, err := host.Load("agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ unit, line string }{
		{"sallyport-controlplane.service", "StateDirectory=" + strings.TrimPrefix(cp.DataDir, "/var/lib/")},
		{"sallyport-proxy@.service", "StateDirectory=" + strings.TrimPrefix(px.StateDir, "/var/lib/")},
		{"sallyport-proxy@.service", "RuntimeDirectory=" + strings.TrimPrefix(filepath.Dir(px.Admin.Socket), "/run/")},
		{"sallyport-proxy@.service", "LoadCredential=" + filepath.Base(px.TokenFile) + ":/etc/sallyport/payments/token"},
		{"sallyport-agent.service", "StateDirectory=" + strings.TrimPrefix(agent.StateDir, "/var/lib/")},
		{"sallyport-agent.service", "RuntimeDirectory=" + strings.TrimPrefix(filepath.Dir(agent.WorkloadAPI.Socket), "/run/")},
		{"sallyport-agent.service", "RuntimeDirectory=" + strings.TrimPrefix(filepath.Dir(agent.Files[0].Dir), "/run/")},
		{"sallyport-agent.service", "LoadCredential=" + filepath.Base(agent.TokenFile) + ":/etc/sallyport/agent-token"},
	} {
		if !strings.Contains(read(c.unit), "\n"+c.line+"\n") {
			t.Errorf("%s has no line %q", c.unit, c.line)
		}
	}
}
