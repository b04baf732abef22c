package relay

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// flush waits until everything sent on a TCP connection is acknowledged, or
// nothing has been for drainLimit: a reset discards what is not. The kernel gives
// no event for that.
func flush(c net.Conn) {
	inner := innermost(c)
	raw := rawConn(inner)
	if _, ok := inner.(lingerer); !ok || raw == nil {
		return
	}
	last, progress := 0, time.Now()
	for pause := time.Millisecond; time.Since(progress) < drainLimit; pause = min(2*pause, 20*time.Millisecond) {
		queued := 0
		err := raw.Control(func(fd uintptr) {
			queued, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) // 0 on error
		})
		if err != nil || queued == 0 || isClosed(inner) { // what a dead connection has queued stays counted
			return
		}
		if queued != last {
			last, progress = queued, time.Now()
		}
		time.Sleep(pause)
	}
}

// waitWritable waits until c, or the connection under it, has room to send.
// Connections without a descriptor have room always.
func waitWritable(c net.Conn) error {
	raw := rawConn(innermost(c))
	if raw == nil {
		return nil
	}
	return raw.Write(writable)
}

// writable also tells of errors, which the next write then meets.
func writable(fd uintptr) bool {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	n, err := unix.Poll(poll, 0)
	return n > 0 || err != nil && err != unix.EINTR
}

// isClosed reports whether c, or the connection under it, is TCP and the kernel
// has nothing left of it but its descriptor: it was reset, or both sides have
// ended.
func isClosed(c net.Conn) bool {
	raw := rawConn(innermost(c))
	if raw == nil {
		return false
	}
	closed := false
	err := raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		closed = err == nil && info.State == unix.BPF_TCP_CLOSE
	})
	return err == nil && closed
}

// rawConn returns nil when c has no descriptor.
func rawConn(c net.Conn) syscall.RawConn {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}
