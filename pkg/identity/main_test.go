package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testNow is the time in every test that does not say otherwise.
var testNow = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

func clock() time.Time { return testNow }

var (
	shop  = spiffeid.RequireTrustDomainFromString("shop.example")
	other = spiffeid.RequireTrustDomainFromString("other.example")

	ordersID   = spiffeid.RequireFromString("spiffe://shop.example/orders")
	paymentsID = spiffeid.RequireFromString("spiffe://shop.example/payments")
)

// authority is a certificate and the key that signs with it.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  crypto.Signer
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

// newAuthority makes a self-signed root.
func newAuthority(t testing.TB, td spiffeid.TrustDomain) *authority {
	t.Helper()
	a := &authority{t: t, key: newKey(t)}
	template := authorityTemplate(td.Name())
	a.cert = sign(t, template, template, a.key.Public(), a.key)
	return a
}

// intermediate makes an authority below a; edit may change its template.
func (a *authority) intermediate(edit func(*x509.Certificate)) *authority {
	a.t.Helper()
	template := authorityTemplate("intermediate")
	if edit != nil {
		edit(template)
	}
	key := newKey(a.t)
	return &authority{t: a.t, key: key, cert: sign(a.t, template, a.cert, key.Public(), a.key)}
}

// leaf makes a certificate that is right in every way, but for what edit does to
// its template.
func (a *authority) leaf(id spiffeid.ID, edit func(*x509.Certificate)) *x509.Certificate {
	cert, _ := a.leafKey(id, edit)
	return cert
}

func (a *authority) leafKey(id spiffeid.ID, edit func(*x509.Certificate)) (*x509.Certificate, crypto.Signer) {
	a.t.Helper()
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(2),
		URIs:                  []*url.URL{id.URL()},
		NotBefore:             testNow.Add(-time.Hour),
		NotAfter:              testNow.Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	key := newKey(a.t)
	pub := key.Public()
	if edit != nil {
		edit(template)
	}
	if template.PublicKey != nil {
		pub = template.PublicKey
	}
	return sign(a.t, template, a.cert, pub, a.key), key
}

// svid makes an SVID, followed by the given issuers.
func (a *authority) svid(id spiffeid.ID, edit func(*x509.Certificate), issuers ...*x509.Certificate) *x509svid.SVID {
	cert, key := a.leafKey(id, edit)
	return &x509svid.SVID{ID: id, Certificates: append([]*x509.Certificate{cert}, issuers...), PrivateKey: key}
}

func authorityTemplate(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             testNow.Add(-24 * time.Hour),
		NotAfter:              testNow.Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
}

func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return cert
}

// rawSAN sets the subject alternative names to URIs that Go would not write.
func rawSAN(t testing.TB, uris ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		var names []asn1.RawValue
		for _, u := range uris {
			names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
		}
		der, err := asn1.Marshal(names)
		require.NoError(t, err)
		c.URIs = nil
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oidSAN, Critical: true, Value: der})
	}
}

// live returns a source with an SVID of a for id that trusts the given
// authorities.
func live(svid *x509svid.SVID, trust Bundles) *Live {
	l := new(Live)
	l.SetSVID(svid)
	l.SetBundles(trust)
	return l
}

func trusting(a *authority) Bundles {
	return Bundles{shop: spiffebundle.FromX509Authorities(shop, []*x509.Certificate{a.cert})}
}
