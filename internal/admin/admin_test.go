package admin

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start serves h on ln and returns a function that gets a path.
func start(t *testing.T, ln net.Listener, h http.Handler) func(path string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- Serve(ctx, ln, h) }()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, ln.Addr().Network(), ln.Addr().String())
	}}
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	client := &http.Client{Transport: tr, Timeout: 5 * time.Second}
	return func(path string) (int, string) {
		resp, err := client.Get("http://sidecar" + path)
		require.NoError(t, err)
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(b)
	}
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := Listen(t.Context(), "127.0.0.1:0")
	require.NoError(t, err)
	return ln
}

func TestHealthAndReadiness(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	h := NewHealth(func() time.Time { return now }, "identity", "policy")
	var notReady error = errors.New("the first SVID")
	get := start(t, listen(t), Handler(h, func() error { return notReady }, prometheus.NewRegistry()))

	check := func(path string, wantCode int, want string) {
		t.Helper()
		code, body := get(path)
		if code != wantCode || !strings.Contains(body, want) {
			t.Errorf("%s: got %d %s\nwant %d and %q in it", path, code, body, wantCode, want)
		}
	}
	check("/healthz", 503, `"message": "starting"`)
	check("/readyz", 503, `"waiting": "the first SVID"`)
	h.Set("identity", OK, "")
	h.Set("policy", Degraded, "no news for 5 minutes; check the control plane")
	notReady = nil
	check("/healthz", 200, `"status": "degraded"`)
	check("/readyz", 200, `"ready": true`)

	now = now.Add(time.Hour)
	h.Set("policy", Degraded, "still")
	h.Set("identity", Down, "gone")
	_, body := get("/healthz")
	var r Report
	require.NoError(t, json.Unmarshal([]byte(body), &r))
	if r.Status != Down || !r.Components["identity"].Since.Equal(now) || !r.Components["policy"].Since.Equal(now.Add(-time.Hour)) {
		t.Errorf("got %+v: since must be when the status changed", r)
	}
}

func TestProfilesAreNeverOnTCP(t *testing.T) {
	get := start(t, listen(t), Handler(NewHealth(time.Now), func() error { return nil }, prometheus.NewRegistry()))
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/cmdline", "/config", "/view", "/"} {
		if code, _ := get(path); code != 404 {
			t.Errorf("%s: got %d, want 404", path, code)
		}
	}
}

func TestDebugSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "admin.sock")
	ln, err := ListenUnix(t.Context(), path)
	require.NoError(t, err)
	info, err := os.Stat(path)
	require.NoError(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %o, want 600", info.Mode().Perm())
	}
	if _, err := ListenUnix(t.Context(), path); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a live socket was taken over: %v", err)
	}
	get := start(t, ln, DebugHandler(map[string]func() any{"view": func() any { return map[string]int{"rules": 3} }}))
	if code, body := get("/view"); code != 200 || !strings.Contains(body, `"rules": 3`) {
		t.Errorf("/view: got %d %s", code, body)
	}
	if code, _ := get("/debug/pprof/goroutine?debug=1"); code != 200 {
		t.Errorf("profile: got %d", code)
	}
}

func TestUnixSocketInTheWay(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale.sock")
	ln, err := net.Listen("unix", stale)
	require.NoError(t, err)
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, ln.Close())
	ln, err = ListenUnix(t.Context(), stale)
	require.NoError(t, err, "a dead process's socket must be replaced")
	require.NoError(t, ln.Close())

	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, []byte("precious"), 0o600))
	for path, want := range map[string]string{
		file: "not a socket",
		filepath.Join(dir, strings.Repeat("x", 120)): "at most 107 bytes",
		filepath.Join(dir, "no", "such", "s"):        "no such file",
	} {
		if ln, err := ListenUnix(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v %v, want %q", path, ln, err, want)
		}
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Errorf("the file in the way is now %q", b)
	}
}

