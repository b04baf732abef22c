package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("shop.example")

// skewedClock is real time plus what a test adds.
type skewedClock struct{ skew atomic.Int64 } // nanoseconds

func (c *skewedClock) Now() time.Time { return time.Now().Add(time.Duration(c.skew.Load())) }

// controlPlane is a real enrolment server on loopback that can be stopped and
// started again at the same address.
type controlPlane struct {
	t        *testing.T
	ca       *ca.CA
	registry *registry.Registry
	service  *issuer.Service
	edge     *edge
	clock    skewedClock
	addr     string
	srv      *grpc.Server
	done     chan error
	issues   atomic.Int32 // Enroll calls that reached the server
	fail     atomic.Bool  // answer every Renew with Unavailable
	busy     atomic.Bool  // answer every Enroll with ResourceExhausted
	tokens   chan call    // of each IssueJWT; full: no more
}

// call is one request as the control plane sees it.
type call struct {
	from   string // the other end of the connection
	serial string // of the SVID that opened it
}

func newControlPlane(t *testing.T, svidTTL time.Duration) *controlPlane {
	t.Helper()
	c := &controlPlane{t: t, tokens: make(chan call, 64)}
	mem := store.NewMemory()
	t.Cleanup(func() { mem.Close() })
	var err error
	c.ca, err = ca.Open(t.Context(), ca.Config{
		TrustDomain: td, KeyDir: filepath.Join(t.TempDir(), "keys"), Store: mem, SVIDTTL: svidTTL, Now: c.clock.Now,
	})
	require.NoError(t, err)
	log := audit.New(mem, c.clock.Now)
	c.registry = registry.New(registry.Config{Store: mem, Audit: log, RootHash: c.ca.RootHash, Now: c.clock.Now})
	c.registry.SetWorkloads(workloads())
	c.service = issuer.New(issuer.Config{CA: c.ca, Registry: c.registry, Now: c.clock.Now})
	c.edge = &edge{Service: c.service}
	c.listen("127.0.0.1:0")
	t.Cleanup(c.stop)
	return c
}

func workload(name string) policy.CompiledWorkload {
	return policy.CompiledWorkload{
		Workload: policy.Workload{Name: name, Attest: []policy.Attest{{Kind: attest.KindJoinToken}}},
		ID:       spiffeid.RequireFromPath(td, "/shop/"+name),
	}
}

func (c *controlPlane) listen(addr string) {
	c.t.Helper()
	lis, err := net.Listen("tcp", addr)
	require.NoError(c.t, err)
	c.addr = lis.Addr().String()
	cfg := identity.TLSConfig{Source: c.ca.ServerSVID(), Now: c.clock.Now, OptionalClient: true, NextProtos: []string{"h2"}}
	c.srv = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(identity.ServerTLS(cfg))),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if c.fail.Load() {
				return nil, status.Error(codes.Unavailable, "not today")
			}
			p, _ := peer.FromContext(ctx)
			if caller, err := identity.PeerOf(p.AuthInfo.(credentials.TLSInfo).State); err == nil {
				ctx = identity.ContextWithPeer(ctx, caller)
				c.note(info.FullMethod, call{p.Addr.String(), caller.Leaf.SerialNumber.String()})
			}
			return next(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			c.issues.Add(1)
			if c.busy.Load() {
				return status.Error(codes.ResourceExhausted, "not today")
			}
			return next(srv, ss)
		}),
	)
	sallyportv1.RegisterEnrollmentServer(c.srv, c.edge)
	c.done = make(chan error, 1)
	go func() { c.done <- c.srv.Serve(lis) }()
}

func (c *controlPlane) note(method string, from call) {
	if method != sallyportv1.Enrollment_IssueJWT_FullMethodName {
		return
	}
	select {
	case c.tokens <- from:
	default:
	}
}

func (c *controlPlane) stop() {
	if c.srv != nil {
		c.srv.Stop()
		<-c.done
		c.srv = nil
	}
}

func (c *controlPlane) token(name string) string {
	c.t.Helper()
	created, err := c.registry.CreateToken(c.t.Context(), registry.TokenRequest{Workload: name, Actor: "alice"})
	require.NoError(c.t, err)
	return created.Token
}

func (c *controlPlane) config(token, dir string) Config {
	return Config{ControlPlane: c.addr, Token: token, StateDir: dir, Now: c.clock.Now}
}

