package host

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
)

func TestMain(m *testing.M) {
	if socket := os.Getenv(askEnv); socket != "" {
		askAndPrint(socket)
	}
	goleak.VerifyTestMain(m)
}

// Users of the tests.
const (
	web      = 65501
	database = 65502
	stranger = 65503
)

const policyFile = `
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: host1}
spec: {id: /agents/host1, attest: [{kind: join-token}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: web}
spec: {id: /shop/web, attest: [{kind: unix, via: [/agents/host1], uid: 65501}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: database}
spec: {id: /shop/database, attest: [{kind: unix, via: [/agents/host1], uid: 65502}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: tool}
spec: {id: /shop/tool, attest: [{kind: unix, via: [/agents/host1], uid: 0, path: PATH}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: elsewhere}
spec: {id: /shop/elsewhere, attest: [{kind: unix, via: [/agents/host2], uid: 65503}]}
`

// machine is a host with an agent, in a mesh.
type machine struct {
	t     *testing.T
	mesh  *meshtest.Mesh
	cfg   Config
	host  *Host
	files string
	stop  func() error
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("acting as several users needs root")
	}
	t.Skip("acting as several users needs root")
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	mesh := meshtest.New(t, meshtest.Config{Files: map[string]string{"mesh.yaml": strings.Replace(policyFile, "PATH", exe, 1)}})
	dir, err := os.MkdirTemp("/dev/shm", "sp") // short, and in memory
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "token"), []byte(mesh.Token("host1")), 0o600))
	path := filepath.Join(dir, "agent.yaml")
	require.NoError(t, os.WriteFile(path, fmt.Appendf(nil, `
controlPlane: %s
tokenFile: token
workloadAPI: {socket: api.sock}
files:
  - {dir: database, user: "65502", onChange: {command: [/bin/touch, %s/told]}}
admin: {listen: "127.0.0.1:0", socket: admin.sock}
`, mesh.GRPC, dir), 0o600))
	m := &machine{t: t, mesh: mesh, files: filepath.Join(dir, "database")}
	m.cfg, err = Load(path)
	require.NoError(t, err)
	m.host, err = New(t.Context(), m.cfg, Options{Log: meshtest.Log(t), Version: "test"})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- m.host.Run(ctx) }()
	stopped := false
	m.stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-done
	}
	t.Cleanup(func() {
		if err := m.stop(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// askEnv makes this test binary ask at a socket and print what it gets.
const askEnv = "SALLYPORT_TEST_ASK"

// answer is what a process got from the agent.
type answer struct {
	Code, JWTCode codes.Code
	ID            string // of the SVID
	Left          time.Duration
	Subject       string // of the validated token
	Token         string
}

// askAndPrint is that process.
func askAndPrint(socket string) {
	ctx, cancel := context.WithTimeout(context.Background(), meshtest.Deadline)
	defer cancel()
	var a answer
	c, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		panic(err)
	}
	svid, err := c.FetchX509SVID(ctx)
	if a.Code = status.Code(err); err == nil {
		a.ID, a.Left = svid.ID.String(), time.Until(svid.Certificates[0].NotAfter)
	}
	token, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"})
	a.JWTCode = status.Code(err)
	for err == nil && a.Subject == "" && ctx.Err() == nil { // the keys to check it with are pushed
		if got, err := c.ValidateJWTSVID(ctx, token.Marshal(), "db"); err == nil {
			a.Subject, a.Token = got.ID.String(), token.Marshal()
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(a); err != nil {
		panic(err)
	}
	os.Exit(0)
}

// ask has a process of another user ask.
func (m *machine) ask(uid uint32) answer {
	m.t.Helper()
	// By this path, because the test binary's folder is root's alone.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{askEnv + "=" + m.cfg.WorkloadAPI.Socket}
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.Output()
	require.NoError(m.t, err)
	var a answer
	require.NoError(m.t, json.Unmarshal(out, &a))
	return a
}

func (m *machine) get(path string) (int, string) {
	m.t.Helper()
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr, Timeout: 5 * time.Second}).Get("http://" + m.host.AdminAddr().String() + path)
	require.NoError(m.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(m.t, err)
	return resp.StatusCode, string(body)
}

// Every process gets what its own evidence proves: another user's gets another
// identity, or none.
func TestD6HostAgent(t *testing.T) {
	needRoot(t)
	m := newMachine(t)
	meshtest.Eventually(t, "ready", func() error {
		if code, body := m.get("/readyz"); code != http.StatusOK {
			return errors.New(body)
		}
		return nil
	})
	for uid, path := range map[uint32]string{web: "/shop/web", database: "/shop/database", 0: "/shop/tool"} {
		a, want := m.ask(uid), "spiffe://test.example"+path
		if a.Code != codes.OK || a.ID != want || a.JWTCode != codes.OK || a.Subject != want {
			t.Errorf("uid %d: got %+v, want %s", uid, a, want)
		}
		if a.Left > time.Hour+time.Minute {
			t.Errorf("uid %d: the SVID lives %v", uid, a.Left)
		}
	}
	if a := m.ask(stranger); a.Code != codes.PermissionDenied || a.JWTCode != codes.PermissionDenied {
		t.Errorf("a stranger: got %+v, want PermissionDenied", a)
	}
	_, metrics := m.get("/metrics")
	for _, want := range []string{`sallyport_identity_outage_seconds{identity="self"} `, `sallyport_identity_outage_seconds{identity="apps"} 3`} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
	if code, body := m.get("/healthz"); code != http.StatusOK || strings.Contains(body, "degraded") {
		t.Errorf("health: %d %s", code, body)
	}
}

// D5: what is revoked is refused at the socket too, at once, and after a restart.
func TestD5RevokedTokensAtTheHost(t *testing.T) {
	needRoot(t)
	m := newMachine(t)
	token := m.ask(web).Token
	c, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+m.cfg.WorkloadAPI.Socket))
	require.NoError(t, err)
	defer c.Close()
	if _, err := c.ValidateJWTSVID(t.Context(), token, "db"); err != nil {
		t.Fatalf("before: %v", err)
	}
	_, err = m.mesh.Admin.Revoke(t.Context(), &sallyportv1.RevokeRequest{Subject: "web", Wait: durationpb.New(meshtest.Deadline)})
	require.NoError(t, err)
	if _, err := c.ValidateJWTSVID(t.Context(), token, "db"); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("after: got %v", err)
	}
	td := m.host.agent.ID().TrustDomain()
	want := m.host.book.List(td).Version()
	require.NoError(t, m.stop())
	again := m.cfg
	again.Admin.Listen, again.Admin.Socket, again.Files = "", "", nil
	h, err := New(t.Context(), again, Options{Log: meshtest.Log(t)})
	require.NoError(t, err)
	defer h.close()
	if got := h.book.List(td).Version(); got != want || got.Number == 0 {
		t.Errorf("after a restart list %s is in force, want %s", got, want)
	}
}

