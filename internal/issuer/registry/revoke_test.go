package registry

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func (f *fixture) enrol(t *testing.T, name string) Instance {
	t.Helper()
	inst, err := f.Redeem(t.Context(), f.token(t, name))
	require.NoError(t, err)
	return inst
}

func (f *fixture) subject(kind RevocationKind, name string) Order {
	return Order{Subjects: []Subject{{kind, name}}, Actor: "alice", Origin: "admin socket", Reason: "stolen laptop"}
}

// TestRevokedIDGetsNothing: tokens, enrolment keys and renewals of a revoked ID
// are refused; readmitted, it may renew once no new SVID can be taken for an old
// one.
func TestRevokedIDGetsNothing(t *testing.T) {
	f := newFixture(t)
	inst := f.enrol(t, "payments")
	early := f.token(t, "payments")
	other := f.enrol(t, "orders")
	id := inst.ID.String()

	got, err := f.Revoke(t.Context(), f.subject(RevokedID, id))
	require.NoError(t, err)
	v, ok := got.find(RevokedID, id)
	require.True(t, ok)
	if !v.Blocked || v.Reason != "stolen laptop" || !v.Bound().After(time.Unix(0, f.now.Load())) {
		t.Errorf("got %+v", v)
	}
	_, redeem := f.Redeem(t.Context(), early)
	_, create := f.CreateToken(t.Context(), TokenRequest{Workload: "payments"})
	for what, err := range map[string]error{
		"renewal": f.Entitled(t.Context(), inst.ID, inst.Name), "redemption": redeem, "new token": create,
	} {
		if !errors.Is(err, ErrRevoked) {
			t.Errorf("%s: got %v", what, err)
		}
	}
	if err := f.Entitled(t.Context(), other.ID, other.Name); err != nil {
		t.Errorf("another ID: %v", err)
	}

	_, err = f.Unrevoke(t.Context(), f.subject(RevokedID, id))
	require.NoError(t, err)
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); !errors.Is(err, ErrReadmitting) {
		t.Errorf("at once: got %v", err)
	}
	f.add(revokeMargin + time.Second)
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); err != nil {
		t.Errorf("readmitted: %v", err)
	}
	all, err := f.Revocations(t.Context())
	require.NoError(t, err)
	if v, ok := all.find(RevokedID, id); !ok || v.Blocked || !v.At.Equal(got.All[0].At) {
		t.Errorf("what was issued before is forgotten: %+v", all)
	}
	if all.Number <= got.Number {
		t.Errorf("number %d after %d", all.Number, got.Number)
	}
}

func TestRevokedInstanceLeavesItsSiblings(t *testing.T) {
	f := newFixture(t)
	one, two := f.enrol(t, "payments"), f.enrol(t, "payments")
	_, err := f.Revoke(t.Context(), f.subject(RevokedInstance, one.Name))
	require.NoError(t, err)
	if err := f.Entitled(t.Context(), one.ID, one.Name); !errors.Is(err, ErrRevoked) {
		t.Errorf("got %v", err)
	}
	if err := f.Entitled(t.Context(), two.ID, two.Name); err != nil {
		t.Errorf("sibling: %v", err)
	}
}

// TestRevocationNumberSurvivesRestore: a store that was set back to an older
// state still gives a newer number to the next change.
func TestRevocationNumberSurvivesRestore(t *testing.T) {
	f := newFixture(t)
	first, err := f.Revoke(t.Context(), f.subject(RevokedSerial, "0a"))
	require.NoError(t, err)
	f.add(time.Second)
	lost, err := f.Revoke(t.Context(), f.subject(RevokedSerial, "0b"))
	require.NoError(t, err)

	number, err := put(keyRevocation, revocationNumber{first.Number})
	require.NoError(t, err)
	_, err = f.store.Txn(t.Context(), nil, []store.Op{number, {Key: revocationKey(RevokedSerial, "0b"), Delete: true}})
	require.NoError(t, err)
	f.add(time.Second)
	next, err := f.Revoke(t.Context(), f.subject(RevokedSerial, "0c"))
	require.NoError(t, err)
	if next.Number <= lost.Number || first.Number >= lost.Number {
		t.Errorf("numbers %d, %d, then %d", first.Number, lost.Number, next.Number)
	}
}

