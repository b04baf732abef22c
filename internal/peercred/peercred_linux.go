package peercred

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Unix returns who connected to the other end of c: the credentials of the
// process at the time it called connect.
func Unix(c *net.UnixConn) (Cred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Cred{}, fmt.Errorf("reading peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var optErr error
	err = raw.Control(func(fd uintptr) {
		cred, optErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, optErr); err != nil {
		return Cred{}, fmt.Errorf("reading peer credentials: %w", err)
	}
	if cred.Pid == 0 && cred.Uid == ^uint32(0) {
		return Cred{}, fmt.Errorf("reading peer credentials: %w", ErrNoOwner)
	}
	return Cred{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}, nil
}

// owner asks sock_diag for the socket bound to local and connected to remote.
// The package's own SocketGet is not exact: it dumps every socket with these two
// ports, whatever the addresses, and takes the first.
func owner(local, remote netip.AddrPort) (uint32, error) {
	if local.Addr().Is4() != remote.Addr().Is4() {
		return 0, errors.New("addresses of two families")
	}
	s, err := nl.Subscribe(unix.NETLINK_INET_DIAG)
	if err != nil {
		return 0, fmt.Errorf("opening sock_diag: %w", err)
	}
	defer s.Close()
	limit := unix.NsecToTimeval(lookupLimit.Nanoseconds())
	if err := errors.Join(s.SetSendTimeout(&limit), s.SetReceiveTimeout(&limit)); err != nil {
		return 0, fmt.Errorf("opening sock_diag: %w", err)
	}
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Socket: s}}
	req.AddRawData(diagRequest(local, remote))
	answers, err := req.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
	switch {
	case errors.Is(err, syscall.ENOENT):
		return 0, ErrNoOwner
	case errors.Is(err, syscall.EAGAIN):
		return 0, fmt.Errorf("asking sock_diag: no answer within %s", lookupLimit)
	case err != nil:
		return 0, fmt.Errorf("asking sock_diag: %w", err)
	case len(answers) != 1:
		return 0, fmt.Errorf("asking sock_diag: %d answers", len(answers))
	}
	return diagOwner(answers[0], local, remote)
}

// Layout of struct inet_diag_req_v2 and struct inet_diag_msg in
// linux/include/uapi/linux/inet_diag.h: both hold a struct inet_diag_sockid with
// ports and addresses in network byte order, padded to 16 bytes.
const (
	reqLen    = 56
	reqSockID = 8
	msgLen    = 72
	msgState  = 1
	msgSockID = 4
	msgUID    = 64
	msgInode  = 68

	idLocalPort  = 0
	idRemotePort = 2
	idLocal      = 4
	idRemote     = 20
	idCookie     = 40
)

func diagRequest(local, remote netip.AddrPort) []byte {
	b := make([]byte, reqLen)
	b[0] = unix.AF_INET6
	if local.Addr().Is4() {
		b[0] = unix.AF_INET
	}
	b[1] = unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], ^uint32(0)) // any state; diagOwner chooses
	id := b[reqSockID:]
	binary.BigEndian.PutUint16(id[idLocalPort:], local.Port())
	binary.BigEndian.PutUint16(id[idRemotePort:], remote.Port())
	copy(id[idLocal:], local.Addr().AsSlice())
	copy(id[idRemote:], remote.Addr().AsSlice())
	binary.NativeEndian.PutUint64(id[idCookie:], ^uint64(0)) // INET_DIAG_NOCOOKIE, twice
	return b
}

// diagOwner reads one answer. The kernel falls back to a listening socket when
// nothing is connected, and reports sockets that no process holds (TIME_WAIT and
// orphans) with inode 0 and user 0: that must not be taken for root.
func diagOwner(b []byte, local, remote netip.AddrPort) (uint32, error) {
	if len(b) < msgLen {
		return 0, fmt.Errorf("asking sock_diag: answer of %d bytes", len(b))
	}
	id := b[msgSockID:]
	gotLocal := diagAddr(b[0], id[idLocal:], id[idLocalPort:])
	gotRemote := diagAddr(b[0], id[idRemote:], id[idRemotePort:])
	switch {
	case gotLocal != local || gotRemote != remote:
		return 0, ErrNoOwner
	case !connected(b[msgState]):
		return 0, ErrNoOwner
	case binary.NativeEndian.Uint32(b[msgInode:]) == 0:
		return 0, ErrNoOwner
	}
	return binary.NativeEndian.Uint32(b[msgUID:]), nil
}

// connected reports whether a socket in that state has been connected to us
// before: one that is still connecting is the successor of the one that was.
func connected(state uint8) bool {
	switch state {
	case unix.BPF_TCP_ESTABLISHED, unix.BPF_TCP_FIN_WAIT1, unix.BPF_TCP_FIN_WAIT2,
		unix.BPF_TCP_CLOSE_WAIT, unix.BPF_TCP_LAST_ACK, unix.BPF_TCP_CLOSING:
		return true
	}
	return false
}

// diagAddr reads an address and a port; an IPv6 socket may carry IPv4.
func diagAddr(family uint8, addr, port []byte) netip.AddrPort {
	ip := netip.AddrFrom16([16]byte(addr[:16])).Unmap()
	if family == unix.AF_INET {
		ip = netip.AddrFrom4([4]byte(addr[:4]))
	}
	return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(port))
}

// alive fails when c was reset or never connected.
func alive(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var info *unix.TCPInfo
	var optErr error
	err = raw.Control(func(fd uintptr) {
		info, optErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	if err := errors.Join(err, optErr); err != nil {
		return err
	}
	if !connected(info.State) {
		return ErrNoOwner
	}
	return nil
}
