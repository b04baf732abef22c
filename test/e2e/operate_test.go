//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

func writeFolder(t *testing.T, dir string, files map[string]string) string {
	t.Helper()
	for name, content := range files {
		realmesh.WriteFile(t, filepath.Join(dir, name), content)
	}
	return dir
}

// TestApplyHistoryRollback: the other path into the catalogue, with sets of
// their own, refusals that change nothing, and an audit record for each.
func TestApplyHistoryRollback(t *testing.T) {
	m := realmesh.New(t, nil)
	if stdout, _, code := m.CLI("status"); code != 1 || !strings.Contains(stdout, "sallyport apply") {
		t.Errorf("status of an empty mesh: exit code %d: %s", code, stdout)
	}
	files := pairFiles()
	files["scopes.yaml"] = "apiVersion: sallyport.dev/v1\nkind: Scope\nmetadata: {name: audit}\nspec: {ids: [/auditor, /server], evidence: [{kind: join-token}]}\n"
	dir := writeFolder(t, filepath.Join(m.Dir, "files"), files)
	mustCLI(t, m, "apply", dir)
	m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": realmesh.HTTPApp(t, "a"), "echo": realmesh.EchoApp(t, "")}})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": ""}})
	stranger := m.Sidecar(realmesh.SidecarConfig{Name: "stranger", Outbound: map[string]string{"server:http": ""}})
	allowed, refused := "http://"+client.Out["server:http"], "http://"+stranger.Out["server:http"]
	waitOK(t, allowed)

	// A set of its own, applied by itself, and waited for: in force on return.
	extra := writeFolder(t, filepath.Join(m.Dir, "extra"), map[string]string{
		"w.yaml": workload("auditor", ""),
		"p.yaml": strings.Replace(allowClient("stranger"), "server-callers", "more-callers", 1),
	})
	out := mustCLI(t, m, "apply", extra, "--set", "audit", "--wait", "20s")
	if !strings.Contains(out, "3 sidecars acknowledged") {
		t.Errorf("apply --wait: %s", out)
	}
	if a, b := status(t, allowed), status(t, refused); a != 200 || b != 200 {
		t.Errorf("after the set was applied: client %d, stranger %d; want 200 and 200", a, b)
	}

	// Refused: nothing changes, the message says where.
	bad := writeFolder(t, filepath.Join(m.Dir, "bad"), map[string]string{"w.yaml": workload("auditor", ""), "p.yaml": allowClient("nobody")})
	_, stderr, code := m.CLI("apply", bad, "--set", "audit")
	if code == 0 || !strings.Contains(stderr, "audit/p.yaml:7:") {
		t.Errorf("a bad set: exit code %d: %s", code, stderr)
	}
	none := writeFolder(t, filepath.Join(m.Dir, "none"), map[string]string{"p.yaml": "# nothing left\n"})
	if _, stderr, code := m.CLI("apply", none, "--set", "audit"); code == 0 || !strings.Contains(stderr, "set remove audit") {
		t.Errorf("a set without its last Workload: exit code %d: %s", code, stderr)
	}
	if out := mustCLI(t, m, "apply", dir, "--dry-run"); !strings.Contains(out, "nothing was changed") {
		t.Errorf("dry run: %s", out)
	}

	var history struct {
		Revisions []struct {
			Revision, Actor, Origin, Summary string
			Current                          bool
		}
	}
	require.NoError(t, json.Unmarshal([]byte(mustCLI(t, m, "history", "--output", "json")), &history))
	if len(history.Revisions) != 2 || !history.Revisions[0].Current || history.Revisions[0].Actor == "" || history.Revisions[0].Origin == "" {
		t.Fatalf("history: %+v", history)
	}
	mustCLI(t, m, "rollback", history.Revisions[1].Revision, "--wait", "20s")
	if a, b := status(t, allowed), status(t, refused); a != 200 || b != 403 {
		t.Errorf("after the rollback: client %d, stranger %d; want 200 and 403", a, b)
	}
	mustCLI(t, m, "rollback", history.Revisions[0].Revision, "--wait", "20s")
	mustCLI(t, m, "set", "remove", "audit", "--wait", "20s")
	if a, b := status(t, allowed), status(t, refused); a != 200 || b != 403 {
		t.Errorf("after the set was removed: client %d, stranger %d; want 200 and 403", a, b)
	}
	audit := mustCLI(t, m, "audit")
	for _, want := range []string{"uid ", "admin socket, pid", "audit/p.yaml:7:", "stranger", "token.create"} {
		if !strings.Contains(audit, want) {
			t.Errorf("audit does not say %q: %s", want, audit)
		}
	}
}

