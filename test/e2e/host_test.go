//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// needRoot skips without root, except in CI, where everything has to run.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("needs root, and CI has it")
	}
	t.Skip("needs root")
}

func sh(t *testing.T, args ...string) string {
	t.Helper()
	stdout, stderr, code := realmesh.Run(t, exec.Command(args[0], args[1:]...))
	require.Zero(t, code, "%s: %s%s", strings.Join(args, " "), stdout, stderr)
	return stdout
}

// TestVanishedSidecar: a sidecar whose host disappears from the network, with
// nothing sent, loses its endpoint within 15 s.
func TestVanishedSidecar(t *testing.T) {
	needRoot(t)
	const hostIP, guestIP = "10.211.7.1", "10.211.7.2"
	// What an aborted run has left behind must not be in the way.
	ns, outer, inner := fmt.Sprintf("sp-%d", os.Getpid()), fmt.Sprintf("spo%d", os.Getpid()), fmt.Sprintf("spi%d", os.Getpid())
	sh(t, "ip", "netns", "add", ns)
	t.Cleanup(func() { sh(t, "ip", "netns", "delete", ns) })
	sh(t, "ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", ns)
	sh(t, "ip", "address", "add", hostIP+"/30", "dev", outer)
	sh(t, "ip", "link", "set", outer, "up")
	sh(t, "ip", "-n", ns, "address", "add", guestIP+"/30", "dev", inner)
	sh(t, "ip", "-n", ns, "link", "set", inner, "up")
	sh(t, "ip", "-n", ns, "link", "set", "lo", "up")

	m := realmesh.NewOn(t, hostIP, pairFiles())
	tunnel := guestIP + ":15008"
	m.SidecarIn(ns, realmesh.SidecarConfig{
		Name: "server", Tunnel: tunnel, Serve: map[string]string{"http": "127.0.0.1:8080", "echo": "127.0.0.1:7000"},
	})
	waitEndpoints(t, m, tunnel)
	sh(t, "ip", "link", "set", outer, "down")
	took := realmesh.EventuallyWithin(t, 15*time.Second, "the vanished sidecar's endpoint gone", func() error { return hasEndpoints(m) })
	t.Logf("endpoint gone %v after the network was cut", took)
}

// TestLocalDoors: whoever can dial a local listener speaks with its identity, so
// another user is turned away.
func TestLocalDoors(t *testing.T) {
	needRoot(t)
	m := realmesh.New(t, pairFiles())
	m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": realmesh.HTTPApp(t, "a"), "echo": realmesh.EchoApp(t, "")}})
	socket := filepath.Join(m.Dir, "door.sock")
	client := m.Sidecar(realmesh.SidecarConfig{
		Name: "client", Outbound: map[string]string{"server:http": "", "server:8080": "unix:" + socket}, Extra: "allowUIDs: [0, 1]\n",
	})
	require.NoError(t, os.Chmod(m.Dir, 0o755))
	tcp := client.Out["server:http"]
	waitOK(t, "http://"+tcp)
	dial := func(uid uint32, args ...string) (string, int) {
		cmd := exec.Command("curl", append([]string{"--silent", "--show-error", "--max-time", "10"}, args...)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		stdout, stderr, code := realmesh.Run(t, cmd)
		return stdout + stderr, code
	}
	for _, door := range [][]string{{"http://" + tcp}, {"--unix-socket", socket, "http://server"}} {
		for uid, admitted := range map[uint32]bool{0: true, 1: true, 65534: false} {
			out, code := dial(uid, door...)
			if (code == 0 && strings.Contains(out, "a")) != admitted {
				t.Errorf("uid %d at %v: curl exit code %d: %s; want admitted %v", uid, door, code, out, admitted)
			}
		}
	}
}

// TestDockerImages builds the images from what `make build` made and starts them.
func TestDockerImages(t *testing.T) {
	needRoot(t)
	startDocker(t)
	root := realmesh.Root(t)
	for program, args := range map[string][]string{
		"sallyport-controlplane": {"-version"}, "sallyport-proxy": {"version"}, "sallyport": {"version"},
	} {
		image := "sallyport-e2e/" + program
		sh(t, "docker", "build", "--quiet", "--network", "none", "--build-arg", "BINARY="+program, "-t", image, "-f", filepath.Join(root, "deploy/Dockerfile"), root)
		out := sh(t, append([]string{"docker", "run", "--rm", "--network", "none", "--read-only", image}, args...)...)
		if !strings.Contains(out, program) {
			t.Errorf("%s %v printed %q", image, args, out)
		}
		if user := strings.TrimSpace(sh(t, "docker", "image", "inspect", "--format", "{{.Config.User}}", image)); user == "" || strings.HasPrefix(user, "0") || strings.HasPrefix(user, "root") {
			t.Errorf("%s runs as user %q", image, user)
		}
	}
	// The control plane serves from its image, as a user without privilege.
	name := "sallyport-e2e-cp"
	_ = exec.Command("docker", "rm", "-f", name).Run()
	sh(t, "docker", "run", "--detach", "--name", name, "--network", "none", "--tmpfs", "/data:mode=1777", "sallyport-e2e/sallyport-controlplane",
		"-trust-domain", "test.example", "-data-dir", "/data/cp")
	t.Cleanup(func() { _ = exec.Command("docker", "rm", "-f", name).Run() })
	realmesh.Eventually(t, "the container serves", func() error {
		out, _ := exec.Command("docker", "logs", name).CombinedOutput()
		if !strings.Contains(string(out), "serving") {
			return fmt.Errorf("log: %s", out)
		}
		return nil
	})
	sh(t, "docker", "stop", "--time", "20", name)
	if code := strings.TrimSpace(sh(t, "docker", "inspect", "--format", "{{.State.ExitCode}}", name)); code != "0" {
		t.Errorf("exit code %s after docker stop, want 0", code)
	}
}

// startDocker starts a daemon of the test's own, on a socket of its own. It
// pulls nothing: the images are made from scratch.
func startDocker(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("", "spd")
	require.NoError(t, err)
	socket := "unix://" + filepath.Join(dir, "docker.sock")
	cmd := exec.Command("dockerd", "--host", socket, "--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"),
		"--pidfile", filepath.Join(dir, "pid"), "--bridge", "none", "--iptables=false", "--ip6tables=false", "--storage-driver", "vfs")
	d := realmesh.Start(t, "dockerd", cmd)
	t.Cleanup(func() {
		d.Signal(t, sigterm)
		d.Wait(t)
		_ = os.RemoveAll(dir)
	})
	t.Setenv("DOCKER_HOST", socket)
	t.Setenv("DOCKER_BUILDKIT", "0") // the classic builder needs no plugin
	realmesh.Eventually(t, "dockerd answers", func() error {
		select {
		case <-d.Done():
			t.Fatalf("dockerd ended: %s", tailOf(d.Log()))
		default:
		}
		return exec.Command("docker", "info").Run()
	})
}

