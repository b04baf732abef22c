package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/agent/endpoint"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// shelf is a wallet behind a real socket.
type shelf struct {
	t      *testing.T
	cp     *controlPlane
	agent  *Agent
	wallet *Wallet
	path   string
	log    bytes.Buffer
}

func newShelf(t *testing.T, life time.Duration, cfg WalletConfig) *shelf {
	t.Helper()
	s := &shelf{t: t, cp: newControlPlane(t, life)}
	s.agent, _ = start(t, s.cp.config(s.cp.token("payments"), t.TempDir()))
	cfg.Log = hclog.New(&hclog.LoggerOptions{Output: &s.log, Mutex: &sync.Mutex{}})
	s.wallet = NewWallet(s.agent, cfg)
	dir, err := os.MkdirTemp("", "sp")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o711))
	s.path = filepath.Join(dir, "api.sock")
	server, err := endpoint.New(endpoint.Config{Path: s.path, Holder: s.wallet})
	require.NoError(t, err)
	for _, run := range []func(context.Context) error{s.wallet.Run, server.Serve} {
		ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
		done := make(chan error, 1)
		go func() { done <- run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	return s
}

// dialAs connects as another user, from a thread that ends with its credentials.
func dialAs(uid int, path string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	got := make(chan result)
	go func() {
		runtime.LockOSThread()
		if uid != os.Geteuid() {
			keep := ^uintptr(0)
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
				got <- result{nil, errno}
				return
			}
		}
		c, err := net.Dial("unix", path)
		got <- result{c, err}
	}()
	r := <-got
	return r.c, r.err
}

func (s *shelf) dialer(uid int) grpc.DialOption {
	return grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return dialAs(uid, s.path) })
}

func (s *shelf) client(uid int) *workloadapi.Client {
	s.t.Helper()
	c, err := workloadapi.New(s.t.Context(), workloadapi.WithAddr("unix://"+s.path), workloadapi.WithDialOptions(s.dialer(uid)))
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = c.Close() })
	return c
}

// follow opens a stream of the caller's SVIDs.
func (s *shelf) follow(uid int) (recv func() (*workloadpb.X509SVID, error), end func()) {
	s.t.Helper()
	cc, err := grpc.NewClient("passthrough:///api", grpc.WithTransportCredentials(insecure.NewCredentials()), s.dialer(uid))
	require.NoError(s.t, err)
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(s.t.Context(), "workload.spiffe.io", "true"))
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	require.NoError(s.t, err)
	end = sync.OnceFunc(func() { cancel(); _ = cc.Close() })
	s.t.Cleanup(end)
	return func() (*workloadpb.X509SVID, error) {
		resp, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		return resp.Svids[0], nil
	}, end
}

func briefly(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// The app gets an SVID and key of its own, of the sidecar's ID; whoever else on
// the machine asks gets nothing.
func TestD6AppOnly(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("acting as several users needs root")
		}
		t.Skip("acting as several users needs root")
	}
	const app = 65501
	s := newShelf(t, time.Hour, WalletConfig{AllowUIDs: []uint32{app}})
	got, err := s.client(app).FetchX509SVID(briefly(t))
	require.NoError(t, err)
	own, err := s.agent.Source().GetX509SVID()
	require.NoError(t, err)
	if got.ID != own.ID {
		t.Errorf("got %s, want %s", got.ID, own.ID)
	}
	if own.PrivateKey.(*ecdsa.PrivateKey).Equal(got.PrivateKey) {
		t.Error("the app was given the sidecar's own key")
	}
	for _, uid := range []int{0, 65502} {
		if _, err := s.client(uid).FetchX509SVID(briefly(t)); status.Code(err) != codes.PermissionDenied {
			t.Errorf("uid %d: got %v, want PermissionDenied", uid, err)
		}
		if _, err := s.client(uid).FetchJWTSVID(briefly(t), jwtsvid.Params{Audience: "x"}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("uid %d, JWT: got %v, want PermissionDenied", uid, err)
		}
	}
}

