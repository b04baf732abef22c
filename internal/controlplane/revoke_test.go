package controlplane_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"testing"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
)

// TestD5RevokedLosesItsStreams: within a second every stream of a revoked ID is
// cut, it gets nothing more by any way, and others go on; unrevoked, it comes
// back by itself with a new SVID.
func TestD5RevokedLosesItsStreams(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	server, client := m.Agent("server"), m.Agent("client")
	conn := m.Dial(server)
	streams := openAll(t, conn)
	other := openAll(t, m.Dial(client))
	old, err := server.Source().GetX509SVID()
	require.NoError(t, err)

	start := time.Now()
	resp, err := m.Admin.Revoke(t.Context(), &sallyportv1.RevokeRequest{Subject: "server", Reason: "stolen"})
	require.NoError(t, err)
	if resp.GetList() == "" || len(resp.GetSubjects()) != 1 {
		t.Errorf("got %v", resp)
	}
	for name, ended := range streams {
		select {
		case err := <-ended:
			if got := status.Code(err); got != codes.Unauthenticated && got != codes.PermissionDenied {
				t.Errorf("%s ended with %v", name, err)
			}
		case <-time.After(time.Second - time.Since(start)):
			t.Errorf("%s lives a second after the revocation", name)
		}
	}
	for name, ended := range other {
		select {
		case err := <-ended:
			t.Errorf("another's %s ended: %v", name, err)
		default:
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	require.NoError(t, err)
	if _, err := sallyportv1.NewEnrollmentClient(conn).Renew(t.Context(), &sallyportv1.RenewRequest{Csr: csr}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("renewing: got %v", err)
	}
	if _, err := sallyportv1.NewEnrollmentClient(conn).IssueJWT(t.Context(), &sallyportv1.IssueJWTRequest{Audience: []string{"x"}}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a JWT-SVID: got %v", err)
	}
	if _, err := m.Admin.CreateToken(t.Context(), &sallyportv1.CreateTokenRequest{Workload: "server"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a join token: got %v", err)
	}
	wantRevoked(t, m, server, true)

	_, err = m.Admin.Unrevoke(t.Context(), &sallyportv1.RevokeRequest{Subject: "server"})
	require.NoError(t, err)
	server.RenewNow()
	meshtest.Eventually(t, "a new SVID", func() error {
		svid, err := server.Source().GetX509SVID()
		if err == nil && svid.Certificates[0].Equal(old.Certificates[0]) {
			server.RenewNow() // the margin for clocks has to pass
			err = errors.New("the old one still")
		}
		return err
	})
	again, err := sallyportv1.NewAnnouncerClient(m.Dial(server)).Announce(t.Context())
	require.NoError(t, err)
	if addr, code := ask(t, again, &sallyportv1.AnnounceRequest{TunnelPort: 15008, Ports: []uint32{8080}}); code != codes.OK || addr == "" {
		t.Errorf("readmitted: got %q, %v", addr, code)
	}
	wantRevoked(t, m, server, false)
}

func TestRevokeNames(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	server := m.Agent("server")
	svid, err := server.Source().GetX509SVID()
	require.NoError(t, err)
	serial := fmt.Sprintf("%x", svid.Certificates[0].SerialNumber)
	for subject, want := range map[string]string{
		"/server": "id spiffe://test.example/server", server.Instance(): "instance " + server.Instance(),
		serial: "serial " + serial, "serial:0A:0B": "serial 0a0b",
	} {
		resp, err := m.Admin.Revoke(t.Context(), &sallyportv1.RevokeRequest{Subject: subject})
		if err != nil || len(resp.GetSubjects()) != 1 || resp.GetSubjects()[0] != want {
			t.Errorf("%s: got %v, %v; want %s", subject, resp.GetSubjects(), err, want)
		}
	}
	for subject, want := range map[string]codes.Code{
		"nobody": codes.NotFound, "": codes.NotFound, "serial:xyz": codes.InvalidArgument, "0c": codes.NotFound,
		"spiffe://other.example/x": codes.InvalidArgument, "/sallyport/controlplane": codes.InvalidArgument,
	} {
		if _, err := m.Admin.Revoke(t.Context(), &sallyportv1.RevokeRequest{Subject: subject}); status.Code(err) != want {
			t.Errorf("%q: got %v, want %v", subject, err, want)
		}
	}
	if _, err := m.Admin.Unrevoke(t.Context(), &sallyportv1.RevokeRequest{Subject: "client"}); status.Code(err) != codes.NotFound {
		t.Errorf("readmitting who was never revoked: got %v", err)
	}
}

// TestBan: every instance on a node is revoked, and none elsewhere.
func TestBan(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	server, client := m.Agent("server"), m.Agent("client")
	resp, err := m.Admin.Ban(t.Context(), &sallyportv1.BanRequest{Node: server.Instance()})
	require.NoError(t, err)
	if got := resp.GetSubjects(); len(got) != 1 || got[0] != "instance "+server.Instance() {
		t.Errorf("got %v", got)
	}
	wantRevoked(t, m, server, true)
	wantRevoked(t, m, client, false)
	resp, err = m.Admin.Ban(t.Context(), &sallyportv1.BanRequest{Node: "127.0.0.1"})
	require.NoError(t, err)
	if got := resp.GetSubjects(); len(got) != 2 {
		t.Errorf("by address: got %v", got)
	}
	if _, err := m.Admin.Ban(t.Context(), &sallyportv1.BanRequest{Node: "192.0.2.1"}); status.Code(err) != codes.NotFound {
		t.Errorf("an address without instances: got %v", err)
	}
}

// TestRemovedWorkloadIsOnTheList: its old SVID stays refused when it is defined
// again, and its sidecar comes back with a new one.
func TestRemovedWorkloadIsOnTheList(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	server := m.Agent("server")
	old, err := server.Source().GetX509SVID()
	require.NoError(t, err)
	all := files()
	without := map[string]string{"w.yaml": fmt.Sprintf(doc, "client", "")}
	require.NoError(t, m.Apply("", without))
	meshtest.Eventually(t, "the ID is on the list", func() error {
		resp, err := m.Admin.Identities(t.Context(), &sallyportv1.IdentitiesRequest{})
		if err == nil && len(resp.GetRevocations()) != 1 {
			err = fmt.Errorf("revocations: %v", resp.GetRevocations())
		}
		return err
	})
	require.NoError(t, m.Apply("", all))
	meshtest.Eventually(t, "a new SVID", func() error {
		server.RenewNow()
		svid, err := server.Source().GetX509SVID()
		if err == nil && svid.Certificates[0].Equal(old.Certificates[0]) {
			err = errors.New("the old one still")
		}
		return err
	})
}

// TestTaint: the intermediate is replaced, everybody can renew, and what it signed
// is on the list.
func TestTaint(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files()})
	server := m.Agent("server")
	old, err := server.Source().GetX509SVID()
	require.NoError(t, err)
	subject := old.Certificates[1].Subject.CommonName
	resp, err := m.Admin.Taint(t.Context(), &sallyportv1.TaintRequest{Authority: subject})
	require.NoError(t, err)
	if resp.GetAuthority() != subject || resp.GetReplacedBy() == subject || resp.GetReplacedBy() == "" {
		t.Errorf("got %v", resp)
	}
	meshtest.Eventually(t, "the issuer is on the list", func() error {
		got, err := m.Admin.Identities(t.Context(), &sallyportv1.IdentitiesRequest{})
		if err == nil && (len(got.GetRevocations()) != 1 || got.GetRevocations()[0].GetKind() != "issuer") {
			err = fmt.Errorf("revocations: %v", got.GetRevocations())
		}
		return err
	})
	server.RenewNow()
	meshtest.Eventually(t, "an SVID of the new one", func() error {
		svid, err := server.Source().GetX509SVID()
		if err == nil && svid.Certificates[1].Subject.CommonName != resp.GetReplacedBy() {
			err = errors.New("the old one still")
		}
		return err
	})
	if _, err := m.Admin.Taint(t.Context(), &sallyportv1.TaintRequest{Authority: "nobody"}); status.Code(err) != codes.NotFound {
		t.Errorf("unknown: got %v", err)
	}
}

func wantRevoked(t *testing.T, m *meshtest.Mesh, a *agent.Agent, want bool) {
	t.Helper()
	resp, err := m.Admin.Identities(t.Context(), &sallyportv1.IdentitiesRequest{})
	require.NoError(t, err)
	for _, i := range resp.GetIdentities() {
		if i.GetInstance() == a.Instance() && i.GetRevoked() != want {
			t.Errorf("%s: revoked %v, want %v", i.GetSpiffeId(), i.GetRevoked(), want)
		}
	}
}

// openAll opens one stream of each kind and says when it ends.
func openAll(t *testing.T, conn *grpc.ClientConn) map[string]chan error {
	t.Helper()
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(t.Context())
	require.NoError(t, err)
	world, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(t.Context())
	require.NoError(t, err)
	logs, err := accesslogv3.NewAccessLogServiceClient(conn).StreamAccessLogs(t.Context())
	require.NoError(t, err)
	announced, err := sallyportv1.NewAnnouncerClient(conn).Announce(t.Context())
	require.NoError(t, err)
	if _, code := ask(t, announced, &sallyportv1.AnnounceRequest{TunnelPort: 15008}); code != codes.OK { // it is open
		t.Fatalf("announcing: %v", code)
	}
	out := map[string]chan error{}
	for name, recv := range map[string]func() error{
		"ADS":        func() error { _, err := ads.Recv(); return err },
		"SotW ADS":   func() error { _, err := world.Recv(); return err },
		"access log": func() error { return logs.RecvMsg(&accesslogv3.StreamAccessLogsResponse{}) },
		"announce":   func() error { _, err := announced.Recv(); return err },
	} {
		ended := make(chan error, 1)
		out[name] = ended
		go func() { ended <- recv() }()
	}
	return out
}
