package ca

import (
	"bytes"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

func sequence(t *testing.T, b *spiffebundle.Bundle) uint64 {
	t.Helper()
	n, ok := b.SequenceNumber()
	require.True(t, ok, "no sequence number")
	return n
}

// sameContent compares bundles but for their sequence numbers.
func sameContent(t *testing.T, a, b *spiffebundle.Bundle) bool {
	a, b = a.Clone(), b.Clone()
	a.ClearSequenceNumber()
	b.ClearSequenceNumber()
	return a.Equal(b)
}

func TestB411_SequenceGrowsWithEveryChange(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	a := open(t, cfg)
	cfg.Replica = "1"
	b := open(t, cfg)
	last, changes := a.Bundle(), 0
	for range 200 {
		for i, c := range []*CA{a, b, a} {
			require.NoError(t, c.Advance(t.Context()))
			now := c.Bundle()
			switch was, is := sequence(t, last), sequence(t, now); {
			case sameContent(t, last, now) && was != is:
				t.Fatalf("replica %d: sequence %d became %d without a change", i, was, is)
			case !sameContent(t, last, now) && is <= was:
				t.Fatalf("replica %d: the content changed and the sequence went from %d to %d", i, was, is)
			case was != is:
				changes++
			}
			last = now
		}
		clk.Add(6 * time.Hour)
	}
	if changes < 10 {
		t.Errorf("only %d changes in 1200 hours", changes)
	}
	require.NoError(t, a.Advance(t.Context()))
	last = a.Bundle()
	if got := open(t, cfg).Bundle(); !got.Equal(last) {
		t.Errorf("after a restart: sequence %d, was %d", sequence(t, got), sequence(t, last))
	}
}

// A store that came back from a backup has forgotten the last numbers.
func TestB411_SequenceGrowsOverARestore(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	c := open(t, cfg)
	backup, _, err := cfg.Store.List(t.Context(), "")
	require.NoError(t, err)
	var highest uint64
	for range 3 {
		clk.Add(190 * time.Hour)
		require.NoError(t, c.Advance(t.Context()))
		highest = max(highest, sequence(t, c.Bundle()))
	}
	mem := store.NewMemory()
	t.Cleanup(func() { mem.Close() })
	for _, kv := range backup {
		_, err := mem.Txn(t.Context(), nil, []store.Op{{Key: kv.Key, Value: kv.Value}})
		require.NoError(t, err)
	}
	cfg.Store = mem
	clk.Add(time.Minute)
	if got := sequence(t, open(t, cfg).Bundle()); got <= highest {
		t.Errorf("sequence %d after a restore, %d was seen before", got, highest)
	}
}

func TestB412_RefreshHintIsWholeSeconds(t *testing.T) {
	for _, root := range []time.Duration{360 * time.Hour, 36 * time.Minute, 90 * time.Second} {
		cfg := config(t, newClock())
		cfg.RootTTL, cfg.IntermediateTTL, cfg.SVIDTTL = root, root/6, root/36
		bundle := open(t, cfg).Bundle()
		hint, ok := bundle.RefreshHint()
		if !ok || hint%time.Second != 0 || hint < time.Second || hint > max(root/48, time.Second) || hint > maxRefreshHint {
			t.Errorf("roots of %v: hint %v", root, hint)
		}
		doc, err := bundle.Marshal()
		require.NoError(t, err)
		if !bytes.Contains(doc, []byte(`"spiffe_refresh_hint":`)) || !bytes.Contains(doc, []byte(`"spiffe_sequence":`)) {
			t.Errorf("got %s", doc)
		}
		back, err := spiffebundle.Parse(td, doc)
		require.NoError(t, err)
		if !back.Equal(bundle) {
			t.Error("a peer reads another bundle")
		}
	}
}

func TestIssueForLessThanConfigured(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk)) // SVIDs live 10 h
	for _, row := range []struct{ ttl, want time.Duration }{
		{0, 10 * time.Hour}, {time.Hour, time.Hour}, {time.Second, time.Second}, {10 * time.Hour, 10 * time.Hour}, {11 * time.Hour, 10 * time.Hour},
	} {
		issued, err := c.Issue(t.Context(), Request{ID: payments, Key: newECKey(t).Public(), TTL: row.ttl})
		require.NoError(t, err)
		if got := issued.Chain[0].NotAfter.Sub(clk.Now()); got != row.want {
			t.Errorf("asked for %v: got %v, want %v", row.ttl, got, row.want)
		}
	}
	for _, ttl := range []time.Duration{-time.Hour, time.Millisecond} {
		if _, err := c.Issue(t.Context(), Request{ID: payments, Key: newECKey(t).Public(), TTL: ttl}); err == nil {
			t.Errorf("asked for %v: issued", ttl)
		}
	}
	// The linter knows the promise too.
	key := newECKey(t)
	long, err := c.Issue(t.Context(), Request{ID: payments, Key: key.Public()})
	require.NoError(t, err)
	if err := c.lintSVID(long, Request{ID: payments, Key: key.Public(), TTL: time.Hour}, clk.Now()); err == nil {
		t.Error("released 10 h where 1 h was asked for")
	}
}
