package ca

import (
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func find(t *testing.T, c *CA, kind, state string) Authority {
	t.Helper()
	for _, a := range c.Authorities() {
		if a.Kind == kind && a.State == state {
			return a
		}
	}
	t.Fatalf("no %s %s among %+v", state, kind, c.Authorities())
	return Authority{}
}

func TestTaintIntermediate(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	c := open(t, cfg)
	old := find(t, c, "intermediate", "active")
	before := issue(t, c)
	tainted, by, err := c.Taint(t.Context(), old.Subject)
	require.NoError(t, err)
	after := issue(t, c)
	if after.Chain[1].Equal(before.Chain[1]) || keyHash(after.Chain[1]) == old.KeyHash || by != after.Chain[1].Subject.CommonName {
		t.Errorf("still signed by %s; replaced by %s", after.Chain[1].Subject, by)
	}
	if tainted.KeyHash != old.KeyHash || tainted.Until.Before(before.Chain[0].NotAfter) {
		t.Errorf("got %+v", tainted)
	}
	if err := verify(after.Chain, before.Bundle, clk.Now()); err != nil {
		t.Errorf("a peer of before refuses: %v", err)
	}
	// A restart, and another replica, know it.
	again := open(t, cfg)
	if list := again.Tainted(); len(list) != 1 || list[0].KeyHash != old.KeyHash {
		t.Errorf("after a restart: %+v", list)
	}
	clk.Add(cfg.IntermediateTTL + time.Hour)
	require.NoError(t, c.Advance(t.Context()))
	if list := c.Tainted(); len(list) != 0 {
		t.Errorf("remembered for ever: %+v", list)
	}
}

// TestTaintRoot: the successor is published before it signs, the tainted root
// leaves the bundle only after that, and then nothing under it is believed.
func TestTaintRoot(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	cfg.TaintGrace = 30 * time.Second
	c := open(t, cfg)
	old := find(t, c, "root", "active")
	before := issue(t, c)
	_, by, err := c.Taint(t.Context(), old.KeyHash)
	require.NoError(t, err)
	known := c.X509Roots()
	if len(known) != 2 || known[1].Subject.CommonName != by {
		t.Fatalf("published: %d roots, replaced by %s", len(known), by)
	}
	if got := issue(t, c); got.Chain[1].CheckSignatureFrom(known[0]) != nil {
		t.Error("the new root signs before anybody can know it")
	}
	clk.Add(11 * time.Second)
	require.NoError(t, c.Advance(t.Context()))
	fresh := issue(t, c)
	if err := verify(fresh.Chain, []*x509.Certificate{known[1]}, clk.Now()); err != nil {
		t.Errorf("not under the new root: %v", err)
	}
	if err := verify(before.Chain, c.X509Roots(), clk.Now()); err != nil {
		t.Errorf("within the grace, the old is refused: %v", err)
	}
	clk.Add(20 * time.Second)
	require.NoError(t, c.Advance(t.Context()))
	if err := verify(before.Chain, c.X509Roots(), clk.Now()); err == nil {
		t.Error("after the grace, the tainted root is believed")
	}
	if err := verify(fresh.Chain, c.X509Roots(), clk.Now()); err != nil {
		t.Errorf("after the grace, the new one is refused: %v", err)
	}
	again := open(t, cfg) // its key file is still there
	if got := again.X509Roots(); len(got) != 1 || keyHash(got[0]) == old.KeyHash {
		t.Errorf("after a restart: %d roots", len(got))
	}
}

func TestTaintJWTKey(t *testing.T) {
	c := open(t, config(t, newClock()))
	old := find(t, c, "jwt", "active")
	_, by, err := c.Taint(t.Context(), old.Subject)
	require.NoError(t, err)
	if c.Bundle().HasJWTAuthority(old.Subject) || !c.Bundle().HasJWTAuthority(by) {
		t.Errorf("bundle: %v", c.Bundle().JWTAuthorities())
	}
	if kid := part(t, issueJWT(t, c).Token, 0)["kid"]; kid != by {
		t.Errorf("signs with %v, want %s", kid, by)
	}
}

func TestTaintUnknown(t *testing.T) {
	c := open(t, config(t, newClock()))
	if _, _, err := c.Taint(t.Context(), "nobody"); !errors.Is(err, ErrUnknownAuthority) {
		t.Errorf("got %v", err)
	}
	if len(c.Tainted()) != 0 {
		t.Error("something was tainted")
	}
}

func TestIssueTTL(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	for ask, want := range map[time.Duration]time.Duration{0: 10 * time.Hour, time.Hour: time.Hour, 100 * time.Hour: 10 * time.Hour} {
		issued, err := c.Issue(t.Context(), Request{ID: payments, Key: newECKey(t).Public(), TTL: ask})
		require.NoError(t, err)
		if got := issued.Chain[0].NotAfter.Sub(clk.Now()); got != want {
			t.Errorf("asked for %v: lives %v, want %v", ask, got, want)
		}
	}
}
