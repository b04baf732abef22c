package peercred

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// holder is for kernels without SO_PEERPIDFD: the process with that number is
// believed to have connected only if it holds the other end of c. Its number may
// have been given away since; another process does not have the socket.
func holder(c *net.UnixConn, pid int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, gone(err)
	}
	holds, err := holdsPeer(c, pid)
	if err == nil && !holds {
		err = ErrGone
	}
	if err == nil {
		err = alivePidfd(pidfd) // the folder that was read is this process's
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(pidfd))
	}
	return pidfd, nil
}

func holdsPeer(c *net.UnixConn, pid int) (bool, error) {
	peer, err := peerInode(c)
	if err != nil {
		return false, err
	}
	want := fmt.Sprintf("socket:[%d]", peer)
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	fds, err := os.ReadDir(dir)
	if err != nil {
		return false, fmt.Errorf("reading its descriptors: %w", err)
	}
	for _, fd := range fds {
		if link, err := os.Readlink(dir + "/" + fd.Name()); err == nil && link == want {
			return true, nil
		}
	}
	return false, nil
}

// Layout of struct unix_diag_req and unix_diag_msg, and what is asked for, in
// linux/include/uapi/linux/unix_diag.h.
const (
	unixDiagReqLen   = 24
	unixDiagMsgLen   = 16
	unixDiagShowPeer = 4
	unixDiagPeer     = 2
)

// peerInode asks sock_diag for the inode of the other end of c.
func peerInode(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var st unix.Stat_t
	var statErr error
	if err := errors.Join(raw.Control(func(fd uintptr) { statErr = unix.Fstat(int(fd), &st) }), statErr); err != nil {
		return 0, err
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
	ask := make([]byte, unixDiagReqLen)
	ask[0] = unix.AF_UNIX
	binary.NativeEndian.PutUint32(ask[4:], ^uint32(0)) // any state
	binary.NativeEndian.PutUint32(ask[8:], uint32(st.Ino))
	binary.NativeEndian.PutUint32(ask[12:], unixDiagShowPeer)
	binary.NativeEndian.PutUint64(ask[16:], ^uint64(0)) // no cookie, twice
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Socket: s}}
	req.AddRawData(ask)
	answers, err := req.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
	if err != nil {
		return 0, fmt.Errorf("asking sock_diag: %w", err)
	}
	for _, a := range answers {
		if len(a) < unixDiagMsgLen || binary.NativeEndian.Uint32(a[4:]) != uint32(st.Ino) {
			continue
		}
		attrs, err := nl.ParseRouteAttr(a[unixDiagMsgLen:])
		if err != nil {
			return 0, fmt.Errorf("asking sock_diag: %w", err)
		}
		for _, attr := range attrs {
			if attr.Attr.Type == unixDiagPeer && len(attr.Value) >= 4 {
				return binary.NativeEndian.Uint32(attr.Value), nil
			}
		}
	}
	return 0, ErrNoOwner
}
