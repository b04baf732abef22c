package controlplane_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
)

const doc = "apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: %s}\nspec:\n  attest: [{kind: join-token}]\n%s---\n"

func files() map[string]string {
	return map[string]string{"w.yaml": fmt.Sprintf(doc, "server", "  ports: [{name: http, port: 8080, protocol: http}, {name: echo, port: 7000, protocol: tcp}]\n") +
		fmt.Sprintf(doc, "client", "")}
}

func announce(t *testing.T, m *meshtest.Mesh, workload string) sallyportv1.Announcer_AnnounceClient {
	t.Helper()
	s, err := sallyportv1.NewAnnouncerClient(m.Dial(m.Agent(workload))).Announce(t.Context())
	require.NoError(t, err)
	return s
}

func ask(t *testing.T, s sallyportv1.Announcer_AnnounceClient, req *sallyportv1.AnnounceRequest) (string, codes.Code) {
	t.Helper()
	_ = s.Send(req) // an ended stream says why on Recv
	resp, err := s.Recv()
	return resp.GetPublished(), status.Code(err)
}

// endpoints of a workload as status shows them.
func endpoints(t *testing.T, m *meshtest.Mesh, workload string) []string {
	t.Helper()
	s, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
	require.NoError(t, err)
	var out []string
	for _, w := range s.GetWorkloads() {
		for _, i := range w.GetInstances() {
			if w.GetName() == workload && i.GetEndpoint() != "" {
				out = append(out, i.GetEndpoint())
			}
		}
	}
	return out
}

func wantEndpoints(t *testing.T, m *meshtest.Mesh, want ...string) {
	t.Helper()
	meshtest.Eventually(t, fmt.Sprintf("endpoints %v", want), func() error {
		if got := endpoints(t, m, "server"); fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("endpoints %v", got)
		}
		return nil
	})
}

// TestAnnounceD4 holds what a sidecar may say of itself: its own declared ports
// on the address it comes from, or one in the configured ranges.
func TestAnnounceD4(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files(), Change: func(c *controlplane.Config) {
		c.Announce.Ranges = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	}})
	for _, tt := range []struct {
		name, workload string
		req            *sallyportv1.AnnounceRequest
		published      string
		code           codes.Code
	}{
		{"observed address", "server", &sallyportv1.AnnounceRequest{TunnelPort: 15008, Ports: []uint32{8080, 7000}}, "127.0.0.1:15008", codes.OK},
		{"observed address by name", "server", &sallyportv1.AnnounceRequest{Address: "127.0.0.1", TunnelPort: 15008}, "127.0.0.1:15008", codes.OK},
		{"address in a range", "server", &sallyportv1.AnnounceRequest{Address: "10.9.1.2", TunnelPort: 15008, Ports: []uint32{8080}}, "10.9.1.2:15008", codes.OK},
		{"another's address", "server", &sallyportv1.AnnounceRequest{Address: "10.8.1.2", TunnelPort: 15008}, "", codes.PermissionDenied},
		{"no address", "server", &sallyportv1.AnnounceRequest{Address: "payments.example", TunnelPort: 15008}, "", codes.InvalidArgument},
		{"undeclared port", "server", &sallyportv1.AnnounceRequest{TunnelPort: 15008, Ports: []uint32{22}}, "", codes.PermissionDenied},
		{"another's port", "client", &sallyportv1.AnnounceRequest{TunnelPort: 15008, Ports: []uint32{8080}}, "", codes.PermissionDenied},
		{"tunnel port 0", "server", &sallyportv1.AnnounceRequest{}, "", codes.InvalidArgument},
		{"tunnel port 65536", "server", &sallyportv1.AnnounceRequest{TunnelPort: 65536}, "", codes.InvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			published, code := ask(t, announce(t, m, tt.workload), tt.req)
			if published != tt.published || code != tt.code {
				t.Errorf("published %q, %v; want %q, %v", published, code, tt.published, tt.code)
			}
		})
	}
}

