// Package meshtest runs a whole mesh in one process, for tests: the same
// constructors as the programs use, on loopback, with state in memory.
package meshtest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/store"
)

// Deadline is how long a condition may take before a test gives up.
const Deadline = 20 * time.Second

// Config says what differs from the default mesh.
type Config struct {
	// Files of the root set, by name; they are applied before New returns.
	Files map[string]string
	// Change adjusts the control plane's configuration.
	Change func(*controlplane.Config)
	// Bundles is the time between two fetches of a foreign bundle; zero: the
	// control plane's default.
	Bundles time.Duration
}

// Mesh is a running control plane. It ends with the test.
type Mesh struct {
	t    testing.TB
	dir  string
	GRPC string // the address for sidecars
	HTTP string // health and metrics
	// Socket is the operator's API, and Admin its client.
	Socket string
	Admin  sallyportv1.AdminClient
	Bundle string // listen.bundle; "" where not configured
	Web    string // listen.web; "" where not configured
}

// New starts a control plane of trust domain test.example.
func New(t testing.TB, c Config) *Mesh {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp") // short: socket paths are limited
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cfg := controlplane.Config{
		TrustDomain: "test.example", DataDir: filepath.Join(dir, "data"),
		Listen: controlplane.Listen{GRPC: "127.0.0.1:0", Metrics: "127.0.0.1:0"},
	}
	if c.Change != nil {
		c.Change(&cfg)
	}
	cfg = cfg.WithDefaults()
	require.NoError(t, cfg.Validate())
	cp, err := controlplane.New(t.Context(), cfg, controlplane.Options{
		Log: Log(t), Now: time.Now, Version: "test", Store: store.NewMemory(), BundleRefresh: c.Bundles,
	})
	require.NoError(t, err)
	m := &Mesh{t: t, dir: dir}
	m.GRPC, m.HTTP, m.Socket = cp.Addrs()
	m.Bundle, m.Web = cp.TrustAddrs()
	Go(t, "control plane", cp.Run)
	conn, err := grpc.NewClient("unix:"+m.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	m.Admin = sallyportv1.NewAdminClient(conn)
	if c.Files != nil {
		require.NoError(t, m.Apply("", c.Files))
	}
	return m
}

// Log is where the mesh logs: nowhere, or with -v to the test's output.
func Log(t testing.TB) hclog.Logger {
	if !testing.Verbose() {
		return hclog.NewNullLogger()
	}
	return hclog.New(&hclog.LoggerOptions{Output: t.Output(), Level: hclog.Info})
}

// Go runs something until the test ends, and waits for its end.
func Go(t testing.TB, name string, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("%s ended with: %v", name, err)
			}
		case <-time.After(Deadline):
			t.Errorf("%s did not end", name)
		}
	})
}

// Apply replaces a set's files.
func (m *Mesh) Apply(set string, files map[string]string) error {
	m.t.Helper()
	s := &sallyportv1.Set{Name: set, Files: map[string][]byte{}}
	for name, content := range files {
		s.Files[name] = []byte(content)
	}
	// The control plane may still be starting.
	_, err := m.Admin.Apply(m.t.Context(), &sallyportv1.ApplyRequest{Sets: []*sallyportv1.Set{s}}, grpc.WaitForReady(true))
	return err
}

// Token makes a join token for a workload, once its document is in force.
func (m *Mesh) Token(workload string) string {
	m.t.Helper()
	var token string
	Eventually(m.t, "a token for "+workload, func() error {
		resp, err := m.Admin.CreateToken(m.t.Context(), &sallyportv1.CreateTokenRequest{Workload: workload}, grpc.WaitForReady(true))
		token = resp.GetToken()
		return err
	})
	return token
}

// Agent enrols one instance of a workload and keeps its identity.
func (m *Mesh) Agent(workload string) *agent.Agent {
	m.t.Helper()
	dir, err := os.MkdirTemp(m.dir, workload)
	require.NoError(m.t, err)
	a, err := agent.New(agent.Config{ControlPlane: m.GRPC, Token: m.Token(workload), StateDir: dir, Log: Log(m.t)})
	require.NoError(m.t, err)
	Go(m.t, "agent of "+workload, a.Run)
	select {
	case <-a.Ready():
	case <-time.After(Deadline):
		m.t.Fatalf("%s did not enrol: %+v", workload, a.Status())
	}
	return a
}

// Dial connects to the control plane as an agent.
func (m *Mesh) Dial(a *agent.Agent) *grpc.ClientConn {
	m.t.Helper()
	conn, err := a.Dial(m.t.Context())
	require.NoError(m.t, err)
	m.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// Eventually waits until cond returns nil.
func Eventually(t testing.TB, what string, cond func() error) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		err := cond()
		if err == nil {
			return
		}
		if time.Since(start) > Deadline {
			t.Fatalf("%s: not within %v: %v", what, Deadline, err)
		}
	}
}
