//go:build !linux

package peercred

import (
	"context"
	"errors"
	"net"
	"net/netip"
)

var errUnsupported = errors.New("peer credentials are supported on Linux only")

// Unix always fails on this system.
func Unix(*net.UnixConn) (Cred, error) { return Cred{}, errUnsupported }

func owner(_, _ netip.AddrPort) (uint32, error) { return 0, errUnsupported }

func alive(*net.TCPConn) error { return errUnsupported }

type handle struct{}

// Alive always fails on this system.
func (handle) Alive() error { return errUnsupported }

// Close does nothing on this system.
func (*handle) Close() {}

// Conn always fails on this system.
func (*Inspector) Conn(context.Context, *net.UnixConn) (*Process, error) { return nil, errUnsupported }

// PID always fails on this system.
func (*Inspector) PID(context.Context, int) (*Process, error) { return nil, errUnsupported }
