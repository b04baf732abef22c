package meshtest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/issuer/external/issuertest"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// borders is a mesh whose issuers, the own one and a foreign one, sign whatever
// the test asks for: at its doors stand the tunnel port and a direct port of a
// sidecar and the port of the control plane; and a sidecar of it calls a server of the test.
type borders struct {
	own, foreign *issuertest.Issuer
	payments     *Sidecar
	direct       string // its direct port
	controlPlane string
	caller       string                          // local address that leads to the test's server
	server       atomic.Pointer[tls.Certificate] // what that presents
	met          chan meeting                    // what came of each handshake there
}

// meeting is a handshake in which the test's server presented a certificate.
type meeting struct {
	cert *tls.Certificate
	err  error // nil: the caller took it
}

var (
	ownDomain     = spiffeid.RequireTrustDomainFromString("test.example")
	foreignDomain = spiffeid.RequireTrustDomainFromString("foreign.example")
	ordersPeer    = spiffeid.RequireFromPath(ownDomain, "/orders")
	foreignPeer   = spiffeid.RequireFromPath(foreignDomain, "/shop/payments")
)

const foreignServer = `apiVersion: sallyport.dev/v1
kind: TrustDomain
metadata: {name: far}
spec:
  trustDomain: foreign.example
  bundle: '%s'
  workloads:
    - {id: /shop/payments, ports: [{name: http, port: 8080, protocol: http}], endpoints: ["%s"]}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: far}
spec:
  to: {id: spiffe://foreign.example/shop/payments}
  allow: [{from: [{workload: orders}], ports: [http]}]
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: from-afar}
spec:
  to: {workload: payments}
  allow: [{from: [{id: spiffe://foreign.example/**}], ports: [http]}]
`

func newBorders(t *testing.T) *borders {
	b := &borders{own: issuertest.New(t, ownDomain), foreign: issuertest.New(t, foreignDomain), met: make(chan meeting)}
	b.own.Federate(b.foreign)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	Go(t, "server", func(ctx context.Context) error { return b.accept(ctx, ln) })
	bundle, err := b.foreign.Bundle().Marshal()
	require.NoError(t, err)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	b.direct = free.Addr().String()
	_, number, _ := net.SplitHostPort(b.direct)
	require.NoError(t, free.Close())
	m := New(t, Config{
		Files: map[string]string{
			"w.yaml": strings.Replace(workloadB, "protocol: http}", "protocol: http, direct: "+number+"}", 1) + fmt.Sprintf(workloadA, "orders") + outsidePolicy,
			"f.yaml": fmt.Sprintf(foreignServer, bundle, ln.Addr()),
		},
		Change: func(c *controlplane.Config) {
			c.ExternalIssuer.WorkloadAPI = b.own.Serve(spiffeid.RequireFromPath(ownDomain, identity.ControlPlanePath))
			c.ExternalIssuer.Bundle.File = b.own.WriteBundle(filepath.Join(t.TempDir(), "bundle.json"))
		},
	})
	start := func(name, path string, serve map[string]string, out ...string) *Sidecar {
		return m.Sidecar(SidecarConfig{Workload: name, Identity: b.own.Serve(spiffeid.RequireFromPath(ownDomain, path)), Serve: serve, Outbound: out})
	}
	b.controlPlane = m.GRPC
	b.payments = start("payments", "/shop/payments", map[string]string{"http": serveHTTP(t)})
	b.caller = start("orders", "/orders", nil, "spiffe://foreign.example/shop/payments:http").Out["spiffe://foreign.example/shop/payments:http"]
	Eventually(t, "the direct port to open", func() error {
		conn, err := net.Dial("tcp", b.direct)
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	for _, good := range []tls.Certificate{b.own.Leaf(ordersPeer, nil), b.foreign.Leaf(foreignPeer, nil)} {
		Eventually(t, "a good SVID to be taken", func() error {
			if !admitted(t, b.payments.Tunnel, good) || !admitted(t, b.direct, good) {
				return errors.New("refused")
			}
			return nil
		})
	}
	return b
}

// accept answers each caller with the certificate of the moment, and tells what
// came of it.
func (b *borders) accept(ctx context.Context, ln net.Listener) error {
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	for {
		conn, err := ln.Accept()
		if err != nil {
			return nil
		}
		cert := b.server.Load()
		served := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{*cert}, ClientAuth: tls.RequestClientCert, NextProtos: []string{"h2"}})
		_ = conn.SetDeadline(time.Now().Add(Deadline))
		err = served.Handshake()
		if err == nil { // the caller has verified; what it says proves it
			_, err = io.ReadFull(served, make([]byte, len(preface)))
		}
		_ = conn.Close()
		select {
		case b.met <- meeting{cert, err}:
		case <-ctx.Done():
			return nil
		}
	}
}

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// admitted reports whether a listener takes a client: it answers HTTP/2 then.
func admitted(t *testing.T, addr string, cert tls.Certificate) bool {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, Deadline)
	require.NoError(t, err)
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(Deadline))
	client := tls.Client(conn, &tls.Config{
		InsecureSkipVerify: true, NextProtos: []string{"h2"}, //nolint:gosec // the other end is not the question
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
	})
	if _, err = io.WriteString(client, preface+"\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
		return false
	}
	_, err = io.ReadFull(client, make([]byte, 9))
	return err == nil
}

