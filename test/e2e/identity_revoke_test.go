//go:build e2e

package e2e

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// admitted reports whether a tunnel port takes an SVID: it answers HTTP/2 then.
func admitted(t *testing.T, addr string, svid *x509svid.SVID) bool {
	t.Helper()
	cert := tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	raw, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	defer raw.Close()
	require.NoError(t, raw.SetDeadline(time.Now().Add(realmesh.Deadline)))
	conn := tls.Client(raw, &tls.Config{
		InsecureSkipVerify: true, NextProtos: []string{"h2"}, //nolint:gosec // the other end is not the question
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
	})
	if _, err := io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
		return false
	}
	_, err = io.ReadFull(conn, make([]byte, 9))
	return err == nil
}

func svidOf(t *testing.T, src *workloadapi.X509Source) *x509svid.SVID {
	t.Helper()
	svid, err := src.GetX509SVID()
	require.NoError(t, err)
	return svid
}

// waitNewer waits until src has an SVID that addr takes, other than old.
func waitNewer(t *testing.T, limit time.Duration, src *workloadapi.X509Source, addr string, old *x509svid.SVID) time.Duration {
	t.Helper()
	return realmesh.EventuallyWithin(t, limit, "a new SVID that is taken", func() error {
		svid, err := src.GetX509SVID()
		switch {
		case err != nil:
			return err
		case svid.Certificates[0].Equal(old.Certificates[0]):
			return errors.New("still the old one")
		case !admitted(t, addr, svid):
			return errors.New("not taken")
		}
		return nil
	})
}

// ended waits for the end of a connection that nobody writes to any more.
func ended(t *testing.T, c net.Conn) {
	t.Helper()
	require.NoError(t, c.SetDeadline(time.Now().Add(realmesh.Deadline)))
	if _, err := io.Copy(io.Discard, c); err != nil && errors.Is(err, net.ErrClosed) {
		t.Error(err)
	} else if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
		t.Error("the connection lives on")
	}
}

// keptAlive is an HTTP connection with an answered request behind it, or with one
// for /stream, of whose answer a first line has come.
func keptAlive(t *testing.T, addr, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(realmesh.Deadline)))
	_, err = io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: server\r\n\r\n")
	require.NoError(t, err)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	require.NoError(t, err)
	_, err = bufio.NewReader(resp.Body).ReadString('\n')
	require.NoError(t, err)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("status %d", resp.StatusCode)
	}
	return c
}

// webApp answers with a line, and on /stream with one every 100 ms without end.
func webApp(t *testing.T) (addr string) {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "a")
		if r.URL.Path != "/stream" {
			return
		}
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for http.NewResponseController(w).Flush() == nil {
			select {
			case <-r.Context().Done():
				return
			case <-tick.C:
				fmt.Fprintln(w, "tick")
			}
		}
	}))
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	return srv.Listener.Addr().String()
}

// pair is the mesh of most tests here: client calls server, and its app holds an
// SVID that the test can keep.
type pair struct {
	*realmesh.Mesh
	server, client *realmesh.Sidecar
	app            *workloadapi.X509Source
}

func newPair(t *testing.T, m *realmesh.Mesh) *pair {
	p := &pair{Mesh: m}
	p.server = m.Sidecar(realmesh.SidecarConfig{Name: "server", Serve: map[string]string{"http": webApp(t), "echo": tickApp(t, 100*time.Millisecond)}})
	p.client = m.Sidecar(realmesh.SidecarConfig{Name: "client", Outbound: map[string]string{"server:http": "", "server:echo": ""}, Extra: "workloadAPI: {socket: api.sock}\n"})
	waitOK(t, p.http())
	p.app = source(t, filepath.Join(p.client.Dir, "api.sock"))
	return p
}

func (p *pair) http() string { return "http://" + p.client.Out["server:http"] }

