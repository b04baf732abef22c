package catalog

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/internal/store/etcd"
)

// errCrash is what a failing store answers.
var errCrash = errors.New("the store is gone")

// failing is a store that fails from its n-th call on, as if the process or the
// network ended there. With late, the n-th call still takes effect.
type failing struct {
	store.Store
	left atomic.Int64
	late bool
}

// crash reports that a call must not reach the store, and that its caller must
// see an error.
func (f *failing) crash() (before, after bool) {
	left := f.left.Add(-1)
	return left < 0 || left == 0 && !f.late, left <= 0
}

func (f *failing) Get(ctx context.Context, key string) (store.KV, error) {
	if _, failed := f.crash(); failed {
		return store.KV{}, errCrash
	}
	return f.Store.Get(ctx, key)
}

func (f *failing) List(ctx context.Context, prefix string) ([]store.KV, int64, error) {
	if _, failed := f.crash(); failed {
		return nil, 0, errCrash
	}
	return f.Store.List(ctx, prefix)
}

func (f *failing) Txn(ctx context.Context, cmps []store.Cmp, ops []store.Op) (int64, error) {
	before, failed := f.crash()
	if before {
		return 0, errCrash
	}
	rev, err := f.Store.Txn(ctx, cmps, ops)
	if failed {
		return 0, errCrash
	}
	return rev, err
}

// noisySet is the shop with size bytes that cannot be compressed.
func noisySet(seed uint64, size int) files {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	noise := make([]byte, size)
	rand.NewChaCha8(key).Read(noise)
	line := append([]byte("# "), base64.StdEncoding.EncodeToString(noise)...)
	return with(shop(), "n.yaml", append(line, '\n'))
}

// wide is a change of more sets than one transaction can write.
func wide() map[string]map[string][]byte {
	sets := map[string]map[string][]byte{"": with(shop(), "c.yaml", []byte("# changed\n"))}
	for i := range store.MaxOps/2 + 1 {
		name := fmt.Sprintf("s%d", i)
		sets[""][name+".yaml"] = scope(name)
		sets[name] = files{"w.yaml": workload(name)}
	}
	return sets
}

// TestCrash ends the store at each call that a change makes, before and after
// the call takes effect. Whoever opens the store then finds the state before the
// change or the one after it, readable and with its audit record.
func TestCrash(t *testing.T) {
	parsed := newCatalog(t, newStore(t)) // its cache spares the test most of the parsing
	apply(t, parsed, map[string]map[string][]byte{"": shop()})
	apply(t, parsed, wide())
	sharing := func(s store.Store) *Catalog {
		c := newCatalog(t, s)
		c.cache.states = slices.Clone(parsed.cache.states)
		return c
	}
	for _, late := range []bool{false, true} {
		landed, calls := 0, 0
		for n := int64(1); ; n++ {
			s := newStore(t)
			apply(t, sharing(s), map[string]map[string][]byte{"": shop()})
			f := &failing{Store: s, late: late}
			f.left.Store(n)
			c := sharing(f)
			c.keep = limits{revisions: 1, every: 1} // tidying up is part of it
			_, err := c.Apply(t.Context(), Change{Sets: wide(), Actor: "ann"})
			if err != nil && !errors.Is(err, errCrash) {
				t.Fatalf("call %d: %v", n, err)
			}
			calls++
			if checkWhole(t, s, n) {
				landed++
			} else if err == nil {
				t.Errorf("call %d: the change was acknowledged and is not there", n)
			}
			apply(t, sharing(s), wide()) // trying again must work
			if f.left.Load() > 0 {
				break
			}
		}
		if calls < 10 || landed == 0 || landed == calls {
			t.Errorf("late %v: %d of %d changes landed; want some, not all, of ten or more", late, landed, calls)
		}
	}
}

// checkWhole reports whether the change of TestCrash has landed, and complains
// about anything in between.
func checkWhole(t *testing.T, s store.Store, n int64) bool {
	t.Helper()
	c := newCatalog(t, s)
	got := state(t, c)
	records, err := c.Audit.Recent(t.Context(), 0)
	require.NoError(t, err)
	switch {
	case got.Rev.N == 1 && len(got.Sets) == 1 && len(records) == 1:
	case got.Rev.N == 2 && len(got.Sets) == len(wide()) && len(records) == 2:
	default:
		t.Errorf("call %d: got revision %s with %d sets and %d audit records", n, got.Rev, len(got.Sets), len(records))
	}
	if !reaches(got, "orders", "payments") {
		t.Errorf("call %d: the rules are lost", n)
	}
	return got.Rev.N == 2
}

// TestHistoryIsBounded shows that old entries and their blobs go, that what is
// kept can be read, and that what the history refers to is all there is.
func TestHistoryIsBounded(t *testing.T) {
	s := newStore(t)
	c := newCatalog(t, s)
	c.keep = limits{revisions: 5, bytes: 1 << 20, every: 1}
	for i := range 20 {
		apply(t, c, map[string]map[string][]byte{"": with(shop(), "c.yaml", fmt.Appendf(nil, "# %d\n", i))})
	}
	h, err := c.History(t.Context(), 0)
	require.NoError(t, err)
	if len(h) != 5 || h[0].Rev.N != 20 || h[4].Rev.N != 16 {
		t.Errorf("got %d entries, want 16 to 20", len(h))
	}
	fresh := newCatalog(t, s)
	for _, e := range h {
		if _, err := fresh.Files(t.Context(), e.Rev); err != nil {
			t.Errorf("revision %s: %v", e.Rev, err)
		}
	}
	_, err = fresh.Files(t.Context(), Rev{1, 15})
	require.ErrorIs(t, err, ErrNoRevision)
	kvs, _, err := s.List(t.Context(), inBlobs)
	require.NoError(t, err)
	chunks, _, err := s.List(t.Context(), inChunks)
	require.NoError(t, err)
	if len(kvs) != 5 || len(chunks) != 5 {
		t.Errorf("got %d blobs in %d chunks, want 5 in 5", len(kvs), len(chunks))
	}
}

