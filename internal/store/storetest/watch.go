package storetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// render gives a revision's events as one line: key=value, or key! when deleted.
func render(events []store.Event) string {
	var parts []string
	for _, e := range events {
		if e.Deleted {
			parts = append(parts, e.Key+"!")
		} else {
			parts = append(parts, e.Key+"="+string(e.Value))
		}
	}
	return strings.Join(parts, " ")
}

// collect watches until it has n revisions.
func collect(t *testing.T, s store.Store, prefix string, from int64, n int) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	var got []string
	last := from
	enough := errors.New("enough")
	err := s.Watch(ctx, prefix, from, func(rev int64, events []store.Event) error {
		if rev <= last {
			t.Errorf("revision %d came after %d", rev, last)
		}
		for _, e := range events {
			if e.Rev != rev {
				t.Errorf("event of %s: got revision %d, want %d", e.Key, e.Rev, rev)
			}
		}
		last = rev
		if got = append(got, render(events)); len(got) == n {
			return enough
		}
		return nil
	})
	wantErr(t, err, enough)
	return got
}

func watch(t *testing.T, s store.Store) {
	mustTxn(t, s, put("w/old", "0"))
	_, rev, err := s.List(t.Context(), "w/")
	require.NoError(t, err)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for _, ops := range [][]store.Op{
			{put("w/b", "1"), put("x", "1"), put("w/a", "1")},
			{put("x", "2")},
			{put("w/a", "2"), {Key: "w/b", Delete: true}, {Key: "w/none", Delete: true}},
		} {
			if _, err := s.Txn(t.Context(), nil, ops); err != nil {
				t.Errorf("writing: %v", err)
			}
		}
	})
	got := collect(t, s, "w/", rev, 2)
	want := []string{"w/a=1 w/b=1", "w/a=2 w/b!"}
	if !sameRevisions(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// sameRevisions compares revision by revision; events within one may come in
// any order.
func sameRevisions(got, want []string) bool {
	if len(got) != len(want) {
		return false
	}
	for i := range got {
		g, w := strings.Fields(got[i]), strings.Fields(want[i])
		if len(g) != len(w) {
			return false
		}
		for _, part := range w {
			if !strings.Contains(" "+got[i]+" ", " "+part+" ") {
				return false
			}
		}
	}
	return true
}

func watchFrom(t *testing.T, s store.Store) {
	rev := mustTxn(t, s, put("k", "1"))
	mustTxn(t, s, put("k", "2"))
	mustTxn(t, s, put("k", "3"))
	if got, want := collect(t, s, "k", rev, 2), []string{"k=2", "k=3"}; !sameRevisions(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	// The whole of one revision, however large.
	var ops []store.Op
	for i := range store.MaxOps {
		ops = append(ops, store.Op{Key: fmt.Sprint("big/", i), Value: make([]byte, store.MaxValue/store.MaxOps)})
	}
	rev = mustTxn(t, s, put("k", "4"))
	mustTxn(t, s, ops...)
	if got := collect(t, s, "big/", rev, 1); len(strings.Fields(got[0])) != store.MaxOps {
		t.Errorf("got %d events at once, want %d", len(strings.Fields(got[0])), store.MaxOps)
	}
}

func watchEnds(t *testing.T, s store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	started := make(chan struct{})
	rev := mustTxn(t, s, put("k", "0"))
	go func() {
		ended <- s.Watch(ctx, "", rev-1, func(int64, []store.Event) error { close(started); return nil })
	}()
	<-started
	cancel()
	wantErr(t, <-ended, context.Canceled)
}

// watchUnderLoad has many writers and three watchers, which must see the same.
func watchUnderLoad(t *testing.T, s store.Store) {
	const writers, each = 4, 25
	rev := mustTxn(t, s, put("begin", ""))
	seen := make([]string, 3)
	var wg sync.WaitGroup
	for i := range seen {
		wg.Go(func() { seen[i] = strings.Join(collect(t, s, "l/", rev, writers*each), ";") })
	}
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if _, err := s.Txn(t.Context(), nil, []store.Op{put(fmt.Sprint("l/", w), fmt.Sprint(i))}); err != nil {
					t.Errorf("writing: %v", err)
				}
			}
		})
	}
	wg.Wait()
	if seen[0] != seen[1] || seen[1] != seen[2] {
		t.Errorf("three watchers saw different things:\n%s\n%s\n%s", seen[0], seen[1], seen[2])
	}
}
