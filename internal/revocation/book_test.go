package revocation

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

func (w *world) book() *Book { return NewBook(w.trust, func() time.Time { return testNow }) }

// reissued is the same list, signed later.
func reissued(m *sallyportv1.RevocationList, d time.Duration) *sallyportv1.RevocationList {
	m.Issued = timestamppb.New(m.Issued.AsTime().Add(d))
	return m
}

func TestBookNeverGoesBack(t *testing.T) {
	w := newWorld(t)
	b := w.book()
	var told []Version
	b.Watch(func(l *List) {
		if b.List(shop) != l {
			t.Error("told before it was in force")
		}
		told = append(told, l.Version())
	})
	restored := list(1)
	restored.Epoch = 2
	emptied := reissued(list(5), time.Minute)
	emptied.Ids = nil
	oldEpoch := list(900)
	for _, step := range []struct {
		what  string
		m     *sallyportv1.RevocationList
		newer bool
		is    error
	}{
		{"the first", list(5), true, nil},
		{"the same", list(5), false, nil},
		{"an older one", list(4), false, ErrOlder},
		{"the same, signed earlier", reissued(list(5), -time.Second), false, nil},
		{"the same, signed later", reissued(list(5), time.Second), true, nil},
		{"the same number without the entries", emptied, false, ErrConflict},
		{"a newer one", list(6), true, nil},
		{"a newer epoch", restored, true, nil},
		{"a greater number of an older epoch", oldEpoch, false, ErrOlder},
	} {
		before := b.List(shop)
		newer, err := b.Offer(w.sign(step.m))
		if newer != step.newer || !errors.Is(err, step.is) {
			t.Errorf("%s: got %v, %v", step.what, newer, err)
		}
		if !newer && b.List(shop) != before {
			t.Errorf("%s: it is in force", step.what)
		}
	}
	if want := []Version{{1, 5}, {1, 5}, {1, 6}, {2, 1}}; !slices.Equal(told, want) {
		t.Errorf("watchers were told of %v, want %v", told, want)
	}
}

// A list whose signer's issuer is refused changes nothing, whatever its number.
func TestBookRefusesATaintedSigner(t *testing.T) {
	w := newWorld(t)
	b := w.book()
	stolen, good := w.ca, w.root.intermediate("two")
	taint := list(1)
	taint.Issuers = []*sallyportv1.RevokedIssuer{{KeyHash: stolen.keyHash()}}
	w.signer = good.svid(controlPlane, "", testNow.Add(-time.Hour))
	_, err := b.Offer(w.sign(taint))
	require.NoError(t, err)
	w.signer = stolen.svid(controlPlane, "", testNow.Add(-time.Hour))
	for what, offer := range map[string]func([]byte) (bool, error){"offer": b.Offer, "restore": b.Restore} {
		if newer, err := offer(w.sign(list(2))); newer || !errors.Is(err, ErrRevoked) {
			t.Errorf("%s: got %v, %v", what, newer, err)
		}
	}
	if b.List(shop).Version() != (Version{1, 1}) {
		t.Errorf("now in force: %s", b.List(shop).Version())
	}
}

func TestBookKeepsTrustDomainsApart(t *testing.T) {
	w := newWorld(t)
	other := newRoot(t, partner)
	w.trust = trusting(map[spiffeid.TrustDomain]*authority{shop: w.root, partner: other})
	b := w.book()
	theirs := list(9)
	theirs.TrustDomain = partner.Name()
	env, err := Sign(theirs, other.svid(spiffeid.RequireFromPath(partner, controlPlane.Path()), "", testNow.Add(-time.Hour)))
	require.NoError(t, err)
	ours := w.sign(list(1))
	for _, e := range [][]byte{env, ours} {
		if newer, err := b.Offer(e); !newer || err != nil {
			t.Fatalf("got %v, %v", newer, err)
		}
	}
	if a, z := b.List(shop).Version(), b.List(partner).Version(); a != (Version{1, 1}) || z != (Version{1, 9}) {
		t.Errorf("got %s and %s", a, z)
	}
	if !slices.Equal(b.Envelope(shop), ours) || b.Envelope(spiffeid.RequireTrustDomainFromString("none.example")) != nil {
		t.Error("envelopes are mixed up")
	}
	began := testNow.Add(-time.Minute)
	if err := b.Check(peer(w.ca.svid(orders, "", began))); !errors.Is(err, ErrRevoked) {
		t.Errorf("our revoked ID: %v", err)
	}
	if err := b.CheckJWT(orders, began); !errors.Is(err, ErrRevoked) {
		t.Errorf("its JWT: %v", err)
	}
	if err := b.Check(peer(w.ca.svid(payments, "", began))); err != nil {
		t.Errorf("another: %v", err)
	}
}

