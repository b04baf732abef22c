package meshtest

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
)

// webCert writes a self-signed certificate for 127.0.0.1.
func webCert(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(240 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "web.pem"), filepath.Join(dir, "web.key")
	require.NoError(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	require.NoError(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600))
	return certFile, keyFile
}

// front stands before a bundle endpoint, where whoever runs the network between
// two meshes would.
type front struct {
	addr string

	mu     sync.Mutex
	target string // guarded by mu; "" is gone
}

func newFront(t *testing.T, target string) *front {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	f := &front{addr: ln.Addr().String(), target: target}
	Go(t, "front", func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
		defer stop()
		var wg sync.WaitGroup
		defer wg.Wait()
		for {
			c, err := ln.Accept()
			if err != nil {
				return nil
			}
			wg.Go(func() { f.serve(ctx, c) })
		}
	})
	return f
}

func (f *front) serve(ctx context.Context, c net.Conn) {
	defer c.Close()
	f.mu.Lock()
	target := f.target
	f.mu.Unlock()
	if target == "" {
		return
	}
	up, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer up.Close()
	stop := context.AfterFunc(ctx, func() { _, _ = c.Close(), up.Close() })
	defer stop()
	done := make(chan struct{})
	go func() { _, _ = io.Copy(up, c); _ = up.(*net.TCPConn).CloseWrite(); close(done) }()
	_, _ = io.Copy(c, up)
	_ = c.Close()
	<-done
}

func (f *front) lead(target string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.target = target
}

// TestF5_TwoMeshes: A's orders calls B's payments, as both sides allow it, and
// nothing else passes; the endpoints misbehave and nothing changes; each side
// takes its part back and the call ends.
func TestF5_TwoMeshes(t *testing.T) {
	w := newMeshes(t, controlplane.CA{}, 50*time.Millisecond)
	w.wantStatus("orders", http.StatusOK)
	w.wantStatus("tester", http.StatusForbidden)            // A lets it try, B refuses
	w.wantStatus("snoop", http.StatusServiceUnavailable)    // A does not offer it
	w.wantBStatus("/ledger", http.StatusServiceUnavailable) // B calls nothing in A: A declares nothing there
	for _, f := range w.flows(w.b) {
		if strings.Contains(f, "snoop") {
			t.Errorf("B has seen A's snoop: %s", f)
		}
	}

	t.Run("endpoints misbehave", w.endpointsMisbehave)
	live := w.openStream()
	t.Run("A's rule goes", func(t *testing.T) {
		w.applyA(strings.ReplaceAll(w.docsA, "{workload: orders}, ", ""))
		live.wantEnd(t)
		w.wantStatus("orders", http.StatusServiceUnavailable)
		w.applyA(w.docsA)
		w.wantStatus("orders", http.StatusOK)
	})
	live = w.openStream()
	t.Run("B's TrustDomain goes", func(t *testing.T) {
		w.applyB("")
		live.wantEnd(t)
		w.wantStatus("orders", http.StatusServiceUnavailable)
		w.applyB(w.docsB)
		w.wantStatus("orders", http.StatusOK)
	})
}

// endpointsMisbehave: both bundle endpoints are gone, answer garbage, or somebody
// else answers; both meshes say so and go on.
func (w *meshes) endpointsMisbehave(t *testing.T) {
	foe := New(t, Config{Change: func(c *controlplane.Config) {
		c.TrustDomain, c.Listen.Bundle = "b.example", "127.0.0.1:0" // an impostor with the very same name
	}})
	live := w.openStream()
	for name, target := range map[string]string{"gone": "", "garbage": w.garbage, "an impostor": foe.Bundle, "another kind of server": foe.GRPC} {
		before := w.bundle(w.a, "b.example")
		w.frontB.lead(target)
		w.frontA.lead(target)
		w.wantProblem(w.a, "b.example", true)
		w.wantProblem(w.b, "a.example", true)
		w.wantStatus("orders", http.StatusOK)
		w.wantStatus("snoop", http.StatusServiceUnavailable)
		if got := w.bundle(w.a, "b.example"); got != before {
			t.Errorf("%s: A's bundle of B changed", name)
		}
		w.frontB.lead(w.b.Bundle)
		w.frontA.lead(w.a.Web)
		w.wantProblem(w.a, "b.example", false)
		w.wantProblem(w.b, "a.example", false)
	}
	live.roundTrip(t)
}