// TestSystemdUnits holds the units against systemd's own check. The programs
// they start are put where the units say.
func TestSystemdUnits(t *testing.T) {
	needRoot(t)
	units, err := filepath.Glob(filepath.Join(realmesh.Root(t), "deploy", "*.service"))
	require.NoError(t, err)
	if len(units) < 2 {
		t.Fatalf("units %v, want the control plane's and the sidecar's", units)
	}
	for _, program := range []string{"sallyport-controlplane", "sallyport-proxy"} {
		path := filepath.Join("/usr/local/bin", program)
		if _, err := os.Lstat(path); os.IsNotExist(err) {
			require.NoError(t, os.Symlink(realmesh.Bin(t, program), path))
			t.Cleanup(func() { _ = os.Remove(path) })
		}
	}
	for _, unit := range units {
		name := filepath.Base(unit)
		out, err := exec.Command("systemd-analyze", "verify", "--man=no", strings.Replace(unit, "@.", "@payments.", 1)).CombinedOutput()
		if strings.Contains(name, "@") && err != nil {
			// A template is verified through an instance: link one.
			inst := filepath.Join(t.TempDir(), strings.Replace(name, "@.", "@payments.", 1))
			data, rerr := os.ReadFile(unit)
			require.NoError(t, rerr)
			require.NoError(t, os.WriteFile(inst, data, 0o600))
			out, err = exec.Command("systemd-analyze", "verify", "--man=no", inst).CombinedOutput()
		}
		if err != nil || strings.TrimSpace(string(out)) != "" {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
}

// TestNetworkPortNeedsAnIdentity: every RPC on the network port but enrolment is
// closed to a caller without an SVID, and the operator's API is not there.
func TestNetworkPortNeedsAnIdentity(t *testing.T) {
	m := realmesh.New(t, pairFiles())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	callEverything(ctx, t, m.GRPC)
	// Health and metrics only, over plain HTTP; and nothing that changes things.
	for _, path := range []string{"/debug/pprof/", "/config", "/view", "/shutdown", "/quitquitquit"} {
		resp, err := http.Get("http://" + m.Metrics + path)
		require.NoError(t, err)
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %d, want 404", path, resp.StatusCode)
		}
	}
	if st, err := os.Stat(m.Socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("admin socket: %v %v, want mode 0600", st.Mode(), err)
	}
}
