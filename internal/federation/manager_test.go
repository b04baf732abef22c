package federation

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// world is one replica with a real store.
type world struct {
	t     *testing.T
	m     *Manager
	live  identity.Live // what sidecars would trust
	own   *issuer
	store store.Store
	stop  func()
}

func newWorld(t *testing.T, s store.Store, roots *x509.CertPool, peers ...Peer) *world {
	t.Helper()
	w := &world{t: t, own: newIssuer(t, own), store: s}
	w.m = NewManager(Config{
		Own: own, OwnBundle: w.own.bundle, Store: s, WebRoots: roots, MinRefresh: 10 * time.Millisecond,
		Publish: func(b identity.Bundles) { w.live.SetBundles(b) }, Now: time.Now, Log: hclog.NewNullLogger(),
		Audit: func(td spiffeid.TrustDomain, detail string) store.Op {
			return store.Op{Key: fmt.Sprintf("audit/%d", time.Now().UnixNano()), Value: []byte(td.Name() + ": " + detail)}
		},
	})
	w.m.SetPeers(peers)
	w.stop = run(t, w.m.Run)
	return w
}

// trusts reports whether an SVID is believed, as the sidecars would.
func (w *world) trusts(i *issuer, id string) error {
	svid := i.svid(id)
	_, err := identity.Verify(svid.Certificates, &w.live, time.Now())
	return err
}

func (w *world) waitTrusts(what string, i *issuer) {
	w.t.Helper()
	eventually(w.t, what, func() error { return w.trusts(i, "spiffe://"+i.td.Name()+"/shop") })
}

func (w *world) status(td spiffeid.TrustDomain) Status {
	w.t.Helper()
	all := w.m.Status()
	i := slices.IndexFunc(all, func(s Status) bool { return s.TrustDomain == td })
	if i < 0 {
		w.t.Fatalf("no status of %s", td)
	}
	return all[i]
}

func (w *world) waitProblem(td spiffeid.TrustDomain, text string) {
	w.t.Helper()
	eventually(w.t, "problem "+text, func() error {
		if got := w.status(td).Problem; !strings.Contains(got, text) || text == "" && got != "" {
			return fmt.Errorf("problem %q", got)
		}
		return nil
	})
}

// waitAsked waits until e was asked n more times.
func waitAsked(t *testing.T, e *endpoint, n int) {
	t.Helper()
	want := e.asked() + n
	eventually(t, "requests", func() error {
		if got := e.asked(); got < want {
			return fmt.Errorf("%d requests, want %d", got, want)
		}
		return nil
	})
}

// TestF5_2_2_LatestBundle: the bootstrap bundle verifies the first fetch only;
// after it the latest does, through rotation after rotation, also once nothing of
// the bootstrap bundle is left.
func TestF5_2_2_LatestBundle(t *testing.T) {
	i := newIssuer(t, partner)
	e := spiffeEndpoint(t, i, i, endpointID)
	bootstrap := i.bundle()
	w := newWorld(t, store.NewMemory(), nil, spiffePeer(e, bootstrap))
	w.waitTrusts("bootstrap", i)
	for range 5 {
		i.addRoot()
		w.waitTrusts("new root", i)
		e.live.SetSVID(i.svid(endpointID)) // signed with what the last bundle told
		i.dropOldRoot()
		eventually(t, "old root gone", func() error {
			if n := len(w.status(partner).Bundle.X509Authorities()); n != 1 {
				return fmt.Errorf("%d roots", n)
			}
			return nil
		})
	}
	records, _, err := w.store.List(t.Context(), "audit/")
	require.NoError(t, err)
	came, went := 0, 0
	for _, r := range records {
		came += strings.Count(string(r.Value), "partner.example: sequence") * strings.Count(string(r.Value), "+root ")
		went += strings.Count(string(r.Value), "-root ")
	}
	if came != 5 || went != 5 {
		t.Errorf("recorded that %d roots came and %d went, want 5 each: %d records", came, went, len(records))
	}
	w.waitProblem(partner, "")
	if w.status(partner).Bundle.HasX509Authority(bootstrap.X509Authorities()[0]) {
		t.Error("the bootstrap root is still trusted")
	}
}

