package peercred

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestServedExecutable looks at programs on a file system that a program serves:
// what that shows proves nothing, and when it hangs, its user alone waits.
func TestServedExecutable(t *testing.T) {
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		t.Skipf("no FUSE here: %v", err)
	} else {
		f.Close()
	}
	runInNamespace(t, "fuse")
}

// startProgram starts a program that waits for the end of its input.
func startProgram(path string, uid int) (pid int, end func() error, err error) {
	cmd := exec.Command(path)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if uid != os.Geteuid() {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, nil, err
	}
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	return cmd.Process.Pid, func() error { return errors.Join(in.Close(), cmd.Wait()) }, nil
}

// lookUp is a lookup that ends after a while, if not by itself.
func lookUp(i *Inspector, pid int, within time.Duration) (*Process, error) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	p, err := i.PID(ctx, pid)
	if err == nil {
		p.Close()
	}
	return p, err
}

const (
	patience = 30 * time.Second // for what comes
	glance   = 100 * time.Millisecond
)

func served() (err error) {
	dir, err := os.MkdirTemp("", "peercred")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	cat, err := exec.LookPath("cat")
	if err != nil {
		return err
	}
	content, err := os.ReadFile(cat)
	if err != nil {
		return err
	}
	fs, err := mountFuse(dir, content)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH)) }()
	answer := sync.OnceFunc(func() { close(fs.free) })
	defer answer() // or this process could not end
	bin := filepath.Join(dir, "bin")
	odd, end, err := startProgram(bin, os.Geteuid())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	plain, end2, err := startProgram(cat, os.Geteuid())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end2()) }()

	var i Inspector
	p, err := lookUp(&i, odd, patience)
	if err != nil {
		return err
	}
	if p.SHA256 != "" || p.Path != bin || !strings.Contains(fmt.Sprint(p.Missing), "FUSE") {
		return fmt.Errorf("a served executable: got %+v", p)
	}
	fs.hang.Store(true)
	if err := hung(&i, fs, odd, plain, cat); err != nil {
		return err
	}
	answer()
	if p, err = lookUp(&i, plain, patience); err != nil || p.SHA256 == "" {
		return fmt.Errorf("after all: got %+v, %w", p, err)
	}
	return nil
}

// hung looks up a process whose file system does not answer, and others meanwhile.
func hung(i *Inspector, fs *fuse, odd, plain int, cat string) error {
	for n := range maxTurns {
		if _, err := lookUp(i, odd, glance); !errors.Is(err, ErrBusy) {
			return fmt.Errorf("hung lookup %d: got %v", n, err)
		}
		for end := time.Now().Add(patience); fs.held.Load() <= int32(n) && time.Now().Before(end); {
			time.Sleep(time.Millisecond) // until it has come to the kernel
		}
	}
	if _, err := lookUp(i, odd, glance); !errors.Is(err, ErrBusy) {
		return fmt.Errorf("one lookup more: got %v", err)
	}
	if _, err := lookUp(i, plain, glance); !errors.Is(err, ErrBusy) {
		return fmt.Errorf("the same user's other program: got %v", err)
	}
	if got := fs.held.Load(); got != maxTurns {
		return fmt.Errorf("%d lookups hang, want %d", got, maxTurns)
	}
	if os.Geteuid() == 0 {
		other, end, err := startProgram(cat, 65534)
		if err != nil {
			return err
		}
		p, err := lookUp(i, other, patience)
		if err = errors.Join(err, end()); err != nil || p.SHA256 == "" {
			return fmt.Errorf("another user's program: got %+v, %w", p, err)
		}
	}
	return nil
}

// TestNosuidIsNotRemembered: a user may have brought that file system, with inode
// numbers and times as he likes them.
func TestNosuidIsNotRemembered(t *testing.T) { runInNamespace(t, "nosuid") }

