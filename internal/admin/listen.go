package admin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

// maxSocketPath is what fits into sockaddr_un on Linux, without the final NUL.
const maxSocketPath = 107

// Listen opens a TCP listener at addr. It never speaks MPTCP, which Landlock's
// TCP rules do not see.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, "tcp", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("listening on %s: the port is in use by another process; stop it or choose another address", addr)
	}
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", addr, err)
	}
	return ln, nil
}

// ListenUnix opens a unix socket at path that only the own user may connect to
// (mode 0600 from the first moment on). A socket that a dead process left
// behind is replaced, one that is alive is an error. Closing the listener
// removes the file.
func ListenUnix(ctx context.Context, path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("listening on %s: a socket's path has at most %d bytes, this one has %d; choose a shorter folder", path, maxSocketPath, len(path))
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		// The mode of a bound socket's file is that of its descriptor: setting
		// it before bind leaves no moment in which others could connect.
		if cerr := c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	ln, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	info, err := os.Stat(path)
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("its mode is %o", info.Mode().Perm())
	}
	if err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("making %s private: %w", path, err)
	}
	return ln, nil
}

// removeStale removes a socket nobody listens on.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listening on %s: %w", path, err)
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("listening on %s: a file that is not a socket is in the way", path)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		_ = conn.Close()
		return fmt.Errorf("listening on %s: another process serves it; stop that one first", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listening on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("removing the socket of an ended process: %w", err)
	}
	return nil
}