// Nothing is asked of the control plane before somebody asks here; all who ask
// share one SVID; it is renewed, with a fresh key, while somebody follows, and
// forgotten when nobody has for a while.
func TestAppSVIDLivesWhileFollowed(t *testing.T) {
	s := newShelf(t, time.Hour, WalletConfig{})
	if n := s.cp.edge.apps.Load(); n != 0 || len(s.wallet.Identities()) != 0 {
		t.Errorf("%d SVIDs before anybody asked", n)
	}
	recv, end := s.follow(os.Geteuid())
	one, err := recv()
	require.NoError(t, err)
	again, err := s.client(os.Geteuid()).FetchX509SVID(briefly(t))
	require.NoError(t, err)
	if n := s.cp.edge.apps.Load(); n != 1 || !bytes.HasPrefix(one.X509Svid, again.Certificates[0].Raw) {
		t.Errorf("%d SVIDs were issued, want one for all", n)
	}
	s.cp.clock.skew.Add(int64(12 * time.Minute))
	if n := s.cp.edge.apps.Load(); n != 1 {
		t.Error("renewed before a quarter of its life was over")
	}
	s.cp.clock.skew.Add(int64(5 * time.Minute))
	two, err := recv()
	require.NoError(t, err)
	if bytes.Equal(one.X509SvidKey, two.X509SvidKey) || bytes.Equal(one.X509Svid, two.X509Svid) {
		t.Error("renewed with the same key, or not at all")
	}
	end()
	s.cp.advance(time.Minute, "forgotten", func() bool { return len(s.wallet.Identities()) == 0 })
	if n := s.cp.edge.apps.Load(); n != 2 {
		t.Errorf("%d SVIDs, want 2: it was renewed for nobody", n)
	}
	if got := strings.Count(s.log.String(), "an app has received an identity"); got != 1 {
		t.Errorf("logged %d times:\n%s", got, s.log.String())
	}
}

// New bundles reach those who follow, federated ones included.
func TestPushedBundlesReachFollowers(t *testing.T) {
	s := newShelf(t, time.Hour, WalletConfig{})
	src, err := workloadapi.NewBundleSource(briefly(t), workloadapi.WithClient(s.client(os.Geteuid())))
	require.NoError(t, err)
	defer src.Close()
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	bundles := s.cp.bundles()
	bundles[partner] = spiffebundle.FromX509Authorities(partner, newControlPlane(t, time.Hour).ca.X509Roots())
	require.NoError(t, s.agent.SetBundles(bundles))
	eventually(t, "the partner's bundle", func() bool {
		_, err := src.GetX509BundleForTrustDomain(partner)
		return err == nil
	})
	eventually(t, "the JWT keys", func() bool {
		_, err := src.GetJWTBundleForTrustDomain(td)
		return err == nil
	})
}

// byUID is evidence that depends on the user alone; 65503 has none.
func byUID(_ context.Context, c endpoint.Caller) (Evidence, error) {
	switch c.UID {
	case 65503:
		return Evidence{"uid": {"65503"}, "gid": {"0"}}, nil
	case 65504:
		return nil, errors.New("the process is gone")
	case 0:
		return Evidence{"path": {"/bin/root"}, "uid": {"0"}, "gid": {"0"}}, nil
	}
	return Evidence{"path": {"/bin/user"}, "uid": {fmt.Sprint(c.UID)}, "gid": {"0"}}, nil
}

// D6 on a host: each process gets what its own evidence proves, with a key of its
// own where anything of it differs, or nothing.
func TestD6HostEvidence(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("acting as several users needs root")
		}
		t.Skip("acting as several users needs root")
	}
	s := newShelf(t, time.Hour, WalletConfig{Find: byUID})
	ids := map[int]string{0: "/shop/root", 65501: "/shop/user", 65502: "/shop/user"}
	keys := map[int]*ecdsa.PrivateKey{}
	for uid, want := range ids {
		c := s.client(uid)
		svid, err := c.FetchX509SVID(briefly(t))
		require.NoError(t, err)
		again, err := c.FetchX509SVID(briefly(t))
		require.NoError(t, err)
		keys[uid] = svid.PrivateKey.(*ecdsa.PrivateKey)
		if svid.ID.Path() != want || !keys[uid].Equal(again.PrivateKey) {
			t.Errorf("uid %d: got %s, want %s and the same key twice", uid, svid.ID, want)
		}
		token, err := c.FetchJWTSVID(briefly(t), jwtsvid.Params{Audience: "db"})
		require.NoError(t, err)
		if token.ID.Path() != want {
			t.Errorf("uid %d: a token of %s", uid, token.ID)
		}
	}
	if keys[65501].Equal(keys[65502]) {
		t.Error("two users share a key because their ID is the same")
	}
	for _, uid := range []int{65503, 65504} {
		if _, err := s.client(uid).FetchX509SVID(briefly(t)); status.Code(err) != codes.PermissionDenied {
			t.Errorf("uid %d: got %v, want PermissionDenied", uid, err)
		}
	}
}

