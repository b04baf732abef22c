package endpoint

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(dialEnv); path != "" {
		dialAndWait(path)
	}
	goleak.VerifyTestMain(m)
}

const deadline = 10 * time.Second

// Users of the tests. Only root may act as several.
const (
	alice    uint32 = 65501 // has /alice
	stranger uint32 = 65502 // has nothing
)

var (
	shop    = spiffeid.RequireTrustDomainFromString("shop.example")
	partner = spiffeid.RequireTrustDomainFromString("partner.example")
	aliceID = spiffeid.RequireFromPath(shop, "/alice")
	ownID   = spiffeid.RequireFromPath(shop, "/own")
	otherID = spiffeid.RequireFromPath(shop, "/own/second")
)

// authority is a small CA of one trust domain, with one JWT key.
type authority struct {
	td   spiffeid.TrustDomain
	root *x509.Certificate
	key  *ecdsa.PrivateKey
	kid  string
}

func newAuthority(t testing.TB, td spiffeid.TrustDomain) *authority {
	t.Helper()
	a := &authority{td: td, key: newKey(t), kid: "key of " + td.Name()}
	a.root = sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: td.Name() + fmt.Sprint(time.Now().UnixNano())},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{td.ID().URL()},
	}, nil, a.key, a.key)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return cert
}

// issue makes an SVID, with an intermediate between it and the root.
func (a *authority) issue(t testing.TB, id spiffeid.ID) *x509svid.SVID {
	t.Helper()
	middle, key := newKey(t), newKey(t)
	inter := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "intermediate"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{a.td.ID().URL()},
	}, a.root, middle, a.key)
	leaf := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "leaf"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{id.URL()},
	}, inter, key, middle)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf, inter}, PrivateKey: key}
}

func (a *authority) bundle(t testing.TB) *spiffebundle.Bundle {
	t.Helper()
	b := spiffebundle.FromX509Authorities(a.td, []*x509.Certificate{a.root})
	require.NoError(t, b.AddJWTAuthority(a.kid, a.key.Public()))
	return b
}

// token makes a JWT; nil claims are those of a good JWT-SVID.
func (a *authority) token(t testing.TB, claims map[string]any, options *jose.SignerOptions) string {
	t.Helper()
	if options == nil {
		options = (&jose.SignerOptions{}).WithType("JWT")
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.key, KeyID: a.kid}}, options)
	require.NoError(t, err)
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	require.NoError(t, err)
	return token
}

func claimsOf(id spiffeid.ID, audience ...string) map[string]any {
	return map[string]any{"sub": id.String(), "aud": audience, "exp": time.Now().Add(5 * time.Minute).Unix()}
}

// desk is a Holder that goes by the uid alone.
type desk struct {
	t         testing.TB
	authority *authority

	mu      sync.Mutex
	feeds   map[uint32]*Feed
	callers []Caller // of each Hold
	err     error    // what Hold says instead
}

func (d *desk) Hold(_ context.Context, c Caller) (*Feed, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.callers = append(d.callers, c)
	if d.err != nil {
		return nil, d.err
	}
	if f := d.feeds[c.UID]; f != nil {
		return f, nil
	}
	return nil, ErrDenied
}

func (d *desk) JWT(_ context.Context, _ Caller, id spiffeid.ID, audience []string) (string, error) {
	return d.authority.token(d.t, claimsOf(id, audience...), nil), nil
}

func (d *desk) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err = err
}

// office is a running endpoint: this user holds /own and /own/second, alice holds
// /alice, others nothing.
type office struct {
	*desk
	path    string
	server  *Server
	feed    *Feed
	svids   []*x509svid.SVID
	bundles identity.Bundles
	foreign *authority
	revoked atomic.Int64 // before this Unix time alice's tokens were issued that are refused; 0: none
	stop    func()
}

func open(t testing.TB) *office {
	t.Helper()
	a, f := newAuthority(t, shop), newAuthority(t, partner)
	o := &office{
		desk:    &desk{t: t, authority: a, feeds: map[uint32]*Feed{}},
		path:    filepath.Join(t.TempDir(), "api.sock"),
		feed:    &Feed{},
		foreign: f, bundles: identity.Bundles{shop: a.bundle(t), partner: f.bundle(t)},
	}
	require.NoError(t, os.Chmod(filepath.Dir(o.path), 0o711))
	require.NoError(t, os.Chmod(filepath.Dir(filepath.Dir(o.path)), 0o711))
	own, second := a.issue(t, ownID), a.issue(t, otherID)
	own.Hint, second.Hint = "internal", "internal"
	o.svids = []*x509svid.SVID{own, second}
	o.feed.Set(&Holding{SVIDs: o.svids, Bundles: o.bundles})
	o.feeds[uint32(os.Geteuid())] = o.feed
	o.feeds[alice] = &Feed{}
	o.feeds[alice].Set(&Holding{SVIDs: []*x509svid.SVID{a.issue(t, aliceID)}, Bundles: o.bundles})
	var err error
	o.server, err = New(Config{Path: o.path, Holder: o.desk, CheckJWT: func(id spiffeid.ID, issued time.Time) error {
		if n := o.revoked.Load(); n > 0 && id == aliceID && issued.Unix() < n {
			return errors.New("revoked")
		}
		return nil
	}})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- o.server.Serve(ctx) }()
	o.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(o.stop)
	return o
}

// dialAs connects as another user, from a thread that has nothing else to do.
func dialAs(uid uint32, path string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	got := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its credentials
		if uid != uint32(os.Geteuid()) {
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

func (o *office) dialer(uid uint32) grpc.DialOption {
	return grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return dialAs(uid, o.path) })
}

// conn is a plain gRPC connection of a user.
func (o *office) conn(uid uint32) *grpc.ClientConn {
	o.t.Helper()
	cc, err := grpc.NewClient("passthrough:///api", grpc.WithTransportCredentials(insecure.NewCredentials()), o.dialer(uid))
	require.NoError(o.t, err)
	o.t.Cleanup(func() { _ = cc.Close() })
	return cc
}

func (o *office) raw(uid uint32) workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(o.conn(uid))
}

// client is go-spiffe's.
func (o *office) client(uid uint32) *workloadapi.Client {
	o.t.Helper()
	c, err := workloadapi.New(o.t.Context(), workloadapi.WithAddr("unix://"+o.path), workloadapi.WithDialOptions(o.dialer(uid)))
	require.NoError(o.t, err)
	o.t.Cleanup(func() { _ = c.Close() })
	return c
}

func me() uint32 { return uint32(os.Geteuid()) }

func needRoot(t *testing.T) {
	t.Helper()
	if me() != 0 && os.Getenv("CI") != "" {
		t.Fatal("acting as several users needs root")
	}
	if me() != 0 {
		t.Skip("acting as several users needs root")
	}
}

// called is a context with the header that every call has to carry.
func called(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// rawHeaders encodes an HPACK header block of names and values in turn.
func rawHeaders(pairs ...string) []byte {
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	for i := 0; i < len(pairs); i += 2 {
		_ = enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]}) // a Buffer takes all
	}
	return b.Bytes()
}