// TestF6RevokeByTheCLI: one command cuts what lives, says why, closes the streams
// of the revoked within a second (D5), and gives it nothing more; readmitted, it
// comes back by itself with another SVID, and the old one stays refused.
func TestF6RevokeByTheCLI(t *testing.T) {
	p := newPair(t, realmesh.New(t, pairFiles()))
	stream, old := live(t, p.client.Out["server:echo"]), svidOf(t, p.app)
	kept, streaming := keptAlive(t, p.client.Out["server:http"], "/"), keptAlive(t, p.client.Out["server:http"], "/stream")
	if !admitted(t, p.server.Tunnel, old) {
		t.Fatal("the app's SVID is refused before anything was revoked")
	}
	connected := func(want float64) func() error {
		return func() error {
			if n, err := metric(p.Metrics, "sallyport_controlplane_sidecars"); err != nil || n != want {
				return fmt.Errorf("%v sidecars connected, %v", n, err)
			}
			return nil
		}
	}
	realmesh.Eventually(t, "two sidecars", connected(2))
	start := time.Now()
	revoked := make(chan string, 1)
	go func() {
		out, stderr, _ := p.CLI("identity", "revoke", "client", "--reason", "key was in a log")
		revoked <- out + stderr
	}()
	ended(t, stream)
	ended(t, kept)
	ended(t, streaming)
	cut := time.Since(start)
	out := <-revoked
	took := realmesh.EventuallyWithin(t, time.Second, "D5: the streams of the revoked end", connected(1))
	t.Logf("all three connections cut %v after the command began; its streams ended %v after it returned", cut, took)
	if !strings.Contains(out, "client") {
		t.Errorf("revoke: %s", out)
	}
	if admitted(t, p.server.Tunnel, old) {
		t.Error("the old SVID is taken after the revocation")
	}
	realmesh.Eventually(t, "records that say why", func() error {
		cuts := 0
		for _, f := range p.Flows() {
			if f.Side == "inbound" && f.Outcome == "cut" && strings.HasPrefix(f.Error, "revoked: ") {
				cuts++
			}
		}
		if cuts < 3 {
			return fmt.Errorf("%d records of revoked connections, want 3: %+v", cuts, p.Flows())
		}
		return nil
	})
	if out, stderr, code := p.CLI("token", "create", "--workload", "client"); code == 0 || !strings.Contains(stderr, "revoked") {
		t.Errorf("a token for a revoked workload: exit code %d: %s%s", code, out, stderr)
	}
	if out, _, code := p.CLI("status"); code != 1 || !strings.Contains(out, "revoked") {
		t.Errorf("status: exit code %d: %s", code, out)
	}
	mustCLI(t, p.Mesh, "identity", "unrevoke", "client")
	back := waitNewer(t, 30*time.Second, p.app, p.server.Tunnel, old)
	waitOK(t, p.http())
	t.Logf("back %v after unrevoke", back)
	if admitted(t, p.server.Tunnel, old) {
		t.Error("readmitted, its old SVID is taken again")
	}
	if out := mustCLI(t, p.Mesh, "audit"); !strings.Contains(out, "key was in a log") {
		t.Errorf("audit: %s", out)
	}
}

// TestF6NeighbourPassesTheListOn: b is cut off from the control plane; x is
// revoked; b still talks to c, and refuses x within seconds.
func TestF6NeighbourPassesTheListOn(t *testing.T) {
	const ports = "  ports: [{name: echo, port: 7000, protocol: tcp}]\n"
	allow := func(to, from string) string {
		return fmt.Sprintf("apiVersion: sallyport.dev/v1\nkind: Policy\nmetadata: {name: to-%s}\nspec:\n  to: {workload: %s}\n  allow: [{from: [{workload: %s}], ports: [echo]}]\n---\n", to, to, from)
	}
	m := realmesh.New(t, map[string]string{"all.yaml": workload("b", ports) + workload("c", ports) + workload("x", "") + allow("b", "x") + allow("c", "b")})
	relay := newRelay(t, m.GRPC)
	m.Sidecar(realmesh.SidecarConfig{Name: "c", Serve: map[string]string{"echo": tickApp(t, 100*time.Millisecond)}})
	direct := m.GRPC
	m.GRPC = relay.addr
	b := m.Sidecar(realmesh.SidecarConfig{Name: "b", Serve: map[string]string{"echo": tickApp(t, 100*time.Millisecond)}, Outbound: map[string]string{"c:echo": ""}})
	m.GRPC = direct
	x := m.Sidecar(realmesh.SidecarConfig{Name: "x", Outbound: map[string]string{"b:echo": ""}, Extra: "workloadAPI: {socket: api.sock}\n"})
	fromX, toC := live(t, x.Out["b:echo"]), live(t, b.Out["c:echo"])
	old := svidOf(t, source(t, filepath.Join(x.Dir, "api.sock")))
	relay.cut()
	realmesh.Eventually(t, "b to be alone", func() error {
		if n, err := metric(m.Metrics, "sallyport_controlplane_sidecars"); err != nil || n != 2 {
			return fmt.Errorf("%v sidecars connected, %v", n, err)
		}
		return nil
	})
	start := time.Now()
	go func() { _, _, _ = m.CLI("identity", "revoke", "x", "--wait", "0s") }()
	ended(t, fromX)
	t.Logf("b cut x %v after the command began, told by c alone", time.Since(start))
	if admitted(t, b.Tunnel, old) {
		t.Error("b takes x's SVID")
	}
	require.NoError(t, toC.SetDeadline(time.Now().Add(realmesh.Deadline)))
	if _, err := io.ReadFull(toC, make([]byte, 20)); err != nil {
		t.Errorf("b's connection to c: %v", err)
	}
}

// relay carries connections to the control plane until it is cut.
type relay struct {
	addr string
	ln   net.Listener
	stop chan struct{}
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	r := &relay{ln.Addr().String(), ln, make(chan struct{})}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				_ = in.Close()
				continue
			}
			go func() { _, _ = io.Copy(in, out); _ = in.Close() }()
			go func() { _, _ = io.Copy(out, in); _ = out.Close() }()
			go func() { <-r.stop; _ = in.Close(); _ = out.Close() }()
		}
	}()
	return r
}

func (r *relay) cut() {
	_ = r.ln.Close()
	close(r.stop)
}

