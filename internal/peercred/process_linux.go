package peercred

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"slices"
	"strconv"
	"syscall"

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
// process has ended, with [ErrChanged] if it has another user by now. The caller
// closes the Process.
//
// Looking at the executable may take long: it ends with [ErrBusy] when ctx does,
// after 10 s at the latest.
func (i *Inspector) Conn(ctx context.Context, c *net.UnixConn) (*Process, error) {
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
	p, err := i.process(ctx, int(cred.PID), pidfd)
	if err != nil {
		return nil, err
	}
	// What was read is of one moment, the credentials of an earlier one: a process
	// that became another user in between would be told by the rights of both.
	if p.UID != cred.UID || p.GID != cred.GID {
		p.Close()
		return nil, fmt.Errorf("looking up process %d: %w", cred.PID, ErrChanged)
	}
	p.name()
	return p, nil
}

// PID looks up a process by its number, as Conn does. Nothing is known about who
// asked for it.
func (i *Inspector) PID(ctx context.Context, pid int) (*Process, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("looking up process %d: not a process number", pid)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("looking up process %d: %w", pid, gone(err))
	}
	p, err := i.process(ctx, pid, pidfd)
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

// process takes over pidfd.
func (i *Inspector) process(ctx context.Context, pid, pidfd int) (*Process, error) {
	p := &Process{PID: int32(pid), handle: handle{pidfd: pidfd, dir: -1}}
	if err := i.read(ctx, p); err != nil {
		p.Close()
		return nil, fmt.Errorf("looking up process %d: %w", pid, err)
	}
	return p, nil
}

func (i *Inspector) read(ctx context.Context, p *Process) error {
	if err := p.open(); err != nil {
		return err
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
		var odd string
		if p.Cgroup, p.Unit, p.Container, odd = parseCgroups(string(cgroup)); odd != "" {
			p.miss("unit or container", errors.New(odd))
		}
	}
	if err := i.executable(ctx, p); err != nil {
		return err
	}
	return p.Alive()
}

// open opens the process's folder. Its number there is asked of that very /proc,
// which may be mounted from another pid namespace than this process lives in.
func (p *Process) open() error {
	proc, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(proc)
	var fs unix.Statfs_t
	if err := unix.Fstatfs(proc, &fs); err != nil {
		return err
	} else if fs.Type != unix.PROC_SUPER_MAGIC {
		return errors.New("/proc is not the kernel's")
	}
	info, err := handle{dir: proc}.file("self/fdinfo/" + strconv.Itoa(p.pidfd))
	if err != nil {
		return fmt.Errorf("asking /proc for the process's number: %w", err)
	}
	pid, err := parseFdinfo(string(info))
	if err != nil {
		return err
	}
	p.dir, err = unix.Openat(proc, strconv.Itoa(pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		p.dir = -1
		return gone(notThere(err))
	}
	return nil
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
