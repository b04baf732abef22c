package peercred

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// dialEnv makes the test binary a program that connects to an address and waits.
const dialEnv = "PEERCRED_TEST_DIAL"

func TestMain(m *testing.M) {
	if addr := os.Getenv(dialEnv); addr != "" {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		_, _ = io.Copy(io.Discard, c)
		os.Exit(0)
	}
	if role := os.Getenv(roleEnv); role != "" {
		os.Exit(playRole(role))
	}
	goleak.VerifyTestMain(m)
}

// skip leaves a test out where the machine lacks something; CI lacks nothing.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

func listen(t *testing.T, network, addr string) *net.TCPListener {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil && network == "tcp6" {
		skip(t, "no IPv6 here: %v", err)
	}
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// dial connects to l from a local address and returns both ends.
func dial(t *testing.T, l *net.TCPListener, network, from string) (client, server *net.TCPConn) {
	t.Helper()
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	if from != "" {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from))
	}
	c, err := d.Dial(network, l.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	s, err := l.AcceptTCP()
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	return c.(*net.TCPConn), s
}

func own() uint32 { return uint32(os.Geteuid()) }

func wantOwn(t *testing.T, c net.Conn) {
	t.Helper()
	if uid, err := UID(c); err != nil || uid != own() {
		t.Errorf("got uid %d, %v, want %d", uid, err, own())
	}
}

func wantNoOwner(t *testing.T, c net.Conn) {
	t.Helper()
	if uid, err := UID(c); !errors.Is(err, ErrNoOwner) {
		t.Errorf("got uid %d, %v, want %v", uid, err, ErrNoOwner)
	}
}

func TestUnix(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	require.NoError(t, err)
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	require.NoError(t, err)
	s, err := l.Accept()
	require.NoError(t, err)
	defer s.Close()
	want := Cred{own(), uint32(os.Getegid()), int32(os.Getpid())}
	if got, err := Unix(s.(*net.UnixConn)); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	wantOwn(t, s)
	c.Close()
	wantOwn(t, s) // the credentials are those of the connect
	s.Close()
	if _, err := Unix(s.(*net.UnixConn)); err == nil {
		t.Error("a closed connection has credentials")
	}
}

func TestTCP(t *testing.T) {
	for _, c := range []struct{ network, addr string }{{"tcp4", "127.0.0.1:0"}, {"tcp6", "[::1]:0"}} {
		t.Run(c.network, func(t *testing.T) {
			client, server := dial(t, listen(t, c.network, c.addr), c.network, "")
			wantOwn(t, server)
			require.NoError(t, client.CloseWrite())
			wantOwn(t, server) // a client may end its writing early
		})
	}
}

// TestTCPMapped connects IPv4 and IPv6 sockets with each other.
func TestTCPMapped(t *testing.T) {
	both := listen(t, "tcp", "[::]:0") // also takes IPv4
	_, server := dial(t, both, "tcp4", "127.0.0.1:0")
	wantOwn(t, server)

	four := listen(t, "tcp4", "127.0.0.1:0")
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		skip(t, "no IPv6 here: %v", err)
	}
	defer unix.Close(fd)
	addr := &unix.SockaddrInet6{Port: four.Addr().(*net.TCPAddr).Port, Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}
	require.NoError(t, unix.Connect(fd, addr))
	server, err = four.AcceptTCP()
	require.NoError(t, err)
	defer server.Close()
	wantOwn(t, server)
}

// TestTCPOrphan: what nobody holds any more belongs to nobody, and not to root,
// whose number the kernel then reports.
func TestTCPOrphan(t *testing.T) {
	l := listen(t, "tcp4", "127.0.0.1:0")
	client, server := dial(t, l, "tcp4", "")
	client.Close()
	wantNoOwner(t, server) // FIN_WAIT2

	client, server = dial(t, l, "tcp4", "")
	client.Close()
	_, err := io.ReadAll(server)
	require.NoError(t, err)
	require.NoError(t, server.CloseWrite())
	wantNoOwner(t, server) // TIME_WAIT

	client, server = dial(t, l, "tcp4", "")
	require.NoError(t, client.SetLinger(0))
	client.Close()
	wantNoOwner(t, server) // reset
}

// TestTCPExact opens connections with the same two ports between other addresses
// of this machine: sock_diag's dump does not tell them apart.
func TestTCPExact(t *testing.T) {
	l := listen(t, "tcp4", "127.0.0.1:0")
	gone, server := dial(t, l, "tcp4", "")
	port := gone.LocalAddr().(*net.TCPAddr).Port
	_, other := dial(t, l, "tcp4", fmt.Sprintf("127.0.0.2:%d", port))
	wantOwn(t, server)
	wantOwn(t, other)
	require.NoError(t, gone.SetLinger(0))
	gone.Close()
	wantNoOwner(t, server)
	wantOwn(t, other)
}

// TestTCPListener asks for a connection from an address where somebody listens:
// the kernel answers with the listener.
func TestTCPListener(t *testing.T) {
	l := listen(t, "tcp4", "127.0.0.1:0")
	server := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}
	if uid, err := TCP(server, l.Addr()); !errors.Is(err, ErrNoOwner) {
		t.Errorf("got uid %d, %v, want %v", uid, err, ErrNoOwner)
	}
}

