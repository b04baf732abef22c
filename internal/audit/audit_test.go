package audit

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

var noon = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

func newStore(t *testing.T) store.Store {
	t.Helper()
	s := store.NewMemory()
	t.Cleanup(func() { s.Close() })
	return s
}

func TestLog(t *testing.T) {
	s := newStore(t)
	l := New(s, func() time.Time { return noon })
	full := Record{Actor: "ann", Origin: "10.0.0.1", Action: "policy.apply", Subject: "billing", Detail: "+ a.yaml", Result: "applied 1.2"}
	require.NoError(t, l.Append(t.Context(), full))
	_, err := s.Txn(t.Context(), nil, []store.Op{l.Op(Record{Action: "second"}), l.Op(Record{Action: "third"}), {Key: "the change"}})
	require.NoError(t, err)
	require.NoError(t, New(s, time.Now).Append(t.Context(), Record{Action: "earlier", Time: noon.Add(-time.Hour)}))

	got, err := l.Recent(t.Context(), 0)
	require.NoError(t, err)
	var order []string
	for _, r := range got {
		order = append(order, r.Action)
	}
	if want := "third second policy.apply earlier"; strings.Join(order, " ") != want {
		t.Errorf("got %v, want %s", order, want)
	}
	full.Time = noon
	if got[2] != full {
		t.Errorf("got %+v, want %+v", got[2], full)
	}
	got, err = l.Recent(t.Context(), 1)
	require.NoError(t, err)
	if len(got) != 1 || got[0].Action != "third" {
		t.Errorf("got %+v, want the newest one", got)
	}
}

func TestLongFields(t *testing.T) {
	l := New(newStore(t), time.Now)
	for _, huge := range []string{strings.Repeat("é", 1<<20), strings.Repeat("<", 1<<20)} {
		op := l.Op(Record{Actor: huge, Origin: huge, Action: huge, Subject: huge, Detail: huge, Result: huge})
		if len(op.Value) > 128<<10 {
			t.Errorf("got a record of %d bytes, want at most 128 KiB", len(op.Value))
		}
		for _, limit := range []int{MaxField, MaxDetail} {
			got := cut(huge, limit)
			if len(got) > limit || !utf8.ValidString(got) || !strings.HasSuffix(got, "bytes more)") {
				t.Errorf("cut at %d: got %d bytes ending in %q", limit, len(got), got[len(got)-20:])
			}
		}
	}
	if got := cut("short", 5); got != "short" {
		t.Errorf("got %q, want short", got)
	}
}

func TestRetention(t *testing.T) {
	s := newStore(t)
	l := New(s, time.Now)
	write := func(n, size int) {
		t.Helper()
		var ops []store.Op
		for i := range n {
			ops = append(ops, l.Op(Record{Action: fmt.Sprint(i), Detail: strings.Repeat("x", size)}))
		}
		for batch := range slices.Chunk(ops, 50) {
			_, err := s.Txn(t.Context(), nil, batch)
			require.NoError(t, err)
		}
		require.NoError(t, l.Trim(t.Context()))
	}
	write(MaxRecords+300, 1)
	got, err := l.Recent(t.Context(), 0)
	require.NoError(t, err)
	if len(got) != MaxRecords || got[0].Action != fmt.Sprint(MaxRecords+299) {
		t.Errorf("got %d records, the newest %s, want %d", len(got), got[0].Action, MaxRecords)
	}
	write(2500, MaxDetail)
	kvs, _, err := s.List(t.Context(), prefix)
	require.NoError(t, err)
	size := 0
	for _, kv := range kvs {
		size += len(kv.Value)
	}
	if size > MaxBytes || size < MaxBytes/2 {
		t.Errorf("got %d bytes, want just below %d", size, MaxBytes)
	}
}

// However often sidecars enrol, what people did stays.
func TestEnrolmentsDoNotPushOutChanges(t *testing.T) {
	s := newStore(t)
	l := New(s, time.Now)
	require.NoError(t, l.Append(t.Context(), Record{Action: "policy.apply"}))
	ops := make([]store.Op, MaxRecords+300)
	for i := range ops {
		ops[i] = l.Op(Record{Action: ActionIssue, Detail: fmt.Sprint(i)})
	}
	for batch := range slices.Chunk(ops, store.MaxOps) {
		_, err := s.Txn(t.Context(), nil, batch)
		require.NoError(t, err)
	}
	require.NoError(t, l.Trim(t.Context()))
	got, err := l.Recent(t.Context(), 0)
	require.NoError(t, err)
	if len(got) != MaxRoutine+1 || got[0].Detail != fmt.Sprint(len(ops)-1) || got[MaxRoutine].Action != "policy.apply" {
		t.Errorf("got %d records from %+v to %+v, want the newest %d enrolments and the change", len(got), got[0], got[len(got)-1], MaxRoutine)
	}
}

// Nor do renewals push out enrolments, however many there are, nor does reading
// the log mean reading them.
func TestRenewalsHaveBoundsOfTheirOwn(t *testing.T) {
	s := newStore(t)
	l := New(s, time.Now)
	require.NoError(t, l.Append(t.Context(), Record{Action: "policy.apply"}))
	require.NoError(t, l.Append(t.Context(), Record{Action: ActionIssue}))
	ops := make([]store.Op, MaxRenewals+trimRenewalsEvery)
	for i := range ops {
		ops[i] = l.Op(Record{Action: []string{ActionRenew, ActionJWT}[i%2], Detail: fmt.Sprint(i)})
	}
	for batch := range slices.Chunk(ops, store.MaxOps) {
		_, err := s.Txn(t.Context(), nil, batch)
		require.NoError(t, err)
	}
	require.NoError(t, l.Trim(t.Context()))
	changes, err := l.Recent(t.Context(), 0)
	require.NoError(t, err)
	if len(changes) != 2 || changes[0].Action != ActionIssue || changes[1].Action != "policy.apply" {
		t.Errorf("got %+v, want the enrolment and the change", changes)
	}
	renewals, err := l.Renewals(t.Context(), 0)
	require.NoError(t, err)
	if len(renewals) != MaxRenewals || renewals[0].Detail != fmt.Sprint(len(ops)-1) {
		t.Errorf("got %d renewals, the newest %+v, want the newest %d", len(renewals), renewals[0], MaxRenewals)
	}
}

func TestParallelWriters(t *testing.T) {
	s := newStore(t)
	var wg sync.WaitGroup
	for range 4 {
		l := New(s, func() time.Time { return noon }) // as replicas with one clock
		wg.Go(func() {
			for range 50 {
				if err := l.Append(t.Context(), Record{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got, err := New(s, time.Now).Recent(t.Context(), 0)
	require.NoError(t, err)
	if len(got) != 200 {
		t.Errorf("got %d records, want 200", len(got))
	}
}