// called reports whether the sidecar takes a server that presents cert.
func (b *borders) called(t *testing.T, cert tls.Certificate) bool {
	t.Helper()
	b.server.Store(&cert)
	var outcome error
	Eventually(t, "a call to the foreign server", func() error {
		conn, err := net.Dial("tcp", b.caller)
		if err != nil {
			return err
		}
		gone := make(chan struct{})
		go func() { defer close(gone); _, _ = io.Copy(io.Discard, conn) }()
		defer func() { _ = conn.Close(); <-gone }()
		_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		for {
			select {
			case m := <-b.met:
				if m.cert == &cert { // else a second try of an earlier call
					outcome = m.err
					return nil
				}
			case <-gone:
				return errors.New("the sidecar has not called")
			}
		}
	})
	return outcome == nil
}

// spoiled is a certificate that must not authenticate.
type spoiled struct {
	leaf   func(*x509.Certificate) // spoils the SVID …
	issuer func(*x509.Certificate) // … or the intermediate above it
	cert   func(*issuertest.Issuer, spiffeid.ID) tls.Certificate
}

func (s spoiled) make(i *issuertest.Issuer, id spiffeid.ID) tls.Certificate {
	switch {
	case s.cert != nil:
		return s.cert(i, id)
	case s.issuer != nil:
		return i.LeafBelow(id, s.issuer)
	}
	return i.Leaf(id, s.leaf)
}

// refuse presents each certificate at every door; a good one is taken.
func refuse(t *testing.T, rows map[string]spoiled) {
	t.Helper()
	b := newBorders(t)
	look := func(name string, s spoiled, want bool) {
		t.Run(name, func(t *testing.T) {
			client := s.make(b.own, ordersPeer)
			if got := admitted(t, b.payments.Tunnel, client); got != want {
				t.Errorf("tunnel port: taken %v, want %v", got, want)
			}
			if got := admitted(t, b.direct, client); got != want {
				t.Errorf("direct port: taken %v, want %v", got, want)
			}
			if got := admitted(t, b.controlPlane, client); got != want {
				t.Errorf("control plane: taken %v, want %v", got, want)
			}
			if got := b.called(t, s.make(b.foreign, foreignPeer)); got != want {
				t.Errorf("as a server: taken %v, want %v", got, want)
			}
		})
	}
	look("good", spoiled{}, true)
	look("good, below an intermediate", spoiled{issuer: func(*x509.Certificate) {}}, true)
	for name, s := range rows {
		look(name, s, false)
	}
}

