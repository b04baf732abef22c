//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// TestBadFiles puts each kind of bad edit into the watched folder: status says
// where, and the last good files stay in force.
func TestBadFiles(t *testing.T) {
	m := realmesh.New(t, pairFiles())
	m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": realmesh.HTTPApp(t, "a"), "echo": realmesh.EchoApp(t, "")}})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": ""}})
	stranger := m.Sidecar(realmesh.SidecarConfig{Name: "stranger", Outbound: map[string]string{"server:http": ""}})
	url, strangerURL := "http://"+client.Out["server:http"], "http://"+stranger.Out["server:http"]
	waitOK(t, url)
	good := pairFiles()
	for _, tt := range []struct {
		name, file, content string
		want                []string
	}{
		{"unknown field", "allow.yaml", strings.Replace(good["allow.yaml"], "ports:", "prots:", 1), []string{"allow.yaml:8:7", "prots"}},
		{"duplicate name", "more.yaml", allowClient("stranger"), []string{"more.yaml:3:", "server-callers"}},
		{"unknown workload", "allow.yaml", allowClient("cleint"), []string{"allow.yaml:7:", "cleint", "client"}},
		{"overlapping IDs", "more.yaml", strings.Replace(workload("twin", ""), "spec:\n", "spec:\n  id: /server\n", 1), []string{"more.yaml:", "/server"}},
		{"bad port", "more.yaml", workload("x", "  ports: [{name: http, port: 70000, protocol: tcp}]\n"), []string{"more.yaml:", "70000"}},
		{"field of a deny", "allow.yaml", strings.Replace(good["allow.yaml"], "      ports:", "      mode: audit\n      ports:", 1), []string{"allow.yaml:8:7", "mode", "not supported"}},
		{"unknown kind", "more.yaml", "apiVersion: sallyport.dev/v1\nkind: Polcy\nmetadata: {name: x}\nspec: {}\n", []string{"more.yaml:2:", "Polcy", "Policy"}},
		{"failing policy test", "more.yaml", "apiVersion: sallyport.dev/v1\nkind: PolicyTest\nmetadata: {name: x}\nspec:\n  cases:\n    - {from: stranger, to: server, expect: allow}\n", []string{"more.yaml:6", "stranger"}},
		{"not YAML", "more.yaml", "\t{", []string{"more.yaml:1:"}},
		{"no final newline", "allow.yaml", strings.TrimSuffix(allowClient("stranger"), "\n"), []string{"allow.yaml:", "newline"}},
		{"100 MB", "more.yaml", strings.Repeat("# comment\n", 10<<20), []string{"more.yaml", "MiB"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			realmesh.WriteFile(t, filepath.Join(m.Policy, tt.file), tt.content)
			problem(t, m, tt.want...)
			lastGood(t, url, strangerURL)
			restore(t, m)
		})
	}
	t.Run("half-written", func(t *testing.T) {
		f, err := os.OpenFile(filepath.Join(m.Policy, "allow.yaml"), os.O_WRONLY|os.O_TRUNC, 0)
		require.NoError(t, err)
		_, err = f.WriteString(allowClient("stranger"))
		require.NoError(t, err)
		// Another file is saved while this one is open: the folder must not be
		// read with a half-written file in it.
		realmesh.WriteFile(t, filepath.Join(m.Policy, "workloads.yaml"), good["workloads.yaml"]+"# saved again\n")
		deadline := time.Now().Add(500 * time.Millisecond)
		for time.Now().Before(deadline) {
			lastGood(t, url, strangerURL)
		}
		_, err = f.WriteString("      reason: complete\n")
		require.NoError(t, err)
		require.NoError(t, f.Close())
		realmesh.Eventually(t, "the complete file in force", func() error {
			if a, b := status(t, url), status(t, strangerURL); a != 403 || b != 200 {
				return fmt.Errorf("client %d, stranger %d; want 403 and 200", a, b)
			}
			return nil
		})
		restore(t, m)
		waitOK(t, url)
	})
	t.Run("last Workload taken", func(t *testing.T) {
		realmesh.WriteFile(t, filepath.Join(m.Policy, "workloads.yaml"), "# nothing\n")
		problem(t, m, "Workload")
		lastGood(t, url, strangerURL)
		restore(t, m)
	})
	t.Run("deleted directory", func(t *testing.T) {
		require.NoError(t, os.RemoveAll(m.Policy))
		problem(t, m, "policy")
		lastGood(t, url, strangerURL)
		require.NoError(t, os.Mkdir(m.Policy, 0o755))
		restore(t, m)
	})
	t.Run("bad folder at start", func(t *testing.T) {
		m.CP.Signal(t, sigterm)
		m.CP.Wait(t)
		realmesh.WriteFile(t, filepath.Join(m.Policy, "more.yaml"), "kind: [\n")
		m.StartControlPlane()
		problem(t, m, "more.yaml:")
		lastGood(t, url, strangerURL)
		restore(t, m)
	})
}

