//go:build smoke

// Package smoke asserts the story that `make demo` tells: the example shop,
// started by `sallyport up`, from the first checkout to the last process.
package smoke

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// offset moves the shop's ports away from those of a demo that may be running.
const offset = 7000

// The shop's addresses, as in examples/shop/mesh.yaml.
const (
	controlPlaneMetrics = 23101 + offset
	paymentsAdmin       = 23122 + offset
	frontendHTTP        = 23140 + offset
	intruderHTTP        = 23150 + offset
)

func local(port int, path string) string { return fmt.Sprintf("http://127.0.0.1:%d%s", port, path) }

// shop is the running demo.
type shop struct {
	*testing.T
	up     *realmesh.Proc
	policy string // its folder of policy files
	socket string
}

// TestShop is one story; its chapters need each other, so they run in order.
func TestShop(t *testing.T) {
	s := start(t)
	for _, chapter := range []struct {
		name string
		tell func(*shop)
	}{
		{"checkout passes all four services", (*shop).checkout},
		{"flow records name both ends", (*shop).flows},
		{"the intruder is refused", (*shop).intruder},
		{"explain names the missing rule", (*shop).explain},
		{"an edit takes effect and cuts live connections", (*shop).edit},
		{"a bad edit changes nothing and says where", (*shop).badEdit},
		{"a failing policy test changes nothing", (*shop).failingTest},
		{"metrics are served", (*shop).metrics},
		{"traffic goes on without the control plane", (*shop).controlPlane},
		{"every process ends", (*shop).end},
	} {
		if !t.Run(chapter.name, func(t *testing.T) { s.T = t; chapter.tell(s) }) {
			t.FailNow()
		}
	}
}

func start(t *testing.T) *shop {
	root := realmesh.Root(t)
	dir, err := os.MkdirTemp("", "sp") // short: socket paths are limited to 107 bytes
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.CopyFS(filepath.Join(dir, "policy"), os.DirFS(filepath.Join(root, "examples/shop/policy"))))
	mesh, err := os.ReadFile(filepath.Join(root, "examples/shop/mesh.yaml"))
	require.NoError(t, err)
	realmesh.WriteFile(t, filepath.Join(dir, "mesh.yaml"), string(mesh))
	s := &shop{T: t, policy: filepath.Join(dir, "policy"), socket: filepath.Join(dir, ".sallyport/admin.sock")}
	s.up = realmesh.Start(t, "up", exec.Command(realmesh.Bin(t, "sallyport"), "up", dir, "--port-offset", strconv.Itoa(offset)))
	s.eventually("the shop is up and says what to try", func() error {
		select {
		case <-s.up.Done():
			t.Fatalf("up ended: %s", s.up.Log())
		default:
		}
		if !strings.Contains(s.up.Log(), local(frontendHTTP, "/checkout")) {
			return fmt.Errorf("nothing to try yet")
		}
		return nil
	})
	if !strings.Contains(s.up.Log(), "local isolation is off") {
		t.Errorf("up does not say that local isolation is off")
	}
	return s
}

func (s *shop) eventually(what string, cond func() error) { realmesh.Eventually(s.T, what, cond) }

func (s *shop) cli(args ...string) (stdout, stderr string, code int) {
	return realmesh.Run(s.T, exec.Command(realmesh.Bin(s.T, "sallyport"), append([]string{"--socket", s.socket}, args...)...))
}

func (s *shop) get(url string) (int, string) {
	s.Helper()
	client := &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url)
	require.NoError(s, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(s, err)
	return resp.StatusCode, string(body)
}

func (s *shop) checkout() {
	code, body := s.get(local(frontendHTTP, "/checkout"))
	if code != http.StatusOK {
		s.Fatalf("checkout: %d %s", code, body)
	}
	for _, hop := range []string{"frontend", "orders", "payments", "ledger"} {
		if !strings.Contains(body, hop) {
			s.Errorf("the receipt does not name %s: %s", hop, body)
		}
	}
}

// records waits for the destination's records of one pair.
func (s *shop) records(from, to, verdict string) []realmesh.Flow {
	s.Helper()
	var flows []realmesh.Flow
	s.eventually(fmt.Sprintf("a flow record %s → %s: %s", from, to, verdict), func() error {
		stdout, stderr, code := s.cli("flows", "--output", "json", "--from", from, "--to", to, "--verdict", verdict)
		if code != 0 {
			return fmt.Errorf("flows: %s", stderr)
		}
		flows = slices.DeleteFunc(realmesh.ParseFlows(s.T, stdout), func(f realmesh.Flow) bool { return f.Side != "inbound" })
		if len(flows) == 0 {
			return fmt.Errorf("none yet")
		}
		return nil
	})
	return flows
}

