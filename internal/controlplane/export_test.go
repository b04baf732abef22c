package controlplane

import (
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// RPCs are the full names of all that a control plane serves, read from its
// servers: on the network port, and on the operator's socket. Nobody has to
// remember a new one.
func RPCs(t testing.TB) (network, operator []string) {
	t.Helper()
	cfg := Config{TrustDomain: "test.example", DataDir: t.TempDir(), Listen: Listen{GRPC: "127.0.0.1:0", Metrics: "127.0.0.1:0"}}.WithDefaults()
	c, err := New(t.Context(), cfg, Options{Log: hclog.NewNullLogger(), Now: time.Now, Store: store.NewMemory()})
	require.NoError(t, err)
	defer func() { require.NoError(t, c.close()) }()
	return methodsOf(c.grpcServer()), methodsOf(c.adminServer())
}

func methodsOf(s *grpc.Server) (out []string) {
	defer s.Stop()
	for service, info := range s.GetServiceInfo() {
		for _, m := range info.Methods {
			out = append(out, "/"+service+"/"+m.Name)
		}
	}
	slices.Sort(out)
	return out
}
