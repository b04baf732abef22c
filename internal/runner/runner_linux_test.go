package runner

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

var pidInOutput = regexp.MustCompile(`\(pid (\d+)\)`)

// pids finds every process that the output names.
func pids(t *testing.T, out string) []int {
	var all []int
	for _, m := range pidInOutput.FindAllStringSubmatch(out, -1) {
		pid, err := strconv.Atoi(m[1])
		require.NoError(t, err)
		all = append(all, pid)
	}
	return all
}

// inOrder checks that the texts appear one after the other.
func inOrder(t *testing.T, out string, texts ...string) {
	t.Helper()
	rest := out
	for _, s := range texts {
		i := strings.Index(rest, s)
		if i < 0 {
			t.Fatalf("%q is missing or too early in:\n%s", s, out)
		}
		rest = rest[i+len(s):]
	}
}

func TestMeshComesUpInOrderAndGoesDownInReverse(t *testing.T) {
	s := newSite(t, twoMesh)
	u := s.start(t)
	u.out.waitFor(t, "flows\n")
	// What a process prints comes through a pipe of its own, so only the runner's
	// own lines have an order.
	for _, text := range []string{
		"controlplane | trust domain test.example ttl 1h0m0s",
		"controlplane | token for back",
		"controlplane | token for front",
		fmt.Sprintf(`back/proxy   | token "token-of-back\n" <nil> app map[http:%s] outbound []`, s.ports["@bapp"]),
		fmt.Sprintf("back         | settings [COLOUR=blue LISTEN_HTTP=%s]", s.ports["@bapp"]),
		fmt.Sprintf(`front/proxy  | token "token-of-front\n" <nil> app map[] outbound [{%s back:http}]`, s.ports["@fout"]),
		fmt.Sprintf("front        | settings [LISTEN_WEB=%s UPSTREAM_BACK_HTTP=%s]", s.ports["@fapp"], s.ports["@fout"]),
		"back/proxy   | log level warn",
	} {
		u.out.waitFor(t, text)
	}
	inOrder(t, u.out.String(),
		"sallyport    | controlplane is ready",
		"sallyport    | back/proxy is ready",
		"sallyport    | back is ready",
		"sallyport    | front/proxy is ready",
		"sallyport    | front is ready",
		"NAME", "controlplane", "back ", "front ",
		"local isolation is off",
		fmt.Sprintf("Call http://%s/ and read %s\n", s.ports["@fapp"], s.ports["@fadm"]),
		"sallyport --socket "+filepath.Join(s.dir, ".sallyport", "admin.sock")+" flows\n",
	)
	for _, f := range []string{"back/proxy.yaml", "back/token", "front/proxy.yaml", "front/token"} {
		info, err := os.Stat(filepath.Join(s.dir, ".sallyport", f))
		require.NoError(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", f, info.Mode())
		}
	}
	if n := strings.Count(strings.ToLower(u.out.String()), "local isolation is off"); n != 1 {
		t.Errorf("local isolation is said to be off %d times, want once:\n%s", n, u.out)
	}
	running := pids(t, u.out.String())
	require.Len(t, running, 5)
	u.stop()
	if err := u.end(t); err != nil {
		t.Errorf("stopped run returned %v", err)
	}
	inOrder(t, u.out.String(), "stopping",
		"front        | app was asked to end", "front/proxy  | sidecar was asked to end",
		"back         | app was asked to end", "back/proxy   | sidecar was asked to end",
		"controlplane | control plane was asked to end")
	if strings.Contains(u.out.String(), " ended: ") {
		t.Errorf("an orderly stop is reported as a problem:\n%s", u.out)
	}
	for _, pid := range running {
		if alive(pid) {
			t.Errorf("process %d is left", pid)
		}
	}
}

func TestEnrolledSidecarGetsNoToken(t *testing.T) {
	s := newSite(t, twoMesh)
	first := s.start(t)
	first.out.waitFor(t, "flows\n")
	first.stop()
	require.NoError(t, first.end(t))
	second := s.start(t)
	second.out.waitFor(t, "flows\n")
	second.stop()
	require.NoError(t, second.end(t))
	if strings.Contains(second.out.String(), "token for") {
		t.Errorf("the second run makes a token:\n%s", second.out)
	}
}

func TestCorruptEnrolmentIsNamed(t *testing.T) {
	s := newSite(t, twoMesh)
	file := filepath.Join(s.dir, ".sallyport", "back", "state", "enrolment.json")
	require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o700))
	require.NoError(t, os.WriteFile(file, []byte("{"), 0o600))
	if err := s.start(t).end(t); err == nil || !strings.Contains(err.Error(), "starting back/proxy: enrolment file "+file+" is corrupt") {
		t.Errorf("got %v", err)
	}
}

