package ca

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

func states(c *CA) (list []string) {
	for _, a := range c.Authorities() {
		if a.Kind == KindRoot {
			list = append(list, a.State)
		}
	}
	return list
}

func TestRootRotation(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	first := c.RootHash()
	start := clk.Now()
	for _, step := range []struct {
		at   time.Duration
		want []string
		same bool // the first root still signs
	}{
		{0, []string{"active"}, true},
		{179 * time.Hour, []string{"active"}, true},
		{180 * time.Hour, []string{"active", "next"}, true},
		{299 * time.Hour, []string{"active", "next"}, true},
		{300 * time.Hour, []string{"retiring", "active"}, false},
		{359 * time.Hour, []string{"retiring", "active"}, false},
		{361 * time.Hour, []string{"active", "next"}, false}, // half of the second's life, which began at 180 h
	} {
		clk.Add(start.Add(step.at).Sub(clk.Now()))
		require.NoError(t, c.Advance(t.Context()), "at %v", step.at)
		if got := states(c); len(got) != len(step.want) || got[0] != step.want[0] || got[len(got)-1] != step.want[len(step.want)-1] {
			t.Errorf("at %v: got %v, want %v", step.at, got, step.want)
		}
		if got := c.RootHash() == first; got != step.same {
			t.Errorf("at %v: first root active: got %v, want %v", step.at, got, step.same)
		}
		issued := issue(t, c)
		if err := verify(issued.Chain, c.X509Roots(), clk.Now()); err != nil {
			t.Errorf("at %v: %v", step.at, err)
		}
	}
}

// A peer that has not heard of the control plane for a twelfth of a root's life
// still verifies everything, and subjects never repeat.
func TestRotationNeverSignsWithAnUnpublishedRoot(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	type published struct {
		at    time.Time
		roots []*x509.Certificate
	}
	var history []published
	subjects := map[string][]byte{}
	for range 400 {
		require.NoError(t, c.Advance(t.Context()))
		history = append(history, published{clk.Now(), c.X509Roots()})
		issued := issue(t, c)
		old := history[0]
		for _, h := range history {
			if clk.Now().Sub(h.at) >= 29*time.Hour {
				old = h
			}
		}
		if err := verify(issued.Chain, old.roots, clk.Now()); err != nil {
			t.Fatalf("a peer with the bundle of %v ago refuses: %v", clk.Now().Sub(old.at), err)
		}
		if got, want := issued.Chain[0].NotAfter.Sub(clk.Now()), 10*time.Hour; got < want-time.Second {
			t.Fatalf("SVID of only %v", got)
		}
		if age := clk.Now().Sub(made(issued.Chain[1])); age > 30*time.Hour {
			t.Fatalf("the intermediate still signs at %v of 60h", age)
		}
		for _, cert := range append(c.X509Roots(), issued.Chain[1]) {
			key, name := cert.RawSubjectPublicKeyInfo, cert.Subject.String()
			if have, ok := subjects[name]; ok && string(have) != string(key) {
				t.Fatalf("two keys with subject %s", name)
			}
			subjects[name] = key
		}
		clk.Add(3 * time.Hour)
	}
	if len(subjects) < 20 {
		t.Errorf("only %d authorities in 1200 hours", len(subjects))
	}
}

func TestControlPlaneDownDuringRotation(t *testing.T) {
	for _, down := range []time.Duration{200 * time.Hour, 310 * time.Hour, 355 * time.Hour} {
		clk := newClock()
		cfg := config(t, clk)
		c := open(t, cfg)
		first, known := c.RootHash(), c.X509Roots()
		clk.Add(down)
		c = open(t, cfg)
		if c.RootHash() != first {
			t.Errorf("down %v: the next root signs before anybody could learn it", down)
		}
		if err := verify(issue(t, c).Chain, known, clk.Now()); err != nil {
			t.Errorf("down %v: %v", down, err)
		}
	}
	clk := newClock()
	cfg := config(t, clk)
	open(t, cfg)
	clk.Add(400 * time.Hour) // past everything
	c := open(t, cfg)
	if err := verify(issue(t, c).Chain, c.X509Roots(), clk.Now()); err != nil {
		t.Errorf("after every root expired: %v", err)
	}
	if got := len(c.X509Roots()); got != 1 {
		t.Errorf("got %d roots, want the new one only", got)
	}
}

// A clock that is far ahead for a while makes new roots; put right, the CA goes
// on with the old ones.
func TestClockAheadForAWhile(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	c := open(t, cfg)
	first, known := c.RootHash(), c.X509Roots()
	clk.Add(50 * 360 * time.Hour)
	open(t, cfg)
	clk.Add(-50*360*time.Hour + time.Hour)
	c = open(t, cfg)
	if err := verify(issue(t, c).Chain, known, clk.Now()); err != nil {
		t.Error(err)
	}
	if c.RootHash() != first {
		t.Error("another root signs")
	}
}

