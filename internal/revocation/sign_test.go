package revocation

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// signAs signs whatever the envelope says, as an attacker would.
func signAs(t testing.TB, m *sallyportv1.RevocationList, svid *x509svid.SVID) []byte {
	t.Helper()
	body, err := proto.Marshal(m)
	require.NoError(t, err)
	sum := digest(body)
	sig, err := ecdsa.SignASN1(rand.Reader, svid.PrivateKey.(*ecdsa.PrivateKey), sum[:])
	require.NoError(t, err)
	env := &sallyportv1.SignedRevocationList{List: body, Signature: sig}
	for _, c := range svid.Certificates {
		env.Chain = append(env.Chain, c.Raw)
	}
	return marshal(t, env)
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	out, err := proto.Marshal(m)
	require.NoError(t, err)
	return out
}

func edit(t testing.TB, envelope []byte, change func(*sallyportv1.SignedRevocationList)) []byte {
	t.Helper()
	var env sallyportv1.SignedRevocationList
	require.NoError(t, proto.Unmarshal(envelope, &env))
	change(&env)
	return marshal(t, &env)
}

func TestOpenBelievesTheControlPlaneOnly(t *testing.T) {
	w := newWorld(t)
	foreignRoot := newRoot(t, partner)
	w.trust = trusting(map[spiffeid.TrustDomain]*authority{shop: w.root, partner: foreignRoot})
	good := w.sign(list(1))
	other := proto.CloneOf(list(1))
	other.Ids = nil
	foreign := foreignRoot.svid(spiffeid.RequireFromPath(partner, identity.ControlPlanePath), "", testNow.Add(-time.Hour))
	began := testNow.Add(-time.Hour)
	for name, c := range map[string]struct {
		envelope []byte
		want     string
		is       error
	}{
		"a workload":                {signAs(t, list(1), w.ca.svid(orders, "", began)), "signed by spiffe://shop.example/shop/orders, which is no control plane", nil},
		"an ID below":               {signAs(t, list(1), w.ca.svid(spiffeid.RequireFromPath(shop, identity.ControlPlanePath+"/x"), "", began)), "which is no control plane", nil},
		"another domain's":          {signAs(t, list(1), foreign), "a list of shop.example signed by spiffe://partner.example/", nil},
		"our ID by another's CA":    {signAs(t, list(1), foreignRoot.svid(controlPlane, "", began)), "", ErrUnknownSigner},
		"our ID by nobody's CA":     {signAs(t, list(1), newRoot(t, shop).svid(controlPlane, "", began)), "", ErrUnknownSigner},
		"no intermediate":           {edit(t, good, func(e *sallyportv1.SignedRevocationList) { e.Chain = e.Chain[:1] }), "", ErrUnknownSigner},
		"an expired SVID":           {signAs(t, list(1), w.ca.svid(controlPlane, "", testNow.Add(-25*time.Hour))), "at 2026-11-01T11:00:00Z", ErrExpired},
		"an SVID from the future":   {signAs(t, list(1), w.ca.svid(controlPlane, "", testNow.Add(time.Hour))), "not yet valid", ErrUnknownSigner},
		"another list":              {edit(t, good, func(e *sallyportv1.SignedRevocationList) { e.List = marshal(t, other) }), "the signature is wrong", nil},
		"another's signature":       {edit(t, good, func(e *sallyportv1.SignedRevocationList) { e.Signature[20]++ }), "the signature is wrong", nil},
		"no signature":              {edit(t, good, func(e *sallyportv1.SignedRevocationList) { e.Signature = nil }), "the signature is wrong", nil},
		"no chain":                  {edit(t, good, func(e *sallyportv1.SignedRevocationList) { e.Chain = nil }), "0 certificates", nil},
		"a long chain":              {edit(t, good, func(e *sallyportv1.SignedRevocationList) { e.Chain = append(e.Chain, make([][]byte, 9)...) }), "11 certificates", nil},
		"a bad entry":               {signAs(t, &sallyportv1.RevocationList{TrustDomain: shop.Name(), Number: 1}, w.signer), "issued: ", nil},
		"something else":            {[]byte("{}"), "", nil},
		"nothing":                   {nil, "0 certificates", nil},
		"too much":                  {make([]byte, MaxEnvelope+1), "bytes, at most", nil},
		"a signature without label": {edit(t, good, unlabelled(t, w.signer)), "the signature is wrong", nil},
	} {
		l, err := Open(c.envelope, w.trust, testNow)
		if err == nil || l != nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: got %v, %v, want %q, %v", name, l, err, c.want, c.is)
		}
	}
	for n := range len(good) {
		if _, err := Open(good[:n], w.trust, testNow); err == nil {
			t.Fatalf("the first %d of %d bytes are believed", n, len(good))
		}
	}
	if l, err := Open(good, w.trust, testNow); err != nil || l.Version() != (Version{1, 1}) || l.TrustDomain() != shop || !l.Issued().Equal(testNow) {
		t.Errorf("the good one: %+v, %v", l, err)
	}
}