// restore puts the good files back and waits until they are in force.
func restore(t *testing.T, m *realmesh.Mesh) {
	t.Helper()
	_ = os.Remove(filepath.Join(m.Policy, "more.yaml"))
	for name, content := range pairFiles() {
		realmesh.WriteFile(t, filepath.Join(m.Policy, name), content)
	}
	realmesh.Eventually(t, "no problem", func() error {
		if stdout, stderr, code := m.CLI("status"); code != 0 {
			return fmt.Errorf("%s%s", stdout, stderr)
		}
		return nil
	})
}

func problem(t *testing.T, m *realmesh.Mesh, want ...string) {
	t.Helper()
	realmesh.Eventually(t, "the problem in status", func() error {
		stdout, stderr, code := m.CLI("status")
		for _, w := range want {
			if code != 1 || !strings.Contains(stdout, w) {
				return fmt.Errorf("exit code %d, want 1 and %q in:\n%s%s", code, w, tailOf(stdout), stderr)
			}
		}
		return nil
	})
}

func tailOf(s string) string { return s[max(0, len(s)-1500):] }

// lastGood asserts that access is as before the bad edit.
func lastGood(t *testing.T, allowed, refused string) {
	t.Helper()
	if a, b := status(t, allowed), status(t, refused); a != 200 || b != 403 {
		t.Errorf("client %d, stranger %d; want 200 and 403", a, b)
	}
}

