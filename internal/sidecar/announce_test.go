package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

// board is an Announcer that remembers, for each open stream, what was said.
type board struct {
	sallyportv1.UnimplementedAnnouncerServer
	refuse bool

	mu   sync.Mutex
	said []string // guarded by mu
	open int      // guarded by mu
}

func (b *board) Announce(stream sallyportv1.Announcer_AnnounceServer) error {
	b.mu.Lock()
	b.open++
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.open--
		b.mu.Unlock()
	}()
	for {
		req, err := stream.Recv()
		if err != nil {
			return nil
		}
		if b.refuse {
			return status.Error(codes.PermissionDenied, "port 1 is not declared")
		}
		published := fmt.Sprintf("127.0.0.1:%d", req.GetTunnelPort())
		b.mu.Lock()
		b.said = append(b.said, fmt.Sprintf("%d%v%t", req.GetTunnelPort(), req.GetPorts(), req.GetDraining()))
		b.mu.Unlock()
		if req.GetDraining() {
			published = ""
		}
		if err := stream.Send(&sallyportv1.AnnounceResponse{Published: published}); err != nil {
			return err
		}
	}
}

func (b *board) state() (string, int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return fmt.Sprint(b.said), b.open
}

func dialBoard(t *testing.T, b *board) *grpc.ClientConn {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	srv := grpc.NewServer()
	sallyportv1.RegisterAnnouncerServer(srv, b)
	served := make(chan error)
	go func() { served <- srv.Serve(ln) }()
	conn, err := grpc.NewClient(ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(); srv.Stop(); <-served })
	return conn
}

// runAnnouncer runs a stream; the returned function ends it.
func runAnnouncer(t *testing.T, a *announcer, conn *grpc.ClientConn, spoken func(string)) (end func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.run(ctx, conn, spoken) }()
	end = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err == nil {
			t.Error("run returned nil")
		}
	})
	t.Cleanup(end)
	return end
}

func request(ports ...uint32) *sallyportv1.AnnounceRequest {
	return &sallyportv1.AnnounceRequest{TunnelPort: 15008, Ports: ports}
}

func TestAnnouncerSaysWhatChanges(t *testing.T) {
	b := &board{}
	conn := dialBoard(t, b)
	a := newAnnouncer(hclog.NewNullLogger())
	heard := make(chan string, 10)
	end := runAnnouncer(t, a, conn, func(p string) { heard <- p })
	a.set(request(80))
	if got := <-heard; got != "127.0.0.1:15008" || !a.published() {
		t.Errorf("published %q, %v", got, a.published())
	}
	a.set(request(80)) // nothing new
	a.set(request(80, 81))
	<-heard

	// A second stream says the newest thing at once, while the first still stands.
	heard2 := make(chan string, 10)
	runAnnouncer(t, a, conn, func(p string) { heard2 <- p })
	<-heard2
	if said, open := b.state(); said != "[15008[80]false 15008[80 81]false 15008[80 81]false]" || open != 2 {
		t.Errorf("said %s on %d streams", said, open)
	}
	end()

	require.NoError(t, a.withdraw(t.Context()))
	if said, _ := b.state(); said != "[15008[80]false 15008[80 81]false 15008[80 81]false 0[]true]" {
		t.Errorf("said %s", said)
	}
	a.set(request(90)) // after that it stays silent
	if a.want.GetTunnelPort() != 0 {
		t.Error("a stopping sidecar announced itself again")
	}
}

func TestWithdrawDoesNotWaitInVain(t *testing.T) {
	a := newAnnouncer(hclog.NewNullLogger())
	require.NoError(t, a.withdraw(t.Context()), "nothing was announced")

	a = newAnnouncer(hclog.NewNullLogger())
	a.set(request(80))
	require.NoError(t, a.withdraw(t.Context()), "there is no stream")

	// A control plane that does not answer is waited for as long as told.
	a = newAnnouncer(hclog.NewNullLogger())
	a.set(request(80))
	a.addStream(1)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := a.withdraw(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestAnnouncerHearsARefusal(t *testing.T) {
	a := newAnnouncer(hclog.NewNullLogger())
	a.set(request(1))
	err := a.run(t.Context(), dialBoard(t, &board{refuse: true}), func(string) {})
	if status.Code(err) != codes.PermissionDenied || a.published() {
		t.Errorf("got %v, published %v", err, a.published())
	}
}

func TestBackoff(t *testing.T) {
	var b backoff
	if d := b.next(); d > 200*time.Millisecond {
		t.Errorf("first retry after %v, want at most 200ms", d)
	}
	for range 100 {
		if d := b.next(); d <= 0 || d > lastRetry {
			t.Fatalf("retry after %v", d)
		}
	}
	if b.d != lastRetry {
		t.Errorf("nominal pause %v, want %v in the end", b.d, lastRetry)
	}
	b.reset()
	if d := b.next(); d > 200*time.Millisecond {
		t.Errorf("after reset: %v", d)
	}
}
