package tunnel

import (
	"context"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var target = Target{Host: "payments.shop.mesh", Port: 8080}

const testID = "0123456789abcdef"

// loopback returns the two ends of a TCP connection; the test closes them.
func loopback(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		accepted <- c
	}()
	client, err = net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	server = <-accepted
	require.NotNil(t, server)
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// within gives a context that ends a hanging test.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// sessions starts a session on each end.
func sessions(t testing.TB, a, b net.Conn, cfg Config) (client, server *Session) {
	t.Helper()
	ctx := within(t, 20*time.Second)
	client, err := Client(ctx, a, cfg)
	require.NoError(t, err)
	server, err = Server(ctx, b, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// streams opens one stream and accepts it.
func streams(t testing.TB, client, server *Session) (c, s *Stream) {
	t.Helper()
	ctx := within(t, 20*time.Second)
	accepted := make(chan *Stream, 1)
	go func() {
		defer close(accepted)
		in, err := server.Accept(ctx)
		if err != nil {
			return
		}
		if st, err := in.Accept(testID); err == nil {
			accepted <- st
		}
	}()
	c, err := client.Open(ctx, target)
	require.NoError(t, err)
	s = <-accepted
	require.NotNil(t, s)
	return c, s
}

// each runs a test over TCP and over an in-memory pipe, which buffers nothing.
func each(t *testing.T, f func(t *testing.T, a, b net.Conn)) {
	t.Run("tcp", func(t *testing.T) {
		a, b := loopback(t)
		f(t, a, b)
	})
	t.Run("pipe", func(t *testing.T) {
		a, b := net.Pipe()
		t.Cleanup(func() { a.Close(); b.Close() })
		f(t, a, b)
	})
}

func pair(t testing.TB, a, b net.Conn, cfg Config) (c, s *Stream) {
	t.Helper()
	cs, ss := sessions(t, a, b, cfg)
	return streams(t, cs, ss)
}

// gone waits for the end of a session.
func gone(t testing.TB, s *Session) {
	t.Helper()
	select {
	case <-s.Done():
	case <-time.After(4 * time.Second): // less than lingerClean: nobody may have to wait for that
		t.Fatal("session did not end")
	}
}

func readAll(t testing.TB, r io.Reader, want string) {
	t.Helper()
	got, err := io.ReadAll(r)
	if err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q, nil", got, err, want)
	}
}

func readN(t testing.TB, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	_, err := io.ReadFull(r, got)
	if err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q, nil", got, err, want)
	}
}
