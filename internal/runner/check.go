package runner

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v4"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// reader turns mesh.yaml's form into a mesh and collects what is wrong with it.
type reader struct {
	file   string
	offset int
	errs   []error

	addresses map[netip.AddrPort]address // :: taken address → the key that took it
}

var (
	label       = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	unknownKey  = regexp.MustCompile(`^field (\S+) not found in type .*$`)
	levels      = []string{"", "debug", "info", "warn", "error"}
	taken       = []string{"data", "controlplane"} // names that the state folder or the output uses itself
	envNonAlnum = regexp.MustCompile(`[^A-Z0-9]`)
)

// failf records an error at t: FILE:LINE:COL: message.
func (r *reader) failf(t text, format string, args ...any) {
	r.errs = append(r.errs, errors.New(position(r.file, t)+": "+fmt.Sprintf(format, args...)))
}

// position gives FILE:LINE:COL, or FILE for a text that is not in the file.
func position(file string, t text) string {
	if t.line == 0 {
		return file
	}
	return fmt.Sprintf("%s:%d:%d", file, t.line, t.col)
}

// yamlError gives every error of the YAML library the form FILE:LINE:COL: message.
func (r *reader) yamlError(err error) error {
	var many *yaml.LoadErrors
	var one *yaml.LoadError
	switch {
	case errors.As(err, &many):
		for _, e := range many.Errors {
			r.loadError(e)
		}
	case errors.As(err, &one):
		r.loadError(one)
	default:
		r.failf(text{}, "%v", err)
	}
	return errors.Join(r.errs...)
}

func (r *reader) loadError(e *yaml.LoadError) {
	msg := unknownKey.ReplaceAllString(e.Message, "unknown key $1")
	r.failf(text{line: e.Mark.Line, col: e.Mark.Column}, "%s", msg)
}

// mesh checks the whole file; with errors recorded, the result is incomplete.
func (r *reader) mesh(in meshFile) *mesh {
	m := &mesh{file: r.file, dir: filepath.Dir(r.file), try: in.Spec.Try, logLevel: in.Spec.LogLevel.value}
	r.addresses = map[netip.AddrPort]address{}
	r.want(in.APIVersion, "apiVersion", "sallyport.dev/v1")
	r.want(in.Kind, "kind", "Mesh")
	var err error
	if m.td, err = spiffeid.TrustDomainFromString(in.Spec.TrustDomain.value); err != nil {
		r.failf(in.Spec.TrustDomain, "spec.trustDomain %q: %v", in.Spec.TrustDomain.value, err)
	}
	if in.Spec.Policies.value == "" {
		r.failf(in.Spec.Policies, "spec.policies is missing: name the folder of policy files")
	}
	m.policies = filepath.Join(m.dir, in.Spec.Policies.value)
	if !slices.Contains(levels, m.logLevel) {
		r.failf(in.Spec.LogLevel, "spec.logLevel %q: want one of %s", m.logLevel, strings.Join(levels[1:], ", "))
	}
	m.control = r.controlPlane(in)
	if len(in.Spec.Workloads) == 0 {
		r.failf(text{}, "spec.workloads is empty")
	}
	seen := map[string]bool{}
	for i, w := range in.Spec.Workloads {
		if seen[w.Name.value] {
			r.failf(w.Name, "workload %q is here twice", w.Name.value)
		}
		seen[w.Name.value] = true
		m.loads = append(m.loads, r.workload(fmt.Sprintf("spec.workloads[%d]", i), w, m.td))
	}
	r.checkTry(m)
	return m
}

func (r *reader) want(t text, key, value string) {
	if t.value != value {
		r.failf(t, "%s is %q, want %s", key, t.value, value)
	}
}

func (r *reader) controlPlane(in meshFile) controlPlane {
	c := in.Spec.ControlPlane
	out := controlPlane{
		listen:  r.address("spec.controlPlane.listen", c.Listen),
		metrics: r.address("spec.controlPlane.metrics", c.Metrics),
	}
	if c.SVIDTTL.value == "" {
		return out
	}
	var err error
	if out.svidTTL, err = time.ParseDuration(c.SVIDTTL.value); err != nil || out.svidTTL <= 0 {
		r.failf(c.SVIDTTL, "spec.controlPlane.svidTTL %q: want a duration above zero, as in 24h", c.SVIDTTL.value)
	}
	return out
}

