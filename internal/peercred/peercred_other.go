//go:build !linux

package peercred

import (
	"errors"
	"net"
	"net/netip"
)

var errUnsupported = errors.New("peer credentials are supported on Linux only")

// Unix always fails on this system.
func Unix(*net.UnixConn) (Cred, error) { return Cred{}, errUnsupported }

func owner(_, _ netip.AddrPort) (uint32, error) { return 0, errUnsupported }

func alive(*net.TCPConn) error { return errUnsupported }
