package runner

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.yaml.in/yaml/v4"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/capture"
)

// The test binary plays every program of a mesh, under the name it is called by.
func TestMain(m *testing.M) {
	programs := map[string]func() error{
		controlPlaneProgram: playControlPlane,
		proxyProgram:        playProxy,
		"app":               playApp,
		"up":                playUp,
	}
	if play, ok := programs[filepath.Base(os.Args[0])]; ok {
		if err := play(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// A program built with the race detector waits a second before it exits.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// untilTerminated blocks until SIGTERM and says so.
func untilTerminated(name string) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	fmt.Println(name, "waits")
	<-c
	fmt.Println(name, "was asked to end")
}

// readyLater answers 503 to the first request for /readyz and 200 to the others.
func readyLater(addr string) error {
	var asked atomic.Int32
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) == 1 {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
		}
	}))
	return nil
}

// tokens makes a token that names its workload, but not when asked first.
type tokens struct {
	sallyportv1.UnimplementedAdminServer
	asked atomic.Int32
}

func (s *tokens) CreateToken(_ context.Context, r *sallyportv1.CreateTokenRequest) (*sallyportv1.CreateTokenResponse, error) {
	if s.asked.Add(1) == 1 {
		return nil, status.Error(codes.NotFound, "no such workload")
	}
	fmt.Println("token for", r.GetWorkload())
	return &sallyportv1.CreateTokenResponse{Token: "token-of-" + r.GetWorkload()}, nil
}

func playControlPlane() error {
	flags := map[string]*string{}
	for _, f := range []string{"trust-domain", "data-dir", "listen", "metrics-listen", "admin-socket", "policy-dir", "svid-ttl"} {
		flags[f] = flag.String(f, "", "")
	}
	flag.Parse()
	if *flags["svid-ttl"] == "1s" {
		return errors.New("this control plane does not start")
	}
	fmt.Println("trust domain", *flags["trust-domain"], "ttl", *flags["svid-ttl"])
	_ = os.Remove(*flags["admin-socket"])
	l, err := net.Listen("unix", *flags["admin-socket"])
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	sallyportv1.RegisterAdminServer(s, &tokens{})
	go s.Serve(l)
	if err := readyLater(*flags["metrics-listen"]); err != nil {
		return err
	}
	untilTerminated("control plane")
	return nil
}

func playProxy() error {
	if len(os.Args) != 4 || os.Args[1] != "run" || os.Args[2] != "--config" {
		return fmt.Errorf("called as %q", os.Args)
	}
	content, err := os.ReadFile(os.Args[3])
	if err != nil {
		return err
	}
	var c proxyFile
	if err := yaml.Load(content, &c, yaml.WithKnownFields()); err != nil {
		return err
	}
	dir := filepath.Dir(os.Args[3])
	token, err := os.ReadFile(filepath.Join(dir, c.TokenFile))
	fmt.Printf("token %q %v app %v outbound %v\n", token, err, c.App, c.Outbound)
	fmt.Println("log level", c.Log.Level)
	fmt.Println("[WARN] " + capture.IsolationOf([]uint32{uint32(os.Geteuid())}).Reason)
	if err := enrol(filepath.Join(dir, c.StateDir)); err != nil {
		return err
	}
	if err := readyLater(c.Admin.Listen); err != nil {
		return err
	}
	untilTerminated("sidecar")
	return nil
}

// enrol leaves what an enrolled sidecar leaves.
func enrol(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	root, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	content, err := json.Marshal(map[string]any{"version": 1, "spiffe_id": "spiffe://test.example/x", "instance": "i",
		"enrolment_key": der, "bundles": map[string][][]byte{"test.example": {root}}})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "enrolment.json"), content, 0o600)
}

// playApp ends early, or listens as it is told, prints its settings and then does as its
// arguments say.
func playApp() error {
	if os.Args[1] == "early" {
		os.Exit(4)
	}
	var settings []string
	for _, e := range os.Environ() {
		name, value, _ := strings.Cut(e, "=")
		if strings.HasPrefix(name, "LISTEN_") || strings.HasPrefix(name, "UPSTREAM_") || name == "COLOUR" {
			settings = append(settings, e)
		}
		if strings.HasPrefix(name, "LISTEN_") {
			l, err := net.Listen("tcp", value)
			if err != nil {
				return err
			}
			go obey(l)
		}
	}
	slices.Sort(settings)
	fmt.Println("settings", settings)
	switch os.Args[1] {
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		select {}
	case "parent":
		child := exec.Command(os.Args[0], "stubborn")
		child.Stdout = os.Stdout
		if err := child.Start(); err != nil {
			return err
		}
		fmt.Printf("child is (pid %d)\n", child.Process.Pid)
	}
	untilTerminated("app")
	return nil
}

