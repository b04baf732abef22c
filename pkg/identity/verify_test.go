package identity

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
)

// wantError fails unless err holds want; "" wants none.
func wantError(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" && err != nil {
		t.Errorf("got error %q, want none", err)
	}
	if want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("got error %v, want %q", err, want)
	}
}

func parse(t *testing.T, s string) *url.URL {
	u, err := url.Parse(s)
	require.NoError(t, err)
	return u
}

// keyUsage writes the key usage extension by hand.
func keyUsage(critical bool, bits byte) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.KeyUsage = 0
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{
			Id: oidKeyUsage, Critical: critical, Value: []byte{asn1.TagBitString, 2, 0, bits},
		})
	}
}

// TestVerifyC5 has one row for each way in which a leaf can be no X509-SVID.
func TestVerifyC5(t *testing.T) {
	root := newAuthority(t, shop)
	source := live(nil, trusting(root))
	for name, c := range map[string]struct {
		edit func(*x509.Certificate)
		want string
	}{
		"good":              {nil, ""},
		"no EKU X4.4":       {func(c *x509.Certificate) { c.ExtKeyUsage = nil }, ""},
		"DNS name besides":  {func(c *x509.Certificate) { c.DNSNames = []string{"orders.shop.example"} }, ""},
		"subject":           {func(c *x509.Certificate) { c.Subject.CommonName = "orders" }, ""},
		"no URI":            {func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"orders"} }, "no URI SAN"},
		"CN only":           {func(c *x509.Certificate) { c.URIs = nil; c.Subject.CommonName = ordersID.String() }, "no URI SAN"},
		"two URIs X2":       {func(c *x509.Certificate) { c.URIs = append(c.URIs, paymentsID.URL()) }, "more than one URI SAN"},
		"two, other scheme": {func(c *x509.Certificate) { c.URIs = append(c.URIs, parse(t, "https://a.example/")) }, "more than one URI SAN"},
		"wrong scheme X5.2": {func(c *x509.Certificate) { c.URIs[0].Scheme = "https" }, "scheme"},
		"no path X3.1":      {func(c *x509.Certificate) { c.URIs[0].Path = "" }, "without a path"},
		"CA X4.1":           {func(c *x509.Certificate) { c.IsCA = true }, "certificate authority"},
		"signs X4.3":        {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, "allows signing"},
		"signs lists X4.3":  {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }, "allows signing"},
		"no signature X4.3": {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }, "lacks digital signature"},
		"no usage X4.3":     {func(c *x509.Certificate) { c.KeyUsage = 0 }, "missing or not critical"},
		"uncritical X4.3":   {keyUsage(false, 0x80), "missing or not critical"},
		"critical X4.3":     {keyUsage(true, 0x80), ""},
		"server only X4.4":  {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, "extended key usage"},
		"client only X4.4":  {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }, "extended key usage"},
		"wrong EKU X4.4":    {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }, "extended key usage"},
		"unknown EKU X4.4": {func(c *x509.Certificate) {
			c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, []asn1.ObjectIdentifier{{1, 2, 3}}
		}, "extended key usage"},
		"uncritical SAN X3.1": {func(c *x509.Certificate) {
			rawSAN(t, ordersID.String())(c)
			c.ExtraExtensions[0].Critical = false
		}, "SAN not critical"},
		"unknown critical": {func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}, "unhandled critical extension"},
	} {
		t.Run(name, func(t *testing.T) {
			leaf := root.leaf(ordersID, c.edit)
			peer, err := Verify([]*x509.Certificate{leaf}, source, testNow)
			wantError(t, err, c.want)
			if err == nil && (peer.ID != ordersID || peer.Leaf != leaf) {
				t.Errorf("got %+v", peer)
			}
			if err != nil && (!peer.ID.IsZero() || peer.Leaf != nil || peer.Chain != nil) {
				t.Errorf("refused, yet %v", peer)
			}
		})
	}
	_, err := Verify(nil, source, testNow)
	if !errors.Is(err, ErrAnonymous) {
		t.Errorf("no certificate: got %v", err)
	}
	_, err = Verify([]*x509.Certificate{root.cert}, source, testNow)
	wantError(t, err, "no URI SAN")
}