// TestF5_2_2_LatestBundleIsRequired: an endpoint that is still where the bootstrap
// bundle was is refused once a later bundle does not know its issuer.
func TestF5_2_2_LatestBundleIsRequired(t *testing.T) {
	i := newIssuer(t, partner)
	e := spiffeEndpoint(t, i, i, endpointID)
	w := newWorld(t, store.NewMemory(), nil, spiffePeer(e, i.bundle()))
	i.addRoot()
	i.dropOldRoot() // the endpoint's own SVID is of the old root
	w.waitTrusts("new root", i)
	w.waitProblem(partner, "verifying")
	if err := w.trusts(i, "spiffe://partner.example/shop"); err != nil {
		t.Errorf("the last good bundle is gone: %v", err)
	}
}

// TestF5_2_2_EndpointOfAnotherTrustDomain: the endpoint's ID may be of a third
// trust domain, or of the own; its latest bundle verifies it, never the one of
// the trust domain that is fetched.
func TestF5_2_2_EndpointOfAnotherTrustDomain(t *testing.T) {
	p, b := newIssuer(t, partner), newIssuer(t, broker)
	e := spiffeEndpoint(t, p, b, "spiffe://broker.example/bundles")
	peer := spiffePeer(e, nil)
	peer.EndpointID = spiffeid.RequireFromString("spiffe://broker.example/bundles")
	w := newWorld(t, store.NewMemory(), nil, peer)
	w.waitProblem(partner, "no bundle of broker.example")
	w.m.SetPeers([]Peer{peer, {TrustDomain: broker, Bootstrap: b.bundle()}})
	w.waitTrusts("fetched by way of the broker", p)

	fromOwn := spiffeEndpoint(t, p, w.own, "spiffe://own.example/mirror")
	peer.URL, peer.EndpointID = fromOwn.URL, spiffeid.RequireFromString("spiffe://own.example/mirror")
	w2 := newWorld(t, store.NewMemory(), nil)
	fromOwn.live.SetSVID(w2.own.svid("spiffe://own.example/mirror"))
	w2.m.SetPeers([]Peer{peer})
	w2.waitTrusts("fetched from an endpoint of our own", p)

	fromOwn.live.SetSVID(p.svid("spiffe://own.example/mirror")) // C7
	w2.waitProblem(partner, "verifying")
}

// TestF4_2_C7_NeverMerged: a trust domain's authorities vouch for its own IDs and
// for no other's, whatever else is trusted.
func TestF4_2_C7_NeverMerged(t *testing.T) {
	p, b := newIssuer(t, partner), newIssuer(t, broker)
	w := newWorld(t, store.NewMemory(), nil,
		spiffePeer(spiffeEndpoint(t, p, p, endpointID), p.bundle()), Peer{TrustDomain: broker, Bootstrap: b.bundle()})
	w.waitTrusts("partner", p)
	w.waitTrusts("broker", b)
	for _, tt := range []struct {
		by *issuer
		id string
	}{{p, "spiffe://broker.example/shop"}, {b, "spiffe://partner.example/shop"}, {p, "spiffe://own.example/shop"}, {b, "spiffe://third.example/shop"}} {
		if err := w.trusts(tt.by, tt.id); err == nil {
			t.Errorf("%s signed by %s was believed", tt.id, tt.by.td)
		}
	}
	both := slices.Concat(p.bundle().X509Authorities(), b.bundle().X509Authorities())
	w.live.SetBundles(identity.Bundles{partner: spiffebundle.FromX509Authorities(partner, both)})
	if err := w.trusts(b, "spiffe://partner.example/shop"); err != nil {
		t.Errorf("this test would not notice merged bundles: %v", err)
	}
}