// What the control plane takes away ends streams and is forgotten; what it only
// cannot do now changes nothing.
func TestIdentityTakenAway(t *testing.T) {
	s := newShelf(t, time.Hour, WalletConfig{Find: byUID})
	if os.Geteuid() != 0 {
		t.Skip("the evidence is root's")
	}
	recv, _ := s.follow(0)
	before, err := recv()
	require.NoError(t, err)
	s.cp.edge.set(codes.Unavailable)
	s.cp.advance(time.Minute, "late", func() bool { i := s.wallet.Identities(); return len(i) == 1 && i[0].Late && i[0].Detail != "" })
	// Said before anything expires, with how long is left.
	if late := s.wallet.Late(s.cp.clock.Now()); len(late) != 1 || !strings.Contains(late[0], "/shop/root ends at") || !strings.Contains(late[0], "not for you") {
		t.Errorf("late: %q", late)
	}
	if left, n := s.wallet.Outage(s.cp.clock.Now()); n != 1 || left <= 0 || left > 30*time.Minute {
		t.Errorf("it would survive %v, of %d", left, n)
	}
	if got, err := s.client(0).FetchX509SVID(briefly(t)); err != nil || !bytes.HasPrefix(before.X509Svid, got.Certificates[0].Raw) {
		t.Errorf("a valid SVID was given up: %v", err)
	}
	s.cp.edge.set(codes.PermissionDenied)
	ended := make(chan error, 1)
	go func() { _, err := recv(); ended <- err }()
	s.cp.advance(time.Second, "taken away", func() bool { return len(ended) == 1 })
	if err := <-ended; status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "not for you") {
		t.Errorf("the stream: got %v", err)
	}
	if _, err := s.client(0).FetchX509SVID(briefly(t)); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a newcomer: got %v", err)
	}
	if late := s.wallet.Late(s.cp.clock.Now()); len(late) != 0 {
		t.Errorf("a process that no workload admits is trouble of this machine: %q", late)
	}
	if i := s.wallet.Identities(); len(i) != 1 || !i[0].Denied || !i[0].NotAfter.IsZero() {
		t.Errorf("got %+v", i)
	}
	// Readmitted, it works again by itself.
	s.cp.edge.set(codes.OK)
	s.cp.advance(100*time.Millisecond, "readmitted", func() bool {
		_, err := s.client(0).FetchX509SVID(briefly(t))
		return err == nil
	})
}

// D5 for apps: a sidecar whose ID is revoked, and that never sees the list, because
// its streams were ended first, learns it when it asks for itself; its app's SVID
// goes with it. That the app's renewal is answered Unauthenticated tells nothing: so
// is a connection that is only too old.
func TestD5RevokedWithoutTheList(t *testing.T) {
	s := newShelf(t, time.Hour, WalletConfig{})
	recv, _ := s.follow(os.Geteuid())
	_, err := recv()
	require.NoError(t, err)
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := recv(); err != nil {
				ended <- err
				return
			}
		}
	}()
	s.cp.edge.set(codes.Unauthenticated)
	s.cp.advance(time.Minute, "late", func() bool { i := s.wallet.Identities(); return len(i) == 1 && i[0].Late })
	if len(ended) > 0 {
		t.Fatalf("the SVID was taken away for nothing: %v", <-ended)
	}
	_, err = s.cp.registry.Revoke(t.Context(), registry.Order{Subjects: []registry.Subject{{Kind: registry.RevokedID, Name: s.agent.ID().String()}}, Actor: "alice"})
	require.NoError(t, err)
	s.cp.advance(time.Second, "taken away", func() bool { return len(ended) == 1 })
	if err := <-ended; status.Code(err) != codes.PermissionDenied {
		t.Errorf("the stream: got %v", err)
	}
	_, err = s.cp.registry.Unrevoke(t.Context(), registry.Order{Subjects: []registry.Subject{{Kind: registry.RevokedID, Name: s.agent.ID().String()}}, Actor: "alice"})
	require.NoError(t, err)
	s.cp.edge.set(codes.OK)
	s.cp.advance(100*time.Millisecond, "readmitted", func() bool {
		_, err := s.client(os.Geteuid()).FetchX509SVID(briefly(t))
		return err == nil
	})
}

// D5 for apps: whatever a new revocation list refuses is renewed at once, and so
// replaced, or taken away from those who hold it.
func TestD5RefusedSVIDsAreRenewedAtOnce(t *testing.T) {
	s := newShelf(t, time.Hour, WalletConfig{})
	recv, _ := s.follow(os.Geteuid())
	one, err := recv()
	require.NoError(t, err)
	s.wallet.RenewIf(func(identity.Peer) bool { return false })
	s.wallet.RenewIf(func(p identity.Peer) bool { return p.ID == s.agent.ID() && len(p.Chain) > 1 })
	two, err := recv()
	require.NoError(t, err)
	if bytes.Equal(one.X509Svid, two.X509Svid) || s.cp.edge.apps.Load() != 2 {
		t.Errorf("%d SVIDs, want 2", s.cp.edge.apps.Load())
	}
	s.cp.edge.set(codes.PermissionDenied)
	s.wallet.RenewIf(func(identity.Peer) bool { return true })
	if _, err := recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("revoked: got %v", err)
	}
}

