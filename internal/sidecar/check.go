package sidecar

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/proxy"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// maxSocketPath is sun_path without its final NUL (unix(7)).
const maxSocketPath = 107

// mistake is a value that cannot be. key is where it stands: "outbound[0].to".
type mistake struct {
	key string
	err error
}

// check finds every mistake and fills in what depends on the process.
func (c *Config) check() []mistake {
	var out []mistake
	fail := func(key string, err error) {
		if err != nil {
			out = append(out, mistake{key, err})
		}
	}
	if c.ControlPlane == "" {
		fail("controlPlane", errors.New("required: the control plane's host:port"))
	} else {
		fail("controlPlane", remote(c.ControlPlane))
	}
	if c.StateDir == "" {
		fail("stateDir", errors.New("required: a folder for this sidecar alone"))
	}
	c.checkEvidence(fail)
	c.checkIdentity(fail)
	for i, file := range c.Files {
		file.Check(func(key string, err error) { fail(fmt.Sprintf("files[%d].%s", i, key), err) })
	}
	fail("tunnel.listen", hostPort(c.Tunnel.Listen))
	if c.Tunnel.Advertise != "" {
		_, err := netip.ParseAddr(c.Tunnel.Advertise)
		fail("tunnel.advertise", orElse(err, "want an IP address without a port"))
	}
	for _, name := range slices.Sorted(maps.Keys(c.App)) {
		_, err := app(name, c.App[name])
		fail("app."+name, err)
	}
	c.checkOutbound(fail)
	if c.AllowUIDs == nil {
		c.AllowUIDs = []uint32{uint32(os.Geteuid())}
	}
	if len(c.AllowUIDs) == 0 && (len(c.Outbound) > 0 || c.WorkloadAPI.Socket != "") {
		fail("allowUIDs", errors.New("nobody may use the outbound listeners or the workloadAPI socket; name the app's user or leave the key out"))
	}
	if c.Admin.Listen != "" {
		fail("admin.listen", hostPort(c.Admin.Listen))
	}
	for key, path := range map[string]string{"admin.socket": c.Admin.Socket, "workloadAPI.socket": c.WorkloadAPI.Socket} {
		if n := len(path); n > maxSocketPath {
			fail(key, fmt.Errorf("the path has %d bytes, and %d are possible for a socket; choose a shorter folder", n, maxSocketPath))
		}
	}
	if c.Drain < 0 {
		fail("drain", errors.New("cannot be negative"))
	}
	if c.Idle < 0 {
		fail("idle", errors.New("cannot be negative; 0 is never"))
	}
	if hclog.LevelFromString(c.Log.Level) == hclog.NoLevel {
		fail("log.level", fmt.Errorf("%q: want debug, info, warn or error", c.Log.Level))
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		fail("log.format", fmt.Errorf("%q: want text or json", c.Log.Format))
	}
	return out
}

func (c *Config) checkEvidence(fail func(string, error)) {
	if c.TokenFile != "" && !c.Evidence.IsZero() {
		fail("tokenFile", errors.New("there is evidence already; a join token belongs there too, as {kind: join-token, tokenFile: …}"))
	}
	if !c.Evidence.IsZero() {
		c.Evidence.Check(func(key string, err error) { fail("evidence."+key, err) })
	}
	e := c.evidence()
	if e.IsZero() {
		return
	}
	switch needs := e.Kind != attest.KindJoinToken; {
	case needs && c.TrustBundle == "":
		fail("trustBundle", errors.New("required with this evidence, which must not go to a control plane that is not known: a file with its roots, as PEM or SPIFFE bundle"))
	case !needs && c.TrustBundle != "":
		fail("trustBundle", errors.New("not needed: a join token names the control plane's root"))
	}
}

