package realmesh

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Mesh is a control plane with sidecars, each a process of its own. Apps are
// the test's.
type Mesh struct {
	T       testing.TB
	Dir     string // everything below here
	Policy  string // watched by the control plane
	GRPC    string // the control plane's address for sidecars
	Metrics string
	Socket  string
	CP      *Proc
	cpArgs  []string
}

// New starts a control plane that watches files, by name; nil files: it watches
// nothing and `sallyport apply` is the source. args are added to its command
// line.
func New(t testing.TB, files map[string]string, args ...string) *Mesh {
	t.Helper()
	return newOn(t, FreeAddr(t), files, args...)
}

// NewOn is New with the control plane on an address of this host's, not on
// loopback.
func NewOn(t testing.TB, ip string, files map[string]string, args ...string) *Mesh {
	t.Helper()
	_, port, err := net.SplitHostPort(FreeAddr(t))
	require.NoError(t, err)
	return newOn(t, net.JoinHostPort(ip, port), files, args...)
}

func newOn(t testing.TB, grpc string, files map[string]string, args ...string) *Mesh {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp") // t.TempDir is too long for socket paths
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	m := &Mesh{
		T: t, Dir: dir, Policy: filepath.Join(dir, "policy"), Socket: filepath.Join(dir, "admin.sock"),
		GRPC: grpc, Metrics: FreeAddr(t),
	}
	require.NoError(t, os.Mkdir(m.Policy, 0o755))
	for name, content := range files {
		WriteFile(t, filepath.Join(m.Policy, name), content)
	}
	m.cpArgs = append([]string{
		"-trust-domain", "test.example", "-data-dir", filepath.Join(dir, "data"), "-listen", m.GRPC,
		"-metrics-listen", m.Metrics, "-admin-socket", m.Socket,
	}, args...)
	if files != nil {
		m.cpArgs = append(m.cpArgs, "-policy-dir", m.Policy)
	}
	m.StartControlPlane()
	return m
}

// StartControlPlane starts it, the first time or again, and waits for readiness.
func (m *Mesh) StartControlPlane() {
	m.T.Helper()
	m.CP = Start(m.T, "controlplane", exec.Command(Bin(m.T, "sallyport-controlplane"), m.cpArgs...))
	m.ready(m.CP, m.Metrics)
}

func (m *Mesh) ready(p *Proc, addr string) {
	m.T.Helper()
	Eventually(m.T, p.Name+" ready", func() error {
		select {
		case <-p.Done():
			m.T.Fatalf("%s ended: %s", p.Name, p.Log())
		default:
		}
		return Ready(addr)
	})
}

// Ready asks a process's /readyz.
func Ready(addr string) error {
	resp, err := http.Get("http://" + addr + "/readyz")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz: %s", resp.Status)
	}
	return nil
}

// CLI runs the operator's tool against this mesh.
func (m *Mesh) CLI(args ...string) (stdout, stderr string, code int) {
	m.T.Helper()
	return Run(m.T, exec.Command(Bin(m.T, "sallyport"), append([]string{"--socket", m.Socket}, args...)...))
}

// Token makes a join token.
func (m *Mesh) Token(workload string) string {
	m.T.Helper()
	stdout, stderr, code := m.CLI("token", "create", "--workload", workload)
	require.Zero(m.T, code, stderr)
	return strings.TrimSpace(stdout)
}

// SidecarConfig is what differs between sidecars.
type SidecarConfig struct {
	Name     string            // a name for its folder; the workload where Workload is empty
	Workload string            // metadata.name
	Serve    map[string]string // port name → where the app listens
	Outbound map[string]string // REF:PORT → local address; empty address: a free one
	Extra    string            // further lines of proxy.yaml
	Evidence string            // lines of proxy.yaml in place of a join token
	NoWait   bool              // do not wait for readiness
	Tunnel   string            // where it takes callers; empty: a free address
}

// Sidecar is a running sidecar.
type Sidecar struct {
	*Proc
	mesh   *Mesh
	Dir    string
	Tunnel string
	Admin  string
	Out    map[string]string // REF:PORT → local address
}