// obey ends the process with the status that a connection names.
func obey(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		line, _ := bufio.NewReader(conn).ReadString('\n')
		if code, err := strconv.Atoi(strings.TrimSpace(line)); err == nil {
			os.Exit(code)
		}
		conn.Close()
	}
}

// playUp is `sallyport up DIR BINDIR`.
func playUp() error {
	return Run(context.Background(), Config{Dir: os.Args[1], BinDir: os.Args[2], Stdout: os.Stdout, Stderr: os.Stderr})
}

// output collects what a run prints.
type output struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	ended error // of the run that wrote it, for messages
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func (o *output) end() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ended
}

// waitFor waits until the output holds every text.
func (o *output) waitFor(t *testing.T, texts ...string) {
	t.Helper()
	for _, s := range texts {
		for deadline := time.Now().Add(20 * time.Second); !strings.Contains(o.String(), s); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("output never says %q (run ended: %v):\n%s", s, o.end(), o)
			}
		}
	}
}

// alive reports whether a process exists and is no zombie.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
}

// site is a mesh on disk whose programs are the test binary.
type site struct {
	dir, bin string
	ports    map[string]string // :: placeholder in mesh.yaml → address
}

// listenLow listens on a port that no outgoing connection can take once it is
// released.
func listenLow(t *testing.T) net.Listener {
	for range 100 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10000+mathrand.IntN(20000)))
		if err == nil {
			return l
		}
	}
	t.Fatal("no free port between 10000 and 30000")
	return nil
}

// newSite writes mesh.yaml, with every @name replaced by a free address, and a
// policy folder for the workloads front and back.
func newSite(t *testing.T, mesh string) site {
	exe, err := os.Executable()
	require.NoError(t, err)
	tmp := t.TempDir()
	s := site{dir: filepath.Join(tmp, "mesh"), bin: filepath.Join(tmp, "bin"), ports: map[string]string{}}
	require.NoError(t, os.MkdirAll(filepath.Join(s.dir, "policy"), 0o755))
	require.NoError(t, os.Mkdir(s.bin, 0o755))
	for _, name := range []string{controlPlaneProgram, proxyProgram, "app", "up"} {
		require.NoError(t, os.Symlink(exe, filepath.Join(s.bin, name)))
	}
	var held []net.Listener
	for _, name := range []string{"@grpc", "@metrics", "@bapp", "@btun", "@badm", "@fapp", "@ftun", "@fadm", "@fout"} {
		l := listenLow(t)
		held = append(held, l)
		s.ports[name] = l.Addr().String()
		mesh = strings.ReplaceAll(mesh, name, s.ports[name])
	}
	for _, l := range held {
		require.NoError(t, l.Close())
	}
	require.NoError(t, os.WriteFile(filepath.Join(s.dir, "mesh.yaml"), []byte(mesh), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(s.dir, "policy", "all.yaml"), []byte(twoWorkloads), 0o644))
	return s
}

const twoWorkloads = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: back}
spec:
  attest: [{kind: join-token}]
  ports: [{name: http, port: 8080, protocol: http}]
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: front}
spec:
  attest: [{kind: join-token}]
`

const twoMesh = `apiVersion: sallyport.dev/v1
kind: Mesh
spec:
  trustDomain: test.example
  policies: policy
  controlPlane: {listen: "@grpc", metrics: "@metrics", svidTTL: 1h}
  workloads:
    - name: back
      command: [app, wait]
      env: {COLOUR: blue}
      serve: {http: "@bapp"}
      tunnel: "@btun"
      admin: "@badm"
    - name: front
      command: [app, wait]
      local: {web: "@fapp"}
      tunnel: "@ftun"
      admin: "@fadm"
      outbound: [{listen: "@fout", to: "back:http"}]
  logLevel: warn
  try: |
    Call http://{{addr "front" "web"}}/ and read {{admin "front"}}
    {{sallyport}} flows
`

// up is a run in progress.
type up struct {
	out  *output
	stop context.CancelFunc
	done chan error
}

// start runs the site's mesh until the test ends.
func (s site) start(t *testing.T, change ...func(*Config)) up {
	ctx, cancel := context.WithCancel(t.Context())
	u := up{out: &output{}, stop: cancel, done: make(chan error, 1)}
	cfg := Config{Dir: s.dir, BinDir: s.bin, Stdout: u.out, Stderr: u.out}
	for _, c := range change {
		c(&cfg)
	}
	go func() {
		err := Run(ctx, cfg)
		u.out.mu.Lock()
		u.out.ended = err
		u.out.mu.Unlock()
		u.done <- err
	}()
	t.Cleanup(cancel)
	return u
}

// end waits for the run to return.
func (u up) end(t *testing.T) error {
	t.Helper()
	select {
	case err := <-u.done:
		return err
	case <-time.After(20 * time.Second):
		t.Fatalf("the run does not end:\n%s", u.out)
		return nil
	}
}
