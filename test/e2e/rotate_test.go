//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// TestRotateSVIDsUnderLoad: 200 rotations of SVIDs that live 5 s, under new and
// kept-alive requests and connections that outlive every SVID. Nothing fails.
func TestRotateSVIDsUnderLoad(t *testing.T) {
	const rotations, longLived = 200, 10
	m := realmesh.New(t, pairFiles(), "-svid-ttl", "5s")
	server := m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": realmesh.HTTPApp(t, "a"), "echo": realmesh.EchoApp(t, "hello\n")}})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": "", "server:echo": ""}})
	url := "http://" + client.Out["server:http"]
	waitOK(t, url)

	var echoed atomic.Int64
	broken := make(chan error, longLived)
	stop := make(chan struct{})
	for range longLived {
		c := live(t, client.Out["server:echo"])
		go func() { broken <- talk(c, stop, &echoed) }()
	}
	load := realmesh.HTTPLoad(t, url, 8, 20*time.Millisecond)
	start, clientStart := svidRotations(t, server.Admin), svidRotations(t, client.Admin)
	realmesh.EventuallyWithin(t, 3*time.Minute, fmt.Sprintf("%d rotations on both sides", rotations), func() error {
		a, b := svidRotations(t, server.Admin)-start, svidRotations(t, client.Admin)-clientStart
		if a < rotations || b < rotations {
			time.Sleep(100 * time.Millisecond) // each look costs a scrape
			return fmt.Errorf("%v and %v so far", a, b)
		}
		return nil
	})
	close(stop)
	for range longLived {
		if err := <-broken; err != nil {
			t.Errorf("a connection that outlived its SVIDs: %v", err)
		}
	}
	ok, failed := load.Stop()
	t.Logf("%d requests succeeded, %d failed; %d lines echoed on %d connections", ok, len(failed), echoed.Load(), longLived)
	if len(failed) > 0 {
		t.Errorf("%d requests failed, want none; first: %s", len(failed), failed[0])
	}
}

// talk echoes a line every 50 ms until stop is closed.
func talk(c net.Conn, stop <-chan struct{}, echoed *atomic.Int64) error {
	r := bufio.NewReader(c)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return nil
		case <-tick.C:
		}
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		if _, err := io.WriteString(c, "line\n"); err != nil {
			return err
		}
		if got, err := r.ReadString('\n'); err != nil || got != "line\n" {
			return fmt.Errorf("echo %q: %w", got, err)
		}
		echoed.Add(1)
	}
}

func svidRotations(t *testing.T, admin string) float64 {
	t.Helper()
	v, err := metric(admin, "sallyport_svid_renewals_total")
	require.NoError(t, err)
	return v
}
