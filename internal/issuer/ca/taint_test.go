package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/stretchr/testify/require"
)

// taint returns what was tainted, and the name of what replaces it.
func taint(t *testing.T, c *CA, authority string) (Tainted, string) {
	t.Helper()
	out, by, err := c.Taint(t.Context(), authority)
	require.NoError(t, err)
	return out, by
}

// the returns the only authority of a kind in a state.
func the(t *testing.T, c *CA, kind, state string) Authority {
	t.Helper()
	var found []Authority
	for _, a := range c.Authorities() {
		if a.Kind == kind && a.State == state {
			found = append(found, a)
		}
	}
	require.Len(t, found, 1, "%s %s of %v", state, kind, c.Authorities())
	return found[0]
}

// Intermediates of one second: status tells which one signs, whatever their order.
func TestTaintedWithinTheSecond(t *testing.T) {
	c := open(t, config(t, newClock()))
	for range 6 {
		taint(t, c, the(t, c, KindIntermediate, "active").Subject)
		if signs := issue(t, c).Chain[1].Subject.CommonName; the(t, c, KindIntermediate, "active").Subject != signs {
			t.Errorf("%s signs, and is not told as active: %v", signs, c.Authorities())
		}
	}
}

func TestTaintIntermediate(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	a := open(t, cfg)
	cfgB := cfg
	cfgB.Replica = "1"
	b := open(t, cfgB)
	known := a.X509Roots()
	old, others := issue(t, a), issue(t, b)
	hash := keyHash(old.Chain[1])
	sequenceBefore := sequence(t, a.Bundle())

	out, by := taint(t, b, old.Chain[1].Subject.CommonName)
	if out.KeyHash != hash || out.Kind != KindIntermediate || by != "" || out.Until.Before(old.Chain[0].NotAfter) {
		t.Errorf("got %+v, replaced by %q", out, by)
	}
	if !b.TaintedIssuer(old.Chain) || b.TaintedIssuer(others.Chain) {
		t.Error("the replica that was asked does not know what is tainted")
	}
	require.NoError(t, a.Advance(t.Context()))
	fresh := issue(t, a)
	if fresh.Chain[1].Equal(old.Chain[1]) || a.TaintedIssuer(fresh.Chain) || !a.TaintedIssuer(old.Chain) {
		t.Error("the replica whose intermediate it is goes on with it")
	}
	if err := verify(fresh.Chain, known, clk.Now()); err != nil {
		t.Errorf("a peer of before refuses: %v", err)
	}
	if got := sequence(t, a.Bundle()); got < sequenceBefore {
		t.Errorf("sequence went from %d to %d", sequenceBefore, got)
	}
	server, err := a.ServerSVID().GetX509SVID()
	require.NoError(t, err)
	if a.TaintedIssuer(server.Certificates) {
		t.Error("the control plane still presents it")
	}

	again, _ := taint(t, a, hash) // by hash, and twice: nothing new
	if again != out || !issue(t, a).Chain[1].Equal(fresh.Chain[1]) {
		t.Errorf("a second time: got %+v", again)
	}
	if _, by := taint(t, a, fresh.Chain[1].Subject.CommonName); by == "" || by != issue(t, a).Chain[1].Subject.CommonName {
		t.Errorf("replaced by %q", by)
	}
	restarted := open(t, cfg)
	if !restarted.TaintedIssuer(old.Chain) || restarted.TaintedIssuer(issue(t, restarted).Chain) {
		t.Error("forgotten by a restart")
	}
	if len(restarted.Tainted()) != 2 {
		t.Errorf("got %v", restarted.Tainted())
	}
	clk.Add(61 * time.Hour)
	require.NoError(t, a.Advance(t.Context()))
	if got := a.Tainted(); len(got) != 0 {
		t.Errorf("still listed after all has expired: %v", got)
	}
}

func TestTaintUnknown(t *testing.T) {
	c := open(t, config(t, newClock()))
	root := the(t, c, KindRoot, "active")
	for _, name := range []string{"", "nobody", "Sallyport root", root.KeyHash[:63]} {
		if _, _, err := c.Taint(t.Context(), name); !errors.Is(err, ErrUnknownAuthority) {
			t.Errorf("%q: got %v", name, err)
		}
	}
	if len(c.Tainted()) != 0 || the(t, c, KindRoot, "active") != root {
		t.Error("a refused request changed something")
	}
}

