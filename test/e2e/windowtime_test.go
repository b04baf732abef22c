//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// TestWindowWithoutControlPlane: a rule ends at its second, and another begins, by the
// sidecar's own clock, while the control plane is down; what the first one let in is
// cut.
func TestWindowWithoutControlPlane(t *testing.T) {
	edge := time.Now().Add(15 * time.Second).UTC().Truncate(time.Second)
	files := pairFiles()
	files["allow.yaml"] = strings.ReplaceAll(allowClient("client"), "      ports:", "      until: "+edge.Format(time.RFC3339)+"\n      ports:") +
		fmt.Sprintf("    - {from: [{workload: stranger}], ports: [echo], since: %s}\n", edge.Format(time.RFC3339))
	m := realmesh.New(t, files)
	m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": realmesh.HTTPApp(t, "a"), "echo": realmesh.EchoApp(t, "")}})
	client := m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:echo": ""}})
	stranger := m.Sidecar(realmesh.SidecarConfig{Name: "stranger", Outbound: map[string]string{"server:echo": ""}})
	talk := func(conn net.Conn) error {
		if _, err := fmt.Fprintln(conn, "hello"); err != nil {
			return err
		}
		_, err := bufio.NewReader(conn).ReadString('\n')
		return err
	}
	dial := func(s *realmesh.Sidecar) (net.Conn, error) {
		conn, err := net.Dial("tcp", s.Out["server:echo"])
		if err == nil {
			_ = conn.SetDeadline(time.Now().Add(time.Minute))
			if err = talk(conn); err != nil {
				_ = conn.Close()
			}
		}
		return conn, err
	}
	var kept net.Conn
	realmesh.Eventually(t, "the client is let in", func() (err error) {
		kept, err = dial(client)
		return err
	})
	defer kept.Close()
	require.True(t, time.Now().Before(edge.Add(-time.Second)), "the mesh took too long to start")
	m.CP.Kill()
	if _, err := dial(stranger); err == nil && time.Now().Before(edge) {
		t.Error("the stranger is let in before its rule begins")
	}
	for time.Now().Before(edge.Add(-time.Second)) {
		require.NoError(t, talk(kept), "before the rule ends")
	}
	_, err := kept.Read(make([]byte, 1)) // until it is cut
	late := time.Since(edge)
	require.Error(t, err)
	if late < 0 || late > time.Second {
		t.Errorf("cut %v after the rule's end, want within a second", late)
	}
	t.Logf("cut %v after the rule's end", late)
	if _, err := dial(client); err == nil {
		t.Error("the client is let in after its rule's end")
	}
	realmesh.Eventually(t, "the stranger is let in from then on", func() error {
		conn, err := dial(stranger)
		if err == nil {
			_ = conn.Close()
		}
		return err
	})
}