// TestVerifyD2 has IDs that must not authenticate although package net/url may
// read them as something harmless.
func TestVerifyD2(t *testing.T) {
	root := newAuthority(t, shop)
	source := live(nil, trusting(root))
	for raw, ok := range map[string]bool{
		"spiffe://shop.example/orders":                                 true,
		"spiffe://shop.example/" + strings.Repeat("a", 2048-22):        true, // ID 2.3
		"spiffe://shop.example/" + strings.Repeat("a", 2048-21):        false,
		"SPIFFE://shop.example/orders":                                 false,
		"Spiffe://shop.example/orders":                                 false,
		"spiffe://SHOP.example/orders":                                 false,
		"spiffe://shop.example/orders#":                                false,
		"spiffe://shop.example/orders#a":                               false,
		"spiffe://shop.example/orders?":                                false,
		"spiffe://shop.example/orders?a=b":                             false,
		"spiffe://@shop.example/orders":                                false,
		"spiffe://u@shop.example/orders":                               false,
		"spiffe://u:p@shop.example/orders":                             false,
		"spiffe://shop.example:/orders":                                false,
		"spiffe://shop.example:443/orders":                             false,
		"spiffe://shop.example/":                                       false,
		"spiffe://shop.example/orders/":                                false,
		"spiffe://shop.example//orders":                                false,
		"spiffe://shop.example/./orders":                               false,
		"spiffe://shop.example/a/../orders":                            false,
		"spiffe://shop.example/%2e":                                    false,
		"spiffe://shop.example/%6frders":                               false,
		"spiffe://shop%2eexample/orders":                               false,
		"spiffe://shop.example/orders%2fa":                             false,
		"spiffe://shop.example/örders":                                 false,
		"spiffe://shop.example/orders ":                                false,
		"spiffe:shop.example/orders":                                   false,
		"spiffe:///orders":                                             false,
		"//shop.example/orders":                                        false,
		"spiffe://shop.example\\orders":                                false,
		"spiffe://shop.example/orders\x00":                             false, // C5
		"spiffe://shop.example/orders\x00.evil/":                       false,
		"spiffe://shop.example/orders;a":                               false,
		"spiffe://other.example/orders":                                false,
		"spiffe://shop.example/orders,spiffe://shop.example/payments":  false,
		"spiffe://shop.example/orders\nspiffe://shop.example/payments": false,
	} {
		t.Run(quote(raw), func(t *testing.T) {
			template := &x509.Certificate{
				SerialNumber: big.NewInt(3), NotBefore: testNow.Add(-time.Hour), NotAfter: testNow.Add(time.Hour),
				KeyUsage: x509.KeyUsageDigitalSignature,
			}
			rawSAN(t, raw)(template)
			leaf, err := create(root, template)
			if err == nil {
				_, err = Verify([]*x509.Certificate{leaf}, source, testNow)
			}
			if got := err == nil; got != ok {
				t.Errorf("accepted: %v (%v), want %v", got, err, ok)
			}
		})
	}
}

// create is sign for certificates that crypto/x509 may refuse to parse.
func create(a *authority, template *x509.Certificate) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, a.key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// FuzzLeafIDD2 feeds raw SAN bytes: an ID that comes out is what go-spiffe makes
// of these very bytes.
func FuzzLeafIDD2(f *testing.F) {
	for _, s := range []string{"spiffe://shop.example/orders", "SPIFFE://shop.example/orders", "spiffe://shop.example/orders#", "spiffe://shop.example/%61", "spiffe://shop.example"} {
		f.Add(s)
	}
	root := newAuthority(f, shop)
	source := live(nil, trusting(root))
	f.Fuzz(func(t *testing.T, raw string) {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(3), NotBefore: testNow.Add(-time.Hour), NotAfter: testNow.Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature,
		}
		rawSAN(t, raw)(template)
		leaf, err := create(root, template)
		if err != nil {
			return
		}
		peer, err := Verify([]*x509.Certificate{leaf}, source, testNow)
		if err != nil {
			return
		}
		want, err := spiffeid.FromString(raw)
		if err != nil || peer.ID != want {
			t.Fatalf("%q authenticates as %v; go-spiffe says %v, %v", raw, peer.ID, want, err)
		}
	})
}

