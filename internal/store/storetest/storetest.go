// Package storetest is the contract of [store.Store] as a test suite. Every
// store runs it.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

const wait = 10 * time.Second

// Run holds the stores that open returns to the contract. Each store is used by
// one subtest, must be empty, and is closed by whoever opened it.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for name, test := range map[string]func(*testing.T, store.Store){
		"get and list":          getAndList,
		"compare and swap":      compareAndSwap,
		"refused transactions":  refused,
		"one winner":            oneWinner,
		"watch":                 watch,
		"watch from a revision": watchFrom,
		"watch ends":            watchEnds,
		"watch under load":      watchUnderLoad,
		"lease":                 leaseLife,
		"lease revoked":         leaseRevoked,
		"values are copies":     copies,
		"cancelled":             cancelled,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

func put(key, value string) store.Op { return store.Op{Key: key, Value: []byte(value)} }

func mustTxn(t *testing.T, s store.Store, ops ...store.Op) int64 {
	t.Helper()
	rev, err := s.Txn(t.Context(), nil, ops)
	require.NoError(t, err)
	return rev
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}

func getAndList(t *testing.T, s store.Store) {
	_, err := s.Get(t.Context(), "a")
	wantErr(t, err, store.ErrNotFound)
	kvs, rev0, err := s.List(t.Context(), "")
	require.NoError(t, err)
	require.Empty(t, kvs)

	rev1 := mustTxn(t, s, put("a/2", "two"), put("a/1", "one"), put("ab", "no"), put("b/1", "other"))
	if rev1 <= rev0 {
		t.Errorf("revision after a write: got %d, want more than %d", rev1, rev0)
	}
	kv, err := s.Get(t.Context(), "a/1")
	require.NoError(t, err)
	if got, want := fmt.Sprint(kv.Key, " ", string(kv.Value), " ", kv.Rev), fmt.Sprint("a/1 one ", rev1); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	kvs, rev, err := s.List(t.Context(), "a/")
	require.NoError(t, err)
	if len(kvs) != 2 || kvs[0].Key != "a/1" || kvs[1].Key != "a/2" || rev != rev1 {
		t.Errorf("got %v at %d, want a/1 and a/2 at %d", kvs, rev, rev1)
	}
	if rev := mustTxn(t, s, store.Op{Key: "missing", Delete: true}); rev != rev1 {
		t.Errorf("deleting nothing: got revision %d, want %d", rev, rev1)
	}
	mustTxn(t, s, store.Op{Key: "a/1", Delete: true}, put("a/3", ""))
	kvs, _, err = s.List(t.Context(), "a/")
	require.NoError(t, err)
	if len(kvs) != 2 || kvs[0].Key != "a/2" || kvs[1].Key != "a/3" || len(kvs[1].Value) != 0 {
		t.Errorf("after a delete: got %v, want a/2 and an empty a/3", kvs)
	}
}

func compareAndSwap(t *testing.T, s store.Store) {
	absent := []store.Cmp{{Key: "k"}}
	rev, err := s.Txn(t.Context(), absent, []store.Op{put("k", "1"), put("l", "1")})
	require.NoError(t, err)
	_, err = s.Txn(t.Context(), absent, []store.Op{put("k", "2"), put("l", "2")})
	wantErr(t, err, store.ErrConflict)
	_, err = s.Txn(t.Context(), []store.Cmp{{Key: "k", Rev: rev}, {Key: "l", Rev: rev - 1}}, []store.Op{put("k", "2")})
	wantErr(t, err, store.ErrConflict)
	kv, err := s.Get(t.Context(), "l")
	require.NoError(t, err)
	if string(kv.Value) != "1" {
		t.Errorf("after a refused transaction: got %s, want 1", kv.Value)
	}
	_, err = s.Txn(t.Context(), []store.Cmp{{Key: "k", Rev: rev}, {Key: "none"}}, []store.Op{{Key: "k", Delete: true}})
	require.NoError(t, err)
	_, err = s.Txn(t.Context(), absent, []store.Op{put("k", "3")})
	require.NoError(t, err, "a deleted key must compare as absent")
	_, err = s.Txn(t.Context(), []store.Cmp{{Key: "k", Rev: rev}}, []store.Op{put("k", "4")})
	wantErr(t, err, store.ErrConflict)
}

