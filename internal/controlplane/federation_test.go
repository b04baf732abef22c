package controlplane_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

var (
	ours   = spiffeid.RequireTrustDomainFromString("test.example")
	theirs = spiffeid.RequireTrustDomainFromString("partner.example")
)

const trustDomain = `apiVersion: sallyport.dev/v1
kind: TrustDomain
metadata: {name: partner}
spec:
  trustDomain: partner.example
  bundle: '%s'
`

// bundleOf asks a control plane for a bundle; "" is its own.
func bundleOf(t *testing.T, m *meshtest.Mesh, td spiffeid.TrustDomain, ask string) *spiffebundle.Bundle {
	t.Helper()
	var data []byte
	meshtest.Eventually(t, "bundle of "+td.Name(), func() error {
		resp, err := m.Admin.TrustBundle(t.Context(), &sallyportv1.TrustBundleRequest{TrustDomain: ask})
		data = resp.GetBundle()
		return err
	})
	b, err := spiffebundle.Parse(td, data)
	require.NoError(t, err)
	return b
}

// TestF5_2_2_3_BundleEndpoint: a stock client reads our bundle on listen.bundle,
// from the control plane's own ID and no other, and it is what the operator sees.
func TestF5_2_2_3_BundleEndpoint(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files(), Change: func(c *controlplane.Config) { c.Listen.Bundle = "127.0.0.1:0" }})
	want := bundleOf(t, m, ours, "")
	id := spiffeid.RequireFromPath(ours, identity.ControlPlanePath)
	got, err := federation.FetchBundle(t.Context(), ours, "https://"+m.Bundle+"/", federation.WithSPIFFEAuth(want, id))
	require.NoError(t, err)
	if !got.Equal(want) || got.Empty() {
		t.Error("it is another bundle than the operator is shown")
	}
	if _, err := federation.FetchBundle(t.Context(), ours, "https://"+m.Bundle+"/", federation.WithSPIFFEAuth(want, spiffeid.RequireFromPath(ours, "/server"))); err == nil {
		t.Error("the endpoint is accepted as a workload")
	}
	if m.Web != "" {
		t.Error("listen.web is open and was not configured")
	}
}

// TestD8_ForeignSVID: an SVID of a federated trust domain opens no RPC of the
// control plane, enrolment included.
func TestD8_ForeignSVID(t *testing.T) {
	partner := meshtest.New(t, meshtest.Config{
		Files:  map[string]string{"w.yaml": fmt.Sprintf(doc, "server", "")},
		Change: func(c *controlplane.Config) { c.TrustDomain = theirs.Name() },
	})
	foreign := bundleOf(t, partner, theirs, "")
	data, err := foreign.Marshal()
	require.NoError(t, err)
	f := files()
	f["td.yaml"] = fmt.Sprintf(trustDomain, data)
	m := meshtest.New(t, meshtest.Config{Files: f})
	if got := bundleOf(t, m, theirs, theirs.Name()); !got.Equal(foreign) {
		t.Fatal("the partner's bundle is not in force, so this test would prove nothing")
	}
	svid, err := partner.Agent("server").Source().GetX509SVID()
	require.NoError(t, err)
	var source identity.Live
	source.SetSVID(svid)
	source.SetBundles(identity.Bundles{ours: bundleOf(t, m, ours, "")})
	conn, err := grpc.NewClient(m.GRPC, grpc.WithTransportCredentials(credentials.NewTLS(identity.ClientTLS(
		identity.TLSConfig{Source: &source, NextProtos: []string{"h2"}}, identity.ExactPattern(spiffeid.RequireFromPath(ours, identity.ControlPlanePath))))))
	require.NoError(t, err)
	defer conn.Close()
	network, _ := controlplane.RPCs(t)
	for _, method := range network {
		s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
		if err == nil {
			_ = s.SendMsg(&emptypb.Empty{})
			err = s.RecvMsg(&emptypb.Empty{})
		}
		wantShut(t, method, err)
	}
}

// wantShut: the connection itself is refused, or the call.
func wantShut(t *testing.T, method string, err error) {
	t.Helper()
	switch status.Code(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
	case codes.Unavailable:
		if !strings.Contains(err.Error(), "tls") && !strings.Contains(err.Error(), "reset") && !strings.Contains(err.Error(), "handshake") && !strings.Contains(err.Error(), "broken pipe") {
			t.Errorf("%s: %v", method, err)
		}
	default:
		t.Errorf("%s: %v, want a refusal", method, err)
	}
}

// TestFederationShows: a foreign trust domain in trouble is in status, health and
// metrics, and the mesh goes on.
func TestFederationShows(t *testing.T) {
	f := files()
	f["td.yaml"] = strings.Replace(trustDomain, "  bundle: '%s'\n", "  bundleEndpoint: {url: \"https://127.0.0.1:1/\", profile: https_web}\n", 1)
	m := meshtest.New(t, meshtest.Config{Files: f, Bundles: 10 * time.Millisecond})
	meshtest.Eventually(t, "the problem", func() error {
		s, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
		if err != nil {
			return err
		}
		if d := s.GetFederated(); len(d) != 1 || d[0].GetProblem() == "" || d[0].GetProfile() != "https_web" || d[0].GetLastSuccess() != nil ||
			!strings.Contains(strings.Join(s.GetProblems(), "\n"), "partner.example (nothing of it is trusted)") {
			return fmt.Errorf("%v %v", d, s.GetProblems())
		}
		return nil
	})
	for path, want := range map[string]string{
		"/healthz": `"federation": {`, "/metrics": `sallyport_federation_problem{trust_domain="partner.example"} 1`,
	} {
		resp, err := http.Get("http://" + m.HTTP + path)
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
			t.Errorf("%s: %d, want %s in\n%s", path, resp.StatusCode, want, body)
		}
	}
	_, err := m.Admin.TrustBundle(t.Context(), &sallyportv1.TrustBundleRequest{TrustDomain: theirs.Name()})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a bundle that is not held: %v", err)
	}
	if _, err := m.Admin.TrustBundle(t.Context(), &sallyportv1.TrustBundleRequest{TrustDomain: "other.example"}); status.Code(err) != codes.NotFound {
		t.Errorf("a trust domain that nobody names: %v", err)
	}
	m.Agent("server") // enrolment does not wait for a partner
}