// TestVerifyC7 signs IDs of one trust domain with the authority of another that
// is trusted as well.
func TestVerifyC7(t *testing.T) {
	ours, theirs := newAuthority(t, shop), newAuthority(t, other)
	source := live(nil, Bundles{shop: spiffebundle.FromX509Authorities(shop, []*x509.Certificate{ours.cert}), other: spiffebundle.FromX509Authorities(other, []*x509.Certificate{theirs.cert})})
	guest := spiffeid.RequireFromString("spiffe://other.example/guest")

	peer, err := Verify([]*x509.Certificate{theirs.leaf(guest, nil)}, source, testNow)
	if err != nil || peer.ID != guest {
		t.Errorf("foreign ID by its own authority: %v, %v", peer.ID, err)
	}
	_, err = Verify([]*x509.Certificate{theirs.leaf(ordersID, nil)}, source, testNow)
	wantError(t, err, "unknown authority")
	_, err = Verify([]*x509.Certificate{theirs.leaf(ordersID, nil), theirs.cert}, source, testNow)
	wantError(t, err, "unknown authority")
	_, err = Verify([]*x509.Certificate{ours.leaf(guest, nil)}, source, testNow)
	wantError(t, err, "unknown authority")
	_, err = Verify([]*x509.Certificate{newAuthority(t, shop).leaf(ordersID, nil)}, source, testNow)
	wantError(t, err, "unknown authority")
}

func TestVerifyIssuers(t *testing.T) {
	root := newAuthority(t, shop)
	source := live(nil, trusting(root))
	for name, c := range map[string]struct {
		edit func(*x509.Certificate)
		want string
	}{
		"good":          {nil, ""},
		"own ID X3.2":   {func(c *x509.Certificate) { c.URIs = []*url.URL{parse(t, "spiffe://shop.example")} }, ""},
		"path X3.2":     {func(c *x509.Certificate) { c.URIs = []*url.URL{ordersID.URL()} }, "issuer's SPIFFE ID has a path"},
		"not a CA X4.1": {func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = x509.KeyUsageDigitalSignature }, "unknown authority"},
		"no sign X4.3":  {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }, "unknown authority"},
	} {
		t.Run(name, func(t *testing.T) {
			middle := root.intermediate(c.edit)
			leaf := middle.leaf(ordersID, nil)
			_, err := Verify([]*x509.Certificate{leaf, middle.cert}, source, testNow)
			wantError(t, err, c.want)
			_, err = Verify([]*x509.Certificate{leaf, middle.cert, root.cert}, source, testNow)
			wantError(t, err, c.want)
		})
	}
	middle := root.intermediate(nil)
	_, err := Verify([]*x509.Certificate{middle.leaf(ordersID, nil)}, source, testNow)
	wantError(t, err, "unknown authority")
}

// untouched is a bundle source that must not be asked.
type untouched struct{ t *testing.T }

func (u untouched) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	u.t.Error("got as far as verifying the chain")
	return nil, errors.New("untouched")
}

