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
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
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

// sign makes list number n, as change has it.
func (s *stories) sign(n int64, change func(*sallyportv1.RevocationList)) []byte {
	s.t.Helper()
	m := &sallyportv1.RevocationList{TrustDomain: "test.example", Epoch: 1, Number: n, Issued: timestamppb.Now()}
	change(m)
	env, err := revocation.Sign(m, signer(s.t, s.data))
	require.NoError(s.t, err)
	return env
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

// refused makes a call that must not succeed. It may end before the dial is done.
func (s *stories) refused(from *Sidecar, i int) {
	s.t.Helper()
	conn, err := net.Dial("tcp", from.OutboundAddrs()[i].String())
	if errors.Is(err, syscall.ECONNRESET) {
		return
	}
	require.NoError(s.t, err)
	defer conn.Close()
	require.NoError(s.t, conn.SetDeadline(time.Now().Add(meshtest.Deadline)))
	s.reset(conn)
}
