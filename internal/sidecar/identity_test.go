package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/host"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
)

const identityFile = `
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: payments}
spec: {id: /shop/payments, attest: [{kind: join-token}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: host1}
spec: {id: /agents/host1, attest: [{kind: join-token}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: orders}
spec: {id: /shop/orders, attest: [{kind: unix, via: [/agents/host1], uid: UID}]}
`

// place is a mesh and a short folder.
type place struct {
	mesh *meshtest.Mesh
	dir  string
}

func newPlace(t *testing.T) place {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sp")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	text := strings.Replace(identityFile, "UID", fmt.Sprint(os.Geteuid()), 1)
	return place{meshtest.New(t, meshtest.Config{Files: map[string]string{"mesh.yaml": text}}), dir}
}

// run starts a sidecar and waits until it is ready.
func (p place) run(t *testing.T, name, more string) *Sidecar {
	t.Helper()
	path := filepath.Join(p.dir, name+".yaml")
	text := fmt.Sprintf("controlPlane: %s\nstateDir: %s-state\ntunnel: {listen: \"127.0.0.1:0\"}\nadmin: {listen: \"127.0.0.1:0\", socket: \"\"}\n%s\n", p.mesh.GRPC, name, more)
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	cfg, err := Load(path)
	require.NoError(t, err)
	s, err := New(t.Context(), cfg, Options{Log: meshtest.Log(t), Version: "test"})
	require.NoError(t, err)
	meshtest.Go(t, name, s.Run)
	meshtest.Eventually(t, name, s.ready)
	return s
}

// The app of an enrolled sidecar gets an SVID of its own, at the socket and as
// files, and health and metrics know of it.
func TestAppOfASidecar(t *testing.T) {
	p := newPlace(t)
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "token"), []byte(p.mesh.Token("payments")), 0o600))
	s := p.run(t, "payments", "tokenFile: token\nworkloadAPI: {socket: api.sock}\nfiles: [{dir: files}]")
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Deadline)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+filepath.Join(p.dir, "api.sock")))
	require.NoError(t, err)
	own, err := s.agent.Source().GetX509SVID()
	require.NoError(t, err)
	if svid.ID != own.ID || svid.Certificates[0].Equal(own.Certificates[0]) {
		t.Errorf("got %s, want another SVID of %s", svid.ID, own.ID)
	}
	if left := time.Until(svid.Certificates[0].NotAfter); left > time.Hour+time.Minute {
		t.Errorf("the app's SVID lives %v", left)
	}
	meshtest.Eventually(t, "files", func() error {
		_, err := os.Stat(filepath.Join(p.dir, "files", "svid_key.pem"))
		return err
	})
	tr := &http.Transport{DisableKeepAlives: true}
	c := &http.Client{Transport: tr, Timeout: 5 * time.Second}
	_, metrics := get(t, c, "http://"+s.AdminAddr().String()+"/metrics")
	for _, want := range []string{`sallyport_identity_outage_seconds{identity="self"} 8`, `sallyport_identity_outage_seconds{identity="app"} 3`} {
		if !strings.Contains(metrics, "\n"+want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
	meshtest.Eventually(t, "healthy", func() error {
		if c := s.health.Report().Components[componentAppSVID]; c.Message != "" {
			return errors.New(c.Message)
		}
		return nil
	})
}

// A sidecar lives by the SVIDs of the host's agent: it is connected, announced, and
// has a view.
func TestSidecarOnTheAgentsSocket(t *testing.T) {
	p := newPlace(t)
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "token"), []byte(p.mesh.Token("host1")), 0o600))
	path := filepath.Join(p.dir, "agent.yaml")
	require.NoError(t, os.WriteFile(path, fmt.Appendf(nil, "controlPlane: %s\ntokenFile: token\nadmin: {listen: \"\", socket: \"\"}\n", p.mesh.GRPC), 0o600))
	cfg, err := host.Load(path)
	require.NoError(t, err)
	h, err := host.New(t.Context(), cfg, host.Options{Log: meshtest.Log(t)})
	require.NoError(t, err)
	meshtest.Go(t, "agent", h.Run)
	s := p.run(t, "orders", "identity: {workloadAPI: \"unix://"+cfg.WorkloadAPI.Socket+"\"}")
	if got := s.agent.ID().String(); got != "spiffe://test.example/shop/orders" {
		t.Errorf("got %s", got)
	}
	if r := s.health.Report(); r.Components[componentIdentity].Message != "" || r.Components[componentLink].Message != "" {
		t.Errorf("health: %s", r)
	}
}
