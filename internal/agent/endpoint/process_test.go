package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/peercred"
)

// dialEnv makes this test binary connect to a socket and wait.
const dialEnv = "SALLYPORT_TEST_DIAL"

// dialAndWait is a process that connects, gives its end to a child that lives on,
// and ends.
func dialAndWait(path string) {
	c, err := net.Dial("unix", path)
	if err != nil {
		os.Exit(1)
	}
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		os.Exit(1)
	}
	child := exec.Command("/bin/sleep", "10")
	child.ExtraFiles = []*os.File{f}
	if err := child.Start(); err != nil {
		os.Exit(1)
	}
	_, _ = os.Stdout.WriteString("x")
	_, _ = os.Stdin.Read(make([]byte, 1)) // until the test has seen enough
	_ = child.Process.Release()
	os.Exit(0)
}

// The caller is looked up once, and a child that inherits the connection does not
// become it.
func TestD6CallerIsPinned(t *testing.T) {
	o := open(t)
	callers := make(chan Caller, 1)
	probe := make(chan struct{})
	holder := holderFunc(func(_ context.Context, c Caller) (*Feed, error) {
		callers <- c
		<-probe
		return nil, ErrDenied
	})
	o.server.holder = holder
	go func() { _ = everyCall(o.raw(me()))["FetchX509SVID"](called(t)) }()
	c := <-callers
	one, err := c.Process(t.Context())
	require.NoError(t, err)
	two, err := c.Process(t.Context())
	require.NoError(t, err)
	if one != two || one.PID != int32(os.Getpid()) {
		t.Errorf("looked up twice, or another: %d, this is %d", one.PID, os.Getpid())
	}
	close(probe)
}

type holderFunc func(context.Context, Caller) (*Feed, error)

func (f holderFunc) Hold(ctx context.Context, c Caller) (*Feed, error) { return f(ctx, c) }

func (holderFunc) JWT(context.Context, Caller, spiffeid.ID, []string) (string, error) {
	return "", ErrDenied
}

// An ended process has no identity, although somebody still holds its connection.
func TestD6EndedProcess(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: t.TempDir() + "/s", Net: "unix"})
	require.NoError(t, err)
	defer l.Close()
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), dialEnv+"="+l.Addr().String())
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	raw, err := l.AcceptUnix()
	require.NoError(t, err)
	_, err = stdout.Read(make([]byte, 1))
	require.NoError(t, err)
	cred, err := peercred.Unix(raw)
	require.NoError(t, err)
	c := newListener(l, hclog.NewNullLogger()).admitted(raw, cred)
	p, err := c.caller.Process(t.Context())
	require.NoError(t, err)
	if p.PID != int32(cmd.Process.Pid) {
		t.Errorf("got %d, want %d", p.PID, cmd.Process.Pid)
	}
	require.NoError(t, stdin.Close())
	_ = cmd.Wait() // it ends with code 0, or the test fails below
	if _, err := c.caller.Process(t.Context()); !errors.Is(err, peercred.ErrGone) {
		t.Errorf("after its end: got %v", err)
	}
	require.NoError(t, c.Close())
	if _, err := c.caller.Process(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after the connection's end: got %v", err)
	}
}

// A lookup that took too long is made again when it is asked for again; any other
// answer stays.
func TestLookupIsMadeAgainAfterBusy(t *testing.T) {
	var inspector peercred.Inspector
	looks := 0
	p := &pinned{look: func(ctx context.Context) (*peercred.Process, error) {
		if looks++; looks == 1 {
			return nil, fmt.Errorf("looking up: %w", peercred.ErrBusy)
		}
		return inspector.PID(ctx, os.Getpid())
	}}
	defer p.close()
	if _, err := p.get(t.Context()); !errors.Is(err, peercred.ErrBusy) {
		t.Errorf("first: got %v", err)
	}
	for range 2 {
		if got, err := p.get(t.Context()); err != nil || got.PID != int32(os.Getpid()) {
			t.Errorf("again: got %+v, %v", got, err)
		}
	}
	if looks != 2 {
		t.Errorf("looked %d times, want 2", looks)
	}
}
