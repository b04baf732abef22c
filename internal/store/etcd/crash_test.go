package etcd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// victimDir tells a copy of this test binary to be the process that is killed.
const victimDir = "STORE_TEST_VICTIM_DIR"

// victim counts up in the store and prints each number that was acknowledged,
// until it is killed.
func victim(dir string) {
	s, err := Embedded(context.Background(), EmbeddedConfig{Dir: dir, Log: hclog.Default()})
	for n := 1; err == nil; n++ {
		value := []byte(strconv.Itoa(n))
		_, err = s.Txn(context.Background(), nil, []store.Op{{Key: "a", Value: value}, {Key: "b", Value: value}})
		fmt.Println(n)
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// TestKilled shows that what was acknowledged survives kill -9, whole, and that
// the folder can be opened again at once.
func TestKilled(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for range 2 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), victimDir+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		acked := 0
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if acked, err = strconv.Atoi(lines.Text()); err != nil || acked == 50 {
				break
			}
		}
		require.NoError(t, cmd.Process.Kill())
		cmd.Wait() // says that it was killed
		require.Equal(t, 50, acked)

		s, err := Embedded(t.Context(), EmbeddedConfig{Dir: dir, Log: hclog.NewNullLogger()})
		require.NoError(t, err)
		a, err := s.Get(t.Context(), "a")
		require.NoError(t, err)
		b, err := s.Get(t.Context(), "b")
		require.NoError(t, err)
		if n, _ := strconv.Atoi(string(a.Value)); n < acked || string(b.Value) != string(a.Value) {
			t.Errorf("after the kill: got %s and %s, want the same number, at least %d", a.Value, b.Value, acked)
		}
		require.NoError(t, s.Close())
	}
}

// wire forwards TCP to a server, until it is cut.
type wire struct {
	l  net.Listener
	wg sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
}

func newWire(t *testing.T, to string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	w := &wire{l: l}
	w.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			w.join(conn, to)
		}
	})
	t.Cleanup(func() { l.Close(); w.cut(); w.wg.Wait() })
	return w
}

func (w *wire) join(conn net.Conn, to string) {
	peer, err := net.Dial("tcp", to)
	if err != nil {
		conn.Close()
		return
	}
	w.mu.Lock()
	w.conns = append(w.conns, conn, peer)
	w.mu.Unlock()
	for _, pair := range [][2]net.Conn{{conn, peer}, {peer, conn}} {
		w.wg.Go(func() {
			io.Copy(pair[0], pair[1])
			pair[0].Close()
		})
	}
}

// cut drops every connection.
func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.conns {
		c.Close()
	}
	w.conns = nil
}

// TestExternalAway shows that a watch misses nothing while the network is cut
// and the cluster restarts.
func TestExternalAway(t *testing.T) {
	t.Parallel()
	e := newExternal(t, false)
	w := newWire(t, e.client.Host)
	s, err := Dial(t.Context(), Config{Endpoints: []string{(&url.URL{Scheme: "http", Host: w.l.Addr().String()}).String()}, Log: hclog.NewNullLogger()})
	require.NoError(t, err)
	defer s.Close()
	rev, err := s.Txn(t.Context(), nil, []store.Op{{Key: "k", Value: []byte("0")}})
	require.NoError(t, err)

	got := make(chan string, 10)
	ended := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	go func() {
		ended <- s.Watch(ctx, "k", rev, func(_ int64, events []store.Event) error {
			got <- string(events[0].Value)
			return nil
		})
	}()
	write := func(value string) {
		t.Helper()
		require.Eventually(t, func() bool {
			_, err := s.Txn(ctx, nil, []store.Op{{Key: "k", Value: []byte(value)}})
			return err == nil
		}, 10*time.Second, 10*time.Millisecond)
		if v := <-got; v != value {
			t.Errorf("got %s, want %s", v, value)
		}
	}
	write("1")
	w.cut()
	write("2")
	for _, l := range e.server.Clients {
		l.Close() // else the client is back before the server has ended
	}
	w.cut()
	e.server.Close()
	e.start(t)
	write("3")
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}

// flaky ends each watch after its first response, as a member without a leader
// does.
type flaky struct{ clientv3.Watcher }

func (f flaky) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	ctx, cancel := context.WithCancel(ctx)
	in := f.Watcher.Watch(ctx, key, opts...)
	out := make(chan clientv3.WatchResponse)
	go func() {
		defer close(out)
		defer cancel()
		if resp, ok := <-in; ok {
			out <- resp
		}
	}()
	return out
}

// TestWatchBegunAgain shows that a watch which etcd's client gives up on goes on
// where it was, with nothing lost and nothing twice.
func TestWatchBegunAgain(t *testing.T) {
	t.Parallel()
	c := embedded(t, t.TempDir()).(*client)
	c.etcd.Watcher = flaky{c.etcd.Watcher}
	rev, err := c.Txn(t.Context(), nil, []store.Op{{Key: "k"}})
	require.NoError(t, err)
	const n = 4
	got := make(chan string, 10*n)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- c.Watch(ctx, "", rev, func(_ int64, events []store.Event) error {
			got <- string(events[0].Value)
			return nil
		})
	}()
	for i := range n {
		value := fmt.Sprint(i)
		_, err := c.Txn(t.Context(), nil, []store.Op{{Key: "k", Value: []byte(value)}})
		require.NoError(t, err)
		if v := <-got; v != value {
			t.Errorf("got %s, want %s", v, value)
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}
