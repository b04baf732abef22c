package peercred

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestD6SharedSocket looks at connections whose process has ended, whose number
// another process has, and whose other end a third one holds, in both ways that
// kernels offer: see shared.
func TestD6SharedSocket(t *testing.T) { runInNamespace(t, "shared 300") }

// sharedDriver connects from a child that ends at once, lets another child have its
// number, says so, and waits for the verdict.
const sharedDriver = `
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
  if (!$victim) { close($s); $0 = "victim"; sleep 1000; POSIX::_exit(0); }
  my $name = '';
  while ($name ne "victim\n") { open(my $g, '<', "/proc/$victim/comm") or die; $name = <$g> // ''; }
  print "$pid $victim\n";
  my $line = <STDIN>;
  kill 9, $victim; waitpid($victim, 0);
}
`

// shared is the server: it looks up each connection when
// it is accepted, while the numbers change hands, and once more when the number is
// another's for certain, in both ways that kernels offer.
func shared(arg string) error {
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
	defer l.Close()
	perl := exec.Command("perl", "-e", sharedDriver, path, strconv.Itoa(n))
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
		if p, err := i.Conn(context.Background(), c); err == nil {
			early++
			name, _ := p.file("comm")
			p.Close()
			if string(name) == "victim\n" {
				return fmt.Errorf("connection %d: taken for the victim while numbers changed hands: %+v", k, p)
			}
		}
		if !lines.Scan() {
			return fmt.Errorf("the driver ended: %w", perl.Wait())
		}
		pid, victim, _ := strings.Cut(lines.Text(), " ")
		if pid == victim {
			reused++
		}
		if p, err := i.Conn(context.Background(), c); !errors.Is(err, ErrGone) {
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