// TestRevokeMany: an order larger than one transaction is carried out whole, and
// two at once do not undo each other.
func TestRevokeMany(t *testing.T) {
	f := newFixture(t)
	order := func(prefix string) Order {
		o := Order{Actor: "alice"}
		for i := range 250 {
			o.Subjects = append(o.Subjects, Subject{RevokedInstance, fmt.Sprintf("%s%d", prefix, i)})
		}
		return o
	}
	errs := make(chan error, 2)
	for _, p := range []string{"a", "b"} {
		go func() {
			_, err := f.Revoke(t.Context(), order(p))
			errs <- err
		}()
	}
	require.NoError(t, errors.Join(<-errs, <-errs))
	all, err := f.Revocations(t.Context())
	require.NoError(t, err)
	if len(all.All) != 500 {
		t.Errorf("%d revocations, want 500", len(all.All))
	}
}

// TestRemovedWorkloadIsRevoked: what was issued under an ID that no Workload has
// any more stays refused when the ID is defined again.
func TestRemovedWorkloadIsRevoked(t *testing.T) {
	f := newFixture(t)
	inst := f.enrol(t, "payments")
	id := inst.ID.String()
	both := []policy.CompiledWorkload{workload("payments", attest.KindJoinToken), workload("orders", attest.KindJoinToken)}
	require.NoError(t, f.ReviseRemoved(t.Context()))
	if all, _ := f.Revocations(t.Context()); len(all.All) != 0 {
		t.Errorf("revoked while defined: %+v", all)
	}

	f.SetWorkloads(both[1:])
	require.NoError(t, f.ReviseRemoved(t.Context()))
	all, err := f.Revocations(t.Context())
	require.NoError(t, err)
	removed, ok := all.find(RevokedID, id)
	if !ok || !removed.Removed || removed.Blocked {
		t.Fatalf("got %+v", all)
	}
	require.NoError(t, f.ReviseRemoved(t.Context()))
	if again, _ := f.Revocations(t.Context()); again.Number != all.Number {
		t.Error("a second look changed the list")
	}

	f.add(time.Hour)
	f.SetWorkloads(both)
	require.NoError(t, f.ReviseRemoved(t.Context()))
	all, err = f.Revocations(t.Context())
	require.NoError(t, err)
	if v, ok := all.find(RevokedID, id); !ok || v.Removed || !v.At.Equal(removed.At) {
		t.Errorf("got %+v", all)
	}
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); err != nil {
		t.Errorf("defined again: %v", err)
	}

	f.add(f.life() + time.Second)
	require.NoError(t, f.ReviseRemoved(t.Context()))
	if all, _ := f.Revocations(t.Context()); len(all.All) != 0 {
		t.Errorf("never forgotten: %+v", all)
	}
}

func TestWatchRevocations(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	seen := make(chan Revocations, 8)
	done := make(chan error, 1)
	go func() {
		done <- f.WatchRevocations(ctx, func(all Revocations) error { seen <- all; return nil })
	}()
	if first := <-seen; len(first.All) != 0 {
		t.Errorf("got %+v", first)
	}
	_, err := f.RevokeIssuer(t.Context(), []byte{1, 2}, time.Unix(0, f.now.Load()), time.Unix(0, f.now.Load()).Add(time.Hour), Order{Actor: "alice"})
	require.NoError(t, err)
	if next := <-seen; len(next.All) != 1 || next.All[0].Subject != "0102" || next.All[0].Kind != RevokedIssuer {
		t.Errorf("got %+v", next)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
