package runner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/sallyport-mesh/sallyport/internal/capture"
)

// maxSocketPath is the longest path that a unix socket may have on Linux, in
// bytes (unix(7), sun_path without its final NUL).
const maxSocketPath = 107

// plan is a checked mesh with every program found and every path fixed.
type plan struct {
	cfg     Config
	mesh    *mesh
	socket  string // the control plane's admin socket
	control spec
	pairs   []pair // in the order of mesh.yaml
}

// pair is one workload: its sidecar and its app.
type pair struct {
	workload
	dir          string // below the state folder
	sidecar, app spec
}

// newPlan finds the programs and lays out the state folder. It changes nothing.
func newPlan(cfg Config, m *mesh) (*plan, error) {
	p := &plan{cfg: cfg, mesh: m, socket: filepath.Join(cfg.State, "admin.sock")}
	program, err := p.lookUp(controlPlaneProgram)
	if err != nil {
		return nil, fmt.Errorf("starting the control plane: %w", err)
	}
	proxy, err := p.lookUp(proxyProgram)
	if err != nil {
		return nil, fmt.Errorf("starting the sidecars: %w", err)
	}
	p.control = p.controlSpec(program)
	sockets := []string{p.socket}
	isolation := capture.IsolationOf([]uint32{uint32(os.Geteuid())}).Reason // what a sidecar warns of
	for _, w := range m.loads {
		app, err := p.lookUp(w.command[0].value)
		if err != nil {
			return nil, fmt.Errorf("%s: starting workload %s: %w", position(m.file, w.command[0]), w.name.value, err)
		}
		dir := filepath.Join(cfg.State, w.name.value)
		sockets = append(sockets, filepath.Join(dir, "admin.sock"))
		p.pairs = append(p.pairs, pair{
			workload: w,
			dir:      dir,
			sidecar:  spec{name: w.name.value + "/proxy", argv: []string{proxy, "run", "--config", filepath.Join(dir, "proxy.yaml")}, mute: isolation},
			app:      appSpec(app, m.dir, w),
		})
	}
	for _, s := range sockets {
		if len(s) > maxSocketPath {
			return nil, fmt.Errorf("socket path %s has %d bytes, but a unix socket may have %d at most: choose a shorter state folder with --state", s, len(s), maxSocketPath)
		}
	}
	return p, nil
}

// lookUp finds a program: a path with a slash is relative to the mesh's folder,
// a bare name is searched beside the sallyport binary, then in PATH.
func (p *plan) lookUp(name string) (string, error) {
	candidate := filepath.Join(p.cfg.BinDir, name)
	if strings.ContainsRune(name, '/') {
		candidate = name
		if !filepath.IsAbs(name) {
			candidate = filepath.Join(p.mesh.dir, name)
		}
	}
	path, err := exec.LookPath(candidate)
	if err == nil {
		return path, nil
	}
	if !strings.ContainsRune(name, '/') {
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path)
		}
		return "", fmt.Errorf("no program %s in %s or in PATH; `make build` makes them all", name, p.cfg.BinDir)
	}
	return "", fmt.Errorf("program %s: %w", candidate, errors.Unwrap(err))
}

func (p *plan) controlSpec(program string) spec {
	c := p.mesh.control
	argv := []string{program,
		"-trust-domain", p.mesh.td.Name(),
		"-data-dir", filepath.Join(p.cfg.State, "data"),
		"-listen", c.listen.String(),
		"-metrics-listen", c.metrics.String(),
		"-admin-socket", p.socket,
		"-policy-dir", p.mesh.policies,
	}
	if c.svidTTL > 0 {
		argv = append(argv, "-svid-ttl", c.svidTTL.String())
	}
	return spec{name: "controlplane", argv: argv}
}

func appSpec(program, dir string, w workload) spec {
	s := spec{name: w.name.value, argv: []string{program}, env: slices.Clone(w.env), dir: dir}
	for _, a := range w.command[1:] {
		s.argv = append(s.argv, a.value)
	}
	for _, ports := range []map[string]address{w.serve, w.local} {
		for _, name := range slices.Sorted(maps.Keys(ports)) {
			s.env = append(s.env, listenEnv(name)+"="+ports[name].String())
		}
	}
	for _, u := range w.upstream {
		s.env = append(s.env, u.env()+"="+u.listen.String())
	}
	return s
}

// names lists every process, for the width of their column.
func (p *plan) names() []string {
	names := []string{p.control.name}
	for _, w := range p.pairs {
		names = append(names, w.sidecar.name, w.app.name)
	}
	return names
}

// releaseTime is how long a port may stay taken by a run that was just killed:
// the kernel closes a process's listeners a moment after it has gone.
const releaseTime = time.Second

// checkPortsFree finds out which key of mesh.yaml names an address that another
// program has, while that can still be said in one line.
func (p *plan) checkPortsFree(ctx context.Context) error {
	m := p.mesh
	ctx, cancel := context.WithTimeout(ctx, releaseTime)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for _, a := range m.addresses() {
		for {
			err := checkFree(a)
			if err == nil {
				break
			}
			if !errors.Is(err, syscall.EADDRINUSE) {
				return fmt.Errorf("%s: %s: trying %s: %w", position(m.file, a.at), a.key, a, err)
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("%s: %s: %s is in use by %s; stop that one, or shift every port of the mesh with --port-offset", position(m.file, a.at), a.key, a, p.otherProgram())
			case <-tick.C:
			}
		}
	}
	return nil
}

