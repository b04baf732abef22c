package capture

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// leftover makes a socket as a killed process leaves it.
func leftover(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	_, err = os.Lstat(path)
	require.NoError(t, err)
	return path
}

func TestUnixReplacesDeadSocket(t *testing.T) {
	path := leftover(t)
	l := open1(t, Config{Listen: "unix:" + path, AllowUIDs: []uint32{ownUID()}})
	serve(t, l, greet)
	if got, err := io.ReadAll(dial(t, l)); string(got) != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
	require.NoError(t, l.Close())
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket was left behind: %v", err)
	}
}

func TestUnixKeepsLiveSocket(t *testing.T) {
	l := open1(t, Config{Listen: doors["unix"](t), AllowUIDs: []uint32{ownUID()}})
	serve(t, l, greet)
	path := l.Addr().String()
	_, err := Listen(Config{Key: "k", Listen: "unix:" + path})
	if err == nil || !strings.Contains(err.Error(), "is in use by another program") {
		t.Errorf("got %v", err)
	}
	if got, err := io.ReadAll(dial(t, l)); string(got) != "hello" {
		t.Errorf("the first listener is gone: got %q, %v", got, err)
	}
}

func TestUnixKeepsWhatIsNoListener(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, []byte("precious"), 0o600))
	link := filepath.Join(dir, "link")
	require.NoError(t, os.Symlink(leftover(t), link))
	datagram := filepath.Join(dir, "datagram")
	d, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: datagram, Net: "unixgram"})
	require.NoError(t, err)
	defer d.Close()
	for _, path := range []string{file, link, datagram, dir} {
		before, err := os.Lstat(path)
		require.NoError(t, err)
		if _, err := Listen(Config{Key: "k", Listen: "unix:" + path}); err == nil {
			t.Errorf("%s was replaced", path)
		}
		after, err := os.Lstat(path)
		if err != nil || !os.SameFile(before, after) {
			t.Errorf("%s was touched: %v", path, err)
		}
	}
}

// TestUnixCloseKeepsOthersSocket closes a listener whose file another process has
// replaced by its own.
func TestUnixCloseKeepsOthersSocket(t *testing.T) {
	l := open1(t, Config{Listen: doors["unix"](t)})
	path := l.Addr().String()
	require.NoError(t, os.Remove(path))
	second, err := net.Listen("unix", path)
	require.NoError(t, err)
	defer second.Close()
	require.NoError(t, l.Close())
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("another's socket was removed: %v", err)
	}
}

// TestUnixRace lets many replace the same dead socket: one wins and stays
// reachable.
func TestUnixRace(t *testing.T) {
	for range 10 {
		path := leftover(t)
		var winner atomic.Pointer[Listener]
		var wins atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if l, err := Listen(Config{Key: "k", Listen: "unix:" + path, AllowUIDs: []uint32{ownUID()}}); err == nil {
					wins.Add(1)
					winner.Store(l)
				}
			})
		}
		wg.Wait()
		if got := wins.Load(); got != 1 {
			t.Fatalf("%d listen", got)
		}
		l := winner.Load()
		wait, cancel := serve(t, l, greet)
		if got, err := io.ReadAll(dial(t, l)); string(got) != "hello" {
			t.Errorf("got %q, %v", got, err)
		}
		cancel()
		require.NoError(t, wait())
	}
}

func TestUnixMode(t *testing.T) {
	for name, c := range map[string]struct {
		allow []uint32
		want  fs.FileMode
	}{
		"nobody":  {nil, 0o600},
		"own":     {[]uint32{ownUID()}, 0o600},
		"another": {[]uint32{other()}, 0o666},
	} {
		t.Run(name, func(t *testing.T) {
			l := open1(t, Config{Listen: doors["unix"](t), AllowUIDs: c.allow})
			info, err := os.Lstat(l.Addr().String())
			require.NoError(t, err)
			if got := info.Mode().Perm(); got != c.want {
				t.Errorf("got %o, want %o", got, c.want)
			}
		})
	}
}
