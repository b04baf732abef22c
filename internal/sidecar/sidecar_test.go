package sidecar

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// closedPort is an address where nobody listens.
func closedPort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	return ln.Addr().String()
}

// config writes a configuration of a sidecar whose control plane is down, and a
// token that looks good.
func config(t *testing.T, more string) Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp") // short: socket paths are limited
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	token, err := attest.NewToken([32]byte{1})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "token"), []byte(token.Encode()+"\n"), 0o600))
	text := fmt.Sprintf("controlPlane: %s\ntokenFile: token\ntunnel: {listen: \"127.0.0.1:0\"}\n%s\n", closedPort(t), more)
	if !strings.Contains(more, "admin:") {
		text += "admin: {listen: \"127.0.0.1:0\", socket: admin.sock}\n"
	}
	c, err := parse(filepath.Join(dir, "proxy.yaml"), []byte(text))
	require.NoError(t, err)
	return c
}

func get(t *testing.T, c *http.Client, url string) (int, string) {
	t.Helper()
	resp, err := c.Get(url)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(b)
}

// Without a control plane the sidecar waits, says so, refuses traffic, and still
// stops at once.
func TestControlPlaneDownAtStart(t *testing.T) {
	cfg := config(t, "outbound: [{listen: \"127.0.0.1:0\", to: \"payments:http\"}]")
	var logged strings.Builder
	s, err := New(t.Context(), cfg, Options{Log: hclog.New(&hclog.LoggerOptions{Output: &logged, Mutex: &sync.Mutex{}}), Version: "1.2.3"})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	tr := &http.Transport{DisableKeepAlives: true}
	c := &http.Client{Transport: tr, Timeout: 5 * time.Second}
	base := "http://" + s.AdminAddr().String()

	require.Eventually(t, func() bool {
		_, body := get(t, c, base+"/readyz")
		return strings.Contains(body, "unreachable")
	}, 5*time.Second, 5*time.Millisecond)
	code, body := get(t, c, base+"/readyz")
	if code != 503 || !strings.Contains(body, "waiting for the first SVID") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	code, body = get(t, c, base+"/healthz")
	var report struct {
		Status     string
		Components map[string]struct{ Status, Message string }
	}
	require.NoError(t, json.Unmarshal([]byte(body), &report))
	if code != 503 || report.Status != "down" || report.Components["identity"].Status != "down" ||
		!strings.Contains(report.Components["local-isolation"].Message, "local isolation is off") {
		t.Errorf("/healthz: %d %s", code, body)
	}
	_, body = get(t, c, base+"/metrics")
	for _, want := range []string{
		`sallyport_build_info{version="1.2.3"} 1`, `sallyport_component_up{component="identity"} 0`,
		`sallyport_live_connections{side="outbound"} 0`, `sallyport_flow_records_dropped_total{sink="control-plane"} 0`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("metric %s is missing", want)
		}
	}
	socket := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", cfg.Admin.Socket)
	}}}
	for path, want := range map[string]string{
		"/config": `"controlPlane": "` + cfg.ControlPlane, "/view": `"rules": null`, "/connections": `"inbound": []`,
	} {
		if code, body := get(t, socket, "http://sidecar"+path); code != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	conn, err := net.Dial("tcp", s.OutboundAddrs()[0].String())
	if err == nil {
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("outbound without identity: %d bytes, %v", n, err)
		}
		_ = conn.Close()
	}

	start := time.Now()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("stopping took %v", d)
	}
	if _, err := os.Stat(cfg.Admin.Socket); !os.IsNotExist(err) {
		t.Errorf("the admin socket is still there: %v", err)
	}
	if !strings.Contains(logged.String(), "local isolation is off") {
		t.Errorf("not a word about local isolation in the log:\n%s", logged.String())
	}
}

// Whatever is wrong shows as one line before anything runs, and nothing stays
// open.
func TestNewRefuses(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()
	addr := taken.Addr().String()
	for name, c := range map[string]struct {
		more  string
		spoil func(*Config)
		want  []string
	}{
		"tunnel port":   {spoil: func(c *Config) { c.Tunnel.Listen = addr }, want: []string{"tunnel.listen", addr, "in use"}},
		"admin port":    {spoil: func(c *Config) { c.Admin.Listen = addr }, want: []string{"admin.listen", addr, "in use"}},
		"outbound port": {more: "outbound: [{listen: \"" + addr + "\", to: \"a:b\"}]", want: []string{"outbound[0].listen", "in use"}},
		"no token": {spoil: func(c *Config) { c.TokenFile += ".not" },
			want: []string{"does not exist", "sallyport token create"}},
		"no token file configured": {spoil: func(c *Config) { c.TokenFile = "" }, want: []string{"sallyport token create"}},
		"broken token": {spoil: func(c *Config) { _ = os.WriteFile(c.TokenFile, []byte("sp1.what"), 0o600) },
			want: []string{"token"}},
		"huge token": {spoil: func(c *Config) { _ = os.WriteFile(c.TokenFile, make([]byte, 1<<20), 0o600) },
			want: []string{"not a join token"}},
		"flow log": {spoil: func(c *Config) { c.FlowLog = "/no/such/folder/flows" }, want: []string{"flow log", "no such file"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(t, c.more)
			if c.spoil != nil {
				c.spoil(&cfg)
			}
			s, err := New(t.Context(), cfg, Options{Log: hclog.NewNullLogger()})
			if err == nil {
				s.close()
				t.Fatal("no error")
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got %v\nwant %q in it", err, want)
				}
			}
			if _, err := os.Stat(cfg.Admin.Socket); err == nil {
				t.Error("the admin socket stayed")
			}
		})
	}
}

// What proxy.yaml and the Workload say of the app's ports must fit, and the log
// says so once.
func TestAppPortsMustFit(t *testing.T) {
	var logged strings.Builder
	s, err := New(t.Context(), config(t, "app: {http: \"127.0.0.1:1\", old: \"127.0.0.1:2\"}"), Options{Log: hclog.New(&hclog.LoggerOptions{Output: &logged})})
	require.NoError(t, err)
	defer s.close()
	view := func(ports ...policy.Port) {
		s.views.Apply(xds.Update{Kind: xds.Rules, Rules: policy.NewRuleset(nil), Ports: ports})
	}
	app := func() admin.Component { return s.health.Report().Components["app"] }
	http, grpc, old := policy.Port{Name: "http", Number: 80}, policy.Port{Name: "grpc", Number: 81}, policy.Port{Name: "old", Number: 82}
	if c := app(); c.Status != admin.OK {
		t.Errorf("before the first view: %+v", c)
	}
	view(http, grpc)
	view(http, grpc)
	want := []string{"declares port grpc, which proxy.yaml does not serve", "proxy.yaml serves port old, which the Workload does not declare"}
	for _, line := range want {
		if c := app(); c.Status != admin.Degraded || !strings.Contains(c.Message, line) {
			t.Errorf("got %+v, want %q", c, line)
		}
		if n := strings.Count(logged.String(), line); n != 1 {
			t.Errorf("%q logged %d times, want once:\n%s", line, n, logged.String())
		}
	}
	view(http, old)
	if c := app(); c.Status != admin.OK {
		t.Errorf("all fits: %+v", c)
	}
}

func TestNotReadyWhileStopping(t *testing.T) {
	s, err := New(t.Context(), config(t, ""), Options{Log: hclog.NewNullLogger()})
	require.NoError(t, err)
	defer s.close()
	s.drain(t.Context())
	if err := s.ready(); err == nil || !strings.Contains(err.Error(), "stopping") {
		t.Errorf("got %v", err)
	}
}
