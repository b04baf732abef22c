package revocation

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

func TestCheck(t *testing.T) {
	w := newWorld(t)
	other := w.root.intermediate("two")
	before, after := testNow.Add(-time.Minute), testNow.Add(time.Minute)
	old := w.ca.svid(orders, "i1", before)
	foreign := newRoot(t, partner).svid(spiffeid.RequireFromPath(partner, orders.Path()), "i1", before)
	m := &sallyportv1.RevocationList{
		TrustDomain: shop.Name(), Number: 1, Issued: timestamppb.New(testNow),
		Ids:       []*sallyportv1.RevokedID{{Path: orders.Path(), NotBefore: timestamppb.New(testNow)}},
		Instances: []*sallyportv1.RevokedInstance{{Instance: "i7", NotBefore: timestamppb.New(testNow)}},
		Issuers:   []*sallyportv1.RevokedIssuer{{KeyHash: other.keyHash(), From: timestamppb.New(after)}},
	}
	stolen := w.ca.svid(payments, "i2", after)
	m.Serials = []*sallyportv1.RevokedSerial{{Serial: stolen.Certificates[0].SerialNumber.Bytes()}}
	l := w.open(m)
	tainted := other.svid(payments, "i3", after)
	for name, c := range map[string]struct {
		got  error
		want string
	}{
		"an ID's old SVID":             {l.Check(peer(old), testNow), "SVIDs of spiffe://shop.example/shop/orders from before 2026-11-01T12:00:00Z"},
		"an ID's new SVID":             {l.Check(peer(w.ca.svid(orders, "i1", testNow)), testNow), ""},
		"another ID":                   {l.Check(peer(w.ca.svid(payments, "i1", before)), testNow), ""},
		"an ID below":                  {l.Check(peer(w.ca.svid(spiffeid.RequireFromPath(shop, "/shop/orders/a"), "", before)), testNow), ""},
		"a foreign ID":                 {l.Check(peer(foreign), testNow), ""},
		"an instance's old SVID":       {l.Check(peer(w.ca.svid(payments, "i7", before)), testNow), "instance i7"},
		"an instance's new SVID":       {l.Check(peer(w.ca.svid(payments, "i7", testNow)), testNow), ""},
		"a serial":                     {l.Check(peer(stolen), testNow), "certificate with serial "},
		"an issuer, before its moment": {l.Check(peer(tainted), testNow), ""},
		"an issuer, at its moment":     {l.Check(peer(tainted), after), "issuer with key "},
		"a JWT from before":            {l.CheckJWT(orders, before), "JWT-SVIDs of spiffe://shop.example/shop/orders"},
		"a JWT from after":             {l.CheckJWT(orders, testNow), ""},
		"a JWT of another":             {l.CheckJWT(payments, before), ""},
		"no list":                      {(*List)(nil).Check(peer(old), testNow), ""},
		"no list, JWT":                 {(*List)(nil).CheckJWT(orders, before), ""},
	} {
		switch {
		case c.want == "" && c.got != nil:
			t.Errorf("%s: %v", name, c.got)
		case c.want != "" && (!errors.Is(c.got, ErrRevoked) || !strings.Contains(c.got.Error(), c.want)):
			t.Errorf("%s: got %v, want %q", name, c.got, c.want)
		}
	}
	if !l.Names(tainted.Certificates) || l.Names(old.Certificates) {
		t.Error("Names: an issuer counts from before its moment on, and no other does")
	}
	if n := l.Len(); n != 4 {
		t.Errorf("%d entries, want 4", n)
	}
}

// Of two entries for one subject the stricter one counts, whatever their order.
func TestStricterEntryCounts(t *testing.T) {
	w := newWorld(t)
	early, late := timestamppb.New(testNow.Add(-time.Hour)), timestamppb.New(testNow)
	for range 2 {
		early, late = late, early
		l := w.open(&sallyportv1.RevocationList{
			TrustDomain: shop.Name(), Number: 1, Issued: timestamppb.New(testNow),
			Ids:       []*sallyportv1.RevokedID{{Path: orders.Path(), NotBefore: early}, {Path: orders.Path(), NotBefore: late}},
			Instances: []*sallyportv1.RevokedInstance{{Instance: "i7", NotBefore: early}, {Instance: "i7", NotBefore: late}},
			Issuers:   []*sallyportv1.RevokedIssuer{{KeyHash: w.ca.keyHash(), From: early}, {KeyHash: w.ca.keyHash(), From: late}},
		})
		began := testNow.Add(-time.Minute)
		if l.Check(peer(w.root.svid(orders, "", began)), testNow) == nil || l.Check(peer(w.root.svid(payments, "i7", began)), testNow) == nil {
			t.Error("the earlier bound counts")
		}
		if l.Check(peer(w.ca.svid(payments, "", began)), began) == nil {
			t.Error("the issuer's later moment counts")
		}
	}
}

