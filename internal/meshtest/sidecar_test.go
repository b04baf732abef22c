package meshtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/sidecar"
)

// SidecarConfig is what differs between sidecars.
type SidecarConfig struct {
	Workload string            // metadata.name
	Serve    map[string]string // port name → where the app listens
	Outbound []string          // REF:PORT
	Identity string            // Workload API to take the identity from; "" enrols with a token
	// ControlPlaneID is whom to expect there, where the identity is taken; "" is as
	// always.
	ControlPlaneID string
}

// Sidecar is a running sidecar. It ends with the test.
type Sidecar struct {
	Tunnel string            // where it takes callers
	Admin  string            // health and metrics
	Out    map[string]string // REF:PORT → local address
}

// Sidecar enrols and starts one, as the program does.
func (m *Mesh) Sidecar(c SidecarConfig) *Sidecar {
	m.t.Helper()
	dir, err := os.MkdirTemp(m.dir, c.Workload)
	require.NoError(m.t, err)
	var b strings.Builder
	fmt.Fprintf(&b, "controlPlane: %s\ndrain: 1s\ntunnel: {listen: \"127.0.0.1:0\"}\nadmin: {listen: \"127.0.0.1:0\", socket: admin.sock}\n", m.GRPC)
	if c.Identity == "" {
		b.WriteString("tokenFile: token\n")
		require.NoError(m.t, os.WriteFile(filepath.Join(dir, "token"), []byte(m.Token(c.Workload)+"\n"), 0o600))
	} else {
		fmt.Fprintf(&b, "identity: {workloadAPI: %q, controlPlaneID: %q}\n", c.Identity, c.ControlPlaneID)
	}
	if len(c.Serve) > 0 {
		b.WriteString("app:\n")
	}
	for port, addr := range c.Serve {
		fmt.Fprintf(&b, "  %s: %q\n", port, addr)
	}
	if len(c.Outbound) > 0 {
		b.WriteString("outbound:\n")
	}
	for _, to := range c.Outbound {
		fmt.Fprintf(&b, "  - {listen: \"127.0.0.1:0\", to: %q}\n", to)
	}
	path := filepath.Join(dir, "proxy.yaml")
	require.NoError(m.t, os.WriteFile(path, []byte(b.String()), 0o600))
	cfg, err := sidecar.Load(path)
	require.NoError(m.t, err)
	s, err := sidecar.New(m.t.Context(), cfg, sidecar.Options{Log: Log(m.t).Named(c.Workload), Version: "test"})
	require.NoError(m.t, err)
	out := &Sidecar{Tunnel: s.TunnelAddr().String(), Admin: s.AdminAddr().String(), Out: map[string]string{}}
	for i, addr := range s.OutboundAddrs() {
		out.Out[c.Outbound[i]] = addr.String()
	}
	Go(m.t, "sidecar of "+c.Workload, s.Run)
	return out
}