func nosuid() (err error) {
	dir, err := os.MkdirTemp("", "peercred")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	cat, err := exec.LookPath("cat")
	if err != nil {
		return err
	}
	if cat, err = filepath.EvalSymlinks(cat); err != nil {
		return err
	}
	if err := unix.Mount(filepath.Dir(cat), dir, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH)) }()
	if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_NOSUID, ""); err != nil {
		return err
	}
	var i Inspector
	for n, path := range []string{filepath.Join(dir, filepath.Base(cat)), cat} {
		pid, end, err := startProgram(path, os.Geteuid())
		if err != nil {
			return err
		}
		p, err := lookUp(&i, pid, patience)
		if err = errors.Join(err, end()); err != nil {
			return err
		}
		if p.SHA256 == "" || len(i.hashes) != n {
			return fmt.Errorf("%s: SHA-256 %q; remembers %v, want %d", path, p.SHA256, i.hashes, n)
		}
	}
	return nil
}

// TestLargeExecutable: hashing ends with the caller's patience, and leaves nothing
// behind.
func TestLargeExecutable(t *testing.T) {
	cat, err := exec.LookPath("cat")
	require.NoError(t, err)
	content, err := os.ReadFile(cat)
	require.NoError(t, err)
	bin := filepath.Join(t.TempDir(), "bin")
	require.NoError(t, os.WriteFile(bin, content, 0o755))
	require.NoError(t, os.Truncate(bin, maxExe)) // a hole after the program
	pid, end, err := startProgram(bin, os.Geteuid())
	require.NoError(t, err)
	defer func() { require.NoError(t, end()) }()
	var i Inspector
	if p, err := lookUp(&i, pid, 5*time.Millisecond); !errors.Is(err, ErrBusy) {
		t.Errorf("got %+v, %v", p, err)
	}
	begin := time.Now()
	require.Eventually(t, func() bool {
		i.mu.Lock()
		defer i.mu.Unlock()
		return i.looking == 0 && len(i.turns) == 0
	}, patience, time.Millisecond)
	t.Logf("its turn ended %v later", time.Since(begin))
	p, err := lookUp(&i, pid, patience)
	require.NoError(t, err)
	if p.SHA256 == "" {
		t.Errorf("with more patience: %+v", p)
	}
	require.NoError(t, end())
	require.NoError(t, os.Truncate(bin, maxExe+1))
	pid, end, err = startProgram(bin, os.Geteuid())
	require.NoError(t, err)
	if p, err = lookUp(&i, pid, patience); err != nil || p.SHA256 != "" || p.Path != bin || len(p.Missing) != 1 {
		t.Errorf("one byte too large: got %+v, %v", p, err)
	}
}

// TestTurns: users do not wait for each other, until there are too many in all.
func TestTurns(t *testing.T) {
	var i Inspector
	soon, cancel := context.WithCancel(t.Context())
	for range maxTurns {
		require.NoError(t, i.enter(t.Context(), 7))
	}
	cancel()
	if err := i.enter(soon, 7); !errors.Is(err, ErrBusy) {
		t.Errorf("one more: got %v", err)
	}
	for n := range maxLooking - maxTurns {
		require.NoError(t, i.enter(t.Context(), uint32(1000+n)))
	}
	if err := i.enter(t.Context(), 8); !errors.Is(err, ErrBusy) {
		t.Errorf("beyond all: got %v", err)
	}
	waits := make(chan error)
	go func() { waits <- i.enter(t.Context(), 7) }()
	i.leave(1000)
	i.leave(7)
	require.NoError(t, <-waits)
	for range maxTurns {
		i.leave(7)
	}
	for n := range maxLooking - maxTurns - 1 {
		i.leave(uint32(1001 + n))
	}
	if i.looking != 0 || len(i.turns) != 0 {
		t.Errorf("left behind: %d, %v", i.looking, i.turns)
	}
}

// TestAbandonedHashing: nobody waits any more, and it ends.
func TestAbandonedHashing(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "exe"))
	require.NoError(t, err)
	defer f.Close()
	for _, n := range []int64{0, betweenChecks, 2*betweenChecks + 1} { // whole steps and not
		require.NoError(t, f.Truncate(n))
		got, err := sum(t.Context(), f)
		require.NoError(t, err)
		if want := sha256.Sum256(make([]byte, n)); got != hex.EncodeToString(want[:]) {
			t.Errorf("%d bytes: got %s, want %x", n, got, want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := sum(ctx, f); !errors.Is(err, ErrBusy) {
		t.Errorf("abandoned: got %q, %v", got, err)
	}
}
