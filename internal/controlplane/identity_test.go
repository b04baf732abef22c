package controlplane_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
)

// factory is another PKI: its root in a file, and how to make a leaf, both PEM.
func factory(t *testing.T) (file string, leaf func(name string, until time.Time) []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	sign := func(tmpl, parent *x509.Certificate, until time.Time) []byte {
		tmpl.SerialNumber, tmpl.NotBefore, tmpl.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-2*time.Hour), until
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), key)
		require.NoError(t, err)
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	root := &x509.Certificate{Subject: pkix.Name{CommonName: "factory"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	file = filepath.Join(t.TempDir(), "factory.pem")
	require.NoError(t, os.WriteFile(file, sign(root, root, time.Now().Add(time.Hour)), 0o600))
	return file, func(name string, until time.Time) []byte {
		return sign(&x509.Certificate{Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature}, root, until)
	}
}

const identities = `
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: press-7}
spec:
  attest: [{kind: x509pop, ca: factory, commonName: press-7}, {kind: join-token}]
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: lathe}
spec:
  attest: [{kind: x509pop, commonName: lathe-1}]
`

func TestExplainIdentity(t *testing.T) {
	file, leaf := factory(t)
	m := meshtest.New(t, meshtest.Config{
		Files: map[string]string{"mesh.yaml": identities},
		Change: func(c *controlplane.Config) {
			c.Attest.X509Pop = []attest.X509PopConfig{{Name: "factory", CAFile: file}}
		},
	})
	m.Token("press-7") // the files are in force
	for _, c := range []struct {
		name     string
		evidence []byte
		id       string // of the first match
		missed   string // by press-7
		problem  string
	}{
		{"good", leaf("press-7", time.Now().Add(time.Hour)), "spiffe://test.example/press-7", "", ""},
		{"another name", leaf("press-8", time.Now().Add(time.Hour)), "", "press-8", ""},
		{"expired", leaf("press-7", time.Now().Add(-time.Hour)), "spiffe://test.example/press-7", "", "is valid from"},
		{"no certificate", []byte("-----BEGIN CERTIFICATE-----\n"), "", "nothing", "chain of 0"},
	} {
		resp, err := m.Admin.ExplainIdentity(t.Context(), &sallyportv1.ExplainIdentityRequest{Evidence: c.evidence})
		require.NoError(t, err, c.name)
		if (resp.GetProblem() == "") != (c.problem == "") || !strings.Contains(resp.GetProblem(), c.problem) {
			t.Errorf("%s: got problem %q, want %q", c.name, resp.GetProblem(), c.problem)
		}
		if len(resp.GetMatches()) != 2 && c.name != "no certificate" {
			t.Fatalf("%s: got %v", c.name, resp.GetMatches())
		}
		for i, match := range resp.GetMatches() {
			switch {
			case i == 0 && c.id != "" && (match.GetSpiffeId() != c.id || !match.GetMatches() || match.GetLocation() != "mesh.yaml:4"):
				t.Errorf("%s: got %v, want %s first", c.name, match, c.id)
			case c.id == "" && match.GetWorkload() == "press-7" && !strings.Contains(match.GetMissed(), "commonName") && c.missed != "nothing":
				t.Errorf("%s: got %v", c.name, match)
			}
		}
	}
	list, err := m.Admin.Identities(t.Context(), &sallyportv1.IdentitiesRequest{})
	require.NoError(t, err)
	if len(list.GetIdentities()) != 0 {
		t.Errorf("explaining enrolled somebody: %v", list.GetIdentities())
	}
}

func TestIdentities(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	conn := m.Dial(m.Agent("server"))
	m.Agent("client")
	server := func() *sallyportv1.Identity {
		list, err := m.Admin.Identities(t.Context(), &sallyportv1.IdentitiesRequest{Workload: "server"})
		require.NoError(t, err)
		require.Len(t, list.GetIdentities(), 1)
		return list.GetIdentities()[0]
	}
	i := server()
	if i.GetWorkload() != "server" || i.GetEvidence() != attest.KindJoinToken || i.GetSerial() == "" || i.GetOrigin() == "" || !i.GetExpires().AsTime().After(time.Now()) || i.GetConnected() {
		t.Errorf("got %v", i)
	}
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(t.Context())
	require.NoError(t, err)
	require.NoError(t, ads.Send(&discoveryv3.DeltaDiscoveryRequest{
		Node: &corev3.Node{Id: i.GetInstance()}, TypeUrl: "type.googleapis.com/envoy.config.listener.v3.Listener",
	}))
	meshtest.Eventually(t, "the server's connection", func() error {
		if !server().GetConnected() {
			return errors.New("not connected")
		}
		return nil
	})
	list, err := m.Admin.Identities(t.Context(), &sallyportv1.IdentitiesRequest{})
	require.NoError(t, err)
	if len(list.GetIdentities()) != 2 {
		t.Errorf("got %v, want two", list.GetIdentities())
	}
	if _, err := m.Admin.Identities(t.Context(), &sallyportv1.IdentitiesRequest{Workload: "a b"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("got %v", err)
	}
}

// Every RPC of the network port: without a certificate, with an expired one, with
// one of a stranger.
func TestD8EveryRPCOfTheNetworkPort(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files(), Change: func(c *controlplane.Config) { c.CA.SVIDTTL = 2 * time.Second }})
	known := m.Dial(m.Agent("server"))
	anonymous := dialTLS(t, m.GRPC)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	stranger := dialTLS(t, m.GRPC, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})
	ask := func(conn *grpc.ClientConn, method string) codes.Code {
		s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
		if err == nil {
			_ = s.SendMsg(&emptypb.Empty{})
			_ = s.CloseSend()
			err = s.RecvMsg(&emptypb.Empty{})
		}
		return status.Code(err)
	}
	methods, _ := controlplane.RPCs(t)
	want := func(who string, conn *grpc.ClientConn, refused codes.Code) {
		for _, method := range methods {
			if method != sallyportv1.Enrollment_Enroll_FullMethodName || refused == codes.Unavailable {
				if got := ask(conn, method); got != refused {
					t.Errorf("%s by %s: got %v, want %v", method, who, got, refused)
				}
			}
		}
	}
	want("nobody", anonymous, codes.Unauthenticated)
	want("a stranger", stranger, codes.Unavailable) // the handshake fails
	meshtest.Eventually(t, "the end of the SVID", func() error {
		if ask(known, sallyportv1.Enrollment_Renew_FullMethodName) != codes.Unauthenticated {
			return errors.New("still good")
		}
		return nil
	})
	want("an expired SVID", known, codes.Unauthenticated)
}

func TestD8TheOperatorsRPCsAreNotOnTheNetworkPort(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	conn := m.Dial(m.Agent("client"))
	_, operator := controlplane.RPCs(t)
	if len(operator) < 10 {
		t.Errorf("the operator has %v only", operator)
	}
	for _, method := range operator {
		if err := conn.Invoke(t.Context(), method, &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s by a workload: got %v, want Unimplemented", method, err)
		}
	}
}

func dialTLS(t *testing.T, addr string, certs ...tls.Certificate) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		InsecureSkipVerify: true, Certificates: certs, NextProtos: []string{"h2"}, // what the server refuses is looked at
	})))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}
