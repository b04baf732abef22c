package sidecar

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// link is a way to the control plane that can be cut.
type link struct {
	ln    net.Listener
	mu    sync.Mutex
	off   bool
	conns []net.Conn
	wg    sync.WaitGroup
}

func newLink(t *testing.T, to string) *link {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l := &link{ln: ln}
	l.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", to)
			l.mu.Lock()
			if err != nil || l.off {
				l.mu.Unlock()
				_ = c.Close()
				if up != nil {
					_ = up.Close()
				}
				continue
			}
			l.conns = append(l.conns, c, up)
			l.mu.Unlock()
			for _, way := range [][2]net.Conn{{c, up}, {up, c}} {
				l.wg.Go(func() { _, _ = io.Copy(way[0], way[1]); _ = way[0].Close() })
			}
		}
	})
	t.Cleanup(func() { l.cut(); _ = ln.Close(); l.wg.Wait() })
	return l
}

// cut ends every connection and lets none come any more.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.off = true
	for _, c := range l.conns {
		_ = c.Close()
	}
}

// signer makes an SVID of the control plane with the CA key in its data folder.
func signer(t *testing.T, dataDir string) *x509svid.SVID {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dataDir, "keys", "intermediate*.pem"))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	data, err := os.ReadFile(files[0])
	require.NoError(t, err)
	keyBlock, rest := pem.Decode(data)
	certBlock, _ := pem.Decode(rest)
	caKey, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	require.NoError(t, err)
	ca, err := x509.ParseCertificate(certBlock.Bytes)
	require.NoError(t, err)
	id := spiffeid.RequireFromString("spiffe://test.example" + identity.ControlPlanePath)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(7), URIs: []*url.URL{id.URL()}, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, ca, key.Public(), caKey)
	require.NoError(t, err)
	leaf, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf, ca}, PrivateKey: key}
}

// stories are sidecars around a real control plane.
type stories struct {
	t    *testing.T
	mesh *meshtest.Mesh
	data string
	echo string // an app
}

func newStories(t *testing.T, files map[string]string) *stories {
	s := &stories{t: t}
	s.mesh = meshtest.New(t, meshtest.Config{Files: files, Change: func(c *controlplane.Config) { s.data = c.DataDir }})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { _, _ = io.Copy(c, c); _ = c.Close() })
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
	s.echo = ln.Addr().String()
	return s
}

// start runs a sidecar until the test ends. It calls the workloads in to.
func (s *stories) start(name, controlPlane string, to ...string) *Sidecar {
	s.t.Helper()
	var more strings.Builder
	fmt.Fprintf(&more, "app: {tcp: %q}\ndrain: 1ms\n", s.echo)
	for i, w := range to {
		if i == 0 {
			more.WriteString("outbound:\n")
		}
		fmt.Fprintf(&more, "  - {listen: \"127.0.0.1:0\", to: \"%s:tcp\"}\n", w)
	}
	cfg := config(s.t, more.String())
	cfg.ControlPlane = controlPlane
	require.NoError(s.t, os.WriteFile(cfg.TokenFile, []byte(s.mesh.Token(name)), 0o600))
	return s.run(name, cfg)
}

func (s *stories) run(name string, cfg Config) *Sidecar {
	s.t.Helper()
	c, err := New(s.t.Context(), cfg, Options{Log: meshtest.Log(s.t).Named(name)})
	require.NoError(s.t, err)
	meshtest.Go(s.t, "sidecar of "+name, c.Run)
	meshtest.Eventually(s.t, name+" is ready", c.ready)
	return c
}

// call opens a connection by the sidecar's outbound listener i.
func (s *stories) call(from *Sidecar, i int) net.Conn {
	s.t.Helper()
	conn, err := net.Dial("tcp", from.OutboundAddrs()[i].String())
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = conn.Close() })
	require.NoError(s.t, conn.SetDeadline(time.Now().Add(meshtest.Deadline)))
	return conn
}

func echoes(conn net.Conn) error {
	if _, err := conn.Write([]byte("ping")); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 4))
	return err
}

// handshake tries to authenticate as from at to's tunnel, wherever the control plane
// says that it is.
func handshake(t *testing.T, from, to *Sidecar) error {
	conn, err := tls.Dial("tcp", to.TunnelAddr().String(), identity.ClientTLS(
		identity.TLSConfig{Source: from.agent.Source()}, identity.ExactPattern(to.agent.ID())))
	require.NoError(t, err) // TLS 1.3: the server's verdict comes later
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(meshtest.Deadline)))
	_, err = io.ReadFull(conn, make([]byte, 9)) // of its SETTINGS
	return err
}

// reset waits for the end of a connection.
func (s *stories) reset(conn net.Conn) {
	s.t.Helper()
	if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
		s.t.Errorf("got %v, want a reset", err)
	}
}

const abcx = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: %[1]s}
spec:
  attest: [{kind: join-token}]
  ports: [{name: tcp, port: 7000, protocol: tcp}]
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: to-%[1]s}
spec:
  to: {workload: %[1]s}
  allow: [{from: [{id: "/**"}], ports: [tcp]}]
