package peercred

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// handle pins a process: a descriptor of the process itself, and one of its
// folder under /proc, which the kernel ties to the process and not to its number.
type handle struct {
	pidfd, dir int
}

// Conn looks up the process at the other end of c. UID and GID are those of the
// moment when it connected, whatever became of it; all else is true of the
// process that connected or not said at all. It fails with [ErrGone] if that
// process has ended. The caller closes the Process.
func (i *Inspector) Conn(c *net.UnixConn) (*Process, error) {
	cred, err := Unix(c)
	if err != nil {
		return nil, err
	}
	pidfd, err := peerPidfd(c)
	if errors.Is(err, unix.ENOPROTOOPT) { // older than Linux 6.5
		pidfd, err = holder(c, int(cred.PID))
	}
	if err != nil {
		return nil, fmt.Errorf("looking up process %d: %w", cred.PID, err)
	}
	p, err := i.process(int(cred.PID), pidfd)
	if err != nil {
		return nil, err
	}
	p.UID, p.GID = cred.UID, cred.GID
	p.name()
	return p, nil
}

// PID looks up a process by its number. Nothing is known about who asked for it.
func (i *Inspector) PID(pid int) (*Process, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("looking up process %d: %w", pid, gone(err))
	}
	p, err := i.process(pid, pidfd)
	if err != nil {
		return nil, err
	}
	p.name()
	return p, nil
}

// peerPidfd asks the kernel for a descriptor of the very process that connected.
func peerPidfd(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	var fd int
	var optErr error
	if err := raw.Control(func(s uintptr) { fd, optErr = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD) }); err != nil {
		return -1, err
	}
	return fd, gone(optErr)
}

// gone translates what the kernel says of a process that has ended.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EINVAL) {
		return ErrGone
	}
	return err
}

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

// process takes over pidfd.
func (i *Inspector) process(pid, pidfd int) (*Process, error) {
	p := &Process{PID: int32(pid), handle: handle{pidfd: pidfd, dir: -1}}
	if err := i.read(p); err != nil {
		p.Close()
		return nil, fmt.Errorf("looking up process %d: %w", pid, err)
	}
	return p, nil
}

func (i *Inspector) read(p *Process) error {
	var err error
	p.dir, err = unix.Open("/proc/"+strconv.Itoa(int(p.PID)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return gone(notThere(err))
	}
	// The number was this process's when the folder was opened, if the process is
	// still there now.
	if err := p.Alive(); err != nil {
		return err
	}
	status, err := p.file("status")
	if err != nil {
		return err
	}
	if p.UID, p.GID, p.Groups, err = parseStatus(string(status)); err != nil {
		return err
	}
	if cgroup, err := p.file("cgroup"); err != nil {
		p.miss("cgroup", err)
	} else {
		p.Cgroup = parseCgroup(string(cgroup))
		p.Unit, p.Container = unitOf(p.Cgroup), containerOf(p.Cgroup)
	}
	if err := i.executable(p); err != nil {
		p.Path, p.SHA256 = "", ""
		p.miss("path and sha256", err)
	}
	return p.Alive()
}

func (p *Process) miss(what string, err error) {
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		err = errors.New("not permitted; it needs CAP_SYS_PTRACE")
	}
	p.Missing = append(p.Missing, what+": "+err.Error())
}

func notThere(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return unix.ESRCH
	}
	return err
}

// file reads a file of the pinned folder.
func (h handle) file(name string) ([]byte, error) {
	fd, err := unix.Openat(h.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, gone(notThere(err))
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxProc+1))
	if err != nil {
		return nil, gone(err)
	}
	if len(data) > maxProc {
		return nil, fmt.Errorf("%s has more than %d bytes", name, maxProc)
	}
	return data, nil
}

// executable reads path and hash of one and the same file: the process may change
// its executable meanwhile, and is looked at again then.
func (i *Inspector) executable(p *Process) error {
	for range 3 {
		fd, err := unix.Openat(p.dir, "exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return notThere(err)
		}
		path, hash, err := i.hash(p, os.NewFile(uintptr(fd), "exe"))
		if !errors.Is(err, errChanged) {
			p.Path, p.SHA256 = path, hash
			return err
		}
	}
	return errChanged
}

var errChanged = errors.New("the executable changes all the time")

func (i *Inspector) hash(p *Process, exe *os.File) (path, hash string, err error) {
	defer exe.Close()
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(p.dir, "exe", buf)
	if err != nil {
		return "", "", err
	}
	path = string(buf[:n])
	if strings.HasSuffix(path, " (deleted)") { // another file may have that path by now
		p.miss("path", errors.New("the executable was deleted or replaced; restart the program"))
		path = ""
	}
	key, size, err := keyOf(int(exe.Fd()))
	if err != nil {
		return "", "", err
	}
	i.mu.Lock()
	hash = i.hashes[key]
	i.mu.Unlock()
	if hash == "" {
		if hash, err = sum(exe, size); err != nil {
			return "", "", err
		}
		if again, _, err := keyOf(int(exe.Fd())); err != nil || again != key {
			return "", "", errChanged
		}
		i.remember(key, hash)
	}
	var now unix.Stat_t
	if err := unix.Fstatat(p.dir, "exe", &now, 0); err != nil {
		return "", "", err
	}
	if uint64(now.Dev) != key.dev || now.Ino != key.ino {
		return "", "", errChanged
	}
	return path, hash, nil
}

func (i *Inspector) remember(key fileKey, hash string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.hashes == nil || len(i.hashes) >= maxHashes {
		i.hashes = make(map[fileKey]string)
	}
	i.hashes[key] = hash
}

func keyOf(fd int) (fileKey, int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileKey{}, 0, err
	}
	return fileKey{uint64(st.Dev), st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()}, st.Size, nil
}

func sum(f *os.File, size int64) (string, error) {
	if size > maxExe {
		return "", fmt.Errorf("the executable has %d bytes; at most %d are hashed", size, maxExe)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, maxExe)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// name looks up the names of user and groups.
func (p *Process) name() {
	if u, err := user.LookupId(strconv.FormatUint(uint64(p.UID), 10)); err == nil {
		p.User = u.Username
	}
	all := append([]uint32{p.GID}, p.Groups...)
	slices.Sort(all)
	for _, gid := range slices.Compact(all) {
		if g, err := user.LookupGroupId(strconv.FormatUint(uint64(gid), 10)); err == nil {
			p.GroupNames = append(p.GroupNames, g.Name)
		}
	}
}

// Alive returns [ErrGone] once the process has ended.
func (h handle) Alive() error { return alivePidfd(h.pidfd) }

func alivePidfd(pidfd int) error {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return err
		case n > 0: // readable: it has ended (pidfd_open(2))
			return ErrGone
		}
		return nil
	}
}

// Close releases the process. What was read of it stays readable.
func (h *handle) Close() {
	for _, fd := range []*int{&h.pidfd, &h.dir} {
		if *fd >= 0 {
			_ = unix.Close(*fd) // nothing was written
			*fd = -1
		}
	}
}
