package revocation

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testNow is the time in every test that does not say otherwise.
var testNow = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

var (
	shop    = spiffeid.RequireTrustDomainFromString("shop.example")
	partner = spiffeid.RequireTrustDomainFromString("partner.example")

	controlPlane = spiffeid.RequireFromPath(shop, identity.ControlPlanePath)
	orders       = spiffeid.RequireFromPath(shop, "/shop/orders")
	payments     = spiffeid.RequireFromPath(shop, "/shop/payments")
)

// authority is a root, or an intermediate with what is above it.
type authority struct {
	t     testing.TB
	chain []*x509.Certificate // to present behind a leaf
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
}

func newRoot(t testing.TB, td spiffeid.TrustDomain) *authority {
	a := &authority{t: t, key: newKey(t)}
	tmpl := caTemplate("root of " + td.Name())
	a.cert = a.sign(tmpl, tmpl, a.key)
	return a
}

func (a *authority) intermediate(name string) *authority {
	i := &authority{t: a.t, key: newKey(a.t)}
	i.cert = a.sign(caTemplate(name), a.cert, i.key)
	i.chain = []*x509.Certificate{i.cert}
	return i
}

// svid makes an SVID of id that begins at notBefore and lives for a day.
func (a *authority) svid(id spiffeid.ID, instance string, notBefore time.Time) *x509svid.SVID {
	key := newKey(a.t)
	leaf := a.sign(&x509.Certificate{
		SerialNumber: serialNumber(a.t), Subject: pkix.Name{SerialNumber: instance}, URIs: []*url.URL{id.URL()},
		NotBefore: notBefore, NotAfter: notBefore.Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, a.cert, key)
	return &x509svid.SVID{ID: id, Certificates: append([]*x509.Certificate{leaf}, a.chain...), PrivateKey: key}
}

func (a *authority) sign(tmpl, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), a.key)
	require.NoError(a.t, err)
	c, err := x509.ParseCertificate(der)
	require.NoError(a.t, err)
	return c
}

func (a *authority) keyHash() []byte {
	sum := sha256.Sum256(a.cert.RawSubjectPublicKeyInfo)
	return sum[:]
}

func caTemplate(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: testNow.Add(-100 * 24 * time.Hour), NotAfter: testNow.Add(100 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

func serialNumber(t testing.TB) *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	require.NoError(t, err)
	return n.SetBit(n, 126, 1)
}

// trusting is a source of bundles of these roots.
func trusting(roots map[spiffeid.TrustDomain]*authority) x509bundle.Source {
	set := x509bundle.NewSet()
	for td, a := range roots {
		set.Add(x509bundle.FromX509Authorities(td, []*x509.Certificate{a.cert}))
	}
	return set
}

// world is a trust domain with a control plane that signs.
type world struct {
	t      testing.TB
	root   *authority
	ca     *authority
	signer *x509svid.SVID
	trust  x509bundle.Source
}

func newWorld(t testing.TB) *world {
	root := newRoot(t, shop)
	ca := root.intermediate("one")
	return &world{t, root, ca, ca.svid(controlPlane, "", testNow.Add(-time.Hour)), trusting(map[spiffeid.TrustDomain]*authority{shop: root})}
}

func (w *world) sign(m *sallyportv1.RevocationList) []byte {
	w.t.Helper()
	env, err := Sign(m, w.signer)
	require.NoError(w.t, err)
	return env
}

func (w *world) open(m *sallyportv1.RevocationList) *List {
	w.t.Helper()
	l, err := Open(w.sign(m), w.trust, testNow)
	require.NoError(w.t, err)
	return l
}

// list is number n of epoch 1, issued now, refusing orders' SVIDs from before now.
func list(n int64) *sallyportv1.RevocationList {
	return &sallyportv1.RevocationList{
		TrustDomain: shop.Name(), Epoch: 1, Number: n, Issued: timestamppb.New(testNow),
		Ids: []*sallyportv1.RevokedID{{Path: orders.Path(), NotBefore: timestamppb.New(testNow)}},
	}
}

func peer(s *x509svid.SVID) identity.Peer {
	return identity.Peer{ID: s.ID, Leaf: s.Certificates[0], Chain: s.Certificates}
}
