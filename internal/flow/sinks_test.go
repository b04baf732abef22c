package flow

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	als "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func ids(flows []Flow) string {
	s := ""
	for _, f := range flows {
		s += f.ID[15:]
	}
	return s
}

func TestRingKeepsTheNewest(t *testing.T) {
	r := NewRing(4)
	for i := range 7 {
		r.Record(sample(i))
	}
	odd := func(f *Flow) bool { return (f.ID[15]-'0')%2 == 1 }
	for _, c := range []struct {
		n     int
		match func(*Flow) bool
		want  string
	}{
		{0, nil, "3456"}, {2, nil, "56"}, {9, nil, "3456"}, {1, odd, "5"}, {0, odd, "35"},
	} {
		if got := ids(r.Newest(c.n, c.match)); got != c.want {
			t.Errorf("Newest(%d): got %s, want %s", c.n, got, c.want)
		}
	}
	if f, ok := r.Find(odd); !ok || f.ID[15] != '3' {
		t.Errorf("Find: got %v %v, want the oldest odd one", f.ID, ok)
	}
	if _, ok := r.Find(func(*Flow) bool { return false }); ok {
		t.Error("Find: found nothing there is")
	}
}

func TestRingFollow(t *testing.T) {
	for _, c := range []struct {
		n    int
		want string
	}{{-1, "0123456789"}, {0, "3456789"}, {1, "23456789"}} {
		r := NewRing(100)
		for i := range 3 {
			r.Record(sample(i))
		}
		stop := errors.New("enough")
		var seen []Flow
		var wg sync.WaitGroup
		wg.Go(func() {
			err := r.Follow(t.Context(), c.n, nil, func(f Flow, _ uint64) error {
				seen = append(seen, f)
				if f.ID[15] == '9' {
					return stop
				}
				return nil
			})
			if !errors.Is(err, stop) {
				t.Errorf("Follow: %v", err)
			}
		})
		waiting := func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.more != nil }
		require.Eventually(t, waiting, 5*time.Second, time.Millisecond)
		for i := 3; i < 10; i++ {
			r.Record(sample(i))
		}
		wg.Wait()
		if got := ids(seen); got != c.want {
			t.Errorf("Follow(%d): got %s, want %s", c.n, got, c.want)
		}
	}
}

