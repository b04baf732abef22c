package sidecar

import (
	"path/filepath"
	"strings"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/agent/pemfile"
	"github.com/sallyport-mesh/sallyport/internal/configfile"
)

// Config configures one sidecar. It is read from YAML by [Load]; unknown keys
// are errors. Relative paths are relative to the configuration file's folder.
// docs/sidecar.md describes every key.
type Config struct {
	// ControlPlane is the control plane's gRPC address, host:port. Required.
	ControlPlane string `yaml:"controlPlane"`
	// TokenFile holds a join token, as "sallyport token create" prints it. It is
	// needed for the first start only, and short for evidence of kind join-token.
	TokenFile string `yaml:"tokenFile"`
	// Evidence is what else to enrol with.
	Evidence agent.EvidenceConfig `yaml:"evidence"`
	// TrustBundle holds the control plane's roots: PEM, or a SPIFFE bundle.
	// Required with evidence other than a join token.
	TrustBundle string `yaml:"trustBundle"`
	// Identity says where else the identity comes from, instead of enrolment.
	Identity Identity `yaml:"identity"`
	// StateDir keeps the enrolment key (0600) and the trust bundles. Default: state.
	StateDir string `yaml:"stateDir"`
	Tunnel   Tunnel `yaml:"tunnel"`
	// App says where the app serves each declared port: port name to loopback
	// HOST:PORT or unix:/path. A declared port that is missing here is not served
	// by this instance.
	App      map[string]string `yaml:"app"`
	Outbound []Outbound        `yaml:"outbound"`
	// AllowUIDs are the users who may use the outbound listeners. Default: the
	// sidecar's own.
	AllowUIDs []uint32 `yaml:"allowUIDs"`
	// WorkloadAPI is the socket at which the app asks for its own SVID. Default:
	// none.
	WorkloadAPI WorkloadAPI `yaml:"workloadAPI"`
	// Files are folders that the app's own SVID is written to, for programs that
	// read files.
	Files []pemfile.Config `yaml:"files"`
	Admin Admin            `yaml:"admin"`
	// Drain is how long a stop waits for live connections. Default: 30s.
	Drain time.Duration `yaml:"drain"`
	// Idle is after how long without a byte in either direction a connection is
	// closed; 0 is never. Default: 1h.
	Idle time.Duration `yaml:"idle"`
	// FlowLog is a file to which flow records are appended, one JSON object per
	// line. Default: none.
	FlowLog string `yaml:"flowLog"`
	Log     Log    `yaml:"log"`
}

// Tunnel is the listener that other sidecars connect to.
type Tunnel struct {
	Listen string `yaml:"listen"` // default 0.0.0.0:15008
	// Advertise is the IP address to announce. Default: the address that the
	// control plane sees. Another one must lie in its announce.ranges.
	Advertise string `yaml:"advertise"`
}

// Outbound is a local listener with one destination.
type Outbound struct {
	Listen string `yaml:"listen"` // loopback IP:PORT or unix:/path
	To     string `yaml:"to"`     // WORKLOAD:PORT, as in payments:http
}

// Identity takes the identity from somebody who keeps it already.
type Identity struct {
	// WorkloadAPI is a socket as SPIFFE_ENDPOINT_SOCKET names it: unix:///path.
	WorkloadAPI string `yaml:"workloadAPI"`
	// ControlPlaneID is whom to expect at controlPlane. Default: the control plane
	// of the SVID's own trust domain.
	ControlPlaneID string `yaml:"controlPlaneID"`
}

// WorkloadAPI is the SPIFFE Workload API and Envoy's SDS for the app. The users in
// allowUIDs may ask.
type WorkloadAPI struct {
	Socket string `yaml:"socket"` // path of the unix socket; "": none
}

// Admin is where the sidecar shows itself.
type Admin struct {
	Listen string `yaml:"listen"` // /healthz, /readyz, /metrics; default 127.0.0.1:15020
	Socket string `yaml:"socket"` // profiles, /config, /view, /connections; mode 0600; default admin.sock
}

// Log says what is logged, on stderr.
type Log struct {
	Level  string `yaml:"level"`  // debug, info, warn or error; default info
	Format string `yaml:"format"` // text or json; default text
}

// Default returns the configuration that an empty file stands for.
func Default() Config {
	return Config{
		StateDir: "state",
		Tunnel:   Tunnel{Listen: "0.0.0.0:15008"},
		Admin:    Admin{Listen: "127.0.0.1:15020", Socket: "admin.sock"},
		Drain:    30 * time.Second,
		Idle:     time.Hour,
		Log:      Log{Level: "info", Format: "text"},
	}
}

// Load reads and checks the configuration file at path. The error is
// [configfile.Mistakes] where the content is to blame: every mistake, each with
// FILE:LINE:COL and the line.
func Load(path string) (Config, error) {
	f, err := configfile.Open(path)
	if err != nil {
		return Config{}, err
	}
	return read(path, f)
}

// parse is Load without the disk.
func parse(path string, data []byte) (Config, error) {
	f, err := configfile.Parse(path, data)
	if err != nil {
		return Config{}, err
	}
	return read(path, f)
}

func read(path string, f *configfile.File) (Config, error) {
	c := Default()
	f.Decode(&c)
	c.resolve(filepath.Dir(path))
	for _, m := range c.check() {
		f.Report(m.key, m.err)
	}
	if err := f.Err(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// resolve makes paths independent of the working directory.
func (c *Config) resolve(dir string) {
	c.Evidence.Resolve(dir)
	for i := range c.Files {
		c.Files[i].Resolve(dir)
	}
	for _, p := range []*string{&c.TokenFile, &c.TrustBundle, &c.StateDir, &c.Admin.Socket, &c.WorkloadAPI.Socket, &c.FlowLog} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	unix := func(addr string) string {
		path, ok := strings.CutPrefix(addr, "unix:")
		if ok && path != "" && !filepath.IsAbs(path) {
			return "unix:" + filepath.Join(dir, path)
		}
		return addr
	}
	for name, addr := range c.App {
		c.App[name] = unix(addr)
	}
	for i := range c.Outbound {
		c.Outbound[i].Listen = unix(c.Outbound[i].Listen)
	}
}