// TestStartErrors: one clear line, a non-zero exit code, no stack trace.
func TestStartErrors(t *testing.T) {
	m := realmesh.New(t, pairFiles())
	other := realmesh.New(t, pairFiles())
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer busy.Close()

	used := m.Token("client")
	sidecar(t, m, "first", used, "").WaitReady()
	expired := strings.TrimSpace(mustCLI(t, m, "token", "create", "--workload", "client", "--ttl", "1s"))
	time.Sleep(1100 * time.Millisecond) // the token's own clock has to run

	for _, tt := range []struct {
		name, token, extra string
		want               []string
	}{
		{"malformed token", "sp1.nonsense", "", []string{"token"}},
		{"unknown token", forge(used), "", []string{"token", "sallyport token create"}},
		{"used token", used, "", []string{"used", "sallyport token create"}},
		{"expired token", expired, "", []string{"expired", "sallyport token create"}},
		{"another mesh's token", other.Token("client"), "", []string{"control plane"}},
		{"port in use", m.Token("client"), fmt.Sprintf("outbound: [{listen: %q, to: \"server:http\"}]\n", busy.Addr()), []string{"in use", busy.Addr().String()}},
		{"unknown key", m.Token("client"), "colour: red\n", []string{"colour"}},
		{"bad upstream", m.Token("client"), "outbound: [{listen: \"127.0.0.1:0\", to: \"server\"}]\n", []string{"server"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := sidecar(t, m, strings.ReplaceAll(tt.name, " ", "-"), tt.token, tt.extra)
			if code := p.Wait(t); code == 0 {
				t.Errorf("exit code 0")
			}
			clear1(t, p.Log(), tt.want...)
		})
	}
	cp := func(name string, want []string, args ...string) {
		t.Run(name, func(t *testing.T) {
			_, stderr, code := realmesh.Run(t, exec.Command(realmesh.Bin(t, "sallyport-controlplane"), args...))
			if code == 0 {
				t.Errorf("exit code 0")
			}
			clear1(t, stderr, want...)
		})
	}
	dir := t.TempDir()
	cp("control plane: port in use", []string{"in use"}, "-trust-domain", "a.example", "-data-dir", dir, "-listen", busy.Addr().String(), "-metrics-listen", "127.0.0.1:0")
	cp("control plane: data in use", []string{"data"}, "-trust-domain", "test.example", "-data-dir", filepath.Join(m.Dir, "data"), "-admin-socket", filepath.Join(dir, "a.sock"), "-listen", "127.0.0.1:0", "-metrics-listen", "127.0.0.1:0")
	cp("control plane: no data folder", []string{"dataDir"})
	cp("control plane: unknown flag", []string{"-colour"}, "-colour", "red")
	other.CP.Signal(t, sigterm)
	other.CP.Wait(t)
	cp("control plane: wrong trust domain", []string{"test.example", "other.example"}, "-trust-domain", "other.example", "-data-dir", filepath.Join(other.Dir, "data"), "-listen", "127.0.0.1:0", "-metrics-listen", "127.0.0.1:0")

	t.Run("unreachable control plane", func(t *testing.T) {
		p := sidecar(t, other, "unreachable", m.Token("client"), "")
		realmesh.Eventually(t, "the log says so", func() error {
			if log := p.Log(); !strings.Contains(log, "unreachable") || !strings.Contains(log, other.GRPC) {
				return fmt.Errorf("log: %s", log)
			}
			return nil
		})
		select {
		case <-p.Done():
		case <-time.After(2 * realmesh.Deadline):
			t.Fatal("a first enrolment goes on for ever")
		}
		if p.Wait(t) == 0 {
			t.Errorf("exit code 0")
		}
		clear1(t, p.Log(), "unreachable", other.GRPC, "controlPlane")
	})
}

func mustCLI(t *testing.T, m *realmesh.Mesh, args ...string) string {
	t.Helper()
	stdout, stderr, code := m.CLI(args...)
	require.Zero(t, code, stderr)
	return stdout
}

// forge changes one character of a token's secret.
func forge(token string) string {
	parts := strings.Split(token, ".")
	c := "A"
	if parts[2][0] == 'A' {
		c = "B"
	}
	parts[2] = c + parts[2][1:]
	return strings.Join(parts, ".")
}

// sidecar starts one with this token, whatever comes of it.
func sidecar(t *testing.T, m *realmesh.Mesh, name, token, extra string) *realmesh.Sidecar {
	t.Helper()
	return m.SidecarWithToken(realmesh.SidecarConfig{Name: name, Extra: extra, NoWait: true}, token)
}

// clear1 wants what the program says last, which is one line and for mistakes in
// a file also the place and a hint, to say all of want.
func clear1(t *testing.T, log string, want ...string) {
	t.Helper()
	clearLog(t, log)
	last := log[max(0, strings.LastIndex("\n"+log, "\nsallyport-")):]
	for _, w := range want {
		if !strings.Contains(last, w) {
			t.Errorf("the last words %q do not say %q", last, w)
		}
	}
}

func clearLog(t *testing.T, log string) {
	t.Helper()
	for _, trace := range []string{"goroutine ", "panic:", ".go:"} {
		if strings.Contains(log, trace) {
			t.Errorf("output holds a stack trace (%q): %s", trace, log)
		}
	}
}