// meshes is A, whose workloads call, and B, which serves. A fetches B's bundle by
// https_spiffe and B fetches A's by https_web.
type meshes struct {
	t              *testing.T
	a, b           *Mesh
	frontA, frontB *front            // before the bundle endpoints of A and of B
	garbage        string            // address
	docsA, docsB   string            // what federates
	out            map[string]string // :: A's workload → its door to payments over HTTP
	stream         string            // orders' door to payments' echo
	fromB          *Sidecar
}

const (
	workloadA = "apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: %s}\nspec:\n  attest: [{kind: join-token}]\n---\n"
	workloadB = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: payments}
spec:
  id: /shop/payments
  attest: [{kind: join-token}]
  ports: [{name: http, port: 8080, protocol: http}, {name: echo, port: 7000, protocol: tcp}]
---
`
	trustA = `apiVersion: sallyport.dev/v1
kind: TrustDomain
metadata: {name: bee}
spec:
  trustDomain: b.example
  bundleEndpoint: {url: "https://%s/", profile: https_spiffe, endpointID: spiffe://b.example/sallyport/controlplane}
  bundle: '%s'
  workloads:
    - id: /shop/payments
      ports: [{name: http, port: 8080, protocol: http}, {name: echo, port: 7000, protocol: tcp}, {name: hidden, port: 9, protocol: tcp}]
      endpoints: ["%s"]
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: calls-to-bee}
spec:
  to: {id: spiffe://b.example/shop/payments}
  allow:
    - {from: [{workload: orders}, {workload: tester}], ports: [http, echo]}
`
	trustB = `apiVersion: sallyport.dev/v1
kind: TrustDomain
metadata: {name: ay}
spec:
  trustDomain: a.example
  bundleEndpoint: {url: "https://%s/", profile: https_web}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: calls-from-ay}
