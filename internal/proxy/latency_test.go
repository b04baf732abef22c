package proxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sallyport-mesh/sallyport/internal/tunnel"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// callerStream stands in for the client certificate of an ADS stream.
type callerStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s callerStream) Context() context.Context { return s.ctx }

// distribute runs an xDS server, and for each of servers a client that feeds its
// book, until the test ends.
func (w *world) distribute(servers []*server) *xds.Server {
	leaf := w.ca.svid(w.t, payments).Certificates[0]
	x := xds.NewServer(xds.ServerConfig{Log: hclog.NewNullLogger()})
	g := grpc.NewServer(grpc.WaitForHandlers(true), grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		return h(srv, callerStream{ss, identity.ContextWithPeer(ss.Context(), identity.Peer{ID: payments, Leaf: leaf})})
	}))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, x)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(w.t, err)
	var running sync.WaitGroup
	running.Go(func() { _ = g.Serve(ln) })
	ctx, cancel := context.WithCancel(context.Background())
	for i, s := range servers {
		conn, err := grpc.NewClient(ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		require.NoError(w.t, err)
		c := xds.NewClient(xds.ClientConfig{Node: payments, Instance: fmt.Sprint(i), Log: hclog.NewNullLogger()})
		running.Go(func() {
			defer conn.Close()
			_ = c.Run(ctx, conn, func(u xds.Update) error {
				if u.Kind == xds.Revocations {
					_, err := s.book.Offer(u.Revocations)
					return err
				}
				return nil
			})
		})
	}
	w.t.Cleanup(func() { cancel(); x.Close(); g.Stop(); running.Wait() })
	x.SetSnapshot(&xds.Snapshot{
		Rev:     xds.Revision{Epoch: 1, N: 1},
		Bundles: identity.Bundles{td: w.bundle()},
	})
	require.Eventually(w.t, func() bool { return len(x.Nodes()) == len(servers) }, 20*time.Second, time.Millisecond)
	return x
}

// F6: a list that the control plane sends out ends the connections of the revoked
// at every sidecar, before it counts as acknowledged. How fast is logged.
func TestF6RevocationAtAHundredSidecars(t *testing.T) {
	const sidecars, each = 100, 2
	w := newWorld(t)
	app := w.app("tcp", echo)
	var servers []*server
	for range sidecars {
		servers = append(servers, w.serve(payments, 1, []policy.Rule{allow(intruder), allow(orders)}, app))
	}
	x := w.distribute(servers)
	x.WaitAcked(t.Context(), xds.Revision{Epoch: 1, N: 1})

	var mu sync.Mutex
	var took []time.Duration // guarded by mu
	var start time.Time      // set before anything ends
	var waiting sync.WaitGroup
	source := w.source(intruder)
	for _, s := range servers {
		for range each {
			conn, err := tls.Dial("tcp", s.Addr().String(), identity.ClientTLS(
				identity.TLSConfig{Source: source, NextProtos: []string{alpn}}, identity.ExactPattern(payments)))
			require.NoError(t, err)
			session, err := tunnel.Client(t.Context(), conn, tunnel.Config{})
			require.NoError(t, err)
			stream, err := session.Open(t.Context(), tunnel.Target{Host: "payments.shop.mesh", Port: tcpPort.Number})
			require.NoError(t, err)
			roundTrip(t, stream, "live")
			waiting.Go(func() {
				_, err := stream.Read(make([]byte, 1))
				mu.Lock()
				took = append(took, time.Since(start))
				mu.Unlock()
				if err == nil {
					t.Error("data where an end was due")
				}
				_ = session.Close()
			})
		}
	}
	mu.Lock()
	start = time.Now()
	mu.Unlock()
	x.SetSnapshot(&xds.Snapshot{
		Rev:     xds.Revision{Epoch: 1, N: 1},
		Bundles: identity.Bundles{td: w.bundle()}, Revocations: w.revoke(1, intruder),
	})
	if missing := x.WaitRevocations(t.Context()); len(missing) > 0 {
		t.Errorf("%d sidecars have not acknowledged", len(missing))
	}
	acked := time.Since(start)
	for _, s := range servers {
		if n := s.Revoked(); n != each {
			t.Errorf("acknowledged with %d of %d connections cut", n, each)
		}
	}
	waiting.Wait()
	slices.Sort(took)
	t.Logf("%d connections at %d sidecars: dead after p50 %v, p99 %v, max %v; acknowledged by all after %v",
		len(took), sidecars, took[len(took)/2], took[len(took)*99/100], took[len(took)-1], acked)
	if worst := took[len(took)-1]; worst > 5*time.Second { // the goal is 100 ms; a shared machine may be slow
		t.Errorf("a connection lived for %v", worst)
	}
}
