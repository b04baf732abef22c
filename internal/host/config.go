package host

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"

	"github.com/hashicorp/go-hclog"

	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/agent/pemfile"
	"github.com/sallyport-mesh/sallyport/internal/configfile"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
)

// Config configures one host's agent. It is read from YAML by [Load]; unknown keys
// are errors. Relative paths are relative to the configuration file's folder.
// docs/agent.md describes every key.
type Config struct {
	// ControlPlane is the control plane's gRPC address, host:port. Required.
	ControlPlane string `yaml:"controlPlane"`
	// TokenFile holds a join token: short for evidence of kind join-token.
	TokenFile string `yaml:"tokenFile"`
	// Evidence is what else the agent itself enrols with.
	Evidence agent.EvidenceConfig `yaml:"evidence"`
	// TrustBundle holds the control plane's roots: PEM, or a SPIFFE bundle.
	// Required with evidence other than a join token.
	TrustBundle string `yaml:"trustBundle"`
	// StateDir keeps the enrolment key (0600) and the trust bundles. Default: state.
	StateDir    string      `yaml:"stateDir"`
	WorkloadAPI WorkloadAPI `yaml:"workloadAPI"`
	// Files are identities to write for programs that read files. The evidence is
	// that of a process of the entry's user.
	Files []pemfile.Config `yaml:"files"`
	Admin Admin            `yaml:"admin"`
	Log   Log              `yaml:"log"`
}

// WorkloadAPI is the SPIFFE Workload API and Envoy's SDS for every process of the
// host.
type WorkloadAPI struct {
	Socket string `yaml:"socket"` // path of the unix socket; default agent.sock
}

// Admin is where the agent shows itself.
type Admin struct {
	Listen string `yaml:"listen"` // /healthz, /readyz, /metrics; default 127.0.0.1:15021
	Socket string `yaml:"socket"` // profiles, /config, /identities; mode 0600; default admin.sock
}

// Log says what is logged, on stderr.
type Log struct {
	Level  string `yaml:"level"`  // debug, info, warn or error; default info
	Format string `yaml:"format"` // text or json; default text
}

// Default returns the configuration that an empty file stands for.
func Default() Config {
	return Config{
		StateDir:    "state",
		WorkloadAPI: WorkloadAPI{Socket: "agent.sock"},
		Admin:       Admin{Listen: "127.0.0.1:15021", Socket: "admin.sock"},
		Log:         Log{Level: "info", Format: "text"},
	}
}

// Load reads and checks the configuration file at path. The error is
// [configfile.Mistakes] where the content is to blame.
func Load(path string) (Config, error) {
	f, err := configfile.Open(path)
	if err != nil {
		return Config{}, err
	}
	return read(path, f)
}

func read(path string, f *configfile.File) (Config, error) {
	c := Default()
	f.Decode(&c)
	c.resolve(filepath.Dir(path))
	c.check(f.Report)
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
	for _, p := range []*string{&c.TokenFile, &c.TrustBundle, &c.StateDir, &c.WorkloadAPI.Socket, &c.Admin.Socket} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
}

// evidence is what to enrol with, tokenFile being the short form.
func (c Config) evidence() agent.EvidenceConfig {
	if c.TokenFile != "" && c.Evidence.IsZero() {
		return agent.EvidenceConfig{Kind: attest.KindJoinToken, TokenFile: c.TokenFile}
	}
	return c.Evidence
}

// check reports every mistake.
func (c Config) check(report func(string, error)) {
	fail := func(key string, err error) {
		if err != nil {
			report(key, err)
		}
	}
	if c.ControlPlane == "" {
		fail("controlPlane", errors.New("required: the control plane's host:port"))
	} else if host, port, err := net.SplitHostPort(c.ControlPlane); err != nil || host == "" || !isPort(port) || port == "0" {
		fail("controlPlane", fmt.Errorf("%q: want HOST:PORT", c.ControlPlane))
	}
	c.checkEvidence(fail)
	if c.StateDir == "" {
		fail("stateDir", errors.New("required: a folder for this agent alone"))
	}
	if c.WorkloadAPI.Socket == "" && len(c.Files) == 0 {
		fail("workloadAPI.socket", errors.New("required, as there are no files either: this agent would serve nobody"))
	}
	for i, file := range c.Files {
		file.Check(func(key string, err error) { fail(fmt.Sprintf("files[%d].%s", i, key), err) })
		if file.User == "" {
			fail(fmt.Sprintf("files[%d].user", i), errors.New("required: whose identity to write"))
		}
	}
	if c.Admin.Listen != "" {
		if _, port, err := net.SplitHostPort(c.Admin.Listen); err != nil || !isPort(port) {
			fail("admin.listen", fmt.Errorf("%q: want HOST:PORT, with a port from 0 to 65535", c.Admin.Listen))
		}
	}
	if hclog.LevelFromString(c.Log.Level) == hclog.NoLevel {
		fail("log.level", fmt.Errorf("%q: want debug, info, warn or error", c.Log.Level))
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		fail("log.format", fmt.Errorf("%q: want text or json", c.Log.Format))
	}
}

func (c Config) checkEvidence(fail func(string, error)) {
	if c.TokenFile != "" && !c.Evidence.IsZero() {
		fail("tokenFile", errors.New("there is evidence already; a join token belongs there too, as {kind: join-token, tokenFile: …}"))
	}
	if !c.Evidence.IsZero() {
		c.Evidence.Check(func(key string, err error) { fail("evidence."+key, err) })
	}
	switch e := c.evidence(); {
	case e.IsZero():
	case e.Kind != attest.KindJoinToken && c.TrustBundle == "":
		fail("trustBundle", errors.New("required with this evidence, which must not go to a control plane that is not known: a file with its roots, as PEM or SPIFFE bundle"))
	case e.Kind == attest.KindJoinToken && c.TrustBundle != "":
		fail("trustBundle", errors.New("not needed: a join token names the control plane's root"))
	}
}

func isPort(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil
}
