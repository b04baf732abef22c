package proxy

import (
	"crypto/tls"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/tunnel"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// learns waits until b holds list number n.
func learns(t *testing.T, b *revocation.Book, n int64) {
	t.Helper()
	require.Eventually(t, func() bool { return b.List(td).Version().Number == n }, 5*time.Second, time.Millisecond,
		"list %d does not come", n)
}

// Who holds a newer list passes it on: whichever side it is, at the start of a
// session and while one lives.
func TestNeighboursShareTheNewestList(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	offer(t, s.book, w.revoke(1, intruder))
	conn := c.dial(t)
	roundTrip(t, conn, "first")
	learns(t, c.book, 1)
	offer(t, c.book, w.revoke(2))
	learns(t, s.book, 2)
	offer(t, s.book, w.revoke(3, intruder))
	learns(t, c.book, 3)
	roundTrip(t, conn, "still here")
	require.NoError(t, conn.Close())

	other := w.client(intruder, "/shop/payments:tcp") // has no way to anybody
	offer(t, other.book, w.revoke(4))
	other.know(s.endpoint("a"))
	expectRefused(t, other) // and yet: what it knows counts for nothing, as nobody talks to it
	if n := s.book.List(td).Version().Number; n != 3 {
		t.Errorf("list %d came from a revoked peer", n)
	}
	if got := c.near.Lists()["accepted"] + s.near.Lists()["accepted"]; got != 3 {
		t.Errorf("%d lists taken over, want 3", got)
	}
}

// A revocation that comes by a neighbour cuts like any other.
func TestF6RevocationByNeighbourCuts(t *testing.T) {
	w := newWorld(t)
	rules := []policy.Rule{allow(orders), allow(intruder)}
	s := w.serve(payments, 1, rules, w.app("tcp", echo))
	loser := w.client(intruder, "/shop/payments:tcp", s.endpoint("a"))
	teller := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	lost, kept := loser.dial(t), teller.dial(t)
	roundTrip(t, lost, "a")
	roundTrip(t, kept, "b")
	start := time.Now()
	offer(t, teller.book, w.revoke(1, intruder))
	expectReset(t, lost)
	t.Logf("cut after %v", time.Since(start))
	if f := only(t, s.flows); f.Outcome != flow.Cut || !strings.HasPrefix(f.Error, "revoked: ") {
		t.Errorf("record: %+v", f)
	}
	roundTrip(t, kept, "still here")
}

// stranger is the other end of a session that says what the test wants.
type stranger struct {
	t       *testing.T
	session *tunnel.Session
	stream  *tunnel.Stream
	got     chan uint8
	lists   chan []byte
}

// meet opens a session, and a stream on it, as id.
func (w *world) meet(id spiffeid.ID, s *server) *stranger {
	w.t.Helper()
	conn, err := tls.Dial("tcp", s.Addr().String(), identity.ClientTLS(
		identity.TLSConfig{Source: w.source(id), NextProtos: []string{alpn}}, identity.ExactPattern(payments)))
	require.NoError(w.t, err)
	x := &stranger{t: w.t, got: make(chan uint8, 100), lists: make(chan []byte, 100)}
	x.session, err = tunnel.Client(w.t.Context(), conn, tunnel.Config{Messages: tunnel.Messages{
		Limit: func(uint8) int { return revocation.MaxEnvelope },
		Receive: func(kind uint8, message []byte) {
			if kind == theList {
				x.lists <- message
			}
			x.got <- kind
		},
	}})
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = x.session.Close() })
	x.stream, err = x.session.Open(w.t.Context(), tunnel.Target{Host: "payments.shop.mesh", Port: tcpPort.Number})
	require.NoError(w.t, err)
	return x
}

// claim says to have a list.
func (x *stranger) claim(number int64) {
	x.session.Send(haveList, edition{revocation.Version{Number: number}, time.Now()}.encode(td))
}

func (x *stranger) expect(kind uint8) {
	x.t.Helper()
	select {
	case got := <-x.got:
		require.Equal(x.t, kind, got)
	case <-time.After(5 * time.Second):
		x.t.Fatalf("no message of kind %d", kind)
	}
}

// alive sees that the stream goes on, and with it that all said before was heard.
func (x *stranger) alive() {
	x.t.Helper()
	roundTrip(x.t, x.stream, "alive?")
}

