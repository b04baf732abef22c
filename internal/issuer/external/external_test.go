package external

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/sallyport-mesh/sallyport/internal/federation"
	"github.com/sallyport-mesh/sallyport/internal/issuer/external/issuertest"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	td  = spiffeid.RequireTrustDomainFromString("spire.example")
	own = spiffeid.RequireFromPath(td, "/sallyport/controlplane")
)

func eventually(t *testing.T, what string, cond func() error) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		err := cond()
		if err == nil {
			return
		}
		if time.Since(start) > 10*time.Second {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

func run(t *testing.T, fn func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- fn(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func config(c Config) Config {
	c.ID, c.Store, c.Poll, c.Now, c.Log = own, store.NewMemory(), time.Millisecond, time.Now, hclog.NewNullLogger()
	return c
}

// wantBelieved waits until i has an SVID that i's own bundle verifies, signed by
// the newest root.
func wantBelieved(t *testing.T, i *Issuer, by *issuertest.Issuer) {
	t.Helper()
	roots := by.Bundle().X509Authorities()
	eventually(t, "an SVID of the newest root", func() error {
		svid, err := i.ServerSVID().GetX509SVID()
		if err != nil {
			return err
		}
		if p, err := identity.Verify(svid.Certificates, i.ServerSVID(), time.Now()); err != nil || p.ID != own {
			return fmt.Errorf("%v: %w", p.ID, err)
		}
		return svid.Certificates[0].CheckSignatureFrom(roots[len(roots)-1])
	})
	if text, down := i.Problem(); text != "" || down {
		t.Errorf("problem %q", text)
	}
}

// TestWorkloadAPIAndBundleFile: the SVID comes from the socket and the bundle from
// the file, both through rotations; a bad file changes nothing.
func TestWorkloadAPIAndBundleFile(t *testing.T) {
	spire := issuertest.New(t, td)
	path := spire.WriteBundle(filepath.Join(t.TempDir(), "bundle.json"))
	i, err := Open(config(Config{BundleFile: path, WorkloadAPI: spire.Serve(spiffeid.RequireFromPath(td, "/another"), own)}))
	require.NoError(t, err)
	if _, down := i.Problem(); !down {
		t.Error("without an SVID it is well")
	}
	run(t, i.Run)
	seen := make(chan int, 100)
	run(t, func(ctx context.Context) error {
		return i.WatchBundle(ctx, func(b *spiffebundle.Bundle) error { seen <- len(b.X509Authorities()); return nil })
	})
	wantBelieved(t, i, spire)
	for range 3 {
		spire.Rotate()
		spire.WriteBundle(path)
		wantBelieved(t, i, spire)
	}
	good := i.Bundle()
	for bad, want := range map[string]string{"garbage": "not a JWK set", `{"keys":[]}`: "no X.509 authority"} {
		require.NoError(t, os.WriteFile(path, []byte(bad), 0o600))
		eventually(t, "the problem", func() error {
			if text, down := i.Problem(); !strings.Contains(text, "bundle.json") || !strings.Contains(text, want) || down {
				return fmt.Errorf("%q, down %v", text, down)
			}
			return nil
		})
		if !i.Bundle().Equal(good) {
			t.Errorf("%s: the bundle changed", bad)
		}
	}
	spire.WriteBundle(path)
	wantBelievedAgain := func() error {
		if text, _ := i.Problem(); text != "" {
			return errors.New(text)
		}
		return nil
	}
	eventually(t, "well again", wantBelievedAgain)
	for want := 1; want <= 4; want++ {
		if n := <-seen; n != want {
			t.Errorf("the watch saw %d roots, want %d", n, want)
		}
	}
}

// TestFiles: SVID from files, bundle from an endpoint.
func TestFiles(t *testing.T) {
	spire := issuertest.New(t, td)
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid.key")
	write := func(id spiffeid.ID) {
		cert, key, err := spire.SVID(id).Marshal()
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(certFile, cert, 0o600))
		require.NoError(t, os.WriteFile(keyFile, key, 0o600))
	}
	write(own)
	var live identity.Live
	endpointID := spiffeid.RequireFromPath(td, "/spire/server")
	live.SetSVID(spire.SVID(endpointID))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	run(t, func(ctx context.Context) error {
		return federation.Serve(ctx, ln, federation.SPIFFETLS(&live, time.Now), federation.BundleHandler(spire.Bundle), hclog.NewNullLogger())
	})
	c := config(Config{CertFile: certFile, KeyFile: keyFile, Peer: federation.Peer{
		TrustDomain: td, URL: "https://" + ln.Addr().String(), Profile: federation.HTTPSSPIFFE, EndpointID: endpointID, Bootstrap: spire.Bundle(),
	}})
	c.Endpoint.MinRefresh, c.Endpoint.MaxRefresh = 5*time.Millisecond, 5*time.Millisecond
	i, err := Open(c)
	require.NoError(t, err)
	run(t, i.Run)
	wantBelieved(t, i, spire)
	spire.Rotate()
	write(own)
	wantBelieved(t, i, spire)
	write(spiffeid.RequireFromPath(td, "/somebody"))
	eventually(t, "the problem", func() error {
		if text, down := i.Problem(); !strings.Contains(text, "/somebody") || down {
			return fmt.Errorf("%q", text)
		}
		return nil
	})
	if svid, err := i.ServerSVID().GetX509SVID(); err != nil || svid.ID != own {
		t.Errorf("%v, %v", svid, err)
	}
}

// TestNobodysSVID: a socket that has no SVID for us, or another's, gives none.
func TestNobodysSVID(t *testing.T) {
	spire := issuertest.New(t, td)
	path := spire.WriteBundle(filepath.Join(t.TempDir(), "bundle.json"))
	for want, addr := range map[string]string{
		"/another":         spire.Serve(spiffeid.RequireFromPath(td, "/another")),
		"PermissionDenied": spire.Serve(),
		"Unavailable":      "unix:///nowhere/api.sock",
	} {
		i, err := Open(config(Config{BundleFile: path, WorkloadAPI: addr}))
		require.NoError(t, err)
		run(t, i.Run)
		eventually(t, want, func() error {
			if text, down := i.Problem(); !strings.Contains(text, want) || !down {
				return fmt.Errorf("%q", text)
			}
			return nil
		})
		if _, err := i.ServerSVID().GetX509SVID(); !errors.Is(err, identity.ErrNoIdentity) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// TestAgentThatEnds: a socket that says goodbye ends nothing here.
func TestAgentThatEnds(t *testing.T) {
	spire := issuertest.New(t, td)
	path := spire.WriteBundle(filepath.Join(t.TempDir(), "bundle.json"))
	i, err := Open(config(Config{BundleFile: path, WorkloadAPI: spire.Serve(own)}))
	require.NoError(t, err)
	run(t, i.Run)
	wantBelieved(t, i, spire)
	spire.End(true)
	eventually(t, "the problem", func() error {
		if text, down := i.Problem(); !strings.Contains(text, "the agent ends") || down {
			return fmt.Errorf("%q", text)
		}
		return nil
	})
	if _, err := i.ServerSVID().GetX509SVID(); err != nil {
		t.Errorf("the last good SVID is gone: %v", err)
	}
	spire.Rotate()
	spire.WriteBundle(path)
	spire.End(false)
	wantBelieved(t, i, spire)
}

// TestOpenRefuses what is wrong with files at the start.
func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad")
	require.NoError(t, os.WriteFile(bad, []byte("garbage"), 0o600))
	good := issuertest.New(t, td).WriteBundle(filepath.Join(dir, "bundle.json"))
	for _, c := range []Config{
		{BundleFile: bad, WorkloadAPI: "unix:///x"}, {BundleFile: filepath.Join(dir, "none"), WorkloadAPI: "unix:///x"},
		{BundleFile: good, CertFile: bad, KeyFile: bad},
	} {
		if _, err := Open(config(c)); err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("%+v: %v, want an error that names the file", c, err)
		}
	}
}