// start runs an agent and waits for its SVID; stop ends it.
func start(t *testing.T, cfg Config) (a *Agent, stop func()) {
	t.Helper()
	a, stop = launch(t, cfg)
	select {
	case <-a.Ready():
	case <-time.After(10 * time.Second):
		t.Fatalf("no SVID: %+v", a.Status())
	}
	return a, stop
}

func launch(t *testing.T, cfg Config) (a *Agent, stop func()) {
	t.Helper()
	a, err := New(cfg)
	require.NoError(t, err)
	a.poll = time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	var stopped bool
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	return a, stop
}

// runBriefly is for a Run that is to end by itself; nil means that it did not.
func runBriefly(t *testing.T, a *Agent) error {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return a.Run(ctx)
}

func serial(t *testing.T, a *Agent) string {
	t.Helper()
	svid, err := a.Source().GetX509SVID()
	require.NoError(t, err)
	return svid.Certificates[0].SerialNumber.String()
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	require.Eventually(t, ok, 10*time.Second, time.Millisecond, what)
}

// advance moves the clock by step at each look until ok. The control plane renews
// its own SVID meanwhile, as it does in life: a slow machine sees days go by.
func (c *controlPlane) advance(step time.Duration, what string, ok func() bool) {
	c.t.Helper()
	require.Eventually(c.t, func() bool {
		c.clock.skew.Add(int64(step))
		if err := c.ca.Advance(c.t.Context()); err != nil {
			c.t.Errorf("the control plane's own SVID: %v", err)
		}
		return ok()
	}, 30*time.Second, 5*time.Millisecond, what)
}

func TestEnrolThenRestartWithoutToken(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	dir := filepath.Join(t.TempDir(), "state")
	token := cp.token("payments")
	a, stop := start(t, cp.config(token, dir))
	if got, want := a.ID().String(), "spiffe://shop.example/shop/payments"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if s := a.Status(); s.State != Valid || s.Detail != "" || s.NotAfter.IsZero() {
		t.Errorf("got %+v", s)
	}
	stop()
	// The token stays where it was, is gone, or is damaged: the state decides.
	for name, tok := range map[string]string{"used": token, "none": "", "damaged": token[:20]} {
		again, stop := start(t, cp.config(tok, dir))
		if again.ID() != a.ID() || again.Instance() != a.Instance() {
			t.Errorf("%s: came back as %s, instance %s", name, again.ID(), again.Instance())
		}
		if serial(t, again) == serial(t, a) {
			t.Errorf("%s: same SVID", name)
		}
		stop()
	}
}

func TestOnDiskIsTheEnrolmentKeyOnly(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	dir := filepath.Join(t.TempDir(), "state")
	if ok, err := Enrolled(dir); ok || err != nil {
		t.Errorf("before: got %v, %v", ok, err)
	}
	a, _ := start(t, cp.config(cp.token("payments"), dir))
	if ok, err := Enrolled(dir); !ok || err != nil {
		t.Errorf("after: got %v, %v", ok, err)
	}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	if len(entries) != 1 || entries[0].Name() != stateFile {
		t.Errorf("got %v", entries)
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, stateFile): 0o600} {
		st, err := os.Stat(path)
		require.NoError(t, err)
		if st.Mode().Perm() != want {
			t.Errorf("%s: got mode %v, want %v", path, st.Mode().Perm(), want)
		}
	}
	data, err := os.ReadFile(filepath.Join(dir, stateFile))
	require.NoError(t, err)
	svid, err := a.Source().GetX509SVID()
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	require.NoError(t, err)
	var j stateJSON
	require.NoError(t, json.Unmarshal(data, &j))
	if bytes.Equal(j.Key, der) || j.Pending != nil {
		t.Error("the SVID's key, or a pending one, is on disk")
	}
}