// A program that reads files gets its own user's identity.
func TestFilesOfAHost(t *testing.T) {
	needRoot(t)
	m := newMachine(t)
	chain, key := filepath.Join(m.files, "svid.pem"), filepath.Join(m.files, "svid_key.pem")
	told := filepath.Join(filepath.Dir(m.files), "told")
	meshtest.Eventually(t, "files", func() error {
		_, err := os.Stat(told)
		return err
	})
	pair, err := tls.LoadX509KeyPair(chain, key)
	require.NoError(t, err)
	if got := pair.Leaf.URIs[0].String(); got != "spiffe://test.example/shop/database" {
		t.Errorf("got %s", got)
	}
	info, err := os.Stat(key)
	require.NoError(t, err)
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid != database || info.Mode().Perm() != 0o600 {
		t.Errorf("the key is %d's, mode %o", uid, info.Mode().Perm())
	}
	require.NoError(t, m.stop())
	if _, err := tls.LoadX509KeyPair(chain, key); err != nil {
		t.Errorf("after a stop the files are gone: %v", err)
	}
}

// Watchers are told of a stop, which takes no longer than they need.
func TestStopIsTold(t *testing.T) {
	needRoot(t)
	m := newMachine(t)
	meshtest.Eventually(t, "ready", func() error { return m.host.ready() })
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Deadline)
	defer cancel()
	src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+m.cfg.WorkloadAPI.Socket)))
	require.NoError(t, err)
	defer src.Close()
	begin := time.Now()
	require.NoError(t, m.stop())
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	if _, err := src.GetX509SVID(); err != nil {
		t.Errorf("the app has lost its SVID with the agent: %v", err)
	}
}

func TestConfigMistakes(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "agent.yaml")
	for text, want := range map[string]string{
		"":                "controlPlane: required",
		"controlPlane: x": "controlPlane:",
		"controlPlane: a:1\nevidence: {kind: oidc, tokenFile: t}":                           "trustBundle: required",
		"controlPlane: a:1\ntokenFile: t\ntrustBundle: b":                                   "trustBundle: not needed",
		"controlPlane: a:1\nworkloadAPI: {socket: \"\"}":                                    "workloadAPI.socket: required",
		"controlPlane: a:1\nfiles: [{dir: d}]":                                              "files[0].user: required",
		"controlPlane: a:1\nfiles: [{dir: d, user: x, mode: \"0644\"}]":                     "2:33: files[0].mode:",
		"controlPlane: a:1\nfiles: [{dir: d, user: x, onChange: {signal: HI, pidFile: p}}]": "files[0].onChange.signal",
		"controlPlane: a:1\nadmin: {listen: x}":                                             "admin.listen",
		"controlPlane: a:1\nlog: {level: loud}":                                             "log.level",
		"controlPlane: a:1\nlog: {format: xml}":                                             "log.format",
		"controlPlane: a:1\nsocket: x":                                                      `unknown key "socket"`,
	} {
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

// What is wrong with the machine shows before anything runs, and gives back what
// was opened.
func TestNewRefuses(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "sp")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	token, err := attest.NewToken([32]byte{1})
	require.NoError(t, err)
	for name, content := range map[string]string{"jwt": "a.b.c", "token": token.Encode()} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	for want, more := range map[string]string{
		"no join token":           "",
		"does not exist":          "tokenFile: none\n",
		"reading trustBundle":     "evidence: {kind: oidc, tokenFile: jwt}\ntrustBundle: none\n",
		"files[0]: there is no":   "tokenFile: token\nfiles: [{dir: f, user: no-such-one}]\n",
		"files[0]: making the fo": "tokenFile: token\nfiles: [{dir: no/f, user: root}]\n",
	} {
		path := filepath.Join(dir, "agent.yaml")
		require.NoError(t, os.WriteFile(path, []byte("controlPlane: 127.0.0.1:1\nadmin: {listen: \"\"}\n"+more), 0o600))
		cfg, err := Load(path)
		require.NoError(t, err)
		if _, err := New(t.Context(), cfg, Options{Log: hclog.NewNullLogger()}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
		if _, err := os.Lstat(cfg.WorkloadAPI.Socket); !os.IsNotExist(err) {
			t.Errorf("%s: the socket was left", want)
		}
	}
}
