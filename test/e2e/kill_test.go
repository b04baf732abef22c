//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// TestKillControlPlaneUnderLoad: the data plane owes the control plane nothing.
func TestKillControlPlaneUnderLoad(t *testing.T) {
	m := realmesh.New(t, pairFiles())
	m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": realmesh.HTTPApp(t, "a"), "echo": realmesh.EchoApp(t, "")}})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": ""}})
	stranger := m.Sidecar(realmesh.SidecarConfig{Name: "stranger", Outbound: map[string]string{"server:http": ""}})
	url := "http://" + client.Out["server:http"]
	waitOK(t, url)

	load := realmesh.HTTPLoad(t, url, 16, 5*time.Millisecond)
	load.More(t, 200)
	m.CP.Kill()
	load.More(t, 2000)
	if got := status(t, "http://"+stranger.Out["server:http"]); got != http.StatusForbidden {
		t.Errorf("stranger while the control plane is down: status %d, want 403", got)
	}
	m.StartControlPlane()
	load.More(t, 500)
	ok, failed := load.Stop()
	t.Logf("%d requests succeeded, %d failed", ok, len(failed))
	if len(failed) > 0 {
		t.Errorf("%d requests failed, want none; first: %s", len(failed), failed[0])
	}

	// It came back: the next edit works.
	realmesh.WriteFile(t, filepath.Join(m.Policy, "allow.yaml"), allowClient("stranger"))
	realmesh.Eventually(t, "the edit after the restart in force", func() error {
		if a, b := status(t, url), status(t, "http://"+stranger.Out["server:http"]); a != 403 || b != 200 {
			return fmt.Errorf("client %d, stranger %d; want 403 and 200", a, b)
		}
		return nil
	})
}

// TestKillSidecarUnderLoad: with two instances, a dead sidecar costs what was
// in flight on it, and its endpoint is gone within 2 s.
func TestKillSidecarUnderLoad(t *testing.T) {
	const workers = 16
	m := realmesh.New(t, pairFiles())
	app := realmesh.HTTPApp(t, "a")
	serve := map[string]string{"http": app, "echo": realmesh.EchoApp(t, "")}
	one := m.Sidecar(realmesh.SidecarConfig{Name: "one", Workload: "server", Serve: serve})
	two := m.Sidecar(realmesh.SidecarConfig{Name: "two", Workload: "server", Serve: serve})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": ""}})
	url := "http://" + client.Out["server:http"]
	waitOK(t, url)
	waitEndpoints(t, m, one.Tunnel, two.Tunnel)

	load := realmesh.HTTPLoad(t, url, workers, 5*time.Millisecond)
	load.More(t, 500)
	one.Kill()
	took := realmesh.EventuallyWithin(t, 2*time.Second, "the killed sidecar's endpoint gone", func() error {
		return hasEndpoints(m, two.Tunnel)
	})
	load.More(t, 1000)
	_, before := load.Count()
	load.More(t, 1000)
	ok, failed := load.Stop()
	t.Logf("%d requests succeeded, %d failed; endpoint gone after %v", ok, len(failed), took)
	if len(failed) > workers {
		t.Errorf("%d requests failed, want at most the %d in flight; first: %s", len(failed), workers, failed[0])
	}
	if len(failed) > before {
		t.Errorf("requests still failed after the endpoint was gone: %s", failed[before])
	}
}

// TestStopSidecarUnderLoad: SIGTERM withdraws first and drains; no request fails.
func TestStopSidecarUnderLoad(t *testing.T) {
	m := realmesh.New(t, pairFiles())
	serve := map[string]string{"http": realmesh.HTTPApp(t, "a"), "echo": realmesh.EchoApp(t, "")}
	one := m.Sidecar(realmesh.SidecarConfig{Name: "one", Workload: "server", Serve: serve, Extra: "drain: 5s\n"})
	two := m.Sidecar(realmesh.SidecarConfig{Name: "two", Workload: "server", Serve: serve})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": ""}})
	url := "http://" + client.Out["server:http"]
	waitOK(t, url)
	waitEndpoints(t, m, one.Tunnel, two.Tunnel)

	// Fresh connections only: a kept-alive one that never ends is cut at the
	// drain limit, by design.
	load := realmesh.HTTPLoad(t, url, 1, 5*time.Millisecond)
	load.More(t, 100)
	one.Signal(t, sigterm)
	took := realmesh.EventuallyWithin(t, time.Second, "the stopping sidecar's endpoint gone", func() error {
		return hasEndpoints(m, two.Tunnel)
	})
	if code := one.Wait(t); code != 0 {
		t.Errorf("exit code %d after SIGTERM, want 0", code)
	}
	load.More(t, 200)
	ok, failed := load.Stop()
	t.Logf("%d requests succeeded, %d failed; endpoint gone after %v", ok, len(failed), took)
	if len(failed) > 0 {
		t.Errorf("%d requests failed, want none; first: %s", len(failed), failed[0])
	}
}

// TestKillAppUnderLoad: a dead app costs what was in flight; callers get an
// answer that says so, and all is well when the app is back.
func TestKillAppUnderLoad(t *testing.T) {
	const workers = 8
	m := realmesh.New(t, pairFiles())
	addr := realmesh.FreeAddr(t)
	app := startApp(t, addr)
	m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": addr, "echo": realmesh.EchoApp(t, "")}})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": ""}})
	url := "http://" + client.Out["server:http"]
	waitOK(t, url)

	load := realmesh.HTTPLoad(t, url, workers, 20*time.Millisecond)
	load.More(t, 200)
	app.Kill()
	realmesh.Eventually(t, "callers told that the app is down", func() error {
		if got := status(t, url); got != http.StatusServiceUnavailable {
			return fmt.Errorf("status %d, want 503", got)
		}
		return nil
	})
	startApp(t, addr)
	load.More(t, 200)
	_, before := load.Count()
	load.More(t, 200)
	ok, failed := load.Stop()
	cut := 0
	for _, f := range failed {
		if !strings.Contains(f, "503 ") {
			cut++
		}
	}
	t.Logf("%d requests succeeded; while the app was down %d were answered 503 and %d were cut in flight", ok, len(failed)-cut, cut)
	if cut > workers {
		t.Errorf("%d requests were cut without an answer, want at most the %d in flight", cut, workers)
	}
	if len(failed) > before {
		t.Errorf("requests still failed after the app was back: %s", failed[before])
	}
}

// startApp runs this test binary as an HTTP app of its own.
func startApp(t *testing.T, addr string) *realmesh.Proc {
	t.Helper()
	cmd := exec.Command(self(t), "-test.run=^$")
	cmd.Env = append(cmd.Environ(), appEnv+"="+addr)
	return realmesh.Start(t, "app", cmd)
}
