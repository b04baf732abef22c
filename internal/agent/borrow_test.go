package agent

import (
	"context"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/agent/endpoint"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// lender is a Workload API with one SVID for everybody, which can go away.
type lender struct {
	feed endpoint.Feed
	path string
	stop func()
}

func (l *lender) Hold(context.Context, endpoint.Caller) (*endpoint.Feed, error) { return &l.feed, nil }

func (l *lender) JWT(context.Context, endpoint.Caller, spiffeid.ID, []string) (string, error) {
	return "", endpoint.ErrDenied
}

func (l *lender) open(t *testing.T) {
	t.Helper()
	server, err := endpoint.New(endpoint.Config{Path: l.path, Holder: l})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx) }()
	stopped := false
	l.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(l.stop)
}

// lend issues an SVID of the control plane's CA and hands it out.
func (l *lender) lend(t *testing.T, cp *controlPlane, path string) *x509svid.SVID {
	t.Helper()
	msg, key := cp.issue(t, path)
	chain, roots, err := readSVID(msg)
	require.NoError(t, err)
	svid := &x509svid.SVID{ID: spiffeid.RequireFromPath(td, path), Certificates: chain, PrivateKey: key}
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	l.feed.Set(&endpoint.Holding{SVIDs: []*x509svid.SVID{svid}, Bundles: identity.Bundles{
		td: spiffebundle.FromX509Authorities(td, roots), partner: spiffebundle.FromX509Authorities(partner, roots),
	}})
	return svid
}

func borrow(t *testing.T, cfg BorrowConfig) *Borrowed {
	t.Helper()
	b, err := Borrow(cfg)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return b
}

func TestBorrow(t *testing.T) {
	cp := newControlPlane(t, time.Hour)
	dir, err := os.MkdirTemp("", "sp")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l := &lender{path: filepath.Join(dir, "s")}
	cfg := BorrowConfig{ControlPlane: cp.addr, WorkloadAPI: "unix://" + l.path, StateDir: filepath.Join(dir, "state"), Now: cp.clock.Now}
	b := borrow(t, cfg)
	eventually(t, "said that the socket is missing", func() bool { return strings.Contains(b.Status().Detail, l.path) && b.Status().State == Enrolling })
	if _, err := b.Dial(t.Context()); err == nil {
		t.Error("connected without an identity")
	}
	l.open(t)
	first := l.lend(t, cp, "/shop/payments")
	<-b.Ready()
	if s := b.Status(); b.ID() != first.ID || s.State != Valid || s.Renewals != 0 {
		t.Errorf("got %s, %+v", b.ID(), s)
	}
	if _, err := b.Source().GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("partner.example")); err != nil {
		t.Errorf("the federated bundle: %v", err)
	}
	require.NoError(t, b.SetBundles(nil))
	if _, err := b.Source().GetX509BundleForTrustDomain(td); err != nil {
		t.Error("SetBundles took the borrowed bundles away")
	}
	conn, err := b.Dial(t.Context())
	require.NoError(t, err)
	// It is authenticated, and as an instance that enrolled nowhere.
	_, err = sallyportv1.NewEnrollmentClient(conn).Renew(t.Context(), &sallyportv1.RenewRequest{})
	if code := status.Code(err); code == codes.Unauthenticated || code == codes.Unavailable {
		t.Errorf("calling with the borrowed SVID: %v", err)
	}
	require.NoError(t, conn.Close())

	l.lend(t, cp, "/shop/payments")
	eventually(t, "renewed", func() bool {
		return b.Status().Renewals == 1 || serialOf(t, b) != first.Certificates[0].SerialNumber.String()
	})
	kept := serialOf(t, b)
	l.lend(t, cp, "/shop/orders")
	eventually(t, "another identity is refused", func() bool { return strings.Contains(b.Status().Detail, "restart to become that") })
	if b.ID() != first.ID || serialOf(t, b) != kept {
		t.Error("it took another identity while running")
	}
	l.stop()
	cp.clock.skew.Add(int64(46 * time.Minute))
	if s := b.Status(); s.State != Degraded {
		t.Errorf("three quarters of its life have passed: %+v", s)
	}
	cp.clock.skew.Add(int64(15 * time.Minute))
	if s := b.Status(); s.State != Expired {
		t.Errorf("all of its life has passed: %+v", s)
	}
	require.NoError(t, cp.ca.Advance(t.Context()))
	l.open(t)
	l.lend(t, cp, "/shop/payments")
	begin := time.Now()
	eventually(t, "well again", func() bool { return b.Status().State == Valid })
	if d := time.Since(begin); d > 2*urgentBackoff {
		t.Errorf("took %v", d)
	}

	again, err := Borrow(cfg)
	require.NoError(t, err)
	if again.name != b.name || len(b.name) != 2*instanceSize {
		t.Errorf("instance %q, then %q", b.name, again.name)
	}
	if got := b.Instance(); got != "test" {
		t.Errorf("instance %q, and the SVID says test", got)
	}
	if got := again.Instance(); got != "" {
		t.Errorf("instance %q before the first SVID", got)
	}
}