// JWT-SVIDs are kept until half of their life, for one audience each.
func TestJWTsAreKept(t *testing.T) {
	s := newShelf(t, time.Hour, WalletConfig{})
	require.NoError(t, s.agent.SetBundles(s.cp.bundles()))
	c := s.client(os.Geteuid())
	cc, err := grpc.NewClient("passthrough:///api", grpc.WithTransportCredentials(insecure.NewCredentials()), s.dialer(os.Geteuid()))
	require.NoError(t, err)
	defer cc.Close()
	api := workloadpb.NewSpiffeWorkloadAPIClient(cc)
	fetch := func(audience string, extra ...string) string {
		t.Helper()
		// Not go-spiffe's client, which reads the token by the real clock.
		resp, err := api.FetchJWTSVID(metadata.AppendToOutgoingContext(briefly(t), "workload.spiffe.io", "true"),
			&workloadpb.JWTSVIDRequest{Audience: append([]string{audience}, extra...)})
		require.NoError(t, err)
		return resp.Svids[0].Svid
	}
	one := fetch("db")
	if fetch("db") != one {
		t.Error("asked twice within a moment")
	}
	if fetch("cache") == one || fetch("db", "cache") == one {
		t.Error("a token of another audience")
	}
	if _, err := c.ValidateJWTSVID(briefly(t), one, "db"); err != nil {
		t.Errorf("validating: %v", err)
	}
	s.cp.clock.skew.Add(int64(2*time.Minute + 40*time.Second))
	if fetch("db") == one {
		t.Error("handed out in the second half of its life")
	}
}

// SECURITY D1 seen from the agent: what it did not ask for it does not hand on.
func TestLeaseRefusesWhatItDidNotAskFor(t *testing.T) {
	s := newShelf(t, time.Hour, WalletConfig{})
	l := &lease{wallet: s.wallet}
	other, key := s.cp.issue(t, "/shop/orders")
	if err := l.accept(other, key); err == nil {
		t.Error("another ID was accepted")
	}
	msg, good := s.cp.issue(t, "/shop/payments")
	if err := l.accept(msg, key); err == nil {
		t.Error("an SVID for another key was accepted")
	}
	if err := l.accept(msg, good); err != nil {
		t.Errorf("as asked: %v", err)
	}
	if err := l.accept(&sallyportv1.SVID{}, key); err == nil {
		t.Error("nothing at all was accepted")
	}
}

// Everything has expired while the control plane was away; seconds after its
// return, whoever followed has a valid SVID, and newcomers too.
func TestAppsRecoverAfterAnOutage(t *testing.T) {
	s := newShelf(t, time.Hour, WalletConfig{})
	recv, _ := s.follow(os.Geteuid())
	_, err := recv()
	require.NoError(t, err)
	s.cp.stop()
	s.cp.advance(time.Minute, "expired", func() bool {
		i := s.wallet.Identities()
		return s.agent.Status().State == Expired && len(i) == 1 && i[0].NotAfter.Before(s.cp.clock.Now())
	})
	_, err = s.client(os.Geteuid()).FetchX509SVID(briefly(t))
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "expired") {
		t.Errorf("a newcomer during the outage: got %v", err)
	}
	require.NoError(t, s.cp.ca.Advance(t.Context()))
	begin := s.cp.clock.Now()
	s.cp.listen(s.cp.addr)
	got := make(chan error, 1)
	go func() { _, err := recv(); got <- err }()
	s.cp.advance(50*time.Millisecond, "a new SVID on the old stream", func() bool { return len(got) == 1 })
	require.NoError(t, <-got)
	if d := s.cp.clock.Now().Sub(begin); d > 30*time.Second {
		t.Errorf("took %v", d)
	}
	if svid, err := s.client(os.Geteuid()).FetchX509SVID(briefly(t)); err != nil || svid.Certificates[0].NotAfter.Before(s.cp.clock.Now()) {
		t.Errorf("a newcomer afterwards: %v", err)
	}
}

func TestDigestOf(t *testing.T) {
	a := digestOf(Evidence{"path": {"/a"}, "group": {"x", "y"}})
	if b := digestOf(Evidence{"group": {"y", "x"}, "path": {"/a"}}); a != b {
		t.Error("the order of values makes a difference")
	}
	for _, e := range []Evidence{{"path": {"/a"}, "group": {"x"}}, {"path": {"/a"}, "group": {"x\", \"y"}}, {"path": {"/a\"]\n"}}, nil} {
		if digestOf(e) == a {
			t.Errorf("%v has the same digest", e)
		}
	}
}
