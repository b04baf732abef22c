//go:build e2e

package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/credentials/tls/certprovider/pemfile"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// identities are a mesh with a sidecar, of server, and a host's agent, which may
// vouch for this test's user as client. Both serve the Workload API and write files.
type identities struct {
	*realmesh.Mesh
	sidecar, agent string // sockets
	files          string // of the sidecar's app
}

func newIdentities(t *testing.T, args ...string) *identities {
	t.Helper()
	files := map[string]string{"workloads.yaml": workload("server", "") + workload("host1", "") + fmt.Sprintf(
		"apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: client}\nspec:\n  attest: [{kind: unix, via: [/host1], uid: %d}]\n", os.Getuid())}
	m := &identities{Mesh: realmesh.New(t, files, args...)}
	memory, err := os.MkdirTemp("/dev/shm", "sp")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(memory) })
	m.files = filepath.Join(memory, "server")
	s := m.Sidecar(realmesh.SidecarConfig{Name: "server", Extra: fmt.Sprintf("workloadAPI: {socket: api.sock}\nfiles: [{dir: %s}]\n", m.files)})
	m.sidecar = filepath.Join(s.Dir, "api.sock")

	dir, admin := filepath.Join(m.Dir, "host1"), realmesh.FreeAddr(t)
	m.agent = filepath.Join(dir, "agent.sock")
	realmesh.WriteFile(t, filepath.Join(dir, "token"), m.Token("host1"))
	realmesh.WriteFile(t, filepath.Join(dir, "agent.yaml"), fmt.Sprintf("controlPlane: %s\ntokenFile: token\nadmin: {listen: %q}\n", m.GRPC, admin))
	realmesh.Start(t, "agent", exec.Command(realmesh.Bin(t, "sallyport-proxy"), "agent", "--config", filepath.Join(dir, "agent.yaml")))
	realmesh.Eventually(t, "agent ready", func() error { return realmesh.Ready(admin) })
	return m
}

func source(t *testing.T, socket string) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	require.NoError(t, err)
	t.Cleanup(func() { _ = src.Close() })
	return src
}

// TestGoSPIFFEOverTheSockets: two programs that know go-spiffe and nothing of us
// speak mutual TLS, one with the SVID of a sidecar's app, one with that of a process
// that the host's agent vouches for; grpc-go's file watcher reads the files; JWT-SVIDs
// of the one are validated by the other.
func TestGoSPIFFEOverTheSockets(t *testing.T) {
	m := newIdentities(t)
	server, client := source(t, m.sidecar), source(t, m.agent)
	serverID, clientID := spiffeid.RequireFromString("spiffe://test.example/server"), spiffeid.RequireFromString("spiffe://test.example/client")
	hello := func(want spiffeid.ID) error {
		ln, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(server, server, tlsconfig.AuthorizeID(clientID)))
		require.NoError(t, err)
		defer ln.Close()
		go func() {
			if c, err := ln.Accept(); err == nil {
				_, _ = io.WriteString(c, "hello")
				_ = c.Close()
			}
		}()
		c, err := tls.Dial("tcp", ln.Addr().String(), tlsconfig.MTLSClientConfig(client, client, tlsconfig.AuthorizeID(want)))
		if err != nil {
			return err
		}
		defer c.Close()
		got, err := io.ReadAll(c)
		if string(got) != "hello" {
			return errors.Join(errors.New("no hello"), err)
		}
		return nil
	}
	if err := hello(serverID); err != nil {
		t.Errorf("mutual TLS: %v", err)
	}
	if err := hello(clientID); err == nil {
		t.Error("another server was taken for the right one")
	}

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	token, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"}, workloadapi.WithAddr("unix://"+m.agent))
	require.NoError(t, err)
	realmesh.Eventually(t, "the other side knows the key", func() error {
		got, err := workloadapi.ValidateJWTSVID(ctx, token.Marshal(), "db", workloadapi.WithAddr("unix://"+m.sidecar))
		if err == nil && got.ID != clientID {
			t.Errorf("a token of %s", got.ID)
		}
		return err
	})

	provider, err := pemfile.NewProvider(pemfile.Options{
		CertFile: filepath.Join(m.files, "svid.pem"), KeyFile: filepath.Join(m.files, "svid_key.pem"), RootFile: filepath.Join(m.files, "bundle.pem"),
		RefreshDuration: 50 * time.Millisecond, // the files may be on their way
	})
	require.NoError(t, err)
	defer provider.Close()
	material, err := provider.KeyMaterial(ctx)
	require.NoError(t, err)
	a, b := net.Pipe()
	defer a.Close()
	go func() {
		s := tls.Server(b, &tls.Config{Certificates: material.Certs, MinVersion: tls.VersionTLS13})
		_ = s.Handshake() // the client judges
		_ = s.Close()
	}()
	if err := tls.Client(a, tlsconfig.TLSClientConfig(client, tlsconfig.AuthorizeID(serverID))).HandshakeContext(ctx); err != nil {
		t.Errorf("with the files: %v", err)
	}
}

// TestRecoveryAfterAllSVIDsExpired: the control plane is away until every SVID of
// sidecar, agent and apps has ended. Within 30 s of its return all are well, by
// themselves.
func TestRecoveryAfterAllSVIDsExpired(t *testing.T) {
	const life = 8 * time.Second
	m := newIdentities(t, "-svid-ttl", life.String())
	apps := map[string]*workloadapi.X509Source{"the sidecar's app": source(t, m.sidecar), "the agent's process": source(t, m.agent)}
	left := func(src *workloadapi.X509Source) time.Duration {
		svid, err := src.GetX509SVID()
		require.NoError(t, err)
		return time.Until(svid.Certificates[0].NotAfter)
	}
	m.CP.Kill()
	realmesh.EventuallyWithin(t, 3*life, "everything expired", func() error {
		for name, src := range apps {
			if d := left(src); d > -2*time.Second { // sidecar's and agent's own ended with them, or before
				return fmt.Errorf("%s has %v left", name, d)
			}
		}
		return nil
	})
	m.StartControlPlane()
	took := realmesh.EventuallyWithin(t, 30*time.Second, "well again", func() error {
		for name, src := range apps {
			if d := left(src); d <= 0 {
				return fmt.Errorf("the SVID of %s ended %v ago", name, -d)
			}
		}
		return nil
	})
	t.Logf("well again after %v", took)
}