func refused(t *testing.T, s store.Store) {
	var many []store.Op
	for i := range store.MaxOps + 1 {
		many = append(many, put(fmt.Sprint(i), ""))
	}
	_, err := s.Txn(t.Context(), nil, many)
	wantErr(t, err, store.ErrTooLarge)
	mustTxn(t, s, many[1:]...)

	big := make([]byte, store.MaxValue)
	mustTxn(t, s, store.Op{Key: "big", Value: big})
	kv, err := s.Get(t.Context(), "big")
	require.NoError(t, err)
	require.True(t, bytes.Equal(kv.Value, big))
	_, err = s.Txn(t.Context(), nil, []store.Op{{Key: "big", Value: append(big, 0)}})
	wantErr(t, err, store.ErrTooLarge)
	_, err = s.Txn(t.Context(), nil, []store.Op{{Key: "big", Value: big}, put("small", "x")})
	wantErr(t, err, store.ErrTooLarge)
	_, err = s.Txn(t.Context(), nil, []store.Op{put(strings.Repeat("k", store.MaxKey+1), "")})
	wantErr(t, err, store.ErrTooLarge)
	for name, ops := range map[string][]store.Op{
		"a key twice": {put("x", "1"), put("x", "2")},
		"put, delete": {put("x", "1"), {Key: "x", Delete: true}},
		"no key":      {put("", "1")},
	} {
		if _, err := s.Txn(t.Context(), nil, ops); err == nil {
			t.Errorf("%s: got no error, want one", name)
		}
	}
	_, err = s.Get(t.Context(), "x")
	wantErr(t, err, store.ErrNotFound)
}

// oneWinner lets many writers raise one counter by compare-and-swap.
func oneWinner(t *testing.T, s store.Store) {
	const writers, each = 8, 10
	raise := func() error {
		for {
			kv, err := s.Get(t.Context(), "n")
			if err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
			_, err = s.Txn(t.Context(), []store.Cmp{{Key: "n", Rev: kv.Rev}}, []store.Op{{Key: "n", Value: append(kv.Value, '+')}})
			if !errors.Is(err, store.ErrConflict) {
				return err
			}
		}
	}
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				if err := raise(); err != nil {
					t.Errorf("raising the counter: %v", err)
				}
			}
		})
	}
	wg.Wait()
	kv, err := s.Get(t.Context(), "n")
	require.NoError(t, err)
	if len(kv.Value) != writers*each {
		t.Errorf("got %d, want %d", len(kv.Value), writers*each)
	}
}

func copies(t *testing.T, s store.Store) {
	value := []byte("good")
	mustTxn(t, s, store.Op{Key: "k", Value: value})
	copy(value, "evil")
	kv, err := s.Get(t.Context(), "k")
	require.NoError(t, err)
	copy(kv.Value, "evil")
	kv, err = s.Get(t.Context(), "k")
	require.NoError(t, err)
	if string(kv.Value) != "good" {
		t.Errorf("got %s, want good", kv.Value)
	}
}

func cancelled(t *testing.T, s store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Get(ctx, "k")
	wantErr(t, err, context.Canceled)
	_, err = s.Txn(ctx, nil, []store.Op{put("k", "v")})
	wantErr(t, err, context.Canceled)
	wantErr(t, s.Watch(ctx, "", 0, func(int64, []store.Event) error { return nil }), context.Canceled)
}

// leaseLife shows that a lease lasts while it is renewed, and ends with its keys.
func leaseLife(t *testing.T, s store.Store) {
	id, err := s.Grant(t.Context(), time.Second)
	require.NoError(t, err)
	rev := mustTxn(t, s, store.Op{Key: "leased", Value: []byte("x"), Lease: id}, put("kept", "y"))
	begun := time.Now()
	for time.Since(begun) < 1500*time.Millisecond {
		require.NoError(t, s.KeepAlive(t.Context(), id))
		time.Sleep(200 * time.Millisecond) // renewing by the clock is what is tested
	}
	_, err = s.Get(t.Context(), "leased")
	require.NoError(t, err, "a renewed lease must last")

	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	found := errors.New("found")
	err = s.Watch(ctx, "", rev, func(_ int64, events []store.Event) error {
		if len(events) != 1 || events[0].Key != "leased" || !events[0].Deleted {
			t.Errorf("got %v, want the end of leased", events)
		}
		return found
	})
	wantErr(t, err, found)
	wantErr(t, s.KeepAlive(t.Context(), id), store.ErrNotFound)
	_, err = s.Get(t.Context(), "kept")
	require.NoError(t, err)
}

func leaseRevoked(t *testing.T, s store.Store) {
	id, err := s.Grant(t.Context(), time.Minute)
	require.NoError(t, err)
	mustTxn(t, s, store.Op{Key: "a", Lease: id}, store.Op{Key: "b", Lease: id}, store.Op{Key: "c", Lease: id})
	mustTxn(t, s, put("b", "no longer leased"))
	require.NoError(t, s.Revoke(t.Context(), id))
	kvs, _, err := s.List(t.Context(), "")
	require.NoError(t, err)
	if len(kvs) != 1 || kvs[0].Key != "b" {
		t.Errorf("got %v, want b only", slices.Collect(keys(kvs)))
	}
	wantErr(t, s.Revoke(t.Context(), id), store.ErrNotFound)
	_, err = s.Txn(t.Context(), nil, []store.Op{{Key: "d", Lease: id}})
	wantErr(t, err, store.ErrNotFound)
	if _, err := s.Grant(t.Context(), 0); err == nil {
		t.Error("a lease of no length: got no error, want one")
	}
}

func keys(kvs []store.KV) func(func(string) bool) {
	return func(yield func(string) bool) {
		for _, kv := range kvs {
			if !yield(kv.Key) {
				return
			}
		}
	}
}