func (s *shop) flows() {
	for _, hop := range []struct{ from, to, location string }{
		{"frontend", "orders", "orders.yaml:"}, {"orders", "payments", "payments.yaml:"}, {"payments", "ledger", "ledger.yaml:"},
	} {
		f := s.records(hop.from, hop.to, "allow")[0]
		if want := "spiffe://shop.example/" + hop.from; f.Src != want {
			s.Errorf("source %q, want %q", f.Src, want)
		}
		if want := "spiffe://shop.example/" + hop.to; f.Dst != want {
			s.Errorf("destination %q, want %q", f.Dst, want)
		}
		if !strings.HasPrefix(f.Location, hop.location) {
			s.Errorf("%s → %s was decided at %q, want %sN", hop.from, hop.to, f.Location, hop.location)
		}
	}
}

func (s *shop) intruder() {
	code, body := s.get(local(intruderHTTP, "/attack"))
	if code != http.StatusOK {
		s.Fatalf("attack: %d %s", code, body)
	}
	var report struct {
		Attempts []struct {
			Target  string
			Refused bool
			Answer  struct {
				DecisionID string `json:"decision_id"`
			}
		}
	}
	require.NoError(s, json.Unmarshal([]byte(body), &report), body)
	for _, a := range report.Attempts {
		if !a.Refused {
			s.Errorf("the attack on %s succeeded: %s", a.Target, body)
		}
		f := s.records("intruder", a.Target, "deny")[0]
		if f.Rule != "" || f.Outcome != "refused" {
			s.Errorf("record of the attack on %s: rule %q, outcome %q; want no rule and refused", a.Target, f.Rule, f.Outcome)
		}
		if a.Target == "payments" && f.ID != a.Answer.DecisionID {
			s.Errorf("payments told the decision id %q, its record says %q", a.Answer.DecisionID, f.ID)
		}
	}
	if strings.Contains(body, "charge-cards") || strings.Contains(body, "payments.yaml") {
		s.Errorf("the refused caller was told the nearest rule: %s", body)
	}
}

func (s *shop) explain() {
	stdout, stderr, code := s.cli("explain", "--from", "intruder", "--to", "payments", "--port", "http")
	require.Zero(s, code, stderr)
	for _, want := range []string{"DENY", "charge-cards", "payments.yaml:"} {
		if !strings.Contains(stdout, want) {
			s.Errorf("explain does not say %q: %s", want, stdout)
		}
	}
	stdout, _, _ = s.cli("explain", "--from", "orders", "--to", "payments", "--port", "http")
	if !strings.Contains(stdout, "ALLOW") {
		s.Errorf("explain of an allowed call: %s", stdout)
	}
}

// ordersPolicy is orders.yaml with its deny switched on, as the demo suggests.
func (s *shop) closeShop() string {
	data, err := os.ReadFile(filepath.Join(realmesh.Root(s.T), "examples/shop/policy/orders.yaml"))
	require.NoError(s, err)
	closed := strings.NewReplacer("  # deny:", "  deny:", "  #   - from", "    - from", "  #     ports", "      ports", "  #     reason", "      reason").Replace(string(data))
	require.NotEqual(s, string(data), closed)
	return closed
}

func (s *shop) write(name, content string) {
	realmesh.WriteFile(s.T, filepath.Join(s.policy, name), content)
}

func (s *shop) original(name string) string {
	data, err := os.ReadFile(filepath.Join(realmesh.Root(s.T), "examples/shop/policy", name))
	require.NoError(s, err)
	return string(data)
}

