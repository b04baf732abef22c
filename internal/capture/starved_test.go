package capture

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// starvedEnv makes the test binary a listener without file descriptors; its
// value is the address to listen on.
const starvedEnv = "CAPTURE_TEST_STARVED"

// starved listens, prints its address, takes every descriptor that is left, and
// gives them back when a line comes in.
func starved() int {
	l, err := Listen(Config{Key: "k", Listen: os.Getenv(starvedEnv), AllowUIDs: []uint32{ownUID()}})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 40, Max: 40}); err != nil {
		fmt.Println(err)
		return 1
	}
	done := make(chan error, 1)
	go func() { done <- l.Serve(context.Background(), greet) }()
	var hogged []int
	// A descriptor may still come free while the program starts: take what there
	// is until there has been none for a while.
	for none := 0; none < 20; {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, syscall.EMFILE) {
			none++
			time.Sleep(5 * time.Millisecond)
			continue
		}
		none = 0
		hogged = append(hogged, fd)
	}
	fmt.Println(l.Addr())
	in := bufio.NewReader(os.Stdin)
	_, _ = in.ReadString('\n')
	for _, fd := range hogged {
		_ = unix.Close(fd)
	}
	_, _ = in.ReadString('\n')
	if err := errors.Join(l.Close(), <-done); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// TestB9Starved: out of descriptors the listener neither dies nor spins, and a
// second after the shortage it serves those who waited.
func TestB9Starved(t *testing.T) {
	for kind, addr := range doors {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			exe, err := os.Executable()
			require.NoError(t, err)
			cmd := exec.Command(exe)
			cmd.Env = append(os.Environ(), starvedEnv+"="+addr(t))
			cmd.Stderr = os.Stderr
			stdin, err := cmd.StdinPipe()
			require.NoError(t, err)
			stdout, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			defer cmd.Process.Kill() // ended by then, if all went well
			line, err := bufio.NewReader(stdout).ReadString('\n')
			require.NoError(t, err)
			network, target := "tcp", strings.TrimSpace(line)
			if kind == "unix" {
				network = "unix"
			}

			var waiting []net.Conn
			for range 5 {
				c, err := net.Dial(network, target)
				require.NoError(t, err)
				defer c.Close()
				waiting = append(waiting, c)
			}
			// Long enough for a back-off without limit to sleep through what follows.
			require.NoError(t, waiting[0].SetReadDeadline(time.Now().Add(1350*time.Millisecond)))
			if n, err := waiting[0].Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("not starved: read %d, %v", n, err)
			}
			_, err = io.WriteString(stdin, "\n")
			require.NoError(t, err)
			deadline := time.Now().Add(time.Second)
			for _, c := range waiting {
				require.NoError(t, c.SetReadDeadline(deadline))
				if got, err := io.ReadAll(c); string(got) != "hello" {
					t.Errorf("a second later: got %q, %v", got, err)
				}
			}
			_, err = io.WriteString(stdin, "\n")
			require.NoError(t, err)
			require.NoError(t, cmd.Wait())
			if cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(); cpu > 200*time.Millisecond {
				t.Errorf("used %s of processor time while waiting", cpu)
			}
		})
	}
}