// TestBadAnswersChangeNothing: garbage, a redirect elsewhere, another server, an
// older document, and silence leave the last good bundle and show; when the
// endpoint is well again, so is all.
func TestBadAnswersChangeNothing(t *testing.T) {
	i, foe := newIssuer(t, partner), newIssuer(t, partner)
	e := spiffeEndpoint(t, i, i, endpointID)
	trap := spiffeEndpoint(t, foe, foe, endpointID)
	old := i.bundle()
	i.addRoot()
	w := newWorld(t, store.NewMemory(), nil, spiffePeer(e, old))
	w.waitTrusts("new root", i)
	good := w.status(partner).Bundle
	sameSequence := i.bundle()
	sameSequence.AddX509Authority(foe.roots[0])
	twice := func() *spiffebundle.Bundle { return sameSequence }
	for _, tt := range []struct {
		name    string
		h       http.Handler
		problem string
	}{
		{"garbage", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"keys":[{"kty":`)) }), "not a JWK set"},
		{"redirect", http.RedirectHandler(trap.URL, http.StatusFound), "verifying"},
		{"error", http.NotFoundHandler(), "404"},
		{"older", BundleHandler(func() *spiffebundle.Bundle { return old }), "behind"},
		{"B4_1_1 other keys under the same number", BundleHandler(twice), "without a new spiffe_sequence"},
	} {
		e.answer(tt.h)
		w.waitProblem(partner, tt.problem)
		if s := w.status(partner); !s.Bundle.Equal(good) || s.Failures == 0 {
			t.Errorf("%s: the bundle changed, or nobody counts: %+v", tt.name, s)
		}
		if err := w.trusts(i, "spiffe://partner.example/shop"); err != nil || w.trusts(foe, "spiffe://partner.example/shop") == nil {
			t.Errorf("%s: trust changed: %v", tt.name, err)
		}
		e.answer(BundleHandler(i.bundle))
		w.waitProblem(partner, "")
	}
	if trap.asked() != 0 {
		t.Error("the impostor was asked")
	}
	success := w.status(partner).Success
	if success.IsZero() || time.Since(success) > deadline {
		t.Errorf("last success %v", success)
	}
}

// TestB4_1_3_TrustNothing: a valid document without a usable key ends all trust
// in that trust domain, and a later one brings it back.
func TestB4_1_3_TrustNothing(t *testing.T) {
	i := newIssuer(t, partner)
	e, roots := webEndpoint(t, i, "127.0.0.1")
	w := newWorld(t, store.NewMemory(), roots, Peer{TrustDomain: partner, URL: e.URL, Profile: HTTPSWeb})
	w.waitTrusts("first", i)
	empty := spiffebundle.New(partner)
	empty.SetSequenceNumber(100)
	empty.SetRefreshHint(0)
	e.answer(BundleHandler(func() *spiffebundle.Bundle { return empty }))
	eventually(t, "trust ended", func() error {
		if w.trusts(i, "spiffe://partner.example/shop") == nil {
			return errors.New("still trusted")
		}
		return nil
	})
	w.waitProblem(partner, "nothing of it is trusted")
	i.mu.Lock()
	i.sequence = 101
	i.mu.Unlock()
	e.answer(BundleHandler(i.bundle))
	w.waitTrusts("again", i)
}

// TestB4_1_1_Sequence holds which document replaces which.
func TestB4_1_1_Sequence(t *testing.T) {
	i := newIssuer(t, partner)
	with := func(seq int, roots int) *spiffebundle.Bundle {
		for len(i.roots) < roots {
			i.addRoot()
		}
		b := spiffebundle.FromX509Authorities(partner, i.roots[:roots])
		if seq >= 0 {
			b.SetSequenceNumber(uint64(seq))
		}
		return b
	}
	other := func(seq uint64) *spiffebundle.Bundle {
		with(0, 2)
		b := spiffebundle.FromX509Authorities(partner, i.roots[1:2])
		b.SetSequenceNumber(seq)
		return b
	}
	withJWT := func(seq int) *spiffebundle.Bundle {
		b := with(seq, 1)
		require.NoError(t, b.AddJWTAuthority("k", newKey(t).Public()))
		return b
	}
	for _, tt := range []struct {
		name      string
		held, got *spiffebundle.Bundle
		want      bool
		problem   string
	}{
		{"first", nil, with(0, 1), true, ""},
		{"the same", with(5, 1), with(5, 1), false, ""},
		{"newer", with(5, 1), with(6, 2), true, ""},
		{"newer, same keys", with(5, 1), with(6, 1), true, ""},
		{"older", with(5, 1), with(4, 2), false, "behind"},
		{"older, same keys", with(5, 1), with(4, 1), false, "behind"},
		{"same number, other keys", with(5, 1), with(5, 2), false, "without a new"},
		{"same number, fewer keys", with(5, 2), with(5, 1), false, "without a new"},
		{"same number, another root", with(5, 1), other(5), false, "without a new"},
		{"same number, a JWT key more", with(5, 1), withJWT(5), false, "without a new"},
		{"no numbers", with(-1, 1), with(-1, 2), true, ""},
		{"number from now on", with(-1, 1), with(0, 2), true, ""},
		{"number no more", with(5, 1), with(-1, 2), true, ""},
	} {
		got, err := supersedes(tt.held, tt.got)
		if got != tt.want || (err == nil) != (tt.problem == "") || err != nil && !strings.Contains(err.Error(), tt.problem) {
			t.Errorf("%s: %v, %v", tt.name, got, err)
		}
	}
}

// TestB4_1_2_RefreshHint: the hint is followed within bounds.
func TestB4_1_2_RefreshHint(t *testing.T) {
	m := NewManager(Config{Own: own})
	for hint, want := range map[time.Duration]time.Duration{
		0: time.Minute, time.Second: time.Minute, 10 * time.Minute: 10 * time.Minute, 48 * time.Hour: time.Hour,
	} {
		b := spiffebundle.New(partner)
		b.SetRefreshHint(hint)
		if got := m.interval(Peer{}, b); got != want {
			t.Errorf("hint %v: every %v, want %v", hint, got, want)
		}
	}
	if got := m.interval(Peer{}, spiffebundle.New(partner)); got != 5*time.Minute {
		t.Errorf("no hint: every %v", got)
	}
}

// TestLatestBundleSurvivesRestart: a restart, and another replica, begin with the
// newest bundle, also where the bootstrap bundle would be of no use any more.
func TestLatestBundleSurvivesRestart(t *testing.T) {
	s := store.NewMemory()
	i := newIssuer(t, partner)
	e := spiffeEndpoint(t, i, i, endpointID)
	peer := spiffePeer(e, i.bundle())
	w := newWorld(t, s, nil, peer)
	replica := newWorld(t, s, nil, peer)
	i.addRoot()
	w.waitTrusts("new root", i)
	replica.waitTrusts("new root at another replica", i)
	e.live.SetSVID(i.svid(endpointID))
	i.dropOldRoot()
	eventually(t, "old root gone", func() error {
		if n := len(w.status(partner).Bundle.X509Authorities()); n != 1 {
			return fmt.Errorf("%d roots", n)
		}
		return nil
	})
	w.stop()
	replica.stop()
	e.answer(http.NotFoundHandler())
	published := make(chan identity.Bundles, 10)
	again := NewManager(Config{
		Own: own, OwnBundle: w.own.bundle, Store: s, MinRefresh: 10 * time.Millisecond,
		Publish: func(b identity.Bundles) { published <- b }, Now: time.Now, Log: hclog.NewNullLogger(),
	})
	run(t, again.Run)
	again.SetPeers([]Peer{peer})
	select {
	case first := <-published:
		if !first[partner].Equal(i.bundle()) {
			t.Error("the first that a restarted replica publishes is not the latest bundle")
		}
	case <-time.After(deadline):
		t.Fatal("nothing published")
	}
	if s := again.Status()[0]; s.Success.IsZero() {
		t.Error("nobody knows when it was fetched")
	}
}

// TestRemovedDocument: its bundle is gone at once, from the store too, and the
// endpoint is left alone.
func TestRemovedDocument(t *testing.T) {
	s := store.NewMemory()
	i := newIssuer(t, partner)
	e := spiffeEndpoint(t, i, i, endpointID)
	w := newWorld(t, s, nil, spiffePeer(e, i.bundle()))
	i.addRoot()
	w.waitTrusts("new root", i)
	w.m.SetPeers(nil)
	eventually(t, "trust ended", func() error {
		if w.trusts(i, "spiffe://partner.example/shop") == nil {
			return errors.New("still trusted")
		}
		kvs, _, err := s.List(t.Context(), "federation/")
		if len(kvs) != 0 {
			err = errors.New("still stored")
		}
		return err
	})
	if n := len(w.m.Status()); n != 0 {
		t.Errorf("%d trust domains in the status", n)
	}
	before := e.asked()
	w.m.SetPeers([]Peer{{TrustDomain: broker, Bootstrap: newIssuer(t, broker).bundle()}})
	eventually(t, "the next list", func() error {
		if len(w.m.Status()) != 1 {
			return errors.New("not yet")
		}
		return nil
	})
	if e.asked() != before {
		t.Error("the endpoint of a removed document was asked")
	}
}

// TestChangedDocumentBeginsAnew: another bundle in the document replaces what was
// fetched, so that an operator can repair a trust domain that lost its keys.
func TestChangedDocumentBeginsAnew(t *testing.T) {
	i := newIssuer(t, partner)
	e := spiffeEndpoint(t, i, i, endpointID)
	w := newWorld(t, store.NewMemory(), nil, spiffePeer(e, i.bundle()))
	i.addRoot()
	w.waitTrusts("old keys", i)
	reborn := newIssuer(t, partner) // and its sequence begins below
	reborn.sequence = 1
	e.live.SetSVID(reborn.svid(endpointID))
	e.answer(BundleHandler(reborn.bundle))
	w.waitProblem(partner, "verifying")
	w.m.SetPeers([]Peer{spiffePeer(e, reborn.bundle())})
	w.waitTrusts("new keys", reborn)
	waitAsked(t, e, 2)
	eventually(t, "a fetch that succeeds", func() error {
		if s := w.status(partner); s.Problem != "" || s.Success.IsZero() {
			return fmt.Errorf("problem %q", s.Problem)
		}
		return nil
	})
	if w.trusts(i, "spiffe://partner.example/shop") == nil {
		t.Error("the old keys are still trusted")
	}
}

// TestRefusedPeers: an invalid document, one for the own trust domain, and two for
// the same are not trusted, and shown; the others are.
func TestRefusedPeers(t *testing.T) {
	o, p, b := newIssuer(t, own), newIssuer(t, partner), newIssuer(t, broker)
	third := newIssuer(t, spiffeid.RequireTrustDomainFromString("third.example"))
	w := newWorld(t, store.NewMemory(), nil,
		Peer{TrustDomain: own, Bootstrap: o.bundle()},
		Peer{TrustDomain: partner, Bootstrap: p.bundle()}, Peer{TrustDomain: partner, Bootstrap: b.bundle()},
		Peer{TrustDomain: broker},
		Peer{TrustDomain: third.td, Bootstrap: third.bundle()})
	w.waitTrusts("third", third)
	for _, i := range []*issuer{o, p, b} {
		if w.trusts(i, "spiffe://"+i.td.Name()+"/shop") == nil || w.status(i.td).Problem == "" {
			t.Errorf("%s is trusted, or shown without a problem", i.td)
		}
	}
}

// TestEndingBundleShows: a fixed bundle that nobody renews is a problem before its
// last authority ends.
func TestEndingBundleShows(t *testing.T) {
	i := newIssuer(t, partner) // of two hours, one is left
	now := time.Now()
	if got := ending(i.bundle(), now); got != "" {
		t.Errorf("problem %q", got)
	}
	if got := ending(i.bundle(), now.Add(45*time.Minute)); !strings.Contains(got, "ends at") {
		t.Errorf("problem %q", got)
	}
}