func TestProcessThatEndsIsReportedAndStaysDown(t *testing.T) {
	s := newSite(t, twoMesh)
	u := s.start(t)
	u.out.waitFor(t, "flows\n")
	conn, err := net.Dial("tcp", s.ports["@bapp"])
	require.NoError(t, err)
	fmt.Fprintln(conn, "3")
	conn.Close()
	u.out.waitFor(t, "back ended: exit status 3. It stays down", "To start it again: env COLOUR=blue LISTEN_HTTP="+s.ports["@bapp"]+" "+s.bin+"/app wait\n")
	running := pids(t, u.out.String())
	require.NoError(t, syscall.Kill(running[0], syscall.SIGKILL))
	u.out.waitFor(t, "controlplane ended: signal: killed. It stays down")
	for _, pid := range []int{running[1], running[3], running[4]} {
		if !alive(pid) {
			t.Errorf("process %d went down with it", pid)
		}
	}
	u.stop()
	require.NoError(t, u.end(t))
}

func TestRunEndsWhenEverythingHasEnded(t *testing.T) {
	s := newSite(t, twoMesh)
	u := s.start(t)
	u.out.waitFor(t, "flows\n")
	for _, pid := range pids(t, u.out.String()) {
		require.NoError(t, syscall.Kill(pid, syscall.SIGTERM))
	}
	if err := u.end(t); err != errAllEnded {
		t.Errorf("got %v, want %v", err, errAllEnded)
	}
}

func TestStubbornProcessIsKilled(t *testing.T) {
	s := newSite(t, strings.Replace(twoMesh, "[app, wait]\n      env", "[app, stubborn]\n      env", 1))
	u := s.start(t, func(c *Config) { c.StopTimeout = time.Second })
	u.out.waitFor(t, "flows\n")
	running := pids(t, u.out.String())
	u.stop()
	require.NoError(t, u.end(t))
	inOrder(t, u.out.String(), "control plane was asked to end", "back did not end within 1s and is killed")
	if n := strings.Count(u.out.String(), "is killed"); n != 1 {
		t.Errorf("%d processes were killed, want one:\n%s", n, u.out)
	}
	for _, pid := range running {
		if alive(pid) {
			t.Errorf("process %d is left", pid)
		}
	}
}

func TestDescendantsEndWithTheirApp(t *testing.T) {
	s := newSite(t, strings.Replace(strings.Replace(twoMesh, "[app, wait]", "[app, parent]", 1), `serve: {http: "@bapp"}`, "", 1))
	u := s.start(t)
	u.out.waitFor(t, "flows\n", "child is (pid ")
	running := pids(t, u.out.String())
	u.stop()
	require.NoError(t, u.end(t))
	require.Len(t, running, 6)
	for _, pid := range running {
		if alive(pid) {
			t.Errorf("process %d is left", pid)
		}
	}
}

