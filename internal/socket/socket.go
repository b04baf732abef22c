// Package socket makes the unix sockets of the daemons: with their mode from the
// first moment on, in place of what a dead process left behind, never in place of
// a live one.
//
// Who connects is not its business: see package peercred.
package socket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is the length in bytes of the longest path of a Unix socket: the
// kernel's 108 with a final zero.
const maxPath = 107

// probeLimit bounds the question whether somebody listens on a socket.
const probeLimit = time.Second

// Listen listens on path with the given permissions, whatever the umask, and
// returns what closes the listener and removes its file, unless that is another
// process's by then. A socket left behind by a dead process is replaced; a live
// one, or anything else, is not touched. Paths of more than 107 bytes are refused,
// which is the kernel's limit (unix(7)).
func Listen(path string, mode fs.FileMode) (l *net.UnixListener, closing func() error, err error) {
	switch {
	case path == "" || path[0] == '@':
		return nil, nil, fmt.Errorf("%q is not the path of a Unix socket", path)
	case len(path) > maxPath:
		return nil, nil, fmt.Errorf("socket path of %d bytes, at most %d are possible; choose a shorter folder: %s", len(path), maxPath, path)
	}
	unlock, err := lockFolder(filepath.Dir(path))
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, nil, err
	}
	l, err = bind(path, mode)
	if err != nil {
		return nil, nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	if closing, err = unlinkOnClose(l, path, mode); err != nil {
		_ = l.Close()
		return nil, nil, err
	}
	return l, closing, nil
}

// bind listens on path. The socket's own mode becomes that of its file when
// it is bound, less the umask, so there is no moment in which others may connect.
func bind(path string, mode fs.FileMode) (*net.UnixListener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var modeErr error
		err := c.Control(func(fd uintptr) { modeErr = unix.Fchmod(int(fd), uint32(mode)) })
		return errors.Join(err, modeErr)
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false) // by then another process may have put its own socket there
	return u, nil
}

// unlinkOnClose sets the mode that the umask kept from being set, and returns what
// closes l and removes its file, unless that is another file by then.
func unlinkOnClose(l net.Listener, path string, mode fs.FileMode) (func() error, error) {
	if err := os.Chmod(path, mode); err != nil {
		return nil, err
	}
	mine, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	return func() error {
		unlock, err := lockFolder(filepath.Dir(path))
		if err != nil {
			return errors.Join(err, l.Close())
		}
		defer unlock()
		if now, err := os.Lstat(path); err == nil && os.SameFile(mine, now) {
			_ = os.Remove(path) // a leftover is recognised as such by the next listener
		}
		return l.Close()
	}, nil
}

// lockFolder keeps two processes from judging and replacing the same socket at
// the same time. The lock leaves nothing behind.
func lockFolder(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("opening folder of the socket: %w", err)
	}
	deadline := time.Now().Add(2 * probeLimit)
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(deadline) {
			_ = f.Close()
			return nil, fmt.Errorf("locking folder %s: %w", dir, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// removeStale makes room at path if it holds a socket that nobody listens on.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s exists and is not a socket; remove it or choose another path", path)
	}
	c, err := net.DialTimeout("unix", path, probeLimit)
	switch {
	case err == nil:
		_ = c.Close()
		return fmt.Errorf("%s is in use by another program; stop that one or choose another path", path)
	case !errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%s may be in use by another program (%w); stop that one or choose another path", path, err)
	}
	return os.Remove(path)
}