// Another issuer's SVID names no instance: the random name does, after restarts too.
func TestBorrowedInstance(t *testing.T) {
	cfg := BorrowConfig{ControlPlane: "a:1", WorkloadAPI: "unix:///s", StateDir: filepath.Join(t.TempDir(), "state")}
	var names []string
	for range 2 {
		b, err := Borrow(cfg)
		require.NoError(t, err)
		b.install(&x509svid.SVID{ID: spiffeid.RequireFromPath(td, "/x"), Certificates: []*x509.Certificate{{}}})
		names = append(names, b.Instance())
	}
	if names[0] != names[1] || len(names[0]) != 2*instanceSize {
		t.Errorf("got %q", names)
	}
}

func serialOf(t *testing.T, b *Borrowed) string {
	t.Helper()
	svid, err := b.Source().GetX509SVID()
	require.NoError(t, err)
	return svid.Certificates[0].SerialNumber.String()
}

// Without a newer SVID it is degraded before it expires, although the socket says
// nothing.
func TestBorrowedIsDegradedBeforeItExpires(t *testing.T) {
	now := time.Now()
	b := &Borrowed{cfg: BorrowConfig{Now: func() time.Time { return now }}, life: time.Hour, status: Status{NotAfter: now.Add(16 * time.Minute)}}
	if s := b.Status(); s.State != Valid {
		t.Errorf("got %+v", s)
	}
	now = now.Add(2 * time.Minute)
	if s := b.Status(); s.State != Degraded || s.Since.After(now) {
		t.Errorf("got %+v", s)
	}
}

// WE 4: unix with an absolute path and no authority.
func TestWE4_WorkloadAPIAddress(t *testing.T) {
	for addr, ok := range map[string]bool{
		"unix:///run/api.sock": true, "unix:/run/api.sock": true,
		"": false, "/run/api.sock": false, "unix://host/run/api.sock": false, "unix:relative": false, "unix://": false,
		"tcp://127.0.0.1:8081": false, "unix:///run/api.sock?x=1": false, "http:///run/api.sock": false, "unix:///run/api.sock#x": false,
	} {
		if err := CheckWorkloadAPI(addr); (err == nil) != ok {
			t.Errorf("%q: got %v", addr, err)
		}
	}
}

func TestBorrowRefuses(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, instanceFile), []byte("../../x"), 0o600))
	good := BorrowConfig{ControlPlane: "a:1", WorkloadAPI: "unix:///s", StateDir: dir}
	for want, change := range map[string]func(*BorrowConfig){
		"no instance name; delete it": func(*BorrowConfig) {},
		"host:port":                   func(c *BorrowConfig) { c.ControlPlane = "a" },
		"unix:///path":                func(c *BorrowConfig) { c.WorkloadAPI = "s" },
		"state folder is required":    func(c *BorrowConfig) { c.StateDir = "" },
	} {
		cfg := good
		change(&cfg)
		if _, err := Borrow(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
