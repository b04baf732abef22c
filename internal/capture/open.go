package capture

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"slices"
	"strings"
	"syscall"

	"github.com/sallyport-mesh/sallyport/internal/socket"
)

// open listens on cfg.Listen and returns the listener with what closes it.
func open(cfg Config) (net.Listener, func() error, error) {
	if path, ok := strings.CutPrefix(cfg.Listen, "unix:"); ok {
		if cfg.Remote {
			return nil, nil, errors.New("a Unix socket is not reachable from the network; give HOST:PORT")
		}
		l, closing, err := socket.Listen(path, socketMode(cfg.AllowUIDs))
		if err != nil {
			return nil, nil, err
		}
		return l, closing, nil
	}
	if err := checkTCP(cfg); err != nil {
		return nil, nil, err
	}
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false) // kernel sandboxes and sock_diag see plain TCP only
	l, err := lc.Listen(context.Background(), "tcp", cfg.Listen)
	if err != nil {
		return nil, nil, explain(cfg.Listen, err)
	}
	return l, l.Close, nil
}

// socketMode is 0600. Where another user is allowed, everybody may try to
// connect, and only the credentials decide.
func socketMode(allowUIDs []uint32) fs.FileMode {
	if slices.ContainsFunc(allowUIDs, func(uid uint32) bool { return uid != ownUID() }) {
		return 0o666
	}
	return 0o600
}

// checkTCP keeps a local door local: only of a connection within this machine
// can the user be known.
func checkTCP(cfg Config) error {
	a, err := net.ResolveTCPAddr("tcp", cfg.Listen)
	if err != nil || cfg.Listen == "" {
		return fmt.Errorf("%q is not an address to listen on; give IP:PORT or unix:/path", cfg.Listen)
	}
	if !cfg.Remote && !a.IP.IsLoopback() {
		return fmt.Errorf("%s is reachable from other machines; give a loopback address such as 127.0.0.1:%d, or unix:/path", cfg.Listen, a.Port)
	}
	return nil
}

// explain says what to do about an address that cannot be listened on.
func explain(addr string, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%s is in use by another program; stop that one or choose another port", addr)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%s needs privileges to listen on; choose a port from 1024 up", addr)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%s is no address of this machine", addr)
	}
	return fmt.Errorf("listening on %s: %w", addr, err)
}