func (c *Config) checkIdentity(fail func(string, error)) {
	id := c.Identity
	if id.ControlPlaneID != "" {
		_, err := spiffeid.FromString(id.ControlPlaneID)
		fail("identity.controlPlaneID", err)
		if id.WorkloadAPI == "" {
			fail("identity.controlPlaneID", errors.New("only with identity.workloadAPI; enrolment knows the control plane"))
		}
	}
	if id.WorkloadAPI == "" {
		return
	}
	fail("identity.workloadAPI", agent.CheckWorkloadAPI(id.WorkloadAPI))
	if !c.evidence().IsZero() {
		fail("identity.workloadAPI", errors.New("there is evidence to enrol with; use one or the other"))
	}
	if len(c.Files) > 0 {
		fail("files", errors.New("the identity comes from a Workload API itself; whoever serves it can write them"))
	}
	if c.WorkloadAPI.Socket != "" {
		fail("workloadAPI.socket", errors.New("the identity comes from a Workload API itself; let the app ask there"))
	}
}

// evidence is what to enrol with, tokenFile being the short form.
func (c *Config) evidence() agent.EvidenceConfig {
	if c.TokenFile != "" && c.Evidence.IsZero() {
		return agent.EvidenceConfig{Kind: attest.KindJoinToken, TokenFile: c.TokenFile}
	}
	return c.Evidence
}

func (c *Config) checkOutbound(fail func(string, error)) {
	seen := make(map[string]int)
	for i, o := range c.Outbound {
		key := fmt.Sprintf("outbound[%d]", i)
		fail(key+".listen", localAddr(o.Listen))
		if first, dup := seen[o.Listen]; dup && !strings.HasSuffix(o.Listen, ":0") {
			fail(key+".listen", fmt.Errorf("the same as outbound[%d].listen", first))
		}
		seen[o.Listen] = i
		fail(key+".to", checkTarget(o.To))
	}
}

// checkTarget reads REF:PORT as far as that goes without the trust domain.
func checkTarget(to string) error {
	ref, port, err := proxy.SplitTarget(to)
	if err != nil {
		return err
	}
	any := spiffeid.RequireTrustDomainFromString("any.example")
	if _, err := identity.ParseRef(any, ref); err != nil {
		return err
	}
	if n, err := strconv.Atoi(port); err == nil && (n < 1 || n > 65535) {
		return fmt.Errorf("port %d: want 1 to 65535, or a port's name", n)
	}
	return nil
}

// app reads where the app serves a port.
func app(name, addr string) (proxy.App, error) {
	if name == "" {
		return proxy.App{}, errors.New("a port's name is missing")
	}
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return proxy.App{Port: name, Network: "unix", Address: path}, localAddr(addr)
	}
	return proxy.App{Port: name, Network: "tcp", Address: addr}, localAddr(addr)
}

// localAddr accepts a loopback HOST:PORT or unix:PATH.
func localAddr(addr string) error {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		switch {
		case path == "":
			return errors.New("unix: without a path")
		case len(path) > maxSocketPath:
			return fmt.Errorf("the path has %d bytes, and %d are possible for a socket; choose a shorter folder", len(path), maxSocketPath)
		}
		return nil
	}
	if err := hostPort(addr); err != nil {
		return fmt.Errorf("%w, or unix:/path", err)
	}
	host, _, _ := net.SplitHostPort(addr)
	if ip, err := netip.ParseAddr(host); host != "localhost" && (err != nil || !ip.Unmap().IsLoopback()) {
		return fmt.Errorf("%q is not on this machine's loopback: traffic to it would be neither encrypted nor authenticated", host)
	}
	return nil
}

// hostPort accepts HOST:PORT with a numeric port; HOST may be empty, which is
// every address of the machine.
func hostPort(addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	return orElse(err, fmt.Sprintf("%q: want HOST:PORT, with a port from 0 to 65535", addr))
}

// remote accepts HOST:PORT of something to connect to.
func remote(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || host == "" || port == "0" {
		return fmt.Errorf("%q: want HOST:PORT", addr)
	}
	return hostPort(addr)
}

// orElse words err for the reader of a configuration file.
func orElse(err error, words string) error {
	if err == nil {
		return nil
	}
	return errors.New(words)
}