`

// B is cut off from the control plane, X is revoked, C learns it by push, and B
// still talks to C: B refuses X too, and goes on refusing it after a restart.
func TestF6CutOffSidecarLearnsFromNeighbours(t *testing.T) {
	files := map[string]string{}
	for _, name := range []string{"a", "b", "c", "x"} {
		files[name+".yaml"] = fmt.Sprintf(abcx, name)
	}
	s := newStories(t, files)
	way := newLink(t, s.mesh.GRPC)
	b := s.start("b", way.ln.Addr().String(), "c")
	c := s.start("c", s.mesh.GRPC, "b")
	a := s.start("a", s.mesh.GRPC, "b")
	x := s.start("x", s.mesh.GRPC, "b", "c")
	sign := func(n int64, revoked ...string) []byte {
		m := &sallyportv1.RevocationList{TrustDomain: "test.example", Epoch: 1, Number: n, Issued: timestamppb.Now()}
		for _, path := range revoked {
			m.Ids = append(m.Ids, &sallyportv1.RevokedID{Path: path, NotBefore: timestamppb.Now()})
		}
		env, err := revocation.Sign(m, signer(t, s.data))
		require.NoError(t, err)
		return env
	}
	push := func(to *Sidecar, envelope []byte) error {
		return to.apply(xds.Update{Kind: xds.Revocations, Revocations: envelope})
	}
	for _, sidecar := range []*Sidecar{a, b, c, x} {
		require.NoError(t, push(sidecar, sign(1)))
	}
	xb, xc, ab, bc := s.call(x, 0), s.call(x, 1), s.call(a, 0), s.call(b, 0)
	for _, conn := range []net.Conn{xb, xc, ab, bc} {
		require.NoError(t, echoes(conn))
	}

	way.cut()
	meshtest.Eventually(t, "b is cut off", func() error {
		if b.health.Get(componentLink).Status == admin.OK {
			return errors.New("connected")
		}
		return nil
	})
	if d := b.stale(); d <= 0 || d > meshtest.Deadline {
		t.Errorf("cut off a moment ago, b believes that it has heard nothing for %v", d)
	}
	if d := c.stale(); d != 0 {
		t.Errorf("connected, c believes that it has heard nothing for %v", d)
	}
	second := sign(2, "/x")
	start := time.Now()
	require.NoError(t, push(c, second))
	s.reset(xc)
	s.reset(xb)
	t.Logf("b cut x after %v", time.Since(start))
	require.Error(t, handshake(t, x, b))
	require.NoError(t, handshake(t, a, b))
	require.NoError(t, echoes(ab))
	require.NoError(t, echoes(bc))
	require.NoError(t, echoes(s.call(b, 0)))
	meshtest.Eventually(t, "a learns it from b", func() error {
		if v := a.book.List(a.agent.ID().TrustDomain()).Version(); v != (revocation.Version{Epoch: 1, Number: 2}) {
			return fmt.Errorf("holds %s", v)
		}
		return nil
	})
	require.NoError(t, push(x, second))
	if status, why := x.revocationHealth(); status != admin.Down {
		t.Errorf("x knows and does not say that it is revoked: %v %s", status, why)
	}

	// Nothing goes back.
	for what, envelope := range map[string][]byte{"older": sign(1), "older, signed later": sign(1), "the same number without x": sign(2)} {
		for name, sidecar := range map[string]*Sidecar{"b": b, "c": c} {
			if err := push(sidecar, envelope); err == nil {
				t.Errorf("%s accepted a list that is %s", name, what)
			}
			require.Error(t, handshake(t, x, sidecar))
		}
	}
	require.NoError(t, push(c, nil), "withdrawn")
	require.Error(t, handshake(t, x, c))
	s.reset(s.call(x, 1))

	// It survives b's end.
	meshtest.Eventually(t, "the list is saved", func() error {
		saved, err := readList(b.cfg.StateDir)
		if err == nil && string(saved) != string(second) {
			err = errors.New("not yet")
		}
		return err
	})
	info, err := os.Stat(filepath.Join(b.cfg.StateDir, revocationFile))
	require.NoError(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %o", info.Mode().Perm())
	}
	again := b.cfg
	again.Admin.Listen, again.Admin.Socket, again.TokenFile = "", "", ""
	restarted, err := New(t.Context(), again, Options{Log: meshtest.Log(t)})
	require.NoError(t, err)
	defer restarted.close()
	if v := restarted.book.List(b.agent.ID().TrustDomain()).Version(); v.Number != 2 {
		t.Errorf("after a restart list %s is in force", v)
	}
	for _, c := range []struct {
		after time.Duration
		limit policy.MaxStale
		want  admin.Status
	}{
		{0, policy.MaxStale{After: time.Hour, Refuse: true}, admin.OK},
		{2 * time.Hour, policy.MaxStale{After: time.Hour, Refuse: true}, admin.Down},
		{2 * time.Hour, policy.MaxStale{After: time.Hour}, admin.Degraded},
		{2 * time.Hour, policy.MaxStale{After: 3 * time.Hour}, admin.OK},
		{staleAfter / 2, policy.MaxStale{}, admin.OK},
		{2 * staleAfter, policy.MaxStale{}, admin.Degraded},
	} {
		restarted.now = func() time.Time { return time.Now().Add(c.after) }
		restarted.book = revocation.NewBook(restarted.agent.Source(), restarted.now)
		_, err := restarted.book.Restore(second)
		require.NoError(t, err)
		restarted.views.Apply(xds.Update{Kind: xds.Rules, Rules: policy.NewRuleset(nil), MaxStale: c.limit})
		if got, why := restarted.revocationHealth(); got != c.want {
			t.Errorf("%v without news, limit %+v: got %v (%s), want %v", c.after, c.limit, got, why, c.want)
		}
	}
}
