package meshtest

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

// Status lists an open door: what it opens, until when, who opened it, and how often
// it was used by something that no rule allows. What a rule allows is no use of it.
func TestStatusListsOpenDoors(t *testing.T) {
	const workloads = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: stock}
spec:
  attest: [{kind: join-token}]
  ports: [{name: tcp, port: 7000, protocol: tcp}]
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: web}
spec: {attest: [{kind: join-token}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: orders}
spec: {attest: [{kind: join-token}]}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: stock}
spec: {to: {workload: stock}, allow: [{from: [{workload: orders}], ports: [tcp]}]}
`
	const door = `# moving in
apiVersion: sallyport.dev/v1
kind: Defaults
metadata: {name: stock-moves-in}
spec: {to: {workload: stock}, audit: {until: 2090-01-01T00:00:00Z}}
---
apiVersion: sallyport.dev/v1
kind: Defaults
metadata: {name: long-closed}
spec: {to: {workload: web}, audit: {until: 2020-01-01T00:00:00Z}}
`
	m := New(t, Config{Files: map[string]string{"a.yaml": workloads}})
	require.NoError(t, m.Apply("", map[string]string{"a.yaml": workloads, "door.yaml": door}))
	require.NoError(t, m.Apply("", map[string]string{"a.yaml": workloads, "door.yaml": strings.TrimPrefix(door, "# moving in\n")}))
	one := func() *sallyportv1.OpenDoor {
		t.Helper()
		resp, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
		require.NoError(t, err)
		if len(resp.GetDoors()) != 1 {
			t.Fatalf("got doors %v, want the one that is open", resp.GetDoors())
		}
		return resp.GetDoors()[0]
	}
	d := one()
	if d.GetName() != "stock-moves-in" || d.GetLocation() != "door.yaml:3" || strings.Join(d.GetTo(), ",") != "stock" ||
		!d.GetUntil().AsTime().Equal(time.Date(2090, 1, 1, 0, 0, 0, 0, time.UTC)) || d.GetUsed() != 0 {
		t.Errorf("got %v", d)
	}
	if !strings.Contains(d.GetActor(), "uid") || d.GetRevision() != "1.2" || time.Since(d.GetOpened().AsTime()) > time.Minute {
		t.Errorf("got %v, want who opened it with 1.2, which 1.3 only moved", d)
	}

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}
	}()
	m.Sidecar(SidecarConfig{Workload: "stock", Serve: map[string]string{"tcp": ln.Addr().String()}})
	call := func(s *Sidecar) error {
		conn, err := net.Dial("tcp", s.Out["/stock:tcp"])
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(Deadline))
		if _, err := conn.Write([]byte("x")); err != nil {
			return err
		}
		_, err = io.ReadFull(conn, make([]byte, 1))
		return err
	}
	orders := m.Sidecar(SidecarConfig{Workload: "orders", Outbound: []string{"/stock:tcp"}})
	web := m.Sidecar(SidecarConfig{Workload: "web", Outbound: []string{"/stock:tcp"}})
	Eventually(t, "orders reaches stock", func() error { return call(orders) })
	Eventually(t, "web reaches stock", func() error { return call(web) })
	Eventually(t, "the use is counted", func() error {
		if d := one(); d.GetUsed() != 1 || time.Since(d.GetLastUsed().AsTime()) > time.Minute {
			return fmt.Errorf("got %v", d)
		}
		return nil
	})
	require.NoError(t, call(orders))
	require.NoError(t, call(web))
	Eventually(t, "the second use is counted", func() error {
		if d := one(); d.GetUsed() != 2 {
			return fmt.Errorf("got %v", d)
		}
		return nil
	})
}
