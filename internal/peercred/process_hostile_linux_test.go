package peercred

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

func connectAndSetuid(path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setuid(65534)); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// TestD6ConnOfChangedUser: a process is not told by the user that it was together
// with the groups and the program that it has since.
func TestD6ConnOfChangedUser(t *testing.T) {
	if own() != 0 {
		skip(t, "not root")
	}
	c, pid, stop := start(t, "setuid", nil)
	defer stop()
	require.Eventually(t, func() bool {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		return err == nil && strings.Contains(string(status), "Uid:\t65534\t65534")
	}, 10e9, 1e6)
	var i Inspector
	if p, err := i.Conn(t.Context(), c); !errors.Is(err, ErrChanged) {
		t.Errorf("got %+v, %v", p, err)
	}
}

// TestOuterProc looks up process 1 of a pid namespace in which /proc is still that
// of its parent, where number 1 is another process.
func TestOuterProc(t *testing.T) {
	if own() != 0 {
		skip(t, "not root: a namespace of its own is needed")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=outerproc")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
}

func lookUpSelf() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var i Inspector
	p, err := i.PID(context.Background(), os.Getpid())
	if err != nil {
		return err
	}
	defer p.Close()
	if os.Getpid() != 1 || p.Path != self {
		return fmt.Errorf("number %d: got %s, want %s", os.Getpid(), p.Path, self)
	}
	return nil
}

func TestPIDRefusesNonsense(t *testing.T) {
	var i Inspector
	for _, pid := range []int{0, -1} {
		if p, err := i.PID(t.Context(), pid); err == nil || errors.Is(err, ErrGone) {
			t.Errorf("%d: got %+v, %v", pid, p, err)
		}
	}
}

// TestFreshExecutable: a file that was written a moment ago can be written again
// without a trace in its times, so that its hash is not remembered.
func TestFreshExecutable(t *testing.T) {
	c, _, stop := start(t, "connect", nil) // from a new copy of the test binary
	defer stop()
	var i Inspector
	p, err := i.Conn(t.Context(), c)
	require.NoError(t, err)
	p.Close()
	if p.SHA256 == "" || len(i.hashes) != 0 {
		t.Errorf("SHA-256 %q; remembers %v", p.SHA256, i.hashes)
	}
	cat := exec.Command("cat")
	in, err := cat.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cat.Start())
	old, err := i.PID(t.Context(), cat.Process.Pid)
	require.NoError(t, err)
	old.Close()
	in.Close()
	require.NoError(t, cat.Wait())
	if old.SHA256 == "" || len(i.hashes) != 1 {
		t.Errorf("%s: SHA-256 %q; remembers %v", filepath.Base(old.Path), old.SHA256, i.hashes)
	}
}
