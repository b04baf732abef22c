package capture

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestG1OnlyAllowedUsers: connections of users who are not allowed reach no
// handler. The peer is this process; what changes is who is allowed.
func TestG1OnlyAllowedUsers(t *testing.T) {
	for kind, addr := range doors {
		for name, c := range map[string]struct {
			allow []uint32
			want  string
		}{
			"own":           {[]uint32{ownUID()}, "hello"},
			"own and other": {[]uint32{other(), ownUID()}, "hello"},
			"other":         {[]uint32{other()}, ""},
			"nobody":        {nil, ""},
		} {
			t.Run(kind+"/"+name, func(t *testing.T) {
				var log logBuffer
				l := open1(t, Config{Listen: addr(t), AllowUIDs: c.allow, Log: log.logger()})
				wait, _ := serve(t, l, greet)
				const connections = 20
				for range connections {
					got, err := io.ReadAll(dial(t, l))
					if string(got) != c.want {
						t.Fatalf("got %q, %v, want %q", got, err, c.want)
					}
				}
				require.NoError(t, l.Close())
				require.NoError(t, wait())
				refused, lines := 0, 0
				if c.want == "" {
					refused, lines = connections, 1 // the log is not for knocking on
				}
				if got := l.Refused(); got != uint64(refused) {
					t.Errorf("%d refused, want %d", got, refused)
				}
				if got := strings.Count(log.String(), "local connection refused"); got != lines {
					t.Errorf("%d log lines, want %d:\n%s", got, lines, &log)
				}
				if lines > 0 && !strings.Contains(log.String(), fmt.Sprintf("uid %d is not allowed", ownUID())) {
					t.Errorf("the log does not say who: %s", &log)
				}
			})
		}
	}
}

// TestRemote admits whoever comes: TLS is to tell them apart.
func TestRemote(t *testing.T) {
	l := open1(t, Config{Listen: "127.0.0.1:0", Remote: true})
	serve(t, l, greet)
	if got, err := io.ReadAll(dial(t, l)); string(got) != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestMaxConns(t *testing.T) {
	for kind, addr := range doors {
		t.Run(kind, func(t *testing.T) {
			l := open1(t, Config{Listen: addr(t), AllowUIDs: []uint32{ownUID()}, MaxConns: 2})
			entered, release := make(chan struct{}, 10), make(chan struct{})
			defer close(release)
			serve(t, l, func(_ context.Context, c net.Conn) {
				entered <- struct{}{}
				<-release
				c.Close()
			})
			for range 3 {
				dial(t, l)
			}
			<-entered
			<-entered
			select {
			case <-entered:
				t.Fatal("a third connection was served")
			case <-time.After(50 * time.Millisecond):
			}
			release <- struct{}{}
			<-entered // its turn now
		})
	}
}

// TestCloseLetsHandlersFinish and the next one are the two ways to stop.
func TestCloseLetsHandlersFinish(t *testing.T) {
	l := open1(t, Config{Listen: "127.0.0.1:0", AllowUIDs: []uint32{ownUID()}})
	entered, release := make(chan context.Context), make(chan struct{})
	wait, _ := serve(t, l, func(ctx context.Context, c net.Conn) {
		entered <- ctx
		<-release
		greet(ctx, c)
	})
	c := dial(t, l)
	ctx := <-entered
	require.NoError(t, l.Close())
	require.NoError(t, l.Close()) // again
	if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
		t.Error("still accepting")
	}
	if err := ctx.Err(); err != nil {
		t.Errorf("the handler was told to stop: %v", err)
	}
	close(release)
	if got, err := io.ReadAll(c); string(got) != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
	require.NoError(t, wait())
}

func TestCancelStopsHandlers(t *testing.T) {
	for kind, addr := range doors {
		t.Run(kind, func(t *testing.T) {
			l := open1(t, Config{Listen: addr(t), AllowUIDs: []uint32{ownUID()}, MaxConns: 1})
			entered := make(chan struct{})
			ended := false
			wait, cancel := serve(t, l, func(ctx context.Context, c net.Conn) {
				close(entered)
				<-ctx.Done()
				c.Close()
				time.Sleep(50 * time.Millisecond) // Serve has this long to return too early
				ended = true
			})
			dial(t, l)
			<-entered // and Serve waits for a slot
			cancel()
			require.NoError(t, wait())
			if !ended {
				t.Error("Serve did not wait for its handler")
			}
			if _, err := net.Dial(l.Addr().Network(), l.Addr().String()); err == nil {
				t.Error("still accepting")
			}
		})
	}
}

func TestPlainTCP(t *testing.T) {
	l := open1(t, Config{Listen: "127.0.0.1:0"})
	raw, err := l.net.(*net.TCPListener).SyscallConn()
	require.NoError(t, err)
	var protocol int
	require.NoError(t, raw.Control(func(fd uintptr) {
		protocol, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PROTOCOL)
	}))
	require.NoError(t, err)
	if protocol != unix.IPPROTO_TCP {
		t.Errorf("protocol %d, want %d", protocol, unix.IPPROTO_TCP)
	}
}

func TestListenErrors(t *testing.T) {
	taken := open1(t, Config{Listen: "127.0.0.1:0"}).Addr().String()
	for name, c := range map[string]struct {
		cfg  Config
		want string
	}{
		"in use":       {Config{Listen: taken}, "outbound[1].listen: " + taken + " is in use by another program; stop that one or choose another port"},
		"everywhere":   {Config{Listen: "0.0.0.0:9001"}, "0.0.0.0:9001 is reachable from other machines; give a loopback address such as 127.0.0.1:9001"},
		"no host":      {Config{Listen: ":9001"}, ":9001 is reachable from other machines"},
		"IPv6":         {Config{Listen: "[::]:9001"}, "is reachable from other machines"},
		"other host":   {Config{Listen: "192.0.2.1:9001", Remote: true}, "192.0.2.1:9001 is no address of this machine"},
		"no port":      {Config{Listen: "127.0.0.1"}, `"127.0.0.1" is not an address to listen on`},
		"empty":        {Config{}, `"" is not an address to listen on`},
		"bad port":     {Config{Listen: "127.0.0.1:99999"}, "is not an address to listen on"},
		"remote users": {Config{Listen: "127.0.0.1:0", Remote: true, AllowUIDs: []uint32{1}}, "users cannot be told apart"},
		"remote unix":  {Config{Listen: "unix:/tmp/x", Remote: true}, "not reachable from the network"},
		"abstract":     {Config{Listen: "unix:@x"}, "not the path of a Unix socket"},
		"no path":      {Config{Listen: "unix:"}, "not the path of a Unix socket"},
		"long path":    {Config{Listen: "unix:/" + strings.Repeat("a", 107)}, "socket path of 108 bytes, at most 107"},
		"no folder":    {Config{Listen: "unix:/nonexistent/s"}, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			c.cfg.Key = "outbound[1].listen"
			l, err := Listen(c.cfg)
			if err == nil {
				l.Close()
				t.Fatal("listening")
			}
			if got := err.Error(); !strings.HasPrefix(got, "outbound[1].listen: ") || !strings.Contains(got, c.want) || strings.Contains(got, "\n") {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