// TestRestartKeepsEverything: the same data directory gives the same CA, tokens,
// enrolments and revision; a sidecar comes back without a new token.
func TestRestartKeepsEverything(t *testing.T) {
	m := realmesh.New(t, nil)
	mustCLI(t, m, "apply", writeFolder(t, filepath.Join(m.Dir, "files"), pairFiles()))
	server := m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": realmesh.HTTPApp(t, "a"), "echo": realmesh.EchoApp(t, "")}})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": ""}})
	waitOK(t, "http://"+client.Out["server:http"])
	token := m.Token("client") // made before, redeemed after
	before := authorities(t, m)

	m.CP.Signal(t, sigterm)
	if code := m.CP.Wait(t); code != 0 {
		t.Errorf("exit code %d after SIGTERM, want 0", code)
	}
	m.StartControlPlane()
	if after := authorities(t, m); after != before {
		t.Errorf("authorities and revision %q, want %q as before", after, before)
	}
	m.SidecarWithToken(realmesh.SidecarConfig{Name: "second", Outbound: map[string]string{"server:http": ""}}, token)
	for _, s := range []*realmesh.Sidecar{server, client} {
		s.Kill()
		require.NoError(t, os.Remove(filepath.Join(s.Dir, "token")))
		s.Start("again")
		s.WaitReady()
	}
	waitOK(t, "http://"+client.Out["server:http"])
}

func authorities(t *testing.T, m *realmesh.Mesh) string {
	t.Helper()
	var s struct {
		Revision    string
		Authorities []struct{ Subject string }
	}
	stdout, stderr, _ := m.CLI("status", "--output", "json")
	require.NoError(t, json.Unmarshal([]byte(stdout), &s), stderr)
	return fmt.Sprint(s)
}

// TestExternalEtcd: the same story with a cluster outside the process.
func TestExternalEtcd(t *testing.T) {
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	addr, peer := realmesh.FreeAddr(t), realmesh.FreeAddr(t)
	listen := url.URL{Scheme: "http", Host: addr}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{listen}, []url.URL{listen}
	peerURL := url.URL{Scheme: "http", Host: peer}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peerURL}, []url.URL{peerURL}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.LogLevel = hclog.Error.String()
	server, err := embed.StartEtcd(cfg)
	require.NoError(t, err)
	t.Cleanup(server.Close)
	<-server.Server.ReadyNotify()

	m := realmesh.New(t, pairFiles(), "-etcd-endpoints", listen.String(), "-etcd-prefix", "/mesh-a/")
	m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": realmesh.HTTPApp(t, "a"), "echo": realmesh.EchoApp(t, "")}})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": ""}})
	waitOK(t, "http://"+client.Out["server:http"])
	m.CP.Kill()
	m.StartControlPlane()
	realmesh.WriteFile(t, filepath.Join(m.Policy, "allow.yaml"), allowClient("stranger"))
	realmesh.Eventually(t, "an edit after the restart", func() error {
		if got := status(t, "http://"+client.Out["server:http"]); got != http.StatusForbidden {
			return fmt.Errorf("status %d, want 403", got)
		}
		return nil
	})
	if _, err := os.Stat(filepath.Join(m.Dir, "data", "etcd")); !os.IsNotExist(err) {
		t.Errorf("an embedded etcd was started beside the external one: %v", err)
	}
}

// TestUpKilledLeavesNothing: `up` dies with -9 and takes everything along.
func TestUpKilledLeavesNothing(t *testing.T) {
	dir, err := os.MkdirTemp("", "sp")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.CopyFS(dir, os.DirFS(filepath.Join(realmesh.Root(t), "examples/shop"))))
	_ = os.RemoveAll(filepath.Join(dir, ".sallyport"))
	up := realmesh.Start(t, "up", exec.Command(realmesh.Bin(t, "sallyport"), "up", dir, "--port-offset", "8000"))
	realmesh.Eventually(t, "the shop is up", func() error {
		if !strings.Contains(up.Log(), "/checkout") {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	pids := up.Children(t)
	if len(pids) < 11 {
		t.Errorf("up has %d children, want a control plane, five sidecars and five apps", len(pids))
	}
	up.Kill()
	realmesh.Eventually(t, "every process gone", func() error {
		for _, pid := range pids {
			if syscall.Kill(pid, 0) == nil {
				return fmt.Errorf("process %d is still there", pid)
			}
		}
		return nil
	})
}

// TestRemovedWorkload: a workload that is no more is denied everything, on live
// connections too, although its sidecars hold valid SVIDs; status names them.
func TestRemovedWorkload(t *testing.T) {
	m := realmesh.New(t, nil)
	mustCLI(t, m, "apply", writeFolder(t, filepath.Join(m.Dir, "files"), pairFiles()))
	m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": realmesh.HTTPApp(t, "a"), "echo": realmesh.EchoApp(t, "hello\n")}})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": "", "server:echo": ""}})
	waitOK(t, "http://"+client.Out["server:http"])
	conn := live(t, client.Out["server:echo"])
	require.NoError(t, conn.SetDeadline(time.Now().Add(realmesh.Deadline)))

	out := mustCLI(t, m, "apply", writeFolder(t, filepath.Join(m.Dir, "less"), map[string]string{
		"workloads.yaml": workload("client", ""),
	}), "--wait", "20s")
	if !strings.Contains(out, "2 sidecars acknowledged") {
		t.Errorf("apply --wait: %s", out)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a live connection to the removed workload: %v, want it cut", err)
	}
	if got := status(t, "http://"+client.Out["server:http"]); got == http.StatusOK {
		t.Errorf("a new request to the removed workload: status %d", got)
	}
	stdout, _, code := m.CLI("status")
	if code != 1 || !strings.Contains(stdout, "no Workload has this ID") {
		t.Errorf("status: exit code %d: %s", code, stdout)
	}
}
