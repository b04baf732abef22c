package controlplane

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

func endpoint(port uint16) record {
	return record{ID: "spiffe://test.example/server", Instance: "a", Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), Ports: []uint16{80}}
}

// TestLostLease: when the lease has ended, with every endpoint under it, the
// sidecars are asked to announce again, and what they announce has a lease.
func TestLostLease(t *testing.T) {
	s := store.NewMemory()
	defer s.Close()
	e := &endpoints{store: s, log: hclog.NewNullLogger(), renew: time.Millisecond}
	_, err := e.publish(t.Context(), endpoint(1))
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	lost, done := make(chan struct{}, 1), make(chan error, 1)
	go func() { done <- e.keepLease(ctx, func() { lost <- struct{}{} }) }()
	require.NoError(t, s.Revoke(ctx, e.lease))
	select {
	case <-lost:
	case <-time.After(10 * time.Second):
		t.Fatal("nobody was told")
	}
	_, err = e.publish(ctx, endpoint(2))
	require.NoError(t, err)
	kv, err := s.Get(ctx, endpoint(2).key())
	require.NoError(t, err)
	if _, ep, err := parseRecord(kv); err != nil || ep.Addr.Port() != 2 {
		t.Errorf("stored %+v, %v", ep, err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("keepLease ended with %v", err)
	}
}

// TestWithdrawLeavesNewer: the end of an old stream does not take what a newer
// one has published.
func TestWithdrawLeavesNewer(t *testing.T) {
	s := store.NewMemory()
	defer s.Close()
	e := &endpoints{store: s, log: hclog.NewNullLogger()}
	old, err := e.publish(t.Context(), endpoint(1))
	require.NoError(t, err)
	current, err := e.publish(t.Context(), endpoint(2))
	require.NoError(t, err)
	require.NoError(t, e.withdraw(t.Context(), endpoint(1), old))
	if _, err := s.Get(t.Context(), endpoint(2).key()); err != nil {
		t.Errorf("the newer endpoint: %v", err)
	}
	require.NoError(t, e.withdraw(t.Context(), endpoint(2), current))
	if _, err := s.Get(t.Context(), endpoint(2).key()); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("after its own withdrawal: %v, want ErrNotFound", err)
	}
}
