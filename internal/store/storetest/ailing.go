package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// ErrAiling is what a call that goes wrong returns.
var ErrAiling = errors.New("the store is ailing")

// Ailing is a store in which one call goes wrong: it fails, or, where it reads,
// answers with noise in the place of values.
type Ailing struct {
	store.Store

	mu     sync.Mutex
	armed  bool // guarded by mu
	left   int  // guarded by mu; calls before the one that goes wrong
	garble bool // guarded by mu
	went   bool // guarded by mu; it went wrong
}

// Arm lets the n-th call from now on go wrong, the first being 0. With garble,
// only calls that read count.
func (a *Ailing) Arm(n int, garble bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.armed, a.left, a.garble, a.went = true, n, garble, false
}

// Disarm makes the store well again and reports whether a call went wrong.
func (a *Ailing) Disarm() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.armed = false
	return a.went
}

// bad reports whether this call goes wrong, and how.
func (a *Ailing) bad(reads bool) (fail, garble bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.armed || a.garble && !reads {
		return false, false
	}
	if a.left--; a.left >= 0 || a.went {
		return false, false
	}
	a.went = true
	return !a.garble, a.garble
}

// Get implements [store.Store].
func (a *Ailing) Get(ctx context.Context, key string) (store.KV, error) {
	fail, garble := a.bad(true)
	if fail {
		return store.KV{}, ErrAiling
	}
	kv, err := a.Store.Get(ctx, key)
	if garble {
		kv.Key, kv.Value, err = key, []byte("{"), nil
	}
	return kv, err
}

// List implements [store.Store].
func (a *Ailing) List(ctx context.Context, prefix string) ([]store.KV, int64, error) {
	fail, garble := a.bad(true)
	if fail {
		return nil, 0, ErrAiling
	}
	kvs, rev, err := a.Store.List(ctx, prefix)
	if garble {
		kvs = []store.KV{{Key: prefix + "noise", Value: []byte("{"), Rev: rev}}
	}
	return kvs, rev, err
}

// Txn implements [store.Store].
func (a *Ailing) Txn(ctx context.Context, cmps []store.Cmp, ops []store.Op) (int64, error) {
	if fail, _ := a.bad(false); fail {
		return 0, ErrAiling
	}
	return a.Store.Txn(ctx, cmps, ops)
}

// EachCall runs do with a fresh store for every call that do makes of it, and has
// another one go wrong each time; do arms nothing itself. prepare comes before,
// with the store well, and returns what is to be tried. That has to return an
// error whenever a call went wrong, and to succeed with the store well again.
func EachCall(t *testing.T, garble bool, prepare func(*testing.T, *Ailing) func() error) {
	t.Helper()
	const most = 1000
	for n := range most {
		ended := false
		t.Run(fmt.Sprintf("call %d", n), func(t *testing.T) {
			a := &Ailing{Store: store.NewMemory()}
			t.Cleanup(func() { _ = a.Store.Close() })
			try := prepare(t, a)
			a.Arm(n, garble)
			err := try()
			went := a.Disarm()
			if went != (err != nil) {
				t.Errorf("went wrong: %v; told: %v", went, err)
			}
			if went {
				if err := try(); err != nil {
					t.Errorf("once the store is well again: %v", err)
				}
			}
			ended = !went
		})
		if ended {
			if n == 0 && !garble {
				t.Error("it asks the store nothing")
			}
			return
		}
	}
	t.Errorf("more than %d calls", most)
}
