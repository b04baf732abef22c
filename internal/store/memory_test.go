package store_test

import (
	"errors"
	"testing"

	"go.uber.org/goleak"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/internal/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemory(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store {
		m := store.NewMemory()
		t.Cleanup(func() { m.Close() })
		return m
	})
}

func TestMemoryCompacted(t *testing.T) {
	m := store.NewMemory()
	defer m.Close()
	var rev int64
	for range 3 {
		var err error
		if rev, err = m.Txn(t.Context(), nil, []store.Op{{Key: "k"}}); err != nil {
			t.Fatal(err)
		}
	}
	m.Compact(rev)
	err := m.Watch(t.Context(), "", rev-1, func(int64, []store.Event) error { return nil })
	if !errors.Is(err, store.ErrCompacted) {
		t.Errorf("got %v, want ErrCompacted", err)
	}
}

func TestMemoryForgetsOldRevisions(t *testing.T) {
	m := store.NewMemory()
	defer m.Close()
	for range 11_000 {
		if _, err := m.Txn(t.Context(), nil, []store.Op{{Key: "k"}}); err != nil {
			t.Fatal(err)
		}
	}
	err := m.Watch(t.Context(), "", 1, func(int64, []store.Event) error { return nil })
	if !errors.Is(err, store.ErrCompacted) {
		t.Errorf("got %v, want ErrCompacted", err)
	}
}

func TestMemoryClose(t *testing.T) {
	m := store.NewMemory()
	ended := make(chan error, 1)
	go func() { ended <- m.Watch(t.Context(), "", 1, func(int64, []store.Event) error { return nil }) }()
	m.Close()
	if err := <-ended; !errors.Is(err, store.ErrClosed) {
		t.Errorf("watch: got %v, want ErrClosed", err)
	}
	if _, err := m.Get(t.Context(), "k"); !errors.Is(err, store.ErrClosed) {
		t.Errorf("get: got %v, want ErrClosed", err)
	}
}