func (s *shop) checkoutBecomes(want int) {
	s.Helper()
	s.eventually(fmt.Sprintf("checkout is answered %d", want), func() error {
		if code, body := s.get(local(frontendHTTP, "/checkout")); code != want {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
}

func (s *shop) edit() {
	resp, err := http.Get(local(frontendHTTP, "/stream"))
	require.NoError(s, err)
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	require.True(s, lines.Scan(), "the stream gives a first line")

	s.write("orders.yaml", s.closeShop())
	cut := make(chan bool, 1)
	go func() {
		for lines.Scan() {
		}
		cut <- true
	}()
	select {
	case <-cut:
	case <-time.After(realmesh.Deadline):
		s.Fatal("the live stream was not cut")
	}
	f := s.records("frontend", "orders", "deny")
	if !slices.ContainsFunc(f, func(f realmesh.Flow) bool { return f.Outcome == "cut" && strings.HasPrefix(f.Location, "orders.yaml:") }) {
		s.Errorf("no record says that the stream was cut, and by which line: %+v", f)
	}
	s.checkoutBecomes(http.StatusBadGateway)
	s.write("orders.yaml", s.original("orders.yaml"))
	s.checkoutBecomes(http.StatusOK)
}

// problem waits until status reports something, then until it is gone again.
func (s *shop) problem(want ...string) {
	s.Helper()
	s.eventually("status says what is wrong", func() error {
		stdout, _, code := s.cli("status")
		for _, w := range want {
			if code != 1 || !strings.Contains(stdout, w) {
				return fmt.Errorf("exit code %d, want 1 and %q in:\n%s", code, w, stdout)
			}
		}
		return nil
	})
}

func (s *shop) noProblem() {
	s.Helper()
	s.eventually("status says that all is well", func() error {
		if stdout, stderr, code := s.cli("status"); code != 0 {
			return fmt.Errorf("%s%s", stdout, stderr)
		}
		return nil
	})
}

func (s *shop) badEdit() {
	s.noProblem()
	bad := strings.Replace(s.original("payments.yaml"), "ports: [http]", "port: [http]", 1)
	s.write("payments.yaml", bad)
	line := 1 + strings.Count(bad[:strings.Index(bad, "port: [http]")], "\n")
	column := 1 + len("      ")
	s.problem(fmt.Sprintf("payments.yaml:%d:%d", line, column), "ports")
	s.checkoutBecomes(http.StatusOK)
	s.write("payments.yaml", s.original("payments.yaml"))
	s.noProblem()
}

func (s *shop) failingTest() {
	opened := strings.Replace(s.original("payments.yaml"), "{workload: orders}", "{workload: orders}, {workload: intruder}", 1)
	s.write("payments.yaml", opened)
	s.problem("tests.yaml:", "intruder")
	if _, body := s.get(local(intruderHTTP, "/attack")); !strings.Contains(body, `"target": "payments"`) && !strings.Contains(body, `"target":"payments"`) || strings.Contains(body, "receipt") {
		s.Errorf("the intruder after a refused edit: %s", body)
	}
	s.write("payments.yaml", s.original("payments.yaml"))
	s.noProblem()
}

func (s *shop) metrics() {
	for port, want := range map[int]string{controlPlaneMetrics: "sallyport_controlplane_sidecars 5", paymentsAdmin: "sallyport_"} {
		code, body := s.get(local(port, "/metrics"))
		if code != http.StatusOK || !strings.Contains(body, want) {
			s.Errorf("metrics on %d: %d, want 200 and %q", port, code, want)
		}
	}
	if code, _ := s.get(local(paymentsAdmin, "/debug/pprof/")); code != http.StatusNotFound {
		s.Errorf("profiles over TCP: %d, want 404", code)
	}
}

// controlPlane kills it with -9, makes requests, and starts it again with the
// command line it had.
func (s *shop) controlPlane() {
	pid := s.child("sallyport-controlplane")
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	require.NoError(s, err)
	args := strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
	load := realmesh.HTTPLoad(s.T, local(frontendHTTP, "/checkout"), 4, 10*time.Millisecond)
	load.More(s.T, 20)
	require.NoError(s, syscall.Kill(pid, syscall.SIGKILL))
	load.More(s.T, 200)
	if _, failed := load.Count(); failed > 0 {
		_, lines := load.Stop()
		s.Errorf("%d checkouts failed while the control plane was down: %s", failed, lines[0])
	}
	s.eventually("up reports that the control plane ended", func() error {
		if !strings.Contains(s.up.Log(), "killed") {
			return fmt.Errorf("nothing yet")
		}
		return nil
	})
	realmesh.Start(s.T, "controlplane, again", exec.Command(args[0], args[1:]...))
	s.noProblem()
	load.More(s.T, 20)
	if _, failed := load.Stop(); len(failed) > 0 {
		s.Errorf("%d checkouts failed: %s", len(failed), failed[0])
	}
	s.write("orders.yaml", s.closeShop())
	s.checkoutBecomes(http.StatusBadGateway)
	s.write("orders.yaml", s.original("orders.yaml"))
	s.checkoutBecomes(http.StatusOK)
}

// child finds a process that `up` started.
func (s *shop) child(program string) int {
	s.Helper()
	for _, pid := range s.up.Children(s.T) {
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && filepath.Base(exe) == program {
			return pid
		}
	}
	s.Fatalf("no child of up runs %s", program)
	return 0
}

func (s *shop) end() {
	pids := s.up.Children(s.T)
	if len(pids) < 10 {
		s.Errorf("up has %d children, want at least 10: five sidecars and five apps", len(pids))
	}
	s.up.Signal(s.T, syscall.SIGINT)
	if code := s.up.Wait(s.T); code != 0 {
		s.Errorf("up ended with code %d after Ctrl-C, want 0", code)
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, 0); err == nil {
			s.Errorf("process %d is still there", pid)
		}
	}
}