// Nobody is locked out: not who has heard of nothing, not who renews late.
func TestTaintRoot(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	c := open(t, cfg)
	known := c.X509Roots() // of a sidecar that is cut off
	tainted := the(t, c, KindRoot, "active")
	old := issue(t, c)

	out, by := taint(t, c, tainted.KeyHash)
	if by != the(t, c, KindRoot, "next").Subject || out.Subject != tainted.Subject {
		t.Errorf("got %+v, replaced by %q", out, by)
	}
	if len(c.X509Roots()) != 2 || !c.X509Roots()[0].Equal(known[0]) {
		t.Error("the new root is not published beside the tainted one")
	}
	between := issue(t, c)
	if err := verify(between.Chain, known, clk.Now()); err != nil {
		t.Errorf("signed with a root that nobody can know yet: %v", err)
	}
	if !between.Chain[1].Equal(old.Chain[1]) || len(c.Tainted()) != 0 {
		t.Error("listed as tainted while there is nothing better to be had")
	}

	clk.Add(11 * time.Second)
	require.NoError(t, c.Advance(t.Context()))
	fresh := issue(t, c)
	if the(t, c, KindRoot, "active").Subject != by || !c.TaintedIssuer(old.Chain) || c.TaintedIssuer(fresh.Chain) {
		t.Errorf("the new root does not sign: %v", c.Authorities())
	}
	onlyNew := c.X509Roots()[1:]
	server, err := c.ServerSVID().GetX509SVID()
	require.NoError(t, err)
	for name, row := range map[string]struct{ chain, roots []*x509.Certificate }{
		"new chain, cut-off peer":      {fresh.Chain, known},
		"new chain, new root only":     {fresh.Chain, onlyNew},
		"old chain, present bundle":    {old.Chain, c.X509Roots()},
		"control plane, cut-off peer":  {server.Certificates, known},
		"control plane, new root only": {server.Certificates, onlyNew},
	} {
		if err := verify(row.chain, row.roots, clk.Now()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if last := server.Certificates[len(server.Certificates)-1]; !last.Equal(onlyNew[0]) {
		t.Error("the control plane's chain does not end with the new root: join tokens name that")
	}
	if err := verify(old.Chain, onlyNew, clk.Now()); err == nil {
		t.Error("the new root alone accepts what the tainted one signed")
	}

	clk.Add(c.cfg.TaintGrace*2/3 - 2*time.Second)
	require.NoError(t, c.Advance(t.Context()))
	if err := verify(old.Chain, c.X509Roots(), clk.Now()); err != nil {
		t.Errorf("refused within the grace: %v", err)
	}
	clk.Add(2 * time.Second)
	require.NoError(t, c.Advance(t.Context()))
	for _, c := range []*CA{c, open(t, cfg)} { // the key file is still there
		if got := c.X509Roots(); !sameCerts(got, onlyNew) {
			t.Errorf("got %d roots, want the new one only", len(got))
		}
		if !slices.ContainsFunc(c.Tainted(), func(k Tainted) bool { return k.KeyHash == keyHash(known[0]) }) {
			t.Error("not listed as tainted any more")
		}
		if err := verify(issue(t, c).Chain, known, clk.Now()); err != nil {
			t.Errorf("a sidecar that is cut off refuses its peers: %v", err)
		}
	}
	clk.Add(cfg.SVIDTTL)
	require.NoError(t, c.Advance(t.Context()))
	if len(issue(t, c).Chain) != 2 {
		t.Error("workloads still present the tainted root's signature")
	}
	if server, err = c.ServerSVID().GetX509SVID(); err != nil {
		t.Fatal(err)
	}
	if err := verify(server.Certificates, known, clk.Now()); err != nil {
		t.Errorf("a sidecar that comes back late cannot reach the control plane: %v", err)
	}
}

// The next root was there already: no other is made, and it signs at once.
func TestTaintActiveRootWithASuccessor(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	known := c.X509Roots()
	clk.Add(180 * time.Hour)
	require.NoError(t, c.Advance(t.Context()))
	next := the(t, c, KindRoot, "next")
	if _, by := taint(t, c, the(t, c, KindRoot, "active").Subject); by != next.Subject {
		t.Errorf("replaced by %q, want %s", by, next.Subject)
	}
	clk.Add(11 * time.Second)
	require.NoError(t, c.Advance(t.Context()))
	if got := the(t, c, KindRoot, "active"); got.Subject != next.Subject {
		t.Errorf("got %v", got)
	}
	if err := verify(issue(t, c).Chain, known, clk.Now()); err != nil {
		t.Errorf("a peer that never heard of the next root: %v", err)
	}
}

// A root that never signed leaves at once, and another is made.
func TestTaintNextRoot(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	clk.Add(180 * time.Hour)
	require.NoError(t, c.Advance(t.Context()))
	active, next := the(t, c, KindRoot, "active"), the(t, c, KindRoot, "next")
	taint(t, c, next.Subject)
	if got := the(t, c, KindRoot, "next"); got.Subject == next.Subject || the(t, c, KindRoot, "active") != active {
		t.Errorf("got %v", c.Authorities())
	}
	if got := len(c.X509Roots()); got != 2 {
		t.Errorf("%d roots in the bundle, want 2", got)
	}
}

func TestTaintJWTKey(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	c := open(t, cfg)
	known, token := c.Bundle(), issueJWT(t, c)
	if _, by := taint(t, c, the(t, c, KindJWT, "active").KeyHash); by != the(t, c, KindJWT, "next").Subject {
		t.Errorf("replaced by %q", by)
	}
	if err := verifyJWT(issueJWT(t, c), known, clk.Now()); err != nil {
		t.Errorf("signed with a key that nobody can know yet: %v", err)
	}
	published := c.Bundle()
	clk.Add(11 * time.Second)
	require.NoError(t, c.Advance(t.Context()))
	if err := verifyJWT(issueJWT(t, c), known, clk.Now()); err == nil {
		t.Error("still signed with the tainted key")
	}
	for name, row := range map[string]struct {
		token  string
		bundle *spiffebundle.Bundle
	}{"new token, pushed bundle": {issueJWT(t, c), published}, "old token": {token, c.Bundle()}} {
		if err := verifyJWT(row.token, row.bundle, clk.Now()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	clk.Add(c.cfg.TaintGrace * 2 / 3)
	require.NoError(t, c.Advance(t.Context()))
	for _, c := range []*CA{c, open(t, cfg)} {
		if n := len(c.Bundle().JWTAuthorities()); n != 1 {
			t.Errorf("%d JWT keys in the bundle, want 1", n)
		}
	}
}

func TestWatchTainted(t *testing.T) {
	c := open(t, config(t, newClock()))
	ctx, cancel := context.WithCancel(t.Context())
	seen, done := make(chan int), make(chan error)
	go func() {
		done <- c.WatchTainted(ctx, func(keys []Tainted) error { seen <- len(keys); return nil })
	}()
	if got := <-seen; got != 0 {
		t.Errorf("at once: got %d keys", got)
	}
	taint(t, c, the(t, c, KindIntermediate, "active").Subject)
	if got := <-seen; got != 1 {
		t.Errorf("got %d keys, want 1", got)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestCrashWhileTainting(t *testing.T) {
	for _, kind := range []string{KindRoot, KindIntermediate, KindJWT} {
		t.Run(kind, func(t *testing.T) {
			clk := newClock()
			cfg := config(t, clk)
			snaps := &snapshots{Store: cfg.Store, t: t, dir: cfg.KeyDir}
			cfg.Store = snaps
			c := open(t, cfg)
			known, old := c.Bundle(), issue(t, c)
			snaps.list = nil
			subject := the(t, c, kind, "active").Subject
			taint(t, c, subject)
			if len(snaps.list) < 4 {
				t.Fatalf("only %d crash points", len(snaps.list))
			}
			for i, snap := range snaps.list {
				again := open(t, snap.restore(t, cfg))
				taint(t, again, subject) // the operator had no answer
				then := clk.Now().Add(11 * time.Second)
				again.cfg.Now = func() time.Time { return then }
				require.NoError(t, again.Advance(t.Context()), "crash point %d", i)
				if kind != KindJWT && (again.TaintedIssuer(issue(t, again).Chain) || !again.TaintedIssuer(old.Chain)) {
					t.Errorf("crash point %d: the tainted issuer signs", i)
				}
				if err := verify(issue(t, again).Chain, known.X509Authorities(), then); err != nil {
					t.Errorf("crash point %d: a peer of before refuses: %v", i, err)
				}
				if kind == KindJWT && verifyJWT(issueJWT(t, again), known, then) == nil {
					t.Errorf("crash point %d: the tainted key signs", i)
				}
				if n := len(again.X509Roots()); n > 2 {
					t.Errorf("crash point %d: %d roots", i, n)
				}
			}
		})
	}
}

// Both replicas go through a taint under way at the same time, and another
// replica that starts with the tainted root is listed with the rest.
func TestTaintRootOfTwoReplicas(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	a := open(t, cfg)
	other := func(name string) Config { o := cfg; o.Replica = name; return o }
	b := open(t, other("1"))
	chains := [][]*x509.Certificate{issue(t, a).Chain, issue(t, b).Chain}
	taint(t, a, the(t, a, KindRoot, "active").Subject)
	late := open(t, other("2")) // before the new root signs
	chains = append(chains, issue(t, late).Chain)
	clk.Add(11 * time.Second)
	for _, c := range []*CA{b, late, a} {
		require.NoError(t, c.Advance(t.Context()))
		for i, chain := range chains {
			if !c.TaintedIssuer(chain) {
				t.Errorf("the SVID of replica %d counts as good", i)
			}
		}
		if c.TaintedIssuer(issue(t, c).Chain) || !c.Bundle().Equal(a.Bundle()) {
			t.Error("not replaced")
		}
	}
}