func TestX2_ExactlyOneURISAN(t *testing.T) {
	refuse(t, map[string]spoiled{
		"none":             {leaf: func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"orders"} }},
		"common name only": {leaf: func(c *x509.Certificate) { c.Subject.CommonName = c.URIs[0].String(); c.URIs = nil }},
		"two":              {leaf: func(c *x509.Certificate) { c.URIs = append(c.URIs, ownDomain.ID().URL()) }},
		"another URI first": {leaf: func(c *x509.Certificate) {
			c.URIs = append([]*url.URL{{Scheme: "https", Host: "a.example"}}, c.URIs...)
		}},
	})
}

func TestX3_1_LeafHasAPath(t *testing.T) {
	refuse(t, map[string]spoiled{
		"no path":    {leaf: func(c *x509.Certificate) { c.URIs[0].Path = "" }},
		"root path":  {leaf: func(c *x509.Certificate) { c.URIs[0].Path = "/" }},
		"uncritical": {leaf: func(c *x509.Certificate) { rawSAN(c, false, c.URIs[0].String()) }},
	})
}

// rawSAN writes the subject alternative name by hand.
func rawSAN(c *x509.Certificate, critical bool, uri string) {
	value, err := asn1.Marshal([]asn1.RawValue{{Tag: 6, Class: asn1.ClassContextSpecific, Bytes: []byte(uri)}})
	if err != nil {
		panic(err)
	}
	c.URIs = nil
	c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: critical, Value: value})
}

func TestX3_2_SigningCertificates(t *testing.T) {
	refuse(t, map[string]spoiled{
		"the issuer has a path": {issuer: func(c *x509.Certificate) { c.URIs[0].Path = "/orders" }},
		"the issuer itself":     {cert: func(i *issuertest.Issuer, _ spiffeid.ID) tls.Certificate { return i.Authority() }},
	})
}

func TestX4_1_BasicConstraints(t *testing.T) {
	refuse(t, map[string]spoiled{
		"a leaf that is a CA":      {leaf: func(c *x509.Certificate) { c.IsCA = true }},
		"an issuer that is no CA":  {issuer: func(c *x509.Certificate) { c.IsCA = false }},
		"an issuer without saying": {issuer: func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = false, false }},
	})
}

func TestX4_3_KeyUsage(t *testing.T) {
	refuse(t, map[string]spoiled{
		"none":                     {leaf: func(c *x509.Certificate) { c.KeyUsage = 0 }},
		"uncritical":               {leaf: func(c *x509.Certificate) { rawUsage(c, false, 0x80) }},
		"no digitalSignature":      {leaf: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }},
		"keyCertSign":              {leaf: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},
		"cRLSign":                  {leaf: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }},
		"issuer without key usage": {issuer: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }},
	})
}

func rawUsage(c *x509.Certificate, critical bool, bits byte) {
	c.KeyUsage = 0
	c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{
		Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: critical, Value: []byte{asn1.TagBitString, 2, 0, bits},
	})
}

func TestX4_4_ExtendedKeyUsage(t *testing.T) {
	only := func(use ...x509.ExtKeyUsage) spoiled {
		return spoiled{leaf: func(c *x509.Certificate) { c.ExtKeyUsage = use }}
	}
	refuse(t, map[string]spoiled{
		"client only": only(x509.ExtKeyUsageClientAuth),
		"server only": only(x509.ExtKeyUsageServerAuth),
		"code":        only(x509.ExtKeyUsageCodeSigning),
	})
}

func TestX5_1_PathValidation(t *testing.T) {
	stranger := issuertest.New(t, ownDomain)
	refuse(t, map[string]spoiled{
		"expired":        {leaf: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-2 * time.Second) }},
		"not yet valid":  {leaf: func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }},
		"issuer expired": {issuer: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-2 * time.Second) }},
		"unknown critical extension": {leaf: func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}},
		"another root": {cert: func(_ *issuertest.Issuer, id spiffeid.ID) tls.Certificate { return stranger.Leaf(id, nil) }},
		"another key": {cert: func(i *issuertest.Issuer, id spiffeid.ID) tls.Certificate {
			cert := i.Leaf(id, nil)
			cert.PrivateKey = i.Leaf(id, nil).PrivateKey
			return cert
		}},
	})
}