func TestHistoryIsBoundedBySize(t *testing.T) {
	s := newStore(t)
	c := newCatalog(t, s)
	c.keep = limits{revisions: 100, bytes: 1, every: 1}
	for i := range 5 {
		apply(t, c, map[string]map[string][]byte{"": with(shop(), "c.yaml", fmt.Appendf(nil, "# %d\n", i))})
	}
	h, err := c.History(t.Context(), 0)
	require.NoError(t, err)
	if len(h) != 2 {
		t.Errorf("got %d entries, want the one in force and the one before", len(h))
	}
	r, err := c.Rollback(t.Context(), Rev{1, 4}, "", "")
	require.NoError(t, err)
	if r.N != 6 {
		t.Errorf("rolling back: got %+v, want revision 6", r)
	}
}

// TestDeletionAgainstApply deletes blobs between the steps of a change that has
// just written them: the change starts over, and its blobs are there.
func TestDeletionAgainstApply(t *testing.T) {
	s := newStore(t)
	tidier := newCatalog(t, s)
	tidier.keep = limits{revisions: 1, every: 1}
	h := &hooked{Store: s}
	c := newCatalog(t, h)
	apply(t, c, map[string]map[string][]byte{"": shop()})
	steps := 0
	h.beforeTxn = func([]store.Op) {
		if steps++; steps < 6 {
			require.NoError(t, tidier.prune(t.Context()))
		}
	}
	apply(t, c, wide())
	h.beforeTxn = nil
	if got := state(t, newCatalog(t, s)); got.Rev.N != 2 || !allowed(got) || len(got.Sets) != len(wide()) {
		t.Errorf("got %s with %d sets, want 1.2 in force", got.Rev, len(got.Sets))
	}
	if steps < 6 {
		t.Errorf("got %d transactions, want some that were in vain", steps)
	}
}

// TestApplyAgainstDeletion brings an old blob back just before it is deleted as
// one that nothing refers to: the deletion must not happen.
func TestApplyAgainstDeletion(t *testing.T) {
	s := newStore(t)
	c := newCatalog(t, s)
	apply(t, c, map[string]map[string][]byte{"": shop()})
	apply(t, c, map[string]map[string][]byte{"": with(shop(), "p.yaml", nil)})
	h := &hooked{Store: s}
	tidier := newCatalog(t, h)
	tidier.keep = limits{revisions: 1, every: 1}
	h.beforeTxn = func(ops []store.Op) {
		if slices.ContainsFunc(ops, func(op store.Op) bool { return op.Key == keyGC }) {
			h.beforeTxn = nil
			apply(t, c, map[string]map[string][]byte{"": shop()})
		}
	}
	require.ErrorIs(t, tidier.prune(t.Context()), store.ErrConflict)
	if got := state(t, newCatalog(t, s)); got.Rev.N != 3 || !allowed(got) {
		t.Errorf("got %s, want 1.3 in force", got.Rev)
	}
}

// TestOnEtcd runs a change of several chunks, a restart and a rollback on the
// store that a control plane really has, and prints how long an edit takes.
func TestOnEtcd(t *testing.T) {
	data, dir := t.TempDir(), t.TempDir()
	open := func() store.Store {
		s, err := etcd.Embedded(t.Context(), etcd.EmbeddedConfig{Dir: data, Log: hclog.NewNullLogger()})
		require.NoError(t, err)
		t.Cleanup(func() { s.Close() })
		return s
	}
	s := open()
	apply(t, newCatalog(t, s), map[string]map[string][]byte{"": noisySet(1, chunkSize*9/8)})
	require.NoError(t, s.Close())
	s = open()
	c := newCatalog(t, s)
	if got := state(t, c); got.Rev.N != 1 || !allowed(got) {
		t.Errorf("after a restart: got %s, want 1.1 in force", got.Rev)
	}
	apply(t, c, map[string]map[string][]byte{"": with(shop(), "p.yaml", nil)})
	_, err := c.Rollback(t.Context(), Rev{1, 1}, "", "")
	require.NoError(t, err)

	write(t, dir, shop())
	w := follow(t, s, dir)
	w.await(t, "start", func(s State) bool { return s.Rev.N == 4 })
	var took []time.Duration
	for i := range 10 {
		begun := time.Now()
		if i%2 == 0 {
			write(t, dir, files{"p.yaml": []byte("# none\n")})
			w.await(t, "denying", denied)
		} else {
			write(t, dir, files{"p.yaml": allow("orders", "payments")})
			w.await(t, "allowing", allowed)
		}
		took = append(took, time.Since(begun))
	}
	slices.Sort(took)
	t.Logf("from a file's write to the new state: median %s, worst %s", took[len(took)/2], took[len(took)-1])
	if took[len(took)/2] > time.Second/2 { // generous: other tests take the processors
		t.Errorf("got a median of %s, want some 10ms", took[len(took)/2])
	}
}
