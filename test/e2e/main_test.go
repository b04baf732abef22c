//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

const (
	sigterm = syscall.SIGTERM
	// appEnv makes this binary an HTTP app that listens on the address it holds.
	appEnv = "SALLYPORT_E2E_APP"
)

func TestMain(m *testing.M) {
	if addr := os.Getenv(appEnv); addr != "" {
		err := http.ListenAndServe(addr, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "app") }))
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if grpcMain() {
		return
	}
	os.Exit(m.Run())
}

func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// status is what one GET on a fresh connection was answered; 0 where nothing was.
func status(t *testing.T, url string) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

func waitOK(t *testing.T, url string) {
	t.Helper()
	realmesh.Eventually(t, "first answer from "+url, func() error {
		if got := status(t, url); got != http.StatusOK {
			return fmt.Errorf("status %d, want 200", got)
		}
		return nil
	})
}

// metric reads the sum of a metric's series from a process's /metrics.
func metric(addr, name string) (float64, error) {
	resp, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	sum, found := 0.0, false
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		series, value, ok := strings.Cut(lines.Text(), " ")
		if base, _, _ := strings.Cut(series, "{"); !ok || base != name {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, err
		}
		sum, found = sum+v, true
	}
	if !found {
		return 0, fmt.Errorf("%s: no metric %s", addr, name)
	}
	return sum, nil
}

// hasEndpoints holds the endpoints that status shows for the Workload server
// against want.
func hasEndpoints(m *realmesh.Mesh, want ...string) error {
	m.T.Helper()
	stdout, stderr, _ := m.CLI("status")
	if stderr != "" {
		return errors.New(stderr)
	}
	var got []string
	for line := range strings.Lines(stdout) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == "server" && f[2] != "-" {
			got = append(got, f[2])
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		return fmt.Errorf("endpoints %v, want %v", got, want)
	}
	return nil
}

func waitEndpoints(t *testing.T, m *realmesh.Mesh, want ...string) {
	t.Helper()
	realmesh.Eventually(t, "endpoints", func() error { return hasEndpoints(m, want...) })
}