func TestStrangersCannotFeedLists(t *testing.T) {
	w := newWorld(t)
	otherWorld := newWorld(t)
	forgery := w.revoke(9)
	forgery[len(forgery)-1]++
	body, err := proto.Marshal(&sallyportv1.SignedRevocationList{List: []byte("x")})
	require.NoError(t, err)
	for name, c := range map[string]struct {
		list    []byte
		outcome string
	}{
		"an older one":             {w.revoke(4), "superseded"},
		"the same":                 {w.revoke(5, intruder), "superseded"},
		"of another control plane": {otherWorld.revoke(9), "unverified"},
		"with a wrong signature":   {forgery, "forged"},
		"of nobody":                {body, "forged"},
		"no list":                  {[]byte("x"), "forged"},
	} {
		t.Run(name, func(t *testing.T) {
			s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
			offer(t, s.book, w.revoke(5, intruder))
			x := w.meet(orders, s)
			x.expect(haveList)
			x.session.Send(theList, c.list) // nobody asked
			x.alive()
			x.claim(9)
			x.expect(wantList)
			x.session.Send(theList, c.list)
			require.Eventually(t, func() bool { return s.near.Lists()[c.outcome] == 1 }, 5*time.Second, time.Millisecond, "%v", s.near.Lists())
			if v := s.book.List(td).Version().Number; v != 5 {
				t.Errorf("list %d is in force", v)
			}
			if c.outcome == "forged" {
				if _, err := io.ReadAll(x.stream); err == nil {
					t.Error("the session goes on")
				}
				return
			}
			x.alive()
			// It is not asked again, by no session.
			again := w.meet(orders, s)
			again.expect(haveList)
			again.claim(9)
			again.alive()
			time.Sleep(3 * askAfter)
			if len(again.got)+len(x.got) != 0 {
				t.Error("asked again")
			}
		})
	}
}

// Who promises and does not deliver is left, and another one asked.
func TestSilentNeighbourIsLeft(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders), allow(intruder)}, w.app("tcp", echo))
	silent := w.meet(intruder, s)
	silent.claim(7)
	silent.expect(wantList)
	w.late.Store(int64(answerIn))
	good := w.meet(orders, s)
	good.claim(7)
	good.expect(wantList)
	good.session.Send(theList, w.revoke(7))
	learns(t, s.book, 7)
	require.Eventually(t, func() bool { return s.near.Lists()["unanswered"] == 1 }, 5*time.Second, time.Millisecond)
	silent.session.Send(theList, w.revoke(8)) // too late
	silent.alive()
	if v := s.book.List(td).Version().Number; v != 7 {
		t.Errorf("list %d is in force", v)
	}
}

// A list is sent to who asks, once.
func TestListIsSentOncePerSession(t *testing.T) {
	w := newWorld(t)
	s := w.serve(payments, 1, []policy.Rule{allow(orders)}, w.app("tcp", echo))
	first := w.revoke(1, intruder)
	offer(t, s.book, first)
	x := w.meet(orders, s)
	x.expect(haveList)
	for range 5 {
		x.session.Send(wantList, edition{revocation.Version{Number: 1}, time.Now()}.encode(td))
		x.alive()
	}
	x.expect(theList)
	require.Equal(t, first, <-x.lists)
	x.claim(1)
	x.alive()
	offer(t, s.book, w.revoke(2))
	x.expect(haveList)
	x.session.Send(wantList, []byte("any"))
	x.expect(theList)
	x.alive()
	if len(x.got) != 0 {
		t.Errorf("%d more messages", len(x.got))
	}
	third := w.revoke(3)
	x.claim(3) // so it is not told of it
	x.expect(wantList)
	offer(t, s.book, third)
	x.alive()
	if len(x.got) != 0 {
		t.Errorf("%d more messages", len(x.got))
	}
}

// Of the list only those speak whom it concerns.
func TestForeignersAreNotToldOfTheList(t *testing.T) {
	w := newWorld(t)
	s := w.listen(payments)
	if s.near.join(spiffeid.RequireFromString("spiffe://partner.example/orders")) != nil {
		t.Error("a foreign peer is")
	}
	ours := s.near.join(orders)
	if ours == nil {
		t.Fatal("one of our own is not")
	}
	for kind, want := range map[uint8]int{haveList: maxHave, wantList: maxHave, theList: 0, 3: 0} {
		if n := ours.limit(kind); n != want {
			t.Errorf("a message of kind %d that nobody asked for: %d bytes are held, want %d", kind, n, want)
		}
	}
	for name, b := range map[string][]byte{
		"another trust domain's": edition{revocation.Version{Number: 1}, time.Now()}.encode(spiffeid.RequireTrustDomainFromString("partner.example")),
		"a negative number":      edition{revocation.Version{Number: -1}, time.Now()}.encode(td),
		"nothing":                nil,
		"something else":         []byte("GET / HTTP/1.1"),
	} {
		if e, err := decodeEdition(b, td); err == nil {
			t.Errorf("%s: read as %+v", name, e)
		}
	}
	if (edition{}).encode(td) != nil {
		t.Error("no list has an announcement")
	}
}