spec:
  to: {workload: payments}
  allow:
    - {from: [{id: spiffe://a.example/orders}, {id: spiffe://a.example/snoop}], ports: [http, echo]}
`
)

func newMeshes(t *testing.T, ca controlplane.CA, refresh time.Duration) *meshes {
	t.Helper()
	certFile, keyFile := webCert(t)
	endpoints := func(c *controlplane.Config) {
		c.CA = ca
		c.Listen.Bundle, c.Listen.Web = "127.0.0.1:0", "127.0.0.1:0"
		c.Web = controlplane.Web{CertFile: certFile, KeyFile: keyFile}
		c.Federation.CAFile = certFile
	}
	w := &meshes{t: t, out: map[string]string{}}
	callers := ""
	for _, name := range []string{"orders", "tester", "snoop"} {
		callers += fmt.Sprintf(workloadA, name)
	}
	w.a = New(t, Config{Files: map[string]string{"w.yaml": callers}, Bundles: refresh, Change: func(c *controlplane.Config) {
		endpoints(c)
		c.TrustDomain = "a.example"
	}})
	w.b = New(t, Config{Files: map[string]string{"w.yaml": workloadB}, Bundles: refresh, Change: func(c *controlplane.Config) {
		endpoints(c)
		c.TrustDomain = "b.example"
	}})
	w.frontA, w.frontB = newFront(t, w.a.Web), newFront(t, w.b.Bundle)
	w.garbage = serveGarbage(t)
	server := w.b.Sidecar(SidecarConfig{Workload: "payments", Serve: map[string]string{"http": serveHTTP(t), "echo": serveEcho(t)}, Outbound: []string{"spiffe://a.example/ledger:http"}})
	w.fromB = server
	w.docsA = fmt.Sprintf(trustA, w.frontB.addr, w.bundle(w.b, ""), server.Tunnel)
	w.docsB = fmt.Sprintf(trustB, w.frontA.addr)
	w.applyA(w.docsA)
	w.applyB(w.docsB)
	for _, name := range []string{"orders", "tester", "snoop"} {
		to := []string{"payments.shop.bee.mesh:http"}
		if name == "orders" {
			to = append(to, "spiffe://b.example/shop/payments:echo")
		}
		s := w.a.Sidecar(SidecarConfig{Workload: name, Outbound: to})
		w.out[name] = "http://" + s.Out[to[0]]
		if name == "orders" {
			w.stream = s.Out[to[1]]
		}
	}
	return w
}

func (w *meshes) applyA(docs string) {
	w.t.Helper()
	callers := ""
	for _, name := range []string{"orders", "tester", "snoop"} {
		callers += fmt.Sprintf(workloadA, name)
	}
	require.NoError(w.t, w.a.Apply("", map[string]string{"w.yaml": callers, "f.yaml": docs}))
}

func (w *meshes) applyB(docs string) {
	w.t.Helper()
	files := map[string]string{"w.yaml": workloadB}
	if docs != "" {
		files["f.yaml"] = docs
	}
	require.NoError(w.t, w.b.Apply("", files))
}

// bundle is what m trusts of a trust domain; "" is its own.
func (w *meshes) bundle(m *Mesh, td string) string {
	w.t.Helper()
	var out string
	Eventually(w.t, "bundle of "+td, func() error {
		resp, err := m.Admin.TrustBundle(w.t.Context(), &sallyportv1.TrustBundleRequest{TrustDomain: td})
		out = string(resp.GetBundle())
		return err
	})
	return out
}

func (w *meshes) wantStatus(caller string, want int) {
	w.t.Helper()
	wantHTTP(w.t, w.out[caller], want)
}

func (w *meshes) wantBStatus(path string, want int) {
	w.t.Helper()
	for _, addr := range w.fromB.Out {
		wantHTTP(w.t, "http://"+addr+path, want)
	}
}

// wantHTTP waits for an answer, and holds the next ones to it.
func wantHTTP(t *testing.T, url string, want int) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: Deadline}
	get := func() error {
		resp, err := client.Get(url)
		if err != nil {
			if want == http.StatusServiceUnavailable {
				return nil // a port that is not known has no words
			}
			return err
		}
		defer resp.Body.Close()
		if body, _ := io.ReadAll(resp.Body); resp.StatusCode != want {
			return fmt.Errorf("%d %s, want %d", resp.StatusCode, body, want)
		}
		return nil
	}
	Eventually(t, url, get)
	for range 3 {
		if err := get(); err != nil {
			t.Errorf("%s, after it was right once: %v", url, err)
		}
	}
}

func (w *meshes) wantProblem(m *Mesh, td string, want bool) {
	w.t.Helper()
	Eventually(w.t, fmt.Sprintf("problem with %s: %v", td, want), func() error {
		s, err := m.Admin.Status(w.t.Context(), &sallyportv1.StatusRequest{})
		if err != nil {
			return err
		}
		for _, d := range s.GetFederated() {
			shown := slices.ContainsFunc(s.GetProblems(), func(p string) bool { return strings.Contains(p, td) })
			if d.GetTrustDomain() == td && (d.GetProblem() != "") == want && shown == want && d.GetLastSuccess() != nil {
				return nil
			}
		}
		return fmt.Errorf("%v", s.GetFederated())
	})
}

func (w *meshes) flows(m *Mesh) []string {
	w.t.Helper()
	stream, err := m.Admin.Flows(w.t.Context(), &sallyportv1.FlowsRequest{})
	require.NoError(w.t, err)
	var out []string
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		require.NoError(w.t, err)
		out = append(out, string(resp.GetFlow()))
	}
}

// stream is a connection of orders to payments' echo.
type stream struct {
	net.Conn
	r *bufio.Reader
}

func (w *meshes) openStream() *stream {
	w.t.Helper()
	c, err := net.Dial("tcp", w.stream)
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = c.Close() })
	s := &stream{c, bufio.NewReader(c)}
	s.roundTrip(w.t)
	return s
}

func (s *stream) roundTrip(t *testing.T) {
	t.Helper()
	require.NoError(t, s.SetDeadline(time.Now().Add(Deadline)))
	_, err := io.WriteString(s, "hello\n")
	require.NoError(t, err)
	line, err := s.r.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "hello\n", line)
}

func (s *stream) wantEnd(t *testing.T) {
	t.Helper()
	require.NoError(t, s.SetDeadline(time.Now().Add(Deadline)))
	if _, err := s.r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a live connection that must end: %v", err)
	}
}

func serveHTTP(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "paid") })}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	return ln.Addr().String()
}

func serveEcho(t *testing.T) string {
	t.Helper()
	return serveTCP(t, func(c net.Conn) { _, _ = io.Copy(c, c) })
}

func serveGarbage(t *testing.T) string {
	t.Helper()
	return serveTCP(t, func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n{}") })
}

func serveTCP(t *testing.T, handle func(net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				handle(c)
			})
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
	return ln.Addr().String()
}
