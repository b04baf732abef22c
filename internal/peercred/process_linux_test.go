package peercred

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// roleEnv makes the test binary another program: see playRole.
const roleEnv = "PEERCRED_TEST_ROLE"

func playRole(role string) int {
	name, arg, _ := strings.Cut(role, " ")
	var err error
	switch name {
	case "connect": // connect and wait for the end of input
		err = connectAndWait(arg)
	case "exec": // connect, become another program, keep the socket
		err = connectAndExec(arg)
	case "setuid": // connect, become another user
		err = connectAndSetuid(arg)
	case "outerproc":
		err = lookUpSelf()
	case "race", "shared", "fuse", "nosuid":
		if err = mountProc(); err != nil {
			fmt.Fprintln(os.Stderr, "mounting /proc:", err)
			return exitNoProc
		}
		switch name {
		case "race":
			err = race(arg)
		case "shared":
			err = shared(arg)
		case "fuse":
			err = served()
		case "nosuid":
			err = nosuid()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func connectAndWait(path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func connectAndExec(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0) // not close-on-exec
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	cat, err := exec.LookPath("cat")
	if err != nil {
		return err
	}
	return syscall.Exec(cat, []string{"cat"}, []string{})
}

// start runs the test binary in a role and returns its connection, as the server
// has it, and a function that ends it.
func start(t *testing.T, role string, attr *syscall.SysProcAttr) (c *net.UnixConn, pid int, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "peercred") // every user may enter it
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	defer l.Close()
	require.NoError(t, os.Chmod(path, 0o777))
	bin := filepath.Join(dir, "bin")
	self, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(bin, self, 0o755))
	cmd := exec.Command(bin)
	cmd.Env, cmd.SysProcAttr, cmd.Stderr = append(os.Environ(), roleEnv+"="+role+" "+path), attr, os.Stderr
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	stop = func() {
		in.Close()
		require.NoError(t, cmd.Wait())
	}
	conn, err := l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn.(*net.UnixConn), cmd.Process.Pid, stop
}

func TestConnDescribesTheProcess(t *testing.T) {
	c, pid, stop := start(t, "connect", nil)
	var i Inspector
	p, err := i.Conn(t.Context(), c)
	require.NoError(t, err)
	defer p.Close()
	if int(p.PID) != pid || p.UID != own() || p.GID != uint32(os.Getegid()) {
		t.Errorf("got %+v", p)
	}
	exe, err := os.ReadFile(p.Path)
	require.NoError(t, err)
	if want := sha256.Sum256(exe); p.SHA256 != hex.EncodeToString(want[:]) || filepath.Base(p.Path) != "bin" {
		t.Errorf("path %s, SHA-256 %s", p.Path, p.SHA256)
	}
	if p.Cgroup == "" || len(p.Missing) > 0 {
		t.Errorf("cgroup %q, missing %v", p.Cgroup, p.Missing)
	}
	again, err := i.PID(t.Context(), pid)
	require.NoError(t, err)
	defer again.Close()
	if again.Path != p.Path || again.SHA256 != p.SHA256 || again.UID != p.UID || !slices.Equal(again.Groups, p.Groups) {
		t.Errorf("by number: %+v", again)
	}
	require.NoError(t, p.Alive())
	stop()
	if err := p.Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("after its end: %v", err)
	}
	if _, err := i.Conn(t.Context(), c); !errors.Is(err, ErrGone) {
		t.Errorf("looked up after its end: %v", err)
	}
	if _, err := i.PID(t.Context(), pid); !errors.Is(err, ErrGone) {
		t.Errorf("by number, after its end: %v", err)
	}
}

// TestD6ConnOfAnotherUser: a process of another user is told by its own user,
// groups and file.
func TestD6ConnOfAnotherUser(t *testing.T) {
	if own() != 0 {
		skip(t, "not root")
	}
	c, _, stop := start(t, "connect", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65533, Groups: []uint32{4242}}})
	defer stop()
	var i Inspector
	p, err := i.Conn(t.Context(), c)
	require.NoError(t, err)
	defer p.Close()
	if p.UID != 65534 || p.GID != 65533 || !slices.Equal(p.Groups, []uint32{4242}) || p.User != "nobody" || p.SHA256 == "" {
		t.Errorf("got %+v", p)
	}
}

// TestWithoutPrivilege: what another user's process hides is missing, and said to
// be.
func TestWithoutPrivilege(t *testing.T) {
	if own() == 0 {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestWithoutPrivilege$", "-test.count=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		cmd.Dir = "/"
		cmd.Env = append(os.Environ(), "TMPDIR=/tmp")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		return
	}
	var i Inspector
	p, err := i.PID(t.Context(), 1)
	require.NoError(t, err)
	defer p.Close()
	if p.UID != 0 || p.Path != "" || p.SHA256 != "" || len(p.Missing) != 1 || !strings.Contains(p.Missing[0], "CAP_SYS_PTRACE") {
		t.Errorf("got %+v", p)
	}
}

// TestConnAfterExec: the answer is about the program that the process is now.
func TestConnAfterExec(t *testing.T) {
	c, pid, stop := start(t, "exec", nil)
	defer stop()
	require.Eventually(t, func() bool {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		return err == nil && filepath.Base(link) != "bin"
	}, 10e9, 1e6)
	var i Inspector
	p, err := i.Conn(t.Context(), c)
	require.NoError(t, err)
	defer p.Close()
	if base := filepath.Base(p.Path); base != "cat" && base != "busybox" && base != "coreutils" {
		t.Errorf("got %s", p.Path)
	}
	pidfd, err := holder(c, pid) // as on a kernel without SO_PEERPIDFD
	require.NoError(t, err)
	require.NoError(t, unix.Close(pidfd))
}

// TestReplacedExecutable: another file may be under the path by now, so that the
// path says nothing; the hash is that of what runs.
func TestReplacedExecutable(t *testing.T) {
	c, _, stop := start(t, "connect", nil)
	defer stop()
	var i Inspector
	before, err := i.Conn(t.Context(), c)
	require.NoError(t, err)
	before.Close()
	require.NoError(t, os.Remove(before.Path))
	require.NoError(t, os.WriteFile(before.Path, []byte("another"), 0o755))
	p, err := i.Conn(t.Context(), c)
	require.NoError(t, err)
	p.Close()
	if p.Path != "" || p.SHA256 != before.SHA256 || len(p.Missing) != 1 || !strings.Contains(p.Missing[0], "replaced") {
		t.Errorf("got %+v", p)
	}
}
