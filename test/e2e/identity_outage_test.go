//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// TestF6SavedListOutlivesKill: b, whose identity is of its host's agent, is cut off
// from the control plane, killed with -9 and started again. It takes others, and
// refuses who was revoked before, although nobody has told it again.
func TestF6SavedListOutlivesKill(t *testing.T) {
	m := realmesh.New(t, map[string]string{"all.yaml": workload("host1", "") + workload("other", "") + workload("mallory", "") + fmt.Sprintf(
		"apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: b}\nspec:\n  attest: [{kind: unix, via: [/host1], uid: %d}]\n", os.Getuid())})
	dir, admin := filepath.Join(m.Dir, "host1"), realmesh.FreeAddr(t)
	realmesh.WriteFile(t, filepath.Join(dir, "token"), m.Token("host1"))
	realmesh.WriteFile(t, filepath.Join(dir, "agent.yaml"), fmt.Sprintf("controlPlane: %s\ntokenFile: token\nadmin: {listen: %q}\n", m.GRPC, admin))
	realmesh.Start(t, "agent", exec.Command(realmesh.Bin(t, "sallyport-proxy"), "agent", "--config", filepath.Join(dir, "agent.yaml")))
	realmesh.Eventually(t, "agent ready", func() error { return realmesh.Ready(admin) })
	const api = "workloadAPI: {socket: api.sock}\n"
	other := m.Sidecar(realmesh.SidecarConfig{Name: "other", Extra: api})
	mallory := m.Sidecar(realmesh.SidecarConfig{Name: "mallory", Extra: api})
	good, bad := svidOf(t, source(t, filepath.Join(other.Dir, "api.sock"))), svidOf(t, source(t, filepath.Join(mallory.Dir, "api.sock")))
	way := newRelay(t, m.GRPC)
	m.GRPC = way.addr
	b := m.Sidecar(realmesh.SidecarConfig{Name: "b", Evidence: fmt.Sprintf("identity: {workloadAPI: \"unix://%s\"}\n", filepath.Join(dir, "agent.sock"))})
	if !admitted(t, b.Tunnel, good) || !admitted(t, b.Tunnel, bad) {
		t.Fatal("b refuses SVIDs before anything was revoked")
	}

	mustCLI(t, m, "identity", "revoke", "mallory")
	realmesh.Eventually(t, "the list saved", func() error {
		saved, err := os.ReadFile(filepath.Join(b.Dir, "state", "revocations.pb"))
		if err == nil && !bytes.Contains(saved, []byte("/mallory")) {
			err = errors.New("it does not name mallory")
		}
		return err
	})
	way.cut()
	b.Kill()
	b.Start("b again")
	realmesh.Eventually(t, "b to take others", func() error {
		c, err := net.Dial("tcp", b.Tunnel)
		if err != nil {
			return err
		}
		_ = c.Close()
		if !admitted(t, b.Tunnel, good) {
			return errors.New("it does not")
		}
		return nil
	})
	if admitted(t, b.Tunnel, bad) {
		t.Error("killed and alone, b takes an SVID that was revoked")
	}
}

// TestHealthWhereNothingRotates: the control plane cannot write keys any more.
// Health and status say so long before the intermediate ends; given the folder
// back, it rotates, and no request has failed.
func TestHealthWhereNothingRotates(t *testing.T) {
	const life, svid = 30 * time.Second, 5 * time.Second
	config := filepath.Join(t.TempDir(), "controlplane.yaml")
	realmesh.WriteFile(t, config, fmt.Sprintf("ca: {rootTTL: 1h, intermediateTTL: %v, svidTTL: %v}\n", life, svid))
	p := newPair(t, realmesh.New(t, pairFiles(), "-config", config))
	load := realmesh.HTTPLoad(t, p.http(), 2, 20*time.Millisecond)
	if got, message := authorityHealth(t, p.Metrics); got != "ok" {
		t.Fatalf("authority is %s: %s", got, message)
	}
	first := signers(t, p.Mesh, "intermediate")
	keys, away := filepath.Join(p.Dir, "data", "keys"), filepath.Join(p.Dir, "data", "keys.away")
	require.NoError(t, os.Rename(keys, away))
	realmesh.WriteFile(t, keys, "no folder\n")

	realmesh.EventuallyWithin(t, life, "health not ok", func() error {
		if got, _ := authorityHealth(t, p.Metrics); got == "ok" {
			return errors.New("ok")
		}
		return nil
	})
	stdout, stderr, code := p.CLI("status")
	if code != 1 || !strings.Contains(stdout, "keys") {
		t.Errorf("status: exit code %d: %s%s", code, stdout, stderr)
	}
	left := time.Until(intermediateEnds(t, p.Mesh))
	got, message := authorityHealth(t, p.Metrics)
	t.Logf("%s with %v left: %s", got, left, message)
	if got != "degraded" || left < svid {
		t.Errorf("authority is %s with %v left; want degraded while a whole SVID can still be signed", got, left)
	}

	require.NoError(t, os.Remove(keys))
	require.NoError(t, os.Rename(away, keys))
	realmesh.Eventually(t, "well again", func() error {
		got, message := authorityHealth(t, p.Metrics)
		if now := signers(t, p.Mesh, "intermediate"); got != "ok" || len(now) != 1 || now[0] == first[0] {
			return fmt.Errorf("%s: %s; %v signs", got, message, now)
		}
		return nil
	})
	load.More(t, 50)
	if _, failed := load.Stop(); len(failed) > 0 {
		t.Errorf("%d requests failed, want none; first: %s", len(failed), failed[0])
	}
}

func authorityHealth(t *testing.T, addr string) (status, message string) {
	t.Helper()
	resp, err := http.Get("http://" + addr + "/healthz")
	require.NoError(t, err)
	defer resp.Body.Close()
	var h struct {
		Components map[string]struct{ Status, Message string }
	}
	require.NoError(t, json.NewDecoder(resp.Body).Decode(&h))
	c, ok := h.Components["authority"]
	require.True(t, ok, "health says nothing of the authority: %v", h)
	return c.Status, c.Message
}

func intermediateEnds(t *testing.T, m *realmesh.Mesh) time.Time {
	t.Helper()
	stdout, stderr, _ := m.CLI("status", "--output", "json")
	var s struct {
		Authorities []struct {
			Kind, State string
			NotAfter    time.Time `json:"not_after"`
		}
	}
	require.NoError(t, json.Unmarshal([]byte(stdout), &s), stdout+stderr)
	for _, a := range s.Authorities {
		if a.Kind == "intermediate" && a.State == "active" {
			return a.NotAfter
		}
	}
	t.Fatalf("no intermediate signs: %s", stdout)
	return time.Time{}
}