// 5-second SVIDs, renewed 200 times with a fresh key each; none comes near its
// end, and the source never runs dry.
func TestRenews200Times(t *testing.T) {
	cp := newControlPlane(t, 5*time.Second)
	a, _ := start(t, cp.config(cp.token("payments"), t.TempDir()))
	keys := map[string]bool{}
	for n := range uint64(200) {
		looks := 0
		eventually(t, "a renewal", func() bool {
			if looks%50 == 0 { // more than a twenty-fourth of 5 s; again should the agent not have slept yet
				cp.clock.skew.Add(int64(250 * time.Millisecond))
			}
			looks++
			return a.Status().Renewals > n
		})
		require.NoError(t, cp.ca.Advance(t.Context()))
		svid, err := a.Source().GetX509SVID()
		require.NoError(t, err)
		keys[string(svid.Certificates[0].RawSubjectPublicKeyInfo)] = true
	}
	if got := cp.issues.Load(); got != 1 {
		t.Errorf("%d enrolments, want the first one only: SVIDs expired before they were renewed", got)
	}
	if len(keys) < 190 {
		t.Errorf("saw only %d keys in 200 renewals", len(keys))
	}
}

func TestRenewalIsJittered(t *testing.T) {
	a := &Agent{}
	a.state.life = 24 * time.Hour
	least, most := 25*time.Hour, time.Duration(0)
	for range 1000 {
		d := a.renewIn()
		least, most = min(least, d), max(most, d)
	}
	if least < 54*time.Minute || most > 66*time.Minute || most-least < 6*time.Minute {
		t.Errorf("hourly renewal in %v to %v", least, most)
	}
}

func TestBackoffIsBounded(t *testing.T) {
	now := time.Now()
	a := &Agent{cfg: Config{Now: func() time.Time { return now }}}
	for _, c := range []struct{ left, limit time.Duration }{
		{0, urgentBackoff}, {-time.Hour, urgentBackoff}, {24 * time.Hour, validBackoff}, {8 * time.Second, time.Second}, {time.Millisecond, minBackoffStep},
	} {
		a.status.NotAfter = now.Add(c.left)
		for failures := 1; failures < 100; failures++ {
			if d := a.backoff(failures); d > c.limit || d < minBackoffStep/4 {
				t.Errorf("%v left, failure %d: %v, limit %v", c.left, failures, d, c.limit)
			}
		}
	}
}

// The control plane goes away: the SVID stays in force, is shown as degraded and
// then expired, and seconds after the return all is well.
func TestRecoversAfterAnOutage(t *testing.T) {
	cp := newControlPlane(t, 24*time.Hour)
	a, _ := start(t, cp.config(cp.token("payments"), t.TempDir()))
	before := serial(t, a)
	cp.stop()
	cp.advance(time.Minute, "degraded", func() bool { return a.Status().State == Degraded })
	if s := a.Status(); !strings.Contains(s.Detail, "control plane unreachable at "+cp.addr+": connection refused; retrying") || s.Since.IsZero() {
		t.Errorf("got %+v", s)
	}
	if serial(t, a) != before {
		t.Error("a valid SVID was given up")
	}
	cp.advance(time.Hour, "expired", func() bool { return a.Status().State == Expired })
	require.NoError(t, cp.ca.Advance(t.Context()))
	enrolments := cp.issues.Load()
	back := cp.clock.Now()
	cp.listen(cp.addr)
	cp.advance(50*time.Millisecond, "valid again", func() bool { return a.Status().State == Valid })
	if d := cp.clock.Now().Sub(back); d > 2*urgentBackoff {
		t.Errorf("took %v", d)
	}
	if serial(t, a) == before || cp.issues.Load() == enrolments {
		t.Error("not re-enrolled")
	}
}

// A renewal that the control plane refuses, or cannot do now, costs nothing
// while the SVID is valid.
func TestFailingRenewalKeepsTheSVID(t *testing.T) {
	cp := newControlPlane(t, 24*time.Hour)
	a, _ := start(t, cp.config(cp.token("payments"), t.TempDir()))
	before := serial(t, a)
	cp.fail.Store(true)
	cp.advance(time.Minute, "a failed renewal", func() bool { return strings.Contains(a.Status().Detail, "not today") })
	if s := a.Status(); s.State != Degraded || serial(t, a) != before {
		t.Errorf("got %+v", s)
	}
	cp.fail.Store(false)
	cp.advance(time.Second, "valid again", func() bool { return a.Status().State == Valid && serial(t, a) != before })

	before = serial(t, a)
	require.NoError(t, cp.registry.Remove(t.Context(), a.Instance(), "alice"))
	cp.advance(time.Minute, "refused", func() bool { return strings.Contains(a.Status().Detail, "unknown instance") })
	if s := a.Status(); s.State != Degraded || serial(t, a) != before {
		t.Errorf("got %+v", s)
	}
}