func TestRingCountsWhatASlowFollowerMissed(t *testing.T) {
	r := NewRing(4)
	r.Record(sample(0))
	var seen []Flow
	var last uint64
	stop := errors.New("enough")
	err := r.Follow(t.Context(), -1, nil, func(f Flow, dropped uint64) error {
		if len(seen) == 0 { // while this one is slow, ten more come
			for i := range 10 {
				r.Record(sample(i))
			}
		}
		seen, last = append(seen, f), dropped
		if len(seen) == 5 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || ids(seen) != "06789" || last != 6 {
		t.Errorf("got %s, dropped %d, %v; want 06789, 6", ids(seen), last, err)
	}
}

func TestRingFollowEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- NewRing(1).Follow(ctx, 0, nil, func(Flow, uint64) error { return nil }) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestTee(t *testing.T) {
	a, b := NewRing(1), NewRing(1)
	Tee(a, b).Record(sample(3))
	if a.Len() != 1 || b.Len() != 1 {
		t.Errorf("got %d and %d records, want one each", a.Len(), b.Len())
	}
}

func TestJSONLWritesEverythingBeforeItStops(t *testing.T) {
	path := filepath.Join(t.TempDir(), "flows.jsonl")
	j, err := OpenJSONL(path, 1000, hclog.NewNullLogger())
	require.NoError(t, err)
	for i := range 500 {
		j.Record(sample(i))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.NoError(t, j.Run(ctx))
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	n := 0
	for s := bufio.NewScanner(f); s.Scan(); n++ {
		var got Flow
		require.NoError(t, json.Unmarshal(s.Bytes(), &got))
		if got != sample(n) {
			t.Fatalf("line %d: got %+v", n+1, got)
		}
	}
	if info, _ := f.Stat(); n != 500 || info.Mode().Perm() != 0o600 {
		t.Errorf("got %d lines, mode %o; want 500, 600", n, info.Mode().Perm())
	}
}

func TestJSONLNeverBlocks(t *testing.T) {
	// Every write to /dev/full fails as a full disk does.
	j, err := OpenJSONL("/dev/full", 10, hclog.NewNullLogger())
	require.NoError(t, err)
	for i := range 15 {
		j.Record(sample(i))
	}
	if got := j.Dropped(); got != 5 {
		t.Errorf("full queue: got %d dropped, want 5", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- j.Run(ctx) }()
	require.Eventually(t, func() bool { return j.Dropped() > 5 }, 5*time.Second, time.Millisecond)
	j.Record(sample(1))
	cancel()
	require.NoError(t, <-done)
}

// collector is the other end of a Stream. It records what it was sent and ends
// a call after so many messages if told to.
type collector struct {
	als.UnimplementedAccessLogServiceServer
	ring *Ring
	node chan string
	end  int
}

func (c *collector) StreamAccessLogs(s als.AccessLogService_StreamAccessLogsServer) error {
	for n := 0; c.end == 0 || n < c.end; n++ {
		m, err := s.Recv()
		if err != nil {
			return s.SendAndClose(&als.StreamAccessLogsResponse{})
		}
		if id := m.GetIdentifier(); id != nil {
			c.node <- id.GetNode().GetId()
		}
		for _, e := range m.GetTcpLogs().GetLogEntry() {
			f, err := FromALS(e)
			if err != nil {
				return err
			}
			c.ring.Record(f)
		}
	}
	return errors.New("over")
}

func dialCollector(t *testing.T, c *collector) *grpc.ClientConn {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	srv := grpc.NewServer()
	als.RegisterAccessLogServiceServer(srv, c)
	served := make(chan error)
	go func() { served <- srv.Serve(ln) }()
	conn, err := grpc.NewClient(ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(); srv.Stop(); <-served })
	return conn
}

func TestStreamDelivers(t *testing.T) {
	c := &collector{ring: NewRing(2000), node: make(chan string, 1)}
	conn := dialCollector(t, c)
	s := NewStream(StreamConfig{Node: "spiffe://shop.example/orders", Batch: 7})
	for i := range 100 {
		s.Record(sample(i))
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx, conn) }()
	require.Eventually(t, func() bool { return c.ring.Len() == 100 }, 5*time.Second, time.Millisecond)
	if got := <-c.node; got != "spiffe://shop.example/orders" {
		t.Errorf("node: got %q", got)
	}
	// What is queued when the stop comes is sent all the same.
	for i := 100; i < 1000; i++ {
		s.Record(sample(i))
	}
	cancel()
	require.NoError(t, <-done)
	got := c.ring.Newest(0, nil)
	if len(got) != 1000 || s.Dropped() != 0 {
		t.Fatalf("got %d records, %d dropped; want 1000, 0", len(got), s.Dropped())
	}
	for i, f := range got {
		if f != sample(i) {
			t.Fatalf("record %d: got %+v", i, f)
		}
	}
}

func TestStreamSurvivesItsConnection(t *testing.T) {
	c := &collector{ring: NewRing(100), node: make(chan string, 9), end: 1}
	conn := dialCollector(t, c)
	s := NewStream(StreamConfig{Queue: 10})
	if err := s.Run(t.Context(), conn); err == nil {
		t.Fatal("a call that ended gave no error")
	}
	for i := range 12 {
		s.Record(sample(i))
	}
	if got := s.Dropped(); got != 2 {
		t.Errorf("got %d dropped while away, want 2", got)
	}
	c2 := &collector{ring: NewRing(100), node: make(chan string, 1)}
	conn2 := dialCollector(t, c2)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error)
	go func() { done <- s.Run(ctx, conn2) }()
	require.Eventually(t, func() bool { return c2.ring.Len() == 10 }, 5*time.Second, time.Millisecond)
	cancel()
	require.NoError(t, <-done)
}

// A collector that reads nothing must not hold up a stop.
type deaf struct {
	als.UnimplementedAccessLogServiceServer
	stop chan struct{}
}

func (d *deaf) StreamAccessLogs(als.AccessLogService_StreamAccessLogsServer) error {
	<-d.stop
	return nil
}

func TestStreamStopsWithADeafCollector(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	srv := grpc.NewServer()
	d := &deaf{stop: make(chan struct{})}
	als.RegisterAccessLogServiceServer(srv, d)
	served := make(chan error)
	go func() { served <- srv.Serve(ln) }()
	conn, err := grpc.NewClient(ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer func() { close(d.stop); _ = conn.Close(); srv.Stop(); <-served }()

	s := NewStream(StreamConfig{})
	for i := range 2000 { // more than a flow-control window holds
		f := sample(i)
		f.Decision = policy.Decision{Reason: "some reason that takes room"}
		s.Record(f)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx, conn) }()
	require.Eventually(t, func() bool { return len(s.queue) < 2000 }, 5*time.Second, time.Millisecond)
	cancel()
	select {
	case err := <-done:
		if err == nil {
			t.Error("records were lost, want an error")
		}
	case <-time.After(4 * time.Second):
		t.Fatal("the stop hangs")
	}
}