// TestTCPSuccessor: our connection was reset and its client's addresses are in
// use again. The old connection's bytes are not the new one's.
func TestTCPSuccessor(t *testing.T) {
	l := listen(t, "tcp4", "127.0.0.1:0")
	first, server := dial(t, l, "tcp4", "")
	addr := first.LocalAddr().String()
	require.NoError(t, first.SetLinger(0))
	first.Close()
	_, successor := dial(t, l, "tcp4", addr)
	if _, err := TCP(server.LocalAddr(), server.RemoteAddr()); err != nil {
		t.Fatalf("the test shows nothing: %v", err)
	}
	wantNoOwner(t, server)
	wantOwn(t, successor)
}

// TestTCPOtherUser is the only test here that tells users apart; it needs root to
// be another user as well.
func TestTCPOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "needs root to start a process of another user")
	}
	const other = 4242
	exe := copyOfSelf(t)
	l := listen(t, "tcp4", "127.0.0.1:0")
	cmd := exec.Command(exe)
	cmd.Env = []string{dialEnv + "=" + l.Addr().String()}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: other, Gid: other}}
	require.NoError(t, cmd.Start())
	require.NoError(t, l.SetDeadline(time.Now().Add(10*time.Second)))
	server, err := l.AcceptTCP()
	require.NoError(t, err)
	if uid, err := UID(server); err != nil || uid != other {
		t.Errorf("got uid %d, %v, want %d", uid, err, other)
	}
	server.Close()
	require.NoError(t, cmd.Wait())
}

// copyOfSelf puts the test binary where every user can start it.
func copyOfSelf(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	dir, err := os.MkdirTemp("/tmp", "peercred")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	data, err := os.ReadFile(self)
	require.NoError(t, err)
	path := filepath.Join(dir, "test")
	require.NoError(t, os.WriteFile(path, data, 0o755))
	return path
}

func TestOtherConnections(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if uid, err := UID(a); err == nil {
		t.Errorf("net.Pipe belongs to %d", uid)
	}
	var none *net.TCPAddr
	good := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}
	for _, addr := range []net.Addr{nil, none, &net.TCPAddr{}, &net.TCPAddr{IP: good.IP}, &net.UnixAddr{Name: "x"}, &net.TCPAddr{IP: net.IPv6loopback, Port: 1}} {
		if uid, err := TCP(good, addr); err == nil {
			t.Errorf("%v belongs to %d", addr, uid)
		}
		if uid, err := TCP(addr, good); err == nil {
			t.Errorf("%v belongs to %d", addr, uid)
		}
	}
}

var (
	near = netip.MustParseAddrPort("127.0.0.1:40000")
	far  = netip.MustParseAddrPort("127.0.0.1:9001")
)

// answer is a sock_diag answer for near → far.
func answer(state uint8, uid, inode uint32) []byte {
	b := make([]byte, msgLen)
	b[0], b[msgState] = unix.AF_INET, state
	copy(b[msgSockID:], diagRequest(near, far)[reqSockID:])
	binary.NativeEndian.PutUint32(b[msgUID:], uid)
	binary.NativeEndian.PutUint32(b[msgInode:], inode)
	return b
}

func TestDiagOwner(t *testing.T) {
	for state := range uint8(16) {
		uid, err := diagOwner(answer(state, 1000, 77), near, far)
		switch state {
		case 1, 4, 5, 8, 9, 11: // established, and either side ending
			if err != nil || uid != 1000 {
				t.Errorf("state %d: got %d, %v", state, uid, err)
			}
		default:
			if !errors.Is(err, ErrNoOwner) {
				t.Errorf("state %d: got %d, %v", state, uid, err)
			}
		}
	}
	if uid, err := diagOwner(answer(unix.BPF_TCP_ESTABLISHED, 0, 0), near, far); !errors.Is(err, ErrNoOwner) {
		t.Errorf("inode 0: got %d, %v", uid, err)
	}
	good := answer(unix.BPF_TCP_ESTABLISHED, 1000, 77)
	if uid, err := diagOwner(good, far, near); !errors.Is(err, ErrNoOwner) {
		t.Errorf("other addresses: got %d, %v", uid, err)
	}
	if uid, err := diagOwner(good[:msgLen-1], near, far); err == nil {
		t.Errorf("short answer: got %d", uid)
	}
}

func FuzzDiagOwner(f *testing.F) {
	f.Add(answer(unix.BPF_TCP_ESTABLISHED, 1000, 77))
	f.Add(answer(unix.BPF_TCP_TIME_WAIT, 0, 0))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if uid, err := diagOwner(b, near, far); err != nil && uid != 0 {
			t.Errorf("refused, yet %d", uid)
		}
	})
}

func BenchmarkUID(b *testing.B) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(b, err)
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	require.NoError(b, err)
	defer c.Close()
	s, err := l.Accept()
	require.NoError(b, err)
	defer s.Close()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := UID(s); err != nil {
			b.Fatal(err)
		}
	}
}