func TestUnreachableAtFirstIsRetriedAndSaid(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	token := cp.token("payments")
	cp.stop()
	var log bytes.Buffer
	cfg := cp.config(token, t.TempDir())
	cfg.Log = hclog.New(&hclog.LoggerOptions{Output: &log})
	a, stop := launch(t, cfg)
	eventually(t, "said", func() bool {
		s := a.Status()
		return s.State == Enrolling && s.Detail == "control plane unreachable at "+cp.addr+": connection refused; retrying"
	})
	cp.listen(cp.addr)
	<-a.Ready()
	stop()
	if got := strings.Count(log.String(), "connection refused"); got != 1 || !strings.Contains(log.String(), checkAddress) {
		t.Errorf("logged %d times:\n%s", got, log.String())
	}
	if strings.Contains(log.String(), strings.Split(token, ".")[2]) {
		t.Error("the token's secret is in the log")
	}
}

// A new sidecar with a wrong address ends with a line that says so; one that has
// been somewhere already waits.
func TestEnrollWithin(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	dir := t.TempDir()
	_, stop := start(t, cp.config(cp.token("payments"), dir))
	stop()
	cfg := cp.config(cp.token("payments"), t.TempDir())
	cfg.EnrollWithin = 50 * time.Millisecond
	cp.stop()
	a, err := New(cfg)
	require.NoError(t, err)
	err = runBriefly(t, a)
	want := "control plane unreachable at " + cp.addr + " for 50ms: connection refused; check controlPlane in the configuration and that it runs"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}

	cfg.StateDir = dir
	a, err = New(cfg)
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	if err := a.Run(ctx); err != nil {
		t.Errorf("with saved state: gave up: %v", err)
	}
}

// A control plane that answers and cannot enrol anybody yet is waited for.
func TestEnrollWithinIsForTheUnreachable(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	cfg := cp.config(cp.token("payments"), t.TempDir())
	cfg.EnrollWithin = time.Millisecond
	cp.busy.Store(true)
	a, _ := launch(t, cfg)
	eventually(t, "refused", func() bool { return strings.Contains(a.Status().Detail, "not today") })
	time.Sleep(2 * cfg.EnrollWithin)
	cp.busy.Store(false)
	eventually(t, "enrolled", func() bool { return a.Status().State == Valid })
}

// Wrong from the start: Run ends with one line that says what to do.
func TestPermanentErrorsEndRun(t *testing.T) {
	other := newControlPlane(t, time.Hour)
	for _, c := range []struct {
		name  string
		spoil func(*testing.T, *controlPlane, *Config)
		want  string
		sent  bool // something was sent to the server
	}{
		{"unknown token", func(t *testing.T, cp *controlPlane, cfg *Config) {
			tok, err := attest.NewToken(cp.ca.RootHash())
			require.NoError(t, err)
			cfg.Token = tok.Encode()
		}, "unknown join token; make a new one with: sallyport token create", true},
		{"used token", func(t *testing.T, cp *controlPlane, cfg *Config) {
			_, stop := start(t, cp.config(cfg.Token, t.TempDir()))
			stop()
		}, "join token already used", true},
		{"expired token", func(_ *testing.T, cp *controlPlane, _ *Config) { cp.clock.skew.Store(int64(11 * time.Minute)) }, "join token expired", true},
		{"token of another control plane", func(_ *testing.T, _ *controlPlane, cfg *Config) { cfg.Token = other.token("payments") },
			"made by another control plane", false},
		{"workload gone", func(_ *testing.T, cp *controlPlane, _ *Config) { cp.registry.SetWorkloads([]policy.CompiledWorkload{}) },
			"no such workload in the applied policy files", true},
		{"clock behind", func(_ *testing.T, cp *controlPlane, cfg *Config) {
			cfg.Now = func() time.Time { return cp.clock.Now().Add(-time.Hour) }
		}, "this clock is 59m", false},
		{"clock ahead", func(_ *testing.T, cp *controlPlane, cfg *Config) {
			cfg.Now = func() time.Time { return cp.clock.Now().Add(50 * time.Minute) }
		}, "this machine's clock is 50m0s ahead of the control plane's", true},
		{"state folder is a file", func(t *testing.T, _ *controlPlane, cfg *Config) {
			require.NoError(t, os.WriteFile(filepath.Join(cfg.StateDir, "x"), nil, 0o600))
			cfg.StateDir = filepath.Join(cfg.StateDir, "x", "y")
		}, "not a directory", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			cp := newControlPlane(t, time.Hour)
			cfg := cp.config(cp.token("payments"), t.TempDir())
			c.spoil(t, cp, &cfg)
			before := cp.issues.Load()
			a, err := New(cfg)
			if err == nil {
				err = runBriefly(t, a)
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line with %q", err, c.want)
			}
			if sent := cp.issues.Load() > before; sent != c.sent {
				t.Errorf("something was sent to the server: %v, want %v", sent, c.sent)
			}
		})
	}
}

