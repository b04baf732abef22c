package runner

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// childAttributes puts a child into a process group of its own, so that the
// terminal's Ctrl-C reaches only the runner, and has the kernel kill it when
// the runner dies, however that happens. A descendant that the child itself
// starts is not covered by the latter.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// runOnOneThread runs each function on the same OS thread until the channel is
// closed.
func runOnOneThread(work <-chan func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for f := range work {
		f()
	}
}

// signalGroup sends sig to every process of the group.
func signalGroup(pgid int, sig syscall.Signal) error { return unix.Kill(-pgid, sig) }

// awaitExit blocks until the child has ended and leaves it to be reaped.
func awaitExit(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// lockState makes the state folder and claims it for this process. The claim
// ends with unlock or with the process, however that ends.
func lockState(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the state folder: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "up.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the state folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("locking the state folder %s: %w", dir, err)
		}
		return nil, fmt.Errorf("another `sallyport up` (pid %s) runs on %s; stop it, or choose another folder with --state", pidIn(f), dir)
	}
	// The number is for that message only; the lock is what counts.
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintln(f, os.Getpid())
	}
	return func() { f.Close() }, nil
}

// stateHolder gives the id of the process that has claimed a state folder, "" if
// none has.
func stateHolder(dir string) string {
	f, err := os.Open(filepath.Join(dir, "up.lock"))
	if err != nil {
		return ""
	}
	defer f.Close()
	if !errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK) {
		return ""
	}
	return pidIn(f)
}

// pidIn reads the number in a lock file; it is for messages only.
func pidIn(f *os.File) string {
	text := make([]byte, 32)
	n, _ := f.Read(text)
	return strings.TrimSpace(string(text[:n]))
}
