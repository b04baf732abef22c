// Package peercred tells who is on the other end of a local connection: the user,
// by SO_PEERCRED for Unix sockets, by sock_diag for TCP connections within this
// network namespace; of Unix sockets also the process, its executable, unit and
// container.
//
// It answers who; whether that one may come in is its caller's decision. Every
// doubt is an error. Users outside this process's user namespace all appear as
// the kernel's overflow user, 65534. Other systems than Linux are not supported:
// there every question is answered with an error.
package peercred

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// Cred is a process's user, group and process id when it connected. The process
// may be gone since and its id taken by another.
type Cred struct {
	UID, GID uint32
	PID      int32
}

// ErrNoOwner says that no process of this network namespace holds the other end
// of a connection: it is closed, still being set up, or elsewhere.
var ErrNoOwner = errors.New("no local process holds the other end")

// lookupLimit bounds one question to the kernel.
const lookupLimit = time.Second

// UID returns the user at the other end of an accepted Unix or TCP connection.
// Unlike [TCP] it also makes sure that the answer is about this very connection
// and not about a later one between the same addresses.
func UID(c net.Conn) (uint32, error) {
	switch c := c.(type) {
	case *net.UnixConn:
		cred, err := Unix(c)
		return cred.UID, err
	case *net.TCPConn:
		uid, err := TCP(c.LocalAddr(), c.RemoteAddr())
		if err != nil {
			return 0, err
		}
		// As long as our end exists, nobody can open another connection
		// between these two addresses.
		if err := alive(c); err != nil {
			return 0, fmt.Errorf("finding owner of %s: %w", c.RemoteAddr(), err)
		}
		return uid, nil
	default:
		return 0, fmt.Errorf("finding owner of %s: not a Unix or TCP connection: %T", c.RemoteAddr(), c)
	}
}

// TCP returns the user who owns the other end of an accepted connection: local
// and remote are its LocalAddr and RemoteAddr, IPv4, IPv6 or IPv4 mapped into
// IPv6. A socket without an owner, such as one that was closed already, gives
// [ErrNoOwner]. The kernel is asked for exactly this pair of addresses and
// answers within a second.
func TCP(local, remote net.Addr) (uid uint32, err error) {
	l, lerr := addrPort(local)
	r, rerr := addrPort(remote)
	if err := errors.Join(lerr, rerr); err != nil {
		return 0, fmt.Errorf("finding owner: %w", err)
	}
	if uid, err = owner(r, l); err != nil {
		return 0, fmt.Errorf("finding owner of %s: %w", r, err)
	}
	return uid, nil
}

func addrPort(a net.Addr) (netip.AddrPort, error) {
	t, ok := a.(*net.TCPAddr)
	if !ok || t == nil {
		return netip.AddrPort{}, fmt.Errorf("%v is not a TCP address", a)
	}
	ap := t.AddrPort()
	if !ap.IsValid() || ap.Port() == 0 {
		return netip.AddrPort{}, fmt.Errorf("%v is not a TCP address with a port", a)
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port()), nil
}
