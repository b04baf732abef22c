package peercred

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ErrGone says that a process has ended, or that its number belongs to another
// one by now.
var ErrGone = errors.New("the process has ended")

// ErrChanged says that a process has another user or group than it had when it
// connected. It may connect again.
var ErrChanged = errors.New("the process has changed its user or group since it connected")

// ErrBusy says that a process's executable could not be looked at in time: it is
// large, its file system hangs, or too many of the same user's are looked at
// already. It is worth another try.
var ErrBusy = errors.New("looking at executables takes too long")

// Process is one process, looked up once and pinned: what it says is true of the
// very process that connected, even if its number is given to another meanwhile.
// It is what the process was at that moment; a process may change its executable
// at any time after.
type Process struct {
	PID        int32
	UID, GID   uint32   // effective; of a connection, when it connected
	Groups     []uint32 // supplementary
	User       string   // name of UID; "" if it has none here
	GroupNames []string // of GID and Groups, those that have one here
	Path       string   // of the executable, as the process's own mount namespace has it
	SHA256     string   // of the executable, lower-case hex
	Cgroup     string   // path; of version 1 in the hierarchy of systemd or the first that has one
	Unit       string   // systemd unit of the system manager
	Container  string   // id of 64 hex digits, as Docker, containerd, CRI-O and Podman give
	Missing    []string // what could not be read, and why

	handle
}

// Inspector looks up processes. It remembers the hashes of executables. The zero
// value is ready; its methods may be called at the same time.
//
// A user who has programs hashed that are large, or that lie where reading hangs,
// delays his own programs: four of a user's are looked at at a time, each for 10 s.
// What hangs in the kernel keeps its turn until the kernel returns.
type Inspector struct {
	mu      sync.Mutex
	hashes  map[fileKey]string // guarded by mu :: file → SHA-256
	turns   map[uint32]*turns  // guarded by mu :: uid → turns; of users who have or await one
	looking int                // guarded by mu; turns that are taken, over all users
}

// fileKey names the content of a file: a file that was written to is another one,
// since the kernel then sets ctime, and nobody can set it back. That holds where the
// kernel keeps the times: not on a file system that a program serves, which is never
// hashed; not where a user brings the image with times and all, which is mounted
// nosuid and never remembered.
type fileKey struct {
	dev, ino     uint64
	size         int64
	mtime, ctime int64 // nanoseconds
}

const (
	maxHashes = 1024      // remembered at once
	maxExe    = 512 << 20 // bytes of an executable that is hashed
	maxProc   = 64 << 10  // bytes of a file below /proc

	maxTurns      = 4   // executables of one user that are looked at at a time
	maxLooking    = 256 // the same, of all users: each may hold a thread
	lookLimit     = 10 * time.Second
	betweenChecks = 1 << 20 // bytes that are hashed before the deadline is looked at

	// settled is how long a file must not have changed before its hash is
	// remembered; longer than a step of any file system's clock.
	settled = 3 * time.Second
)

// parseFdinfo reads the process's number of a pidfd's fdinfo (pidfd_open(2)).
func parseFdinfo(text string) (int, error) {
	for line := range strings.Lines(text) {
		value, ok := strings.CutPrefix(line, "Pid:")
		if !ok {
			continue
		}
		pid, err := strconv.ParseInt(strings.TrimSpace(value), 10, 32)
		switch {
		case err != nil:
			return 0, fmt.Errorf("fdinfo: Pid: %w", err)
		case pid == -1:
			return 0, ErrGone
		case pid <= 0:
			return 0, errors.New("the process is outside the pid namespace of /proc")
		}
		return int(pid), nil
	}
	return 0, errors.New("fdinfo: Pid is missing")
}

// parseStatus reads Uid, Gid and Groups of /proc/PID/status (proc(5)).
func parseStatus(text string) (uid, gid uint32, groups []uint32, err error) {
	found := 0
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		fields := strings.Fields(value)
		switch key {
		case "Uid", "Gid":
			if len(fields) != 4 {
				return 0, 0, nil, fmt.Errorf("status: %s has %d numbers", key, len(fields))
			}
			n, err := strconv.ParseUint(fields[1], 10, 32) // the effective one
			if err != nil {
				return 0, 0, nil, fmt.Errorf("status: %s: %w", key, err)
			}
			if key == "Uid" {
				uid = uint32(n)
			} else {
				gid = uint32(n)
			}
			found++
		case "Groups":
			for _, f := range fields {
				n, err := strconv.ParseUint(f, 10, 32)
				if err != nil {
					return 0, 0, nil, fmt.Errorf("status: Groups: %w", err)
				}
				groups = append(groups, uint32(n))
			}
			found++
		}
	}
	if found != 3 {
		return 0, 0, nil, errors.New("status: Uid, Gid or Groups is missing")
	}
	return uid, gid, groups, nil
}
