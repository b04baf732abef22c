package controlplane_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/issuer/external/issuertest"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// outside is a mesh whose SVIDs somebody else signs.
type outside struct {
	*meshtest.Mesh
	t       *testing.T
	issuer  *issuertest.Issuer
	bundle  string // file
	dataDir string
}

func newOutside(t *testing.T) *outside {
	t.Helper()
	o := &outside{t: t, issuer: issuertest.New(t, ours), bundle: filepath.Join(t.TempDir(), "bundle.json")}
	o.issuer.WriteBundle(o.bundle)
	o.Mesh = meshtest.New(t, meshtest.Config{Files: files(), Change: func(c *controlplane.Config) {
		o.dataDir = c.DataDir
		c.ExternalIssuer.WorkloadAPI = o.issuer.Serve(spiffeid.RequireFromPath(ours, identity.ControlPlanePath))
		c.ExternalIssuer.Bundle.File = o.bundle
	}})
	return o
}

// dial connects with an SVID of the outside issuer.
func (o *outside) dial(path string) *grpc.ClientConn {
	o.t.Helper()
	return o.dialAs(o.issuer.SVID(spiffeid.RequireFromPath(ours, path)))
}

func (o *outside) dialAs(svid *x509svid.SVID) *grpc.ClientConn {
	o.t.Helper()
	var source identity.Live
	source.SetSVID(svid)
	source.SetBundles(identity.Bundles{ours: o.issuer.Bundle()})
	conn, err := grpc.NewClient(o.GRPC, grpc.WithTransportCredentials(credentials.NewTLS(identity.ClientTLS(
		identity.TLSConfig{Source: &source, NextProtos: []string{"h2"}}, identity.ExactPattern(spiffeid.RequireFromPath(ours, identity.ControlPlanePath))))))
	require.NoError(o.t, err)
	o.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// announce says where path's instance listens; an instance of "" is not named.
func (o *outside) announce(path, instance string, port uint32) error {
	o.t.Helper()
	ctx := o.t.Context()
	if instance != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, sallyportv1.InstanceMetadata, instance)
	}
	s, err := sallyportv1.NewAnnouncerClient(o.dial(path)).Announce(ctx, grpc.WaitForReady(true))
	require.NoError(o.t, err)
	_ = s.Send(&sallyportv1.AnnounceRequest{TunnelPort: port, Ports: []uint32{8080}})
	_, err = s.Recv()
	return err
}

// TestExternalIssuer: another issuer signs and we authorise: its SVIDs are members
// by their ID, nothing is issued here, and no CA of our own exists.
func TestExternalIssuer(t *testing.T) {
	o := newOutside(t)
	if err := o.announce("/server", "i1", 1111); err != nil {
		t.Fatalf("announcing: %v", err)
	}
	wantEndpoints(t, o.Mesh, "127.0.0.1:1111")

	t.Run("a view by ADS", func(t *testing.T) {
		server := spiffeid.RequireFromPath(ours, "/server")
		client := xds.NewClient(xds.ClientConfig{Node: spiffeid.RequireFromPath(ours, "/client"), Instance: "i1", Subscribe: []spiffeid.ID{server}, Log: hclog.NewNullLogger()})
		ctx, cancel := context.WithCancel(t.Context())
		seen := false
		err := client.Run(ctx, o.dial("/client"), func(u xds.Update) error {
			if e := u.Services[server].Endpoints; len(e) == 1 && e[0].Instance == "i1" {
				seen = true
				cancel()
			}
			return nil
		})
		if !seen {
			t.Errorf("the stream ended without the endpoint: %v", err)
		}
	})
	for _, tt := range []struct {
		name, path, instance string
		code                 codes.Code
	}{
		{"no Workload has the ID", "/nobody", "i1", codes.PermissionDenied},
		{"no instance", "/server", "", codes.PermissionDenied},
		{"an instance that is none", "/server", "a b", codes.PermissionDenied},
		{"the control plane's own ID", "/sallyport/controlplane", "i1", codes.PermissionDenied},
	} {
		if err := o.announce(tt.path, tt.instance, 2222); status.Code(err) != tt.code {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.code)
		}
	}
	t.Run("an instance counts within its own ID", func(t *testing.T) {
		for range 4 { // more streams than an instance may hold
			ctx := metadata.AppendToOutgoingContext(t.Context(), sallyportv1.InstanceMetadata, "i1")
			s, err := sallyportv1.NewAnnouncerClient(o.dial("/client")).Announce(ctx)
			require.NoError(t, err)
			require.NoError(t, s.Send(&sallyportv1.AnnounceRequest{TunnelPort: 3333}))
			_, err = s.Recv()
			require.NoError(t, err)
		}
		wantEndpoints(t, o.Mesh, "127.0.0.1:1111")
	})
	t.Run("nothing is issued", func(t *testing.T) {
		enrol, err := sallyportv1.NewEnrollmentClient(o.dial("/server")).Enroll(t.Context())
		require.NoError(t, err)
		if _, err := enrol.Recv(); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "Workload API") {
			t.Errorf("enrolling: %v", err)
		}
		if _, err := sallyportv1.NewEnrollmentClient(o.dial("/server")).Renew(t.Context(), &sallyportv1.RenewRequest{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("renewing: %v", err)
		}
		if _, err := o.Admin.CreateToken(t.Context(), &sallyportv1.CreateTokenRequest{Workload: "server"}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("making a token: %v", err)
		}
		if _, err := os.Stat(filepath.Join(o.dataDir, "keys")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a key folder of our own: %v", err)
		}
	})
	t.Run("the issuer rotates", func(t *testing.T) {
		o.issuer.Rotate()
		o.issuer.WriteBundle(o.bundle)
		meshtest.Eventually(t, "the new root in force", func() error {
			if b := bundleOf(t, o.Mesh, ours, ""); len(b.X509Authorities()) != 2 {
				return fmt.Errorf("%d roots", len(b.X509Authorities()))
			}
			return nil
		})
		if err := o.announce("/server", "i2", 4444); err != nil {
			t.Errorf("an SVID of the new root: %v", err)
		}
	})
	stranger := issuertest.New(t, ours).SVID(spiffeid.RequireFromPath(ours, "/server"))
	s, err := sallyportv1.NewAnnouncerClient(o.dialAs(stranger)).Announce(t.Context())
	if err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("another issuer of the same name: %v, want a failed handshake", err)
	}
}
