// Package issuertest is a SPIFFE issuer of its own, for tests: a CA and a Workload
// API socket that know nothing of Sallyport.
package issuertest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Issuer signs whatever a test asks for.
type Issuer struct {
	t  testing.TB
	td spiffeid.TrustDomain

	mu       sync.Mutex
	roots    []*x509.Certificate // guarded by mu; the last one signs
	key      crypto.Signer       // guarded by mu
	sequence uint64              // guarded by mu
	changed  chan struct{}       // guarded by mu; closed by Rotate
	friends  map[string][]byte   // guarded by mu; foreign trust domain → roots
	ending   bool                // guarded by mu; the Workload API answers Canceled
}

// New makes an issuer with one root.
func New(t testing.TB, td spiffeid.TrustDomain) *Issuer {
	i := &Issuer{t: t, td: td, changed: make(chan struct{})}
	i.Rotate()
	return i
}

// Rotate adds a root, which signs from now on, and gives everyone a new SVID.
func (i *Issuer) Rotate() {
	i.t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.key = newKey(i.t)
	tmpl := authority(i.td)
	i.roots = append(i.roots, sign(i.t, tmpl, tmpl, i.key.Public(), i.key))
	i.sequence++
	close(i.changed)
	i.changed = make(chan struct{})
}

// End has the Workload API end its streams with Canceled, as an agent does that is
// stopped, and answer all others so until it is false again.
func (i *Issuer) End(ending bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.ending = ending
	close(i.changed)
	i.changed = make(chan struct{})
}

// Federate has the Workload API hand out another issuer's roots too, from the next
// call or rotation on.
func (i *Issuer) Federate(other *Issuer) {
	var roots []byte
	for _, r := range other.Bundle().X509Authorities() {
		roots = append(roots, r.Raw...)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.friends = map[string][]byte{other.td.IDString(): roots}
}

// DropOldest takes the oldest root out of the bundle.
func (i *Issuer) DropOldest() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.roots = i.roots[1:]
	i.sequence++
}

// Bundle is what the issuer publishes.
func (i *Issuer) Bundle() *spiffebundle.Bundle {
	i.mu.Lock()
	defer i.mu.Unlock()
	b := spiffebundle.FromX509Authorities(i.td, i.roots)
	b.SetSequenceNumber(i.sequence)
	return b
}

// WriteBundle writes the bundle to a file, by renaming, and returns its path.
func (i *Issuer) WriteBundle(path string) string {
	i.t.Helper()
	data, err := i.Bundle().Marshal()
	require.NoError(i.t, err)
	require.NoError(i.t, os.WriteFile(path+".new", data, 0o600))
	require.NoError(i.t, os.Rename(path+".new", path))
	return path
}

// SVID is a new one, of an hour.
func (i *Issuer) SVID(id spiffeid.ID) *x509svid.SVID {
	i.t.Helper()
	cert := i.Leaf(id, nil)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert.Leaf}, PrivateKey: cert.PrivateKey.(crypto.Signer)}
}

// Leaf is an SVID that edit may spoil before it is signed.
func (i *Issuer) Leaf(id spiffeid.ID, edit func(*x509.Certificate)) tls.Certificate {
	i.t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.leaf(id, edit, i.roots[len(i.roots)-1], i.key)
}

// LeafBelow is an SVID of an intermediate, with it; edit may spoil the intermediate
// before it is signed.
func (i *Issuer) LeafBelow(id spiffeid.ID, edit func(*x509.Certificate)) tls.Certificate {
	i.t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	key := newKey(i.t)
	tmpl := authority(i.td)
	if edit != nil {
		edit(tmpl)
	}
	middle := sign(i.t, tmpl, i.roots[len(i.roots)-1], key.Public(), i.key)
	cert := i.leaf(id, nil, middle, key)
	cert.Certificate = append(cert.Certificate, middle.Raw)
	return cert
}

// Authority is the root that signs, with its key, as if it were an SVID.
func (i *Issuer) Authority() tls.Certificate {
	i.mu.Lock()
	defer i.mu.Unlock()
	root := i.roots[len(i.roots)-1]
	return tls.Certificate{Certificate: [][]byte{root.Raw}, PrivateKey: i.key, Leaf: root}
}

func (i *Issuer) leaf(id spiffeid.ID, edit func(*x509.Certificate), parent *x509.Certificate, by crypto.Signer) tls.Certificate {
	i.t.Helper()
	key := newKey(i.t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{id.URL()}, NotBefore: time.Now().Add(-time.Minute),
		NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if edit != nil {
		edit(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), by)
	require.NoError(i.t, err)
	leaf, _ := x509.ParseCertificate(der) // nil where edit left nothing that can be read
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// authority is the template of a signing certificate.
func authority(td spiffeid.TrustDomain) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: now.Format(time.RFC3339Nano)},
		URIs: []*url.URL{td.ID().URL()}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
}

// Serve opens a Workload API socket whose callers have the IDs, in that order, and
// returns its address.
func (i *Issuer) Serve(ids ...spiffeid.ID) string {
	i.t.Helper()
	dir, err := os.MkdirTemp("", "wa") // short: socket paths are limited
	require.NoError(i.t, err)
	path := filepath.Join(dir, "api.sock")
	ln, err := net.Listen("unix", path)
	require.NoError(i.t, err)
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, &api{issuer: i, ids: ids})
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(ln) }()
	i.t.Cleanup(func() { s.Stop(); <-done; _ = os.RemoveAll(dir) })
	return "unix://" + path
}

// api serves the X.509 profile.
type api struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	issuer *Issuer
	ids    []spiffeid.ID
}

// FetchX509SVID sends new SVIDs at once and after each rotation.
func (a *api) FetchX509SVID(_ *workload.X509SVIDRequest, stream workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	return a.follow(stream, func(roots []byte) error {
		a.issuer.mu.Lock()
		resp := &workload.X509SVIDResponse{FederatedBundles: a.issuer.friends}
		a.issuer.mu.Unlock()
		for _, id := range a.ids {
			svid := a.issuer.SVID(id)
			chain, key, err := svid.MarshalRaw()
			if err != nil {
				return err
			}
			resp.Svids = append(resp.Svids, &workload.X509SVID{SpiffeId: id.String(), X509Svid: chain, X509SvidKey: key, Bundle: roots})
		}
		return stream.Send(resp)
	})
}

// FetchX509Bundles sends the own trust domain's bundle.
func (a *api) FetchX509Bundles(_ *workload.X509BundlesRequest, stream workload.SpiffeWorkloadAPI_FetchX509BundlesServer) error {
	return a.follow(stream, func(roots []byte) error {
		return stream.Send(&workload.X509BundlesResponse{Bundles: map[string][]byte{a.issuer.td.IDString(): roots}})
	})
}

func (a *api) follow(stream grpc.ServerStream, send func(roots []byte) error) error {
	md, _ := metadata.FromIncomingContext(stream.Context())
	if v := md.Get("workload.spiffe.io"); len(v) != 1 || v[0] != "true" {
		return status.Error(codes.InvalidArgument, "security header missing")
	}
	if len(a.ids) == 0 {
		return status.Error(codes.PermissionDenied, "no identity")
	}
	for {
		a.issuer.mu.Lock()
		changed, ending := a.issuer.changed, a.issuer.ending
		var roots []byte
		for _, r := range a.issuer.roots {
			roots = append(roots, r.Raw...)
		}
		a.issuer.mu.Unlock()
		if ending {
			return status.Error(codes.Canceled, "the agent ends")
		}
		if err := send(roots); err != nil {
			return err
		}
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-changed:
		}
	}
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return cert
}