func (r *reader) workload(key string, in workloadFile, td spiffeid.TrustDomain) workload {
	w := workload{name: in.Name, command: in.Command, tunnel: r.address(key+".tunnel", in.Tunnel), admin: r.address(key+".admin", in.Admin)}
	if !label.MatchString(in.Name.value) || slices.Contains(taken, in.Name.value) {
		r.failf(in.Name, "%s.name %q: want lower-case letters, digits and hyphens, and none of %s", key, in.Name.value, strings.Join(taken, ", "))
	}
	if len(in.Command) == 0 || in.Command[0].value == "" {
		r.failf(in.Name, "%s.command is missing: name the app's program and its arguments", key)
	}
	env := map[string]string{} // :: variable → key that sets it
	w.serve = r.listeners(key+".serve", in.Serve, env)
	w.local = r.listeners(key+".local", in.Local, env)
	for i, o := range in.Outbound {
		k := fmt.Sprintf("%s.outbound[%d]", key, i)
		u, err := parseUpstream(td, o.To)
		if err != nil {
			r.failf(o.To, "%s.to: %v", k, err)
			continue
		}
		u.listen = r.address(k+".listen", o.Listen)
		r.claim(env, u.env(), k+".to", o.To)
		w.upstream = append(w.upstream, u)
	}
	for _, name := range slices.Sorted(maps.Keys(in.Env)) {
		value := in.Env[name]
		r.claim(env, name, key+".env."+name, value)
		w.env = append(w.env, name+"="+value.value)
	}
	return w
}

// claim refuses a second key that would set the same environment variable.
func (r *reader) claim(env map[string]string, name, key string, at text) {
	if other, ok := env[name]; ok {
		r.failf(at, "%s sets %s, and so does %s", key, name, other)
	}
	env[name] = key
}

func (r *reader) listeners(key string, in map[string]text, env map[string]string) map[string]address {
	out := map[string]address{}
	for _, name := range slices.Sorted(maps.Keys(in)) {
		t := in[name]
		if !label.MatchString(name) {
			r.failf(t, "%s: port name %q: want lower-case letters, digits and hyphens", key, name)
		}
		r.claim(env, listenEnv(name), key+"."+name, t)
		out[name] = r.address(key+"."+name, t)
	}
	return out
}

// address reads a loopback IP:PORT, adds the offset and refuses one that
// another key has.
func (r *reader) address(key string, t text) address {
	a := address{key: key, at: t}
	if t.value == "" {
		r.failf(t, "%s is missing: give it an address, as in 127.0.0.1:8080", key)
		return a
	}
	ap, err := netip.ParseAddrPort(t.value)
	if err != nil || !ap.Addr().IsLoopback() || ap.Port() == 0 {
		r.failf(t, "%s %q: want a loopback address and a port, as in 127.0.0.1:8080", key, t.value)
		return a
	}
	port := int(ap.Port()) + r.offset
	if port < 1 || port > 65535 {
		r.failf(t, "%s: port %d with the offset %d is %d, which is no port", key, ap.Port(), r.offset, port)
		return a
	}
	a.AddrPort = netip.AddrPortFrom(ap.Addr(), uint16(port))
	if other, ok := r.addresses[a.AddrPort]; ok {
		r.failf(t, "%s: %s is %s already", key, t.value, other.key)
		return a
	}
	r.addresses[a.AddrPort] = a
	return a
}

// parseUpstream reads REF:PORT.
func parseUpstream(td spiffeid.TrustDomain, to text) (upstream, error) {
	i := strings.LastIndexByte(to.value, ':')
	if i <= 0 || i == len(to.value)-1 {
		return upstream{}, fmt.Errorf("%q: want WORKLOAD:PORT, as in payments:http", to.value)
	}
	ref, port := to.value[:i], to.value[i+1:]
	if n, err := strconv.Atoi(port); !label.MatchString(port) || err == nil && (n < 1 || n > 65535) {
		return upstream{}, fmt.Errorf("%q: port %q is neither a name nor a number", to.value, port)
	}
	id, err := identity.ParseRef(td, ref)
	if err != nil {
		return upstream{}, fmt.Errorf("%q: %w", to.value, err)
	}
	return upstream{to: to, ref: id, port: port}, nil
}

// listenEnv names the variable that tells an app where to listen.
func listenEnv(port string) string { return "LISTEN_" + envName(port) }

// env names the variable that tells an app where to find u.
func (u upstream) env() string {
	path := u.ref.Path()
	return "UPSTREAM_" + envName(path[strings.LastIndexByte(path, '/')+1:]) + "_" + envName(u.port)
}

func envName(s string) string { return envNonAlnum.ReplaceAllString(strings.ToUpper(s), "_") }