func TestBadEntriesAreRefused(t *testing.T) {
	w := newWorld(t)
	now := timestamppb.New(testNow)
	broken := &timestamppb.Timestamp{Nanos: -1}
	for want, spoil := range map[string]func(*sallyportv1.RevocationList){
		`"Shop.Example" is not a trust domain`: func(m *sallyportv1.RevocationList) { m.TrustDomain = "Shop.Example" },
		"version -1.1":                         func(m *sallyportv1.RevocationList) { m.Epoch = -1 },
		"version 1.-2":                         func(m *sallyportv1.RevocationList) { m.Number = -2 },
		"issued: invalid nil Timestamp":        func(m *sallyportv1.RevocationList) { m.Issued = nil },
		`revoked ID "": want`:                  func(m *sallyportv1.RevocationList) { m.Ids[0].Path = "" },
		`revoked ID "/a/../b": want`:           func(m *sallyportv1.RevocationList) { m.Ids[0].Path = "/a/../b" },
		"revoked ID /shop/orders: not_before":  func(m *sallyportv1.RevocationList) { m.Ids[0].NotBefore = nil },
		"revoked ID /shop/orders: issued_at":   func(m *sallyportv1.RevocationList) { m.Ids[0].IssuedAt = broken },
		"revoked instance of 0 bytes":          func(m *sallyportv1.RevocationList) { m.Instances = []*sallyportv1.RevokedInstance{{NotBefore: now}} },
		`revoked instance "a": not_before`:     func(m *sallyportv1.RevocationList) { m.Instances = []*sallyportv1.RevokedInstance{{Instance: "a"}} },
		"revoked serial 00ff: want": func(m *sallyportv1.RevocationList) {
			m.Serials = []*sallyportv1.RevokedSerial{{Serial: []byte{0, 255}}}
		},
		"revoked issuer 01: want a SHA-256": func(m *sallyportv1.RevocationList) { m.Issuers = []*sallyportv1.RevokedIssuer{{KeyHash: []byte{1}}} },
		"from: timestamp": func(m *sallyportv1.RevocationList) {
			m.Issuers = []*sallyportv1.RevokedIssuer{{KeyHash: w.ca.keyHash(), From: broken}}
		},
		fmt.Sprintf("%d entries, at most %d", MaxEntries+1, MaxEntries): func(m *sallyportv1.RevocationList) { m.Ids = make([]*sallyportv1.RevokedID, MaxEntries+1) },
	} {
		m := list(1)
		spoil(m)
		if _, err := parseList(m); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// full is a list as large as one of a big mesh.
func full(t testing.TB, n int) *sallyportv1.RevocationList {
	m := list(1)
	for i := range n {
		path := fmt.Sprintf("/ns/n%d/sa/s%d", i%100, i)
		sum := sha256.Sum256([]byte(path))
		m.Ids = append(m.Ids, &sallyportv1.RevokedID{Path: path, NotBefore: timestamppb.New(testNow)})
		m.Serials = append(m.Serials, &sallyportv1.RevokedSerial{Serial: append([]byte{1}, sum[:15]...)})
	}
	m.Issuers = []*sallyportv1.RevokedIssuer{{KeyHash: newRoot(t, shop).keyHash()}}
	return m
}

func TestCheckAllocatesNothing(t *testing.T) {
	w := newWorld(t)
	l, p := w.open(full(t, 1000)), peer(w.ca.svid(payments, "i1", testNow))
	if n := testing.AllocsPerRun(100, func() { _ = l.Check(p, testNow) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkCheck(b *testing.B) {
	w := newWorld(b)
	book := NewBook(w.trust, func() time.Time { return testNow })
	if _, err := book.Offer(w.sign(full(b, 20_000))); err != nil {
		b.Fatal(err)
	}
	p := peer(w.ca.svid(payments, "i1", testNow))
	b.ReportAllocs()
	for b.Loop() {
		if err := book.Check(p); err != nil {
			b.Fatal(err)
		}
	}
}