// The state folder says who we are; whoever answers at the address must be that
// mesh's control plane.
func TestStateOfAnotherMesh(t *testing.T) {
	one, two := newControlPlane(t, time.Hour), newControlPlane(t, time.Hour)
	dir := t.TempDir()
	token := one.token("payments")
	first, stop := start(t, one.config(token, dir))
	stop()
	cfg := two.config(token, dir)
	a, err := New(cfg)
	require.NoError(t, err)
	err = runBriefly(t, a)
	if err == nil || !strings.Contains(err.Error(), "not trusting the control plane at "+two.addr) || two.issues.Load() != 0 {
		t.Errorf("got %v, %d enrolments", err, two.issues.Load())
	}
	// A token of the other mesh is what an operator gives on purpose.
	cfg.Token = two.token("orders")
	a, stop = start(t, cfg)
	stop()
	if a.ID().Path() != "/shop/orders" || a.Instance() == first.Instance() {
		t.Errorf("got %s, instance %s", a.ID(), a.Instance())
	}
}

// Losing the answer of the first enrolment does not lose the token.
func TestRestartBeforeTheAnswer(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	dir := t.TempDir()
	cfg := cp.config(cp.token("payments"), dir)
	a, err := New(cfg)
	require.NoError(t, err)
	p, err := a.proof()
	require.NoError(t, err)
	_, err = a.pendingKey(p.name)
	require.NoError(t, err)
	pending, err := os.ReadFile(filepath.Join(dir, stateFile))
	require.NoError(t, err)
	if ok, err := Enrolled(dir); ok || err != nil {
		t.Errorf("pending: got enrolled %v, %v", ok, err)
	}
	first, stop := start(t, cfg)
	stop()
	require.NoError(t, os.WriteFile(filepath.Join(dir, stateFile), pending, 0o600)) // as if the answer never came
	again, stop := start(t, cfg)
	stop()
	if again.Instance() != first.Instance() {
		t.Errorf("got instance %s, want %s", again.Instance(), first.Instance())
	}
}

func TestNewSaysWhatIsWrong(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	dir := t.TempDir()
	_, stop := start(t, cp.config(cp.token("payments"), dir))
	stop()
	good, err := os.ReadFile(filepath.Join(dir, stateFile))
	require.NoError(t, err)
	with := func(data []byte, mode os.FileMode) string {
		d := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(d, stateFile), data, mode))
		return d
	}
	for _, c := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"address without port", Config{ControlPlane: "localhost", StateDir: dir}, "want host:port"},
		{"no state folder", Config{ControlPlane: cp.addr}, "state folder is required"},
		{"nothing to enrol with", Config{ControlPlane: cp.addr, StateDir: t.TempDir()}, "sallyport token create --workload NAME"},
		{"no token at all", Config{ControlPlane: cp.addr, StateDir: t.TempDir(), Token: "secret"}, "not a join token"},
		{"truncated state", Config{ControlPlane: cp.addr, StateDir: with(good[:len(good)/2], 0o600)}, "corrupt"},
		{"empty state", Config{ControlPlane: cp.addr, StateDir: with(nil, 0o600)}, "delete it and start with a new join token"},
		{"later version", Config{ControlPlane: cp.addr, StateDir: with([]byte(`{"version":2}`), 0o600)}, "version 2, want 1"},
		{"unknown field", Config{ControlPlane: cp.addr, StateDir: with([]byte(`{"version":1,"x":1}`), 0o600)}, "corrupt"},
		{"readable state", Config{ControlPlane: cp.addr, StateDir: with(good, 0o644)}, "run chmod 600"},
	} {
		_, err := New(c.cfg)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v, want one line with %q", c.name, err, c.want)
		}
	}
}