// snapshots records key folder and store before and after each transaction: what
// a crash at that moment would leave.
type snapshots struct {
	store.Store
	t    *testing.T
	dir  string
	list []snapshot
}

type snapshot struct {
	files map[string][]byte
	kvs   []store.KV
}

func (s *snapshots) Txn(ctx context.Context, cmps []store.Cmp, ops []store.Op) (int64, error) {
	s.take()
	rev, err := s.Store.Txn(ctx, cmps, ops)
	s.take()
	return rev, err
}

func (s *snapshots) take() {
	kvs, _, err := s.List(s.t.Context(), "")
	require.NoError(s.t, err)
	snap := snapshot{files: map[string][]byte{}, kvs: kvs}
	entries, err := os.ReadDir(s.dir)
	require.NoError(s.t, err)
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(s.dir, e.Name()))
		require.NoError(s.t, err)
		snap.files[e.Name()] = data
	}
	s.list = append(s.list, snap)
}

// restore makes a configuration that starts from a snapshot, with a file that
// was being written at the time.
func (s snapshot) restore(t *testing.T, cfg Config) Config {
	cfg.KeyDir = filepath.Join(t.TempDir(), "keys")
	require.NoError(t, os.Mkdir(cfg.KeyDir, 0o700))
	for name, data := range s.files {
		require.NoError(t, os.WriteFile(filepath.Join(cfg.KeyDir, name), data, 0o600))
	}
	require.NoError(t, os.WriteFile(filepath.Join(cfg.KeyDir, ".new-0-123"), []byte("-----BEGIN PRIV"), 0o600))
	mem := store.NewMemory()
	t.Cleanup(func() { mem.Close() })
	for _, kv := range s.kvs {
		_, err := mem.Txn(t.Context(), nil, []store.Op{{Key: kv.Key, Value: kv.Value}})
		require.NoError(t, err)
	}
	cfg.Store = mem
	return cfg
}

func TestCrashBetweenAnyTwoSteps(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	snaps := &snapshots{Store: cfg.Store, t: t, dir: cfg.KeyDir}
	cfg.Store = snaps
	c := open(t, cfg)
	for i, snap := range snaps.list[:2] { // first start
		again, err := Open(t.Context(), snap.restore(t, cfg))
		require.NoError(t, err, "first start, crash point %d", i)
		if again.RootHash() != firstRoot(t, snap) {
			t.Errorf("first start, crash point %d: another root", i)
		}
	}
	for range 30 {
		known := c.Bundle()
		taken := len(snaps.list)
		clk.Add(15 * time.Hour)
		require.NoError(t, c.Advance(t.Context()))
		snaps.take()
		for i, snap := range snaps.list[taken:] {
			again, err := Open(t.Context(), snap.restore(t, cfg))
			require.NoError(t, err, "crash point %d", i)
			if err := verify(issue(t, again).Chain, known.X509Authorities(), clk.Now()); err != nil {
				t.Errorf("crash point %d: a peer of before refuses: %v", i, err)
			}
			if err := verifyJWT(issueJWT(t, again), known, clk.Now()); err != nil {
				t.Errorf("crash point %d: a peer of before refuses a token: %v", i, err)
			}
			left, err := filepath.Glob(filepath.Join(again.cfg.KeyDir, ".new-*"))
			require.NoError(t, err)
			if len(left) > 0 {
				t.Errorf("crash point %d: half-written files stay: %v", i, left)
			}
		}
	}
}

func firstRoot(t *testing.T, s snapshot) [32]byte {
	for name, data := range s.files {
		if ok, _ := filepath.Match("root-*", name); ok {
			a, err := keyDir{}.decode(data)
			require.NoError(t, err)
			return sha256.Sum256(a.cert.RawSubjectPublicKeyInfo)
		}
	}
	t.Fatal("no root on disk before the first transaction")
	return [32]byte{}
}

func TestRunRotatesAndFollowsTheOtherReplica(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	a := open(t, cfg)
	cfg.Replica = "1"
	b := open(t, cfg)
	if a.RootHash() != b.RootHash() || a.state.Load().signer.cert.Equal(b.state.Load().signer.cert) {
		t.Fatal("replicas need one root and an intermediate each")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	clk.Add(180 * time.Hour)
	require.Eventually(t, func() bool {
		return a.Advance(t.Context()) == nil && a.Bundle().Equal(b.Bundle()) && len(b.X509Roots()) >= 2 // both may have made one
	}, 5*time.Second, time.Millisecond)
	cancel()
	require.NoError(t, <-done)
}

func TestReplicaWithAnotherKeyFolderChangesNothing(t *testing.T) {
	cfg := config(t, newClock())
	a := open(t, cfg)
	other := cfg
	other.KeyDir, other.Replica = filepath.Join(t.TempDir(), "keys"), "1"
	if _, err := Open(t.Context(), other); err == nil {
		t.Fatal("opened without the root's key")
	}
	require.NoError(t, a.Advance(t.Context()))
	if got := len(a.X509Roots()); got != 1 {
		t.Errorf("got %d roots, want 1", got)
	}
}
