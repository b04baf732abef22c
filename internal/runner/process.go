package runner

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// spec says how to start a process.
type spec struct {
	name string   // in front of its lines
	argv []string // argv[0] is an absolute path
	env  []string // NAME=value, added to the runner's own environment
	dir  string   // working folder
	mute string   // lines that hold it are not shown, because the runner says it once for all; "" is none
}

var shellSafe = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// String gives a line for a shell that starts the same process.
func (s spec) String() string {
	words := slices.Concat(s.env, s.argv)
	if len(s.env) > 0 {
		words = append([]string{"env"}, words...)
	}
	for i, w := range words {
		words[i] = shellWord(w)
	}
	return strings.Join(words, " ")
}

// shellWord quotes w where a shell would not take it as it is.
func shellWord(w string) string {
	if shellSafe.MatchString(w) {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}

// process is one running child with everything in its process group.
type process struct {
	spec
	pid  int
	done chan struct{} // closed when it has ended and its last line is printed
	err  error         // how it ended, nil for exit status 0; valid once done is closed

	mu     sync.Mutex // held while signalling, so that the id stays ours meanwhile
	reaped bool       // the id may belong to somebody else
}

// status says how the process ended; valid once done is closed.
func (p *process) status() string {
	if p.err == nil {
		return "exit status 0"
	}
	return p.err.Error()
}

// signal sends sig to the process and to all its descendants that stayed in its
// process group. One that has ended already is no error.
func (p *process) signal(sig syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		_ = signalGroup(p.pid, sig)
	}
}

// finish ends what the ended leader left behind in its group, then gives up the
// group's id.
func (p *process) finish() {
	p.signal(syscall.SIGKILL)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reaped = true
}

// Phases of a group.
const (
	starting int32 = iota // the mesh cannot come up
	running               // the others go on
	stopping              // it was asked to
)

// group starts processes, reports those that end and stops them all.
type group struct {
	console     *console
	stopTimeout time.Duration

	procs   []*process // in the order of their start; owned by the goroutine that runs the mesh
	spawn   chan func()
	waiters sync.WaitGroup // one per process, and the spawning thread
	phase   atomic.Int32   // what it means when a process ends
}

func newGroup(cfg Config, names []string) *group {
	width := len("sallyport")
	for _, n := range names {
		width = max(width, len(n))
	}
	g := &group{
		console:     &console{width: width, color: cfg.Color, out: cfg.Stdout, err: cfg.Stderr},
		stopTimeout: cfg.StopTimeout,
		spawn:       make(chan func()),
	}
	g.waiters.Go(func() { runOnOneThread(g.spawn) })
	return g
}

// start starts a process. Every process is started by the same OS thread, which
// lives until stop returns: the kernel kills a child when the thread that made
// it ends, and that has to be the end of the whole runner.
func (g *group) start(s spec) (*process, error) {
	out := g.console.writer(s.name, len(g.procs))
	out.mute = s.mute
	cmd := &exec.Cmd{Path: s.argv[0], Args: s.argv, Env: append(os.Environ(), s.env...), Dir: s.dir,
		Stdout: out, Stderr: out, SysProcAttr: childAttributes(), WaitDelay: time.Second}
	started := make(chan error)
	g.spawn <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", s.name, err)
	}
	p := &process{spec: s, pid: cmd.Process.Pid, done: make(chan struct{})}
	g.procs = append(g.procs, p)
	g.waiters.Go(func() { g.wait(p, cmd, out) })
	return p, nil
}

// wait follows p to its end and reports it.
func (g *group) wait(p *process, cmd *exec.Cmd, out *lineWriter) {
	defer close(p.done)
	awaitExit(p.pid)
	p.finish()
	p.err = cmd.Wait()
	if errors.Is(p.err, exec.ErrWaitDelay) {
		p.err = nil // exit status 0; a descendant outside its group still holds its output
	}
	out.end()
	switch g.phase.Load() {
	case starting:
		g.console.problem("%s ended: %s", p.name, p.status())
	case running:
		g.console.problem("%s ended: %s. It stays down, the others go on. To start it again: %s", p.name, p.status(), p.spec)
	}
}

// allEnded returns a channel that is closed once every process has ended.
func (g *group) allEnded() <-chan struct{} {
	ended := make(chan struct{})
	procs := g.procs
	g.waiters.Go(func() {
		for _, p := range procs {
			<-p.done
		}
		close(ended)
	})
	return ended
}

// stop asks each process to end, the last started first and each only when the
// one before is gone. Half way through the stop timeout it asks all that are
// left, and at its end it kills them. It returns when no process is left.
func (g *group) stop() {
	g.phase.Store(stopping)
	half, limit := time.After(g.stopTimeout/2), time.After(g.stopTimeout)
	left := slices.Clone(g.procs)
	slices.Reverse(left)
	for len(left) > 0 {
		left[0].signal(syscall.SIGTERM)
		if !left[0].endsBefore(half) {
			break
		}
		left = left[1:]
	}
	for i, p := range left {
		if i > 0 {
			p.signal(syscall.SIGTERM)
		}
	}
	for len(left) > 0 && left[0].endsBefore(limit) {
		left = left[1:]
	}
	for _, p := range left {
		g.kill(p)
	}
	for _, p := range left {
		<-p.done
	}
	close(g.spawn)
	g.waiters.Wait()
}

// endsBefore waits for p to end and gives false when the time came first.
func (p *process) endsBefore(t <-chan time.Time) bool {
	select {
	case <-p.done:
		return true
	case <-t:
		return false
	}
}

// kill ends a process that did not end when asked to.
func (g *group) kill(p *process) {
	select {
	case <-p.done:
	default:
		g.console.problem("%s did not end within %s and is killed", p.name, g.stopTimeout)
		p.signal(syscall.SIGKILL)
	}
}