func TestSetBundlesIsSaved(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	dir := t.TempDir()
	a, stop := start(t, cp.config(cp.token("payments"), dir))
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	own, err := a.Source().GetX509BundleForTrustDomain(td)
	require.NoError(t, err)
	roots := own.X509Authorities()
	if err := a.SetBundles(identity.Bundles{partner: spiffebundle.FromX509Authorities(partner, roots)}); err == nil {
		t.Error("accepted bundles without the own trust domain")
	}
	require.NoError(t, a.SetBundles(identity.Bundles{td: spiffebundle.FromX509Authorities(td, roots), partner: spiffebundle.FromX509Authorities(partner, roots)}))
	if _, err := a.Source().GetX509BundleForTrustDomain(partner); err != nil {
		t.Error(err)
	}
	stop()
	again, err := New(cp.config("", dir))
	require.NoError(t, err)
	if _, err := again.Source().GetX509BundleForTrustDomain(partner); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	if err := (&Agent{}).SetBundles(nil); !errors.Is(err, identity.ErrNoIdentity) {
		t.Errorf("before enrolment: got %v", err)
	}
}

func TestDialFollowsTheSVID(t *testing.T) {
	cp := newControlPlane(t, 24*time.Hour)
	dir := t.TempDir()
	early, err := New(cp.config(cp.token("orders"), t.TempDir()))
	require.NoError(t, err)
	if _, err := early.Dial(t.Context()); !errors.Is(err, identity.ErrNoIdentity) {
		t.Errorf("before the first SVID: got %v", err)
	}
	a, _ := start(t, cp.config(cp.token("payments"), dir))
	conn, err := a.Dial(t.Context())
	require.NoError(t, err)
	_, csr, err := newKey()
	require.NoError(t, err)
	if _, err := sallyportv1.NewEnrollmentClient(conn).Renew(t.Context(), &sallyportv1.RenewRequest{Csr: csr}); err != nil {
		t.Error(err)
	}
	require.NoError(t, conn.Close())
	cp.stop()
	if _, err := a.Dial(t.Context()); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("without a control plane: got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Dial(ctx); err == nil {
		t.Error("connected with an ended context")
	}
}

// C8: whoever holds a valid SVID of the mesh, but not the control plane's, must
// not pass for it.
func TestC8AnotherWorkloadIsNoControlPlane(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	dir := t.TempDir()
	a, stop := start(t, cp.config(cp.token("payments"), dir))
	stop()
	token := cp.token("orders")
	root := cp.ca.X509Roots()[0]
	var live identity.Live
	svid, err := a.Source().GetX509SVID()
	require.NoError(t, err)
	forged := *svid
	forged.Certificates = append(append([]*x509.Certificate{}, svid.Certificates...), root)
	live.SetSVID(&forged)
	live.SetBundles(identity.Bundles{td: spiffebundle.FromX509Authorities(td, []*x509.Certificate{root})})
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var seen atomic.Int32
	srv := grpc.NewServer(grpc.Creds(credentials.NewTLS(identity.ServerTLS(identity.TLSConfig{Source: &live, OptionalClient: true, NextProtos: []string{"h2"}}))),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { seen.Add(1); return nil }))
	done := make(chan error, 1)
	go func() { done <- srv.Serve(lis) }()
	defer func() { srv.Stop(); <-done }()
	for name, cfg := range map[string]Config{
		"with a token": {Token: token, StateDir: t.TempDir()},
		"with state":   {StateDir: dir},
	} {
		cfg.ControlPlane, cfg.Now = lis.Addr().String(), cp.clock.Now
		victim, err := New(cfg)
		require.NoError(t, err)
		if err := runBriefly(t, victim); err == nil || !strings.Contains(err.Error(), "/shop/payments") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if seen.Load() != 0 {
		t.Errorf("%d calls were sent to an impostor", seen.Load())
	}
}

