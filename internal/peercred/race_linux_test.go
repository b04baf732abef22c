package peercred

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestPIDReuse looks at connections whose process has ended and whose number
// another process has: see race.
func TestPIDReuse(t *testing.T) { runRace(t, 500) }

func runRace(t *testing.T, n int) {
	if own() != 0 {
		skip(t, "not root: a namespace of its own is needed")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=race "+strconv.Itoa(n))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	require.NoError(t, err)
}

// driver connects from a child that ends at once, lets another child have its
// number, says so, and waits for the verdict.
const driver = `
use strict; use Socket; use POSIX (); $| = 1;
my ($path, $n) = @ARGV;
for my $i (1..$n) {
  socket(my $s, PF_UNIX, SOCK_STREAM, 0) or die "socket: $!";
  my $pid = fork();
  if (!$pid) { connect($s, sockaddr_un($path)) or die "connect: $!"; POSIX::_exit(0); }
  waitpid($pid, 0);
  open(my $f, '>', '/proc/sys/kernel/ns_last_pid') or die "ns_last_pid: $!";
  print $f $pid - 1; close($f);
  my $victim = fork();
  if (!$victim) { close($s); $) = "4242 4242"; sleep 1000; POSIX::_exit(0); }
  my $groups = '';
  while ($groups !~ /4242/) { open(my $g, '<', "/proc/$victim/status") or die; local $/; $groups = <$g>; }
  print "$pid $victim\n";
  my $line = <STDIN>;
  kill 9, $victim; waitpid($victim, 0);
}
`

// race is the server: in its own pid namespace it looks up each connection when
// it is accepted, while the numbers change hands, and once more when the number is
// another's for certain, in both ways that kernels offer.
func race(arg string) error {
	n, err := strconv.Atoi(arg)
	if err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
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
	defer l.Close()
	perl := exec.Command("perl", "-e", driver, path, strconv.Itoa(n))
	perl.Stderr = os.Stderr
	in, err := perl.StdinPipe()
	if err != nil {
		return err
	}
	out, err := perl.StdoutPipe()
	if err != nil {
		return err
	}
	if err := perl.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(out)
	var i Inspector
	reused, early := 0, 0
	for k := range n {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		c := conn.(*net.UnixConn)
		if p, err := i.Conn(c); err == nil {
			early++
			if slices.Contains(p.Groups, 4242) {
				return fmt.Errorf("connection %d: taken for the victim while numbers changed hands: %+v", k, p)
			}
			p.Close()
		}
		if !lines.Scan() {
			return fmt.Errorf("the driver ended: %w", perl.Wait())
		}
		pid, victim, _ := strings.Cut(lines.Text(), " ")
		if pid == victim {
			reused++
		}
		if p, err := i.Conn(c); !errors.Is(err, ErrGone) {
			return fmt.Errorf("connection %d: got %+v, %v", k, p, err)
		}
		if number, err := strconv.Atoi(pid); err != nil {
			return err
		} else if fd, err := holder(c, number); !errors.Is(err, ErrGone) {
			return fmt.Errorf("connection %d, without SO_PEERPIDFD: got %d, %v", k, fd, err)
		}
		c.Close()
		if _, err := fmt.Fprintln(in, "next"); err != nil {
			return err
		}
	}
	if err := perl.Wait(); err != nil {
		return err
	}
	fmt.Printf("%d connections, %d numbers reused, %d looked up in time\n", n, reused, early)
	if reused < n*9/10 {
		return errors.New("too few numbers were reused to prove anything")
	}
	return nil
}
