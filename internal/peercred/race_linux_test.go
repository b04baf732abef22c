package peercred

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// exitNoProc is how a role says that it may not mount /proc.
const exitNoProc = 3

// runInNamespace runs the test binary in a role, in a pid namespace of its own, so
// that numbers can be handed out again at will. An ordinary user needs a user
// namespace for it.
func runInNamespace(t *testing.T, role string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if own() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() == exitNoProc {
		skip(t, "no pid namespace here: %v", err)
	}
	require.NoError(t, err)
}

// mountProc gives a new pid namespace its /proc.
func mountProc() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return unix.Mount("proc", "/proc", "proc", 0, "")
}

// TestD6PIDReuse races lookups against processes that connect, leave the socket to
// a sibling and end, all with one and the same number: see race.
func TestD6PIDReuse(t *testing.T) { runInNamespace(t, "race 5000") }

// raceDriver gives every child the same number and its own name. A child connects
// and ends, at once or a little later; its parent holds the last sockets.
const raceDriver = `
use strict; use Socket; use POSIX (); $| = 1;
my ($path, $n) = @ARGV;
my ($pid, @kept);
for my $i (0..$n-1) {
  socket(my $s, PF_UNIX, SOCK_STREAM, 0) or die "socket: $!";
  if ($pid) {
    open(my $f, '>', '/proc/sys/kernel/ns_last_pid') or die "ns_last_pid: $!";
    print $f $pid - 1; close($f);
  }
  $pid = fork() // die "fork: $!";
  if (!$pid) {
    $0 = "k$i";
    connect($s, sockaddr_un($path)) or die "connect: $!";
    select(undef, undef, undef, 0.0002) if $i % 3 == 0;
    POSIX::_exit(0);
  }
  waitpid($pid, 0);
  push @kept, $s; shift @kept if @kept > 32;
}
`

// lag is after how many connections one is looked up again; its number is another
// process's, or nobody's, for certain then.
const lag = 16

// race is the server: it looks up each connection when it is accepted, while the
// number changes hands, and once more when the process that connected is gone. A
// wrong answer has another process's name.
func race(arg string) error {
	n, err := strconv.Atoi(arg)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "peercred")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	perl := exec.Command("perl", "-e", raceDriver, path, strconv.Itoa(n))
	perl.Stderr = os.Stderr
	if err := perl.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		err := perl.Wait()
		if err != nil {
			_ = l.Close() // nobody comes any more; else some may still wait to be accepted
		}
		ended <- err
	}()
	defer l.Close()
	defer func() { _ = perl.Process.Kill() }() // it has ended, or this has failed
	r := racer{n: n}
	for k := range n {
		conn, err := l.Accept()
		if err != nil {
			return errors.Join(err, <-ended)
		}
		if err := r.accepted(k, conn.(*net.UnixConn)); err != nil {
			return err
		}
	}
	if err := <-ended; err != nil {
		return err
	}
	return r.verdict()
}

type racer struct {
	n                   int
	inspect             Inspector
	recent              []*net.UnixConn
	last                int32
	reused, early, late int
}

// accepted looks up connection k, and the one that came lag earlier.
func (r *racer) accepted(k int, c *net.UnixConn) error {
	p, err := r.inspect.Conn(context.Background(), c)
	switch {
	case err == nil:
		r.early++
		name, err := p.file("comm") // of the same folder as all that was read
		p.Close()
		if want := fmt.Sprintf("k%d\n", k); err == nil && string(name) != want {
			return fmt.Errorf("wrong answer: connection %s taken for %s", strings.TrimSpace(want), name)
		} else if err != nil && !errors.Is(err, ErrGone) {
			return err
		}
	case !errors.Is(err, ErrGone):
		return fmt.Errorf("connection %d: %w", k, err)
	}
	cred, err := Unix(c)
	if err != nil {
		return err
	}
	if cred.PID == r.last {
		r.reused++
	}
	r.last = cred.PID
	r.recent = append(r.recent, c)
	if len(r.recent) <= lag {
		return nil
	}
	old := r.recent[0]
	r.recent = r.recent[1:]
	defer old.Close()
	if p, err := r.inspect.Conn(context.Background(), old); !errors.Is(err, ErrGone) {
		return fmt.Errorf("wrong answer: connection %d of a process that is gone: %+v, %v", k-lag, p, err)
	}
	r.late++
	return nil
}

func (r *racer) verdict() error {
	fmt.Printf("%d connections, %d numbers reused, %d looked up in time, %d once more when gone, no wrong answer\n", r.n, r.reused, r.early, r.late)
	if r.reused < r.n*9/10 || r.early < r.n/100 || r.early > r.n*99/100 {
		return errors.New("too little of a race to prove anything")
	}
	return nil
}