func FuzzDecodeState(f *testing.F) {
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`{"version":1,"pending":{"token":"x","enrolment_key":"AA=="}}`))
	f.Add([]byte(`{"version":1,"spiffe_id":"spiffe://a/b","instance":"x","bundles":{"a":["AA=="]}}`))
	f.Add([]byte(`{"version":1,"spiffe_id":"spiffe://a/b","instance":"x","trust_bundles":{"a":{"keys":[]}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := decodeState(data)
		if err != nil || !s.enrolled() {
			return
		}
		own := s.bundles[s.ID.TrustDomain()]
		if s.key == nil || own == nil || len(own.X509Authorities()) == 0 {
			t.Error("accepted half an enrolment")
		}
	})
}

// Even an authenticated control plane may not hand out just anything.
func TestAcceptRefuses(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	a, stop := start(t, cp.config(cp.token("payments"), t.TempDir()))
	stop()
	before := serial(t, a)
	key, _, err := newKey()
	require.NoError(t, err)
	other, _, err := newKey()
	require.NoError(t, err)
	issued := func(path string) *sallyportv1.SVID {
		res, err := cp.ca.Issue(t.Context(), ca.Request{ID: spiffeid.RequireFromPath(td, path), Key: key.Public(), Instance: a.Instance()})
		require.NoError(t, err)
		msg := &sallyportv1.SVID{Instance: a.Instance(), Bundle: [][]byte{res.Bundle[0].Raw}}
		for _, c := range res.Chain {
			msg.Chain = append(msg.Chain, c.Raw)
		}
		return msg
	}
	server, err := cp.ca.ServerSVID().GetX509SVID()
	require.NoError(t, err)
	for _, c := range []struct {
		name  string
		spoil func(m *sallyportv1.SVID)
		want  string
	}{
		{"nothing", func(m *sallyportv1.SVID) { m.Reset() }, "0 certificates"},
		{"no bundle", func(m *sallyportv1.SVID) { m.Bundle = nil }, "trust bundle"},
		{"no intermediate", func(m *sallyportv1.SVID) { m.Chain = m.Chain[:1] }, "checking the issued SVID"},
		{"another workload", func(m *sallyportv1.SVID) { m.Chain = issued("/shop/orders").Chain }, "and this is spiffe://shop.example/shop/payments"},
		{"another key", func(m *sallyportv1.SVID) { m.Chain[0] = server.Certificates[0].Raw }, "another key"},
		{"no instance", func(m *sallyportv1.SVID) { m.Instance = "" }, "names no instance"},
		{"two certificates in one field", func(m *sallyportv1.SVID) { m.Chain[0] = append(m.Chain[0], m.Chain[1]...) }, "several certificates"},
	} {
		m := issued("/shop/payments")
		c.spoil(m)
		if err := a.accept(m, key, td, nil); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
	}
	if err := a.accept(issued("/shop/payments"), other, td, nil); err == nil {
		t.Error("accepted an SVID for another key")
	}
	own := issued("/shop/payments")
	own.Chain = [][]byte{server.Certificates[0].Raw, server.Certificates[1].Raw}
	serverKey, ok := server.PrivateKey.(*ecdsa.PrivateKey)
	require.True(t, ok)
	if err := a.accept(own, serverKey, td, &pendingKey{"x", other}); err == nil || !strings.Contains(err.Error(), "is not a workload") {
		t.Errorf("the control plane's own ID at a first enrolment: got %v", err)
	}
	if serial(t, a) != before {
		t.Error("a refused SVID is in force")
	}
	if err := a.accept(issued("/shop/payments"), key, td, nil); err != nil {
		t.Error(err)
	}
}

// With a clock that is a little slow the agent holds an SVID for valid that the
// control plane no longer accepts. It comes back with the enrolment key at once.
func TestSlowClockReEnrols(t *testing.T) {
	cp := newControlPlane(t, 20*time.Second)
	cfg := cp.config(cp.token("payments"), t.TempDir())
	cfg.Now = func() time.Time { return cp.clock.Now().Add(-25 * time.Second) }
	a, _ := start(t, cfg)
	cp.fail.Store(true)
	cp.advance(50*time.Millisecond, "a failed renewal", func() bool { return a.Status().State == Degraded })
	cp.clock.skew.Add(int64(21 * time.Second))
	require.NoError(t, cp.ca.Advance(t.Context()))
	before := serial(t, a)
	if a.Status().State != Degraded {
		t.Fatalf("the agent's clock is not slow: %+v", a.Status())
	}
	cp.fail.Store(false)
	eventually(t, "re-enrolled", func() bool { return a.Status().State == Valid && serial(t, a) != before })
}