func TestKilledRunnerLeavesNothingBehind(t *testing.T) {
	s := newSite(t, twoMesh)
	var out output
	cmd := exec.Command(filepath.Join(s.bin, "up"), s.dir, s.bin)
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Start())
	out.waitFor(t, "flows\n")
	running := pids(t, out.String())
	require.Len(t, running, 5)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait() // killed
	t.Cleanup(func() {
		for _, pid := range running {
			if alive(pid) { // the test failed
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	for _, pid := range running {
		require.Eventually(t, func() bool { return !alive(pid) }, 5*time.Second, 5*time.Millisecond, "process %d is left", pid)
	}
	// Its claim on the state folder ended with it.
	u := s.start(t)
	u.out.waitFor(t, "flows\n")
	u.stop()
	require.NoError(t, u.end(t))
}

// TestProcessOutlivesOtherThreads ends many threads of the runner: a child must
// not be taken for an orphan because of that.
func TestProcessOutlivesOtherThreads(t *testing.T) {
	s := newSite(t, twoMesh)
	var out output
	g := newGroup(Config{Stdout: &out, Stderr: &out, StopTimeout: 5 * time.Second}, nil)
	app := filepath.Join(s.bin, "app")
	for n := 1; n <= 5; n++ {
		_, err := g.start(spec{name: "app", argv: []string{app, "wait"}})
		require.NoError(t, err)
		require.Eventually(t, func() bool { return strings.Count(out.String(), "app waits") == n }, 10*time.Second, time.Millisecond)
		endThreads(100)
	}
	makers := map[int]bool{} // threads that start processes
	for range 50 {
		g.spawn <- func() { makers[unix.Gettid()] = true }
		endThreads(20)
	}
	g.stop()
	if len(makers) != 1 {
		t.Errorf("%d threads start processes, want one", len(makers))
	}
	for _, p := range g.procs {
		if p.status() != "exit status 0" {
			t.Errorf("process %d did not end when asked to, but by itself: %s", p.pid, p.status())
		}
	}
}

// endThreads ends the threads that run n goroutines at once.
func endThreads(n int) {
	var threads sync.WaitGroup
	gate := make(chan struct{})
	for range n {
		threads.Go(func() {
			runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
			<-gate
		})
	}
	close(gate)
	threads.Wait()
}

func TestStopWhileStarting(t *testing.T) {
	s := newSite(t, twoMesh)
	u := s.start(t)
	u.out.waitFor(t, "back/proxy is ready")
	u.stop()
	if err := u.end(t); err != nil {
		t.Errorf("got %v, want nil", err)
	}
	for _, pid := range pids(t, u.out.String()) {
		if alive(pid) {
			t.Errorf("process %d is left", pid)
		}
	}
}

func TestRunSaysWhatIsWrong(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer busy.Close()
	for _, c := range []struct {
		name, old, new string
		change         func(*Config)
		want           string
	}{
		{"port in use", `serve: {http: "@bapp"}`, `serve: {http: "` + busy.Addr().String() + `"}`, nil,
			"mesh.yaml:11:21: spec.workloads[0].serve.http: " + busy.Addr().String() + " is in use by another program; stop that one, or shift"},
		{"no app", "[app, wait]", "[appp, wait]", nil, "mesh.yaml:9:17: starting workload back: no program appp in "},
		{"no app by path", "[app, wait]", "[./appp, wait]", nil, "appp: no such file or directory"},
		{"no control plane", "", "", func(c *Config) { c.BinDir = t.TempDir() }, "starting the control plane: no program sallyport-controlplane in "},
		{"long socket path", "", "", func(c *Config) { c.State = filepath.Join(t.TempDir(), strings.Repeat("s", 100)) }, "but a unix socket may have 107 at most"},
		{"no such workload", "name: back", "name: bakc", nil, "mesh.yaml:8:13: no Workload bakc in "},
		{"no such port", "serve: {http:", "serve: {grpc:", nil, "mesh.yaml:11:21: Workload back (all.yaml:3) declares no port grpc"},
		{"no such destination", "back:http", "bakc:http", nil, "no Workload has the ID spiffe://test.example/bakc"},
		{"no such destination port", "back:http", "back:8081", nil, "Workload back (all.yaml:3) declares no port 8081"},
		{"app ends early", "[app, wait]", "[app, early]", nil, "waiting for back: it ended before it was ready: exit status 4"},
		{"control plane ends early", "svidTTL: 1h", "svidTTL: 1s", nil, "waiting for controlplane: it ended before it was ready: exit status 1"},
		{"never ready", "", "", func(c *Config) { c.StartTimeout = time.Nanosecond }, "waiting for controlplane: not ready after 1ns"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t, strings.Replace(twoMesh, c.old, c.new, 1))
			var change []func(*Config)
			if c.change != nil {
				change = append(change, c.change)
			}
			u := s.start(t, change...)
			err := u.end(t)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
			for _, pid := range pids(t, u.out.String()) {
				if alive(pid) {
					t.Errorf("process %d is left", pid)
				}
			}
		})
	}
}

func TestBrokenPoliciesStopBeforeAnythingStarts(t *testing.T) {
	s := newSite(t, twoMesh)
	require.NoError(t, os.WriteFile(filepath.Join(s.dir, "policy", "bad.yaml"), []byte("apiVersion: sallyport.dev/v1\nkind: Polizy\n"), 0o644))
	u := s.start(t)
	err := u.end(t)
	if err == nil || !strings.Contains(err.Error(), "bad.yaml:2:") {
		t.Errorf("got %v, want the place of the mistake", err)
	}
	if out := u.out.String(); out != "" {
		t.Errorf("something started:\n%s", out)
	}
}

func TestOneRunPerStateFolder(t *testing.T) {
	s := newSite(t, twoMesh)
	u := s.start(t)
	u.out.waitFor(t, "flows\n")
	second := s.start(t)
	want := fmt.Sprintf("another `sallyport up` (pid %d) runs on %s", os.Getpid(), filepath.Join(s.dir, ".sallyport"))
	if err := second.end(t); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
	elsewhere := s.start(t, func(c *Config) { c.State = filepath.Join(s.dir, "other") })
	want = fmt.Sprintf("is in use by another program, probably the `sallyport up` (pid %d) that runs on %s", os.Getpid(), filepath.Join(s.dir, ".sallyport"))
	if err := elsewhere.end(t); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
	u.stop()
	require.NoError(t, u.end(t))
}