// TestVerifyB10 offers chains that cost much to verify: they are refused before.
func TestVerifyB10(t *testing.T) {
	root := newAuthority(t, shop)
	good := root.leaf(ordersID, nil)
	chain := func(n int) []*x509.Certificate {
		c := []*x509.Certificate{good}
		for range n - 1 {
			c = append(c, root.cert)
		}
		return c
	}
	names := func(n int) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			for i := range n - 1 { // one is the SPIFFE ID
				c.DNSNames = append(c.DNSNames, fmt.Sprintf("n%d.example", i))
			}
		}
	}
	size := func(n int) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: make([]byte, n)}}
		}
	}
	rsaKey := func(bits uint) func(*x509.Certificate) {
		n := new(big.Int).Lsh(big.NewInt(1), bits-1)
		return func(c *x509.Certificate) { c.PublicKey = &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: 65537} }
	}
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		want  string
	}{
		"9 certificates":  {chain(9), "chain of 9"},
		"256 KiB chain":   {chain(600), "chain of 600"},
		"17 names":        {[]*x509.Certificate{root.leaf(ordersID, names(17))}, "17 names"},
		"10,000 names":    {[]*x509.Certificate{root.leaf(ordersID, names(10_000))}, "bytes, at most"},
		"large leaf":      {[]*x509.Certificate{root.leaf(ordersID, size(16<<10))}, "bytes, at most"},
		"RSA 4097":        {[]*x509.Certificate{root.leaf(ordersID, rsaKey(4097))}, "4097 bits"},
		"RSA 65536":       {[]*x509.Certificate{root.leaf(ordersID, rsaKey(65536))}, "65536 bits"},
		"RSA 1024":        {[]*x509.Certificate{root.leaf(ordersID, rsaKey(1024))}, "1024 bits"},
		"names above":     {[]*x509.Certificate{good, root.intermediate(names(18)).cert}, "17 names"},
		"large above":     {[]*x509.Certificate{good, root.intermediate(size(16 << 10)).cert}, "bytes, at most"},
		"RSA 8192 above":  {[]*x509.Certificate{good, root.leaf(ordersID, rsaKey(8192))}, "8192 bits"},
		"several at once": {[]*x509.Certificate{root.leaf(ordersID, names(10_000)), root.cert}, "bytes, at most"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Verify(c.chain, untouched{t}, testNow)
			wantError(t, err, c.want)
		})
	}
	for name, c := range map[string][]*x509.Certificate{
		"8 certificates": chain(8),
		"16 names":       {root.leaf(ordersID, names(16))},
		"15 KiB":         {root.leaf(ordersID, size(15<<10))},
		"RSA 4096":       {root.leaf(ordersID, rsaKey(4096))},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Verify(c, live(nil, trusting(root)), testNow)
			wantError(t, err, "")
		})
	}
}

// TestVerifyClock shows what an operator reads when a clock is wrong.
func TestVerifyClock(t *testing.T) {
	root := newAuthority(t, shop)
	source := live(nil, trusting(root))
	fresh := func(c *x509.Certificate) { c.NotBefore = testNow }
	short := root.intermediate(func(c *x509.Certificate) { c.NotAfter = testNow.Add(10 * time.Minute) })
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		at    time.Duration
		want  string
	}{
		"first second": {[]*x509.Certificate{root.leaf(ordersID, fresh)}, 0, ""},
		"behind":       {[]*x509.Certificate{root.leaf(ordersID, fresh)}, -192 * time.Second, "certificate of spiffe://shop.example/orders not yet valid: this clock is 3m12s behind"},
		"just behind":  {[]*x509.Certificate{root.leaf(ordersID, fresh)}, -time.Millisecond, "this clock is 1s behind"},
		"expired":      {[]*x509.Certificate{root.leaf(ordersID, nil)}, 3 * time.Hour, "certificate of spiffe://shop.example/orders expired 2h0m0s ago; clock skew?"},
		"issuer":       {[]*x509.Certificate{short.leaf(ordersID, nil), short.cert}, 20 * time.Minute, `issuer "CN=intermediate" of spiffe://shop.example/orders expired 10m0s ago; clock skew?`},
		"issuer alive": {[]*x509.Certificate{short.leaf(ordersID, nil), short.cert}, 9 * time.Minute, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Verify(c.chain, source, testNow.Add(c.at))
			wantError(t, err, c.want)
		})
	}
}

// TestVerifyMissingBundleC8: nothing is trusted unless a bundle says so.
func TestVerifyMissingBundleC8(t *testing.T) {
	root := newAuthority(t, shop)
	leaf := []*x509.Certificate{root.leaf(ordersID, nil)}
	_, err := Verify(leaf, new(Live), testNow)
	if !errors.Is(err, ErrNoIdentity) {
		t.Errorf("nothing received: got %v", err)
	}
	_, err = Verify(leaf, live(nil, Bundles{}), testNow)
	wantError(t, err, `no bundle for trust domain "shop.example"`)
	_, err = Verify(leaf, live(nil, Bundles{shop: spiffebundle.FromX509Authorities(shop, []*x509.Certificate{})}), testNow)
	wantError(t, err, `no X.509 authority for trust domain "shop.example"`)
	_, err = Verify(leaf, nil, testNow)
	wantError(t, err, "bundle")
	_, err = Verify(leaf, x509bundle.NewSet(x509bundle.New(shop)), testNow) // no authority: not the system's
	wantError(t, err, "unknown authority")
}