// Sidecar enrols and starts one.
func (m *Mesh) Sidecar(c SidecarConfig) *Sidecar {
	m.T.Helper()
	if c.Workload == "" {
		c.Workload = c.Name
	}
	if c.Evidence != "" {
		return m.SidecarWithToken(c, "")
	}
	return m.SidecarWithToken(c, m.Token(c.Workload))
}

// SidecarWithToken is Sidecar with a join token of the test's choice.
func (m *Mesh) SidecarWithToken(c SidecarConfig, token string) *Sidecar {
	m.T.Helper()
	s := m.configure(c, token)
	s.Start(c.Name)
	if !c.NoWait {
		s.WaitReady()
	}
	return s
}

// SidecarIn starts one in a network namespace. Nobody waits for it.
func (m *Mesh) SidecarIn(netns string, c SidecarConfig) *Sidecar {
	m.T.Helper()
	s := m.configure(c, m.Token(c.Name))
	s.Proc = Start(m.T, c.Name, exec.Command("ip", "netns", "exec", netns, Bin(m.T, "sallyport-proxy"), "run", "--config", filepath.Join(s.Dir, "proxy.yaml")))
	return s
}

// configure writes a sidecar's folder.
func (m *Mesh) configure(c SidecarConfig, token string) *Sidecar {
	m.T.Helper()
	s := &Sidecar{mesh: m, Dir: filepath.Join(m.Dir, c.Name), Tunnel: c.Tunnel, Admin: FreeAddr(m.T), Out: map[string]string{}}
	if s.Tunnel == "" {
		s.Tunnel = FreeAddr(m.T)
	}
	var b strings.Builder
	if c.Evidence == "" {
		c.Evidence = "tokenFile: token\n"
	}
	fmt.Fprintf(&b, "controlPlane: %s\nstateDir: state\n%s", m.GRPC, c.Evidence)
	fmt.Fprintf(&b, "tunnel: {listen: %s}\nadmin: {listen: %s, socket: admin.sock}\n", s.Tunnel, s.Admin)
	if len(c.Serve) > 0 {
		b.WriteString("app:\n")
		for port, addr := range c.Serve {
			fmt.Fprintf(&b, "  %s: %q\n", port, addr)
		}
	}
	if len(c.Outbound) > 0 {
		b.WriteString("outbound:\n")
		for to, addr := range c.Outbound {
			if addr == "" {
				addr = FreeAddr(m.T)
			}
			s.Out[to] = addr
			fmt.Fprintf(&b, "  - {listen: %q, to: %q}\n", addr, to)
		}
	}
	b.WriteString(c.Extra)
	WriteFile(m.T, filepath.Join(s.Dir, "proxy.yaml"), b.String())
	WriteFile(m.T, filepath.Join(s.Dir, "token"), token+"\n")
	return s
}

// Start starts the sidecar's process, the first time or again.
func (s *Sidecar) Start(name string) {
	s.mesh.T.Helper()
	s.Proc = Start(s.mesh.T, name, exec.Command(Bin(s.mesh.T, "sallyport-proxy"), "run", "--config", filepath.Join(s.Dir, "proxy.yaml")))
}

// WaitReady waits for /readyz.
func (s *Sidecar) WaitReady() {
	s.mesh.T.Helper()
	s.mesh.ready(s.Proc, s.Admin)
}

// Flow is a flow record as `sallyport flows --output json` prints it.
type Flow struct {
	ID, Side, Src, Dst, Verdict, Rule, Location, Outcome, Error string
	Port                                                        int
	Sent, Received                                              int64
}

// Flows returns the records the control plane holds.
func (m *Mesh) Flows(args ...string) []Flow {
	m.T.Helper()
	stdout, stderr, code := m.CLI(append([]string{"flows", "--output", "json"}, args...)...)
	require.Zero(m.T, code, stderr)
	return ParseFlows(m.T, stdout)
}

// ParseFlows reads one record per line.
func ParseFlows(t testing.TB, lines string) []Flow {
	t.Helper()
	var flows []Flow
	for line := range strings.Lines(lines) {
		var f Flow
		require.NoError(t, json.Unmarshal([]byte(line), &f), line)
		flows = append(flows, f)
	}
	return flows
}