// unlabelled signs the list as if it were any other message.
func unlabelled(t testing.TB, svid *x509svid.SVID) func(*sallyportv1.SignedRevocationList) {
	return func(e *sallyportv1.SignedRevocationList) {
		sum := digest(e.List[len(e.List):]) // of the label alone
		sig, err := ecdsa.SignASN1(rand.Reader, svid.PrivateKey.(*ecdsa.PrivateKey), sum[:])
		require.NoError(t, err)
		e.Signature = sig
	}
}

func TestSignRefusesWhatNobodyWouldBelieve(t *testing.T) {
	w := newWorld(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	require.NoError(t, err)
	wrongKey := *w.signer
	wrongKey.PrivateKey = p384
	foreign := list(1)
	foreign.TrustDomain = partner.Name()
	large := list(1)
	for i := range 2000 {
		large.Ids = append(large.Ids, &sallyportv1.RevokedID{Path: fmt.Sprintf("/%02000d", i), NotBefore: large.Issued})
	}
	for want, f := range map[string]func() ([]byte, error){
		`the revocation list of "partner.example"`: func() ([]byte, error) { return Sign(foreign, w.signer) },
		"not ECDSA P-256":                          func() ([]byte, error) { return Sign(list(1), &wrongKey) },
		"version 1.-2":                             func() ([]byte, error) { return Sign(list(-2), w.signer) },
		"bytes, at most 4194":                      func() ([]byte, error) { large.Ids = append(large.Ids, large.Ids...); return Sign(large, w.signer) },
	} {
		if _, err := f(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// Replicas that sign the same entries in another order sign the same list.
func TestOrderOfEntriesDoesNotMatter(t *testing.T) {
	w := newWorld(t)
	a, b := full(t, 50), full(t, 50)
	b.Issuers = a.Issuers
	for i, j := 0, len(b.Ids)-1; i < j; i, j = i+1, j-1 {
		b.Ids[i], b.Ids[j] = b.Ids[j], b.Ids[i]
	}
	if w.open(a).content != w.open(b).content {
		t.Error("the same entries, and two lists")
	}
	b.Ids = b.Ids[1:]
	if w.open(a).content == w.open(b).content {
		t.Error("one entry less, and the same list")
	}
}

func FuzzOpen(f *testing.F) {
	w := newWorld(f)
	good := w.sign(full(f, 3))
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte{})
	f.Add(edit(f, good, func(e *sallyportv1.SignedRevocationList) { e.Chain = nil }))
	var env sallyportv1.SignedRevocationList
	require.NoError(f, proto.Unmarshal(good, &env))
	f.Fuzz(func(t *testing.T, data []byte) {
		// What is believed was signed: these very bytes.
		if l, err := Open(data, w.trust, testNow); err == nil {
			var got sallyportv1.SignedRevocationList
			if err := proto.Unmarshal(data, &got); err != nil || string(got.List) != string(env.List) || l.Version() != (Version{1, 1}) {
				t.Fatalf("believed: %x", data)
			}
		}
		// And what is inside may be anything.
		var m sallyportv1.RevocationList
		if proto.Unmarshal(data, &m) == nil {
			if l, err := parseList(&m); err == nil && l.Len() > len(m.Ids)+len(m.Instances)+len(m.Serials)+len(m.Issuers) {
				t.Fatalf("%d entries out of %v", l.Len(), &m)
			}
		}
	})
}