func TestX5_2_LeafValidation(t *testing.T) {
	refuse(t, map[string]spoiled{
		"another scheme":  {leaf: func(c *x509.Certificate) { c.URIs[0].Scheme = "https" }},
		"root path":       {leaf: func(c *x509.Certificate) { c.URIs[0].Path = "" }},
		"several URIs":    {leaf: func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }},
		"cA":              {leaf: func(c *x509.Certificate) { c.IsCA = true }},
		"cA, keyCertSign": {leaf: func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign }},
		"cRLSign":         {leaf: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }},
		"a query":         {leaf: func(c *x509.Certificate) { c.URIs[0].RawQuery = "a" }},
		"upper case":      {leaf: func(c *x509.Certificate) { c.URIs[0].Host = "TEST.example" }},
	})
}

// A CA of one trust domain speaks for no other: C7, over the real ports.
func TestC7_AnotherTrustDomainsCA(t *testing.T) {
	b := newBorders(t)
	for _, addr := range []string{b.payments.Tunnel, b.controlPlane} {
		if admitted(t, addr, b.foreign.Leaf(ordersPeer, nil)) {
			t.Errorf("%s takes an own identity that a foreign CA signed", addr)
		}
		if admitted(t, addr, b.own.Leaf(foreignPeer, nil)) {
			t.Errorf("%s takes a foreign identity that the own CA signed", addr)
		}
	}
	if b.called(t, b.own.Leaf(foreignPeer, nil)) {
		t.Error("the sidecar calls a foreign server whose SVID the own CA signed")
	}
}

// C8: a good SVID of the wrong server.
func TestC8_WrongServer(t *testing.T) {
	b := newBorders(t)
	if !b.called(t, b.foreign.Leaf(foreignPeer, nil)) {
		t.Error("the right server: refused, nothing was tested")
	}
	for _, path := range []string{"/shop/payments2", "/shop", "/orders"} {
		if b.called(t, b.foreign.Leaf(spiffeid.RequireFromPath(foreignDomain, path), nil)) {
			t.Errorf("the sidecar calls %s in the place of payments", path)
		}
	}
	if b.called(t, b.own.Leaf(spiffeid.RequireFromPath(ownDomain, "/shop/payments"), nil)) {
		t.Error("the sidecar calls the own payments in the place of the foreign one")
	}
}

// C1: no session can be resumed at any port that authenticates by SVID, so that
// each connection is verified anew.
func TestC1_NoResumption(t *testing.T) {
	b := newBorders(t)
	m, _ := published(t)
	for name, addr := range map[string]string{"tunnel": b.payments.Tunnel, "direct port": b.direct, "control plane": b.controlPlane, "bundle endpoint": m.Bundle} {
		cert := b.own.Leaf(ordersPeer, nil)
		cfg := &tls.Config{
			InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}, ServerName: "x", //nolint:gosec // the other end is not the question
			ClientSessionCache: tls.NewLRUClientSessionCache(8), Certificates: []tls.Certificate{cert},
		}
		for n := range 3 {
			raw, err := net.Dial("tcp", addr)
			require.NoError(t, err)
			require.NoError(t, raw.SetDeadline(time.Now().Add(Deadline)))
			conn := tls.Client(raw, cfg)
			require.NoError(t, conn.Handshake())
			if conn.ConnectionState().NegotiatedProtocol == "h2" {
				_, err = io.WriteString(conn, preface+"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
			} else {
				_, err = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			}
			require.NoError(t, err)
			if _, err = io.ReadFull(conn, make([]byte, 9)); err != nil { // what may resume came before
				t.Errorf("%s, connection %d: %v", name, n, err)
			}
			if conn.ConnectionState().DidResume {
				t.Errorf("%s: connection %d resumed a session", name, n)
			}
			_ = conn.Close()
		}
	}
}