// TestTaintUnderLoad taints the intermediate, then the root, while requests go on:
// none fails, everybody has a new SVID, and what the tainted key signed is refused.
func TestTaintUnderLoad(t *testing.T) {
	p := newPair(t, realmesh.New(t, pairFiles()))
	load := realmesh.HTTPLoad(t, p.http(), 4, 5*time.Millisecond)
	for _, kind := range []string{"intermediate", "root"} {
		old := svidOf(t, p.app)
		before := signers(t, p.Mesh, kind)
		if len(before) != 1 {
			t.Fatalf("%d of kind %s sign: %v", len(before), kind, before)
		}
		mustCLI(t, p.Mesh, "ca", "taint", before[0])
		renewed := waitNewer(t, realmesh.Deadline, p.app, p.server.Tunnel, old)
		refused := realmesh.EventuallyWithin(t, time.Minute, "the old SVID refused", func() error {
			if admitted(t, p.server.Tunnel, old) {
				return errors.New("it is taken")
			}
			return nil
		})
		load.More(t, 100)
		t.Logf("%s: a new SVID after %v, the old one refused %v later", kind, renewed, refused)
		if now := signers(t, p.Mesh, kind); len(now) != 1 || now[0] == before[0] {
			t.Errorf("%s: %v signed, now %v", kind, before, now)
		}
	}
	ok, failed := load.Stop()
	t.Logf("%d requests", ok)
	for _, f := range failed {
		t.Errorf("a request failed: %s", f)
	}
}

// signers are the subjects of the authorities of a kind that sign.
func signers(t *testing.T, m *realmesh.Mesh, kind string) []string {
	t.Helper()
	stdout, stderr, _ := m.CLI("status", "--output", "json")
	var s struct {
		Authorities []struct{ Kind, Subject, State string }
	}
	require.NoError(t, json.Unmarshal([]byte(stdout), &s), stdout+stderr)
	var out []string
	for _, a := range s.Authorities {
		if a.Kind == kind && a.State == "active" {
			out = append(out, a.Subject)
		}
	}
	return out
}

// TestRemovedWorkloadIsRevoked: a pattern still admits its ID, but its SVIDs are
// refused as soon as its document is gone; defined again, it is readmitted, never
// its old SVIDs.
func TestRemovedWorkloadIsRevoked(t *testing.T) {
	const server = "  ports: [{name: http, port: 8080, protocol: http}, {name: echo, port: 7000, protocol: tcp}]\n"
	const everyone = "apiVersion: sallyport.dev/v1\nkind: Policy\nmetadata: {name: all}\nspec:\n  to: {workload: server}\n  allow: [{from: [{id: /**}], ports: [all]}]\n---\n"
	with := workload("server", server) + everyone + workload("client", "")
	m := realmesh.New(t, map[string]string{"all.yaml": with})
	p := newPair(t, m)
	stream, old := live(t, p.client.Out["server:echo"]), svidOf(t, p.app)
	realmesh.WriteFile(t, filepath.Join(m.Policy, "all.yaml"), workload("server", server)+everyone)
	ended(t, stream)
	if admitted(t, p.server.Tunnel, old) {
		t.Error("the SVID of a workload that is no more is taken")
	}
	realmesh.WriteFile(t, filepath.Join(m.Policy, "all.yaml"), with)
	t.Logf("back %v after it was defined again", waitNewer(t, 30*time.Second, p.app, p.server.Tunnel, old))
	waitOK(t, p.http())
	if admitted(t, p.server.Tunnel, old) {
		t.Error("its old SVID is taken again")
	}
}

// TestHealthBeforeExpiry: while nothing can be renewed, the sidecar says so well
// before its SVID ends, and tells how long it would last; traffic goes on.
func TestHealthBeforeExpiry(t *testing.T) {
	const life = 40 * time.Second
	p := newPair(t, realmesh.New(t, pairFiles(), "-svid-ttl", life.String()))
	health := func() (status, message string) {
		resp, err := http.Get("http://" + p.server.Admin + "/healthz")
		require.NoError(t, err)
		defer resp.Body.Close()
		var h struct {
			Components map[string]struct{ Status, Message string }
		}
		require.NoError(t, json.NewDecoder(resp.Body).Decode(&h))
		return h.Components["identity"].Status, h.Components["identity"].Message
	}
	if s, m := health(); s != "ok" {
		t.Fatalf("identity is %s: %s", s, m)
	}
	p.CP.Kill()
	after := realmesh.EventuallyWithin(t, life, "health not ok", func() error {
		if s, _ := health(); s == "ok" {
			return errors.New("ok")
		}
		return nil
	})
	left, err := metric(p.server.Admin, "sallyport_identity_outage_seconds")
	require.NoError(t, err)
	status, message := health()
	t.Logf("%s after %v: %s; %v s left", status, after, message, left)
	if status != "degraded" || left < life.Seconds()/2 || left > life.Seconds() {
		t.Errorf("%s with %v s left, want degraded with half of %v or more", status, left, life)
	}
	if got := realmesh.Get(t.Context(), http.DefaultClient, p.http()); got != nil {
		t.Errorf("a request meanwhile: %v", got)
	}
}
