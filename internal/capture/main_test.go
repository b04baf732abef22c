package capture

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(starvedEnv) != "" {
		os.Exit(starved())
	}
	goleak.VerifyTestMain(m)
}

// doors are the kinds of address to listen on.
var doors = map[string]func(*testing.T) string{
	"tcp":  func(*testing.T) string { return "127.0.0.1:0" },
	"unix": func(t *testing.T) string { return "unix:" + filepath.Join(t.TempDir(), "s") },
}

// other is a user that this test does not run as.
func other() uint32 { return ownUID() + 1 }

func open1(t *testing.T, cfg Config) *Listener {
	t.Helper()
	cfg.Key = "outbound[0].listen"
	l, err := Listen(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l
}

// serve runs l and returns how to wait for its end, and how to cancel it.
func serve(t *testing.T, l *Listener, handler func(context.Context, net.Conn)) (wait func() error, cancel context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Serve(ctx, handler) }()
	wait = sync.OnceValue(func() error {
		select {
		case err := <-done:
			return err
		case <-time.After(10 * time.Second):
			t.Error("Serve does not return")
			return nil
		}
	})
	t.Cleanup(func() { cancel(); wait() })
	return wait, cancel
}

func dial(t *testing.T, l *Listener) net.Conn {
	t.Helper()
	c, err := net.Dial(l.Addr().Network(), l.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	return c
}

// greet is a handler that says hello and hangs up.
func greet(_ context.Context, c net.Conn) {
	_, _ = c.Write([]byte("hello"))
	_ = c.Close()
}

// logBuffer collects what is logged.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBuffer) logger() hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Output: b})
}