// What this process saved counts after its signer's SVID has expired; from anybody
// else it does not, and it is not passed on.
func TestRestoreOutlivesTheSigner(t *testing.T) {
	w := newWorld(t)
	env := w.sign(list(3))
	late := testNow.Add(48 * time.Hour)
	b := NewBook(w.trust, func() time.Time { return late })
	if newer, err := b.Offer(env); newer || !errors.Is(err, ErrExpired) {
		t.Errorf("offered: got %v, %v", newer, err)
	}
	if newer, err := b.Restore(env); !newer || err != nil {
		t.Fatalf("restored: got %v, %v", newer, err)
	}
	if age, ok := b.Age(shop); age != 48*time.Hour || !ok {
		t.Errorf("age: got %v, %v", age, ok)
	}
	if l, _ := b.Presentable(shop); l != nil {
		t.Error("it would be passed on")
	}
	late = testNow
	if l, got := b.Presentable(shop); l == nil || !slices.Equal(got, env) {
		t.Error("it would not be passed on while it can be believed")
	}
	stranger := newWorld(t)
	if _, err := b.Restore(stranger.sign(list(4))); !errors.Is(err, ErrUnknownSigner) {
		t.Errorf("a stranger's: %v", err)
	}
}

// Lists that come from all sides at once end in the newest.
func TestOffersFromAllSides(t *testing.T) {
	w := newWorld(t)
	b := w.book()
	last := Version{}
	b.Watch(func(l *List) {
		if !last.Less(l.Version()) {
			t.Errorf("told of %s after %s", l.Version(), last)
		}
		last = l.Version()
	})
	var wg sync.WaitGroup
	for n := int64(1); n <= 40; n++ {
		env := w.sign(list(n))
		wg.Go(func() { _, _ = b.Offer(env) })
	}
	wg.Wait()
	if last != (Version{1, 40}) || b.List(shop).Version() != last {
		t.Errorf("ended with %s, told of %s", b.List(shop).Version(), last)
	}
}

// An issuer that is refused from a moment on: watchers hear of that moment.
func TestRunTellsOfTheMoment(t *testing.T) {
	w := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		b := NewBook(w.trust, func() time.Time { return testNow.Add(time.Since(start)) })
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var told []time.Duration
		b.Watch(func(*List) { told = append(told, time.Since(start)) })
		go func() { _ = b.Run(ctx) }()
		time.Sleep(time.Minute)
		m := list(1)
		m.Issuers = []*sallyportv1.RevokedIssuer{
			{KeyHash: w.ca.keyHash(), From: timestamppb.New(testNow.Add(time.Hour))},
			{KeyHash: w.root.keyHash(), From: timestamppb.New(testNow.Add(2 * time.Hour))},
		}
		_, err := b.Offer(w.sign(m))
		require.NoError(t, err)
		p := peer(w.ca.svid(payments, "", testNow))
		time.Sleep(59*time.Minute - time.Second)
		require.NoError(t, b.Check(p))
		time.Sleep(2 * time.Hour)
		require.ErrorIs(t, b.Check(p), ErrRevoked)
		synctest.Wait()
		if want := []time.Duration{time.Minute, time.Hour, 2 * time.Hour}; !slices.Equal(told, want) {
			t.Errorf("told after %v, want %v", told, want)
		}
	})
}

// A control plane may have another name where the trust domain's issuer is not our
// CA: whoever knows that believes it, and nobody else.
func TestExpectedSigner(t *testing.T) {
	w := newWorld(t)
	byName, err := Sign(list(1), w.ca.svid(orders, "", testNow.Add(-time.Hour)))
	require.NoError(t, err)
	byPath := w.sign(list(2))
	stranger, err := Sign(list(3), w.ca.svid(payments, "", testNow.Add(-time.Hour)))
	require.NoError(t, err)
	for name, c := range map[string]struct {
		expect spiffeid.ID
		good   []byte
		bad    [][]byte
	}{
		"as always":              {spiffeid.ID{}, byPath, [][]byte{byName, stranger}},
		"another name":           {orders, byName, [][]byte{byPath, stranger}},
		"another trust domain's": {spiffeid.RequireFromPath(partner, "/mesh"), byPath, [][]byte{byName, stranger}},
	} {
		b := w.book()
		b.Expect(c.expect)
		for _, env := range c.bad {
			if _, err := b.Offer(env); err == nil || !strings.Contains(err.Error(), "which is no control plane") {
				t.Errorf("%s: got %v", name, err)
			}
		}
		if _, err := b.Offer(c.good); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