func TestListenInUse(t *testing.T) {
	ln := listen(t)
	defer ln.Close()
	if _, err := Listen(t.Context(), ln.Addr().String()); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("got %v", err)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	ln := listen(t)
	start(t, ln, http.NotFoundHandler())
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	first := dial()
	for range maxConns - 1 {
		dial()
	}
	last := dial()
	_, err := io.WriteString(last, "GET / HTTP/1.1\r\nHost: sidecar\r\n\r\n")
	require.NoError(t, err)
	require.NoError(t, last.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
	if n, err := last.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("connection %d is served: %d, %v", maxConns+1, n, err)
	}
	require.NoError(t, first.Close())
	require.NoError(t, last.SetReadDeadline(time.Now().Add(5*time.Second)))
	if _, err := last.Read(make([]byte, 1)); err != nil {
		t.Errorf("it is not served when another one has gone: %v", err)
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	now := time.Now()
	h := NewHealth(time.Now, "identity")
	m := NewMetrics(reg, "1.2.3", Sources{
		Live:       func() map[flow.Side]int { return map[flow.Side]int{flow.Inbound: 3} },
		SVIDExpiry: func() (time.Time, bool) { return now.Add(90 * time.Second), true },
		Outage: func() map[string]time.Duration {
			return map[string]time.Duration{"self": time.Hour, "app": -time.Second}
		},
		SVIDRenewals:      func() uint64 { return 4 },
		Revisions:         func() map[string]string { return map[string]string{"rules": "1.42"} },
		Dropped:           func() map[string]uint64 { return map[string]uint64{"stream": 5} },
		RefusedLocal:      func() uint64 { return 6 },
		HandshakeFailures: func() map[string]uint64 { return map[string]uint64{"timeout": 7} },
		Revocation:        func() (Revocation, bool) { return Revocation{"1.9", 8, 2 * time.Minute}, true },
		NeighbourLists:    func() map[string]uint64 { return map[string]uint64{"forged": 12} },
		Revoked:           func() map[flow.Side]uint64 { return map[flow.Side]uint64{flow.Inbound: 11} },
		Components:        func() map[string]Component { return h.Report().Components },
		Now:               func() time.Time { return now },
	})
	m.Record(flow.Flow{Side: flow.Inbound, Outcome: flow.Refused, Sent: 10, Received: 20})
	m.Record(flow.Flow{Side: flow.Outbound, Outcome: flow.Closed, Sent: 1, Decision: policy.Decision{Effect: policy.Allow}})
	m.Record(flow.Flow{Side: flow.Outbound, Outcome: flow.Failed})
	_, body := start(t, listen(t), Handler(h, func() error { return nil }, reg))("/metrics")
	for _, want := range []string{
		`sallyport_build_info{version="1.2.3"} 1`,
		`sallyport_connections_total{outcome="refused",side="inbound",verdict="deny"} 1`,
		`sallyport_connections_total{outcome="closed",side="outbound",verdict="allow"} 1`,
		`sallyport_connections_total{outcome="failed",side="outbound",verdict="none"} 1`,
		`sallyport_bytes_total{direction="sent",side="inbound"} 10`,
		`sallyport_bytes_total{direction="received",side="inbound"} 20`,
		`sallyport_connection_duration_seconds_count{side="inbound"} 1`,
		`sallyport_live_connections{side="inbound"} 3`,
		`sallyport_svid_remaining_seconds 90`,
		`sallyport_identity_outage_seconds{identity="self"} 3600`,
		`sallyport_identity_outage_seconds{identity="app"} -1`,
		`sallyport_revocation_list_info{version="1.9"} 1`,
		`sallyport_revocation_list_entries 8`,
		`sallyport_revocation_list_age_seconds 120`,
		`sallyport_neighbour_lists_total{outcome="forged"} 12`,
		`sallyport_revoked_connections_total{side="inbound"} 11`,
		`sallyport_svid_renewals_total 4`,
		`sallyport_view_info{kind="rules",revision="1.42"} 1`,
		`sallyport_flow_records_dropped_total{sink="stream"} 5`,
		`sallyport_local_callers_refused_total 6`,
		`sallyport_handshake_failures_total{class="timeout"} 7`,
		`sallyport_component_up{component="identity"} 0`,
		`go_goroutines`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("%s is missing", want)
		}
	}
	if t.Failed() {
		t.Log(body)
	}
}

func TestSourcesMayBeMissing(t *testing.T) {
	reg := prometheus.NewRegistry()
	NewMetrics(reg, "dev", Sources{})
	if _, err := reg.Gather(); err != nil {
		t.Error(err)
	}
}