// TestEndpointLivesAsLongAsItsStream: published, withdrawn on draining, and gone
// with the stream; the end of an old stream does not take the new one's.
func TestEndpointLivesAsLongAsItsStream(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	a := m.Agent("server")
	open := func() (sallyportv1.Announcer_AnnounceClient, func()) {
		conn, err := a.Dial(t.Context())
		require.NoError(t, err)
		s, err := sallyportv1.NewAnnouncerClient(conn).Announce(t.Context())
		require.NoError(t, err)
		return s, func() { _ = conn.Close() }
	}
	old, closeOld := open()
	if got, code := ask(t, old, &sallyportv1.AnnounceRequest{TunnelPort: 1111, Ports: []uint32{8080}}); code != codes.OK {
		t.Fatalf("announcing: %q %v", got, code)
	}
	wantEndpoints(t, m, "127.0.0.1:1111")
	current, closeCurrent := open()
	if got, code := ask(t, current, &sallyportv1.AnnounceRequest{TunnelPort: 2222, Ports: []uint32{8080}}); code != codes.OK {
		t.Fatalf("announcing again: %q %v", got, code)
	}
	wantEndpoints(t, m, "127.0.0.1:2222")
	closeOld()
	// The old stream's end reaches the server before what is asked next does
	// anything, or after: the endpoint has to survive both.
	if got, code := ask(t, current, &sallyportv1.AnnounceRequest{TunnelPort: 2223, Ports: []uint32{8080}}); code != codes.OK {
		t.Fatalf("announcing another port: %q %v", got, code)
	}
	wantEndpoints(t, m, "127.0.0.1:2223")
	if got, code := ask(t, current, &sallyportv1.AnnounceRequest{Draining: true}); got != "" || code != codes.OK {
		t.Fatalf("draining: %q %v", got, code)
	}
	wantEndpoints(t, m)
	if got, code := ask(t, current, &sallyportv1.AnnounceRequest{TunnelPort: 3333, Ports: []uint32{8080}}); code != codes.OK {
		t.Fatalf("announcing after draining: %q %v", got, code)
	}
	wantEndpoints(t, m, "127.0.0.1:3333")
	closeCurrent()
	wantEndpoints(t, m)
}

// TestEndpointOfRemovedWorkload: a workload that is no more has no endpoint, and
// its streams end without being asked anything.
func TestEndpointOfRemovedWorkload(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	s := announce(t, m, "server")
	if got, code := ask(t, s, &sallyportv1.AnnounceRequest{TunnelPort: 1111, Ports: []uint32{8080}}); code != codes.OK {
		t.Fatalf("announcing: %q %v", got, code)
	}
	require.NoError(t, m.Apply("", map[string]string{"w.yaml": fmt.Sprintf(doc, "client", "")}))
	meshtest.Eventually(t, "the workload gone from status", func() error {
		r, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
		if err == nil && len(r.GetWorkloads()) != 1 {
			err = fmt.Errorf("%d workloads", len(r.GetWorkloads()))
		}
		return err
	})
	if _, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("the stream of a removed workload: %v, want PermissionDenied", err)
	}
}

// TestReplacedEndpointComesBack: a second sidecar with the same instance takes
// the endpoint over; when it ends, the first one's is back.
func TestReplacedEndpointComesBack(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	a := m.Agent("server")
	open := func(port uint32) func() {
		conn, err := a.Dial(t.Context())
		require.NoError(t, err)
		s, err := sallyportv1.NewAnnouncerClient(conn).Announce(t.Context())
		require.NoError(t, err)
		if got, code := ask(t, s, &sallyportv1.AnnounceRequest{TunnelPort: port, Ports: []uint32{8080}}); code != codes.OK {
			t.Fatalf("announcing: %q %v", got, code)
		}
		return func() { _ = conn.Close() }
	}
	defer open(1111)()
	closeSecond := open(2222)
	wantEndpoints(t, m, "127.0.0.1:2222")
	closeSecond()
	wantEndpoints(t, m, "127.0.0.1:1111")
}

// TestStreamsPerInstance: an instance holds three streams at most, the oldest
// goes; the endpoint is the newest one's.
func TestStreamsPerInstance(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	conn := m.Dial(m.Agent("server"))
	var first sallyportv1.Announcer_AnnounceClient
	for i := range 4 {
		s, err := sallyportv1.NewAnnouncerClient(conn).Announce(t.Context())
		require.NoError(t, err)
		if got, code := ask(t, s, &sallyportv1.AnnounceRequest{TunnelPort: uint32(1000 + i), Ports: []uint32{8080}}); code != codes.OK {
			t.Fatalf("announcing: %q %v", got, code)
		}
		if i == 0 {
			first = s
		}
	}
	if _, err := first.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("the oldest of four streams: %v, want ResourceExhausted", err)
	}
	wantEndpoints(t, m, "127.0.0.1:1003")
}