// otherProgram says who has a port of the mesh, as far as the lock of the
// default state folder tells.
func (p *plan) otherProgram() string {
	usual := defaultState(p.mesh.dir)
	if usual != p.cfg.State {
		if pid := stateHolder(usual); pid != "" {
			return fmt.Sprintf("another program, probably the `sallyport up` (pid %s) that runs on %s", pid, usual)
		}
	}
	return "another program"
}

// checkFree listens on an address for an instant.
func checkFree(a address) error {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(a.AddrPort))
	if err != nil {
		return err
	}
	return l.Close()
}

// addresses lists every listener of the mesh.
func (m *mesh) addresses() []address {
	all := []address{m.control.listen, m.control.metrics}
	for _, w := range m.loads {
		all = append(all, w.tunnel, w.admin)
		for _, ports := range []map[string]address{w.serve, w.local} {
			for _, name := range slices.Sorted(maps.Keys(ports)) {
				all = append(all, ports[name])
			}
		}
		for _, u := range w.upstream {
			all = append(all, u.listen)
		}
	}
	return all
}

// proxyFile is the part of a sidecar's proxy.yaml that a local mesh sets.
type proxyFile struct {
	ControlPlane string            `yaml:"controlPlane"`
	TokenFile    string            `yaml:"tokenFile"`
	StateDir     string            `yaml:"stateDir"`
	Tunnel       proxyTunnel       `yaml:"tunnel"`
	App          map[string]string `yaml:"app,omitempty"`
	Outbound     []proxyOutbound   `yaml:"outbound,omitempty"`
	Admin        proxyAdmin        `yaml:"admin"`
	Drain        string            `yaml:"drain"`
	Log          *proxyLog         `yaml:"log,omitempty"`
}

type proxyTunnel struct {
	Listen string `yaml:"listen"`
}

type proxyOutbound struct {
	Listen string `yaml:"listen"`
	To     string `yaml:"to"`
}

type proxyAdmin struct {
	Listen string `yaml:"listen"`
	Socket string `yaml:"socket"`
}

type proxyLog struct {
	Level string `yaml:"level"`
}

// proxyConfig is the sidecar's configuration. Its drain is short because the
// runner stops the app first.
func (p *plan) proxyConfig(w pair) proxyFile {
	f := proxyFile{
		ControlPlane: p.mesh.control.listen.String(),
		TokenFile:    "token",
		StateDir:     "state",
		Tunnel:       proxyTunnel{Listen: w.tunnel.String()},
		App:          map[string]string{},
		Admin:        proxyAdmin{Listen: w.admin.String(), Socket: "admin.sock"},
		Drain:        "2s",
	}
	for name, a := range w.serve {
		f.App[name] = a.String()
	}
	for _, u := range w.upstream {
		f.Outbound = append(f.Outbound, proxyOutbound{Listen: u.listen.String(), To: u.to.value})
	}
	if p.mesh.logLevel != "" {
		f.Log = &proxyLog{Level: p.mesh.logLevel}
	}
	return f
}

// writeFiles writes each sidecar's proxy.yaml.
func (p *plan) writeFiles() error {
	for _, w := range p.pairs {
		content, err := yaml.Dump(p.proxyConfig(w))
		if err != nil {
			return fmt.Errorf("encoding the configuration of %s: %w", w.sidecar.name, err)
		}
		if err := os.MkdirAll(filepath.Join(w.dir, "state"), 0o700); err != nil {
			return fmt.Errorf("making the folder of %s: %w", w.sidecar.name, err)
		}
		if err := writePrivate(filepath.Join(w.dir, "proxy.yaml"), content); err != nil {
			return err
		}
	}
	return nil
}

// writePrivate replaces a file by one that only this user can read.
func writePrivate(path string, content []byte) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("replacing %s: %w", path, err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// summary is what the user sees when everything is ready.
func (p *plan) summary() string {
	var b bytes.Buffer
	b.WriteString("\n")
	t := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	fmt.Fprintf(t, "NAME\tAPP\tSIDECAR\tMETRICS\n")
	fmt.Fprintf(t, "controlplane\t%s\t\thttp://%s/metrics\n", p.mesh.control.listen, p.mesh.control.metrics)
	for _, w := range p.pairs {
		fmt.Fprintf(t, "%s\t%s\t%s\thttp://%s/metrics\n", w.name.value, w.ports(), w.tunnel, w.admin)
	}
	_ = t.Flush() // into memory
	fmt.Fprintf(&b, "\nNote that local isolation is off: everything here runs as user %d, so any program\nof that user can use any sidecar's local listeners and speak with its identity.\n", os.Getuid())
	if p.mesh.try.value != "" {
		b.WriteString("\n")
		_ = p.tryData().render(&b) // rendered once already when mesh.yaml was read
	}
	return b.String()
}

// tryData gives spec.try the command line of this mesh.
func (p *plan) tryData() tryData {
	program := relative(filepath.Join(p.cfg.BinDir, "sallyport"))
	return tryData{mesh: p.mesh, cli: spec{argv: []string{program, "--socket", relative(p.socket)}}.String()}
}

// ports lists where the app listens: NAME ADDRESS, and (local) for what lies
// outside the mesh.
func (w workload) ports() string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(w.serve)) {
		all = append(all, name+" "+w.serve[name].String())
	}
	for _, name := range slices.Sorted(maps.Keys(w.local)) {
		all = append(all, name+" "+w.local[name].String()+" (local)")
	}
	return strings.Join(all, ", ")
}

// relative shortens a path for people who stay in the current folder.
func relative(path string) string {
	cwd, err := os.Getwd()
	if err != nil {
		return path
	}
	rel, err := filepath.Rel(cwd, path)
	if err != nil || strings.HasPrefix(rel, "..") {
		return path
	}
	return rel
}
