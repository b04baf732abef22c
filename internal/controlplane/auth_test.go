package controlplane_test

import (
	"testing"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
)

// TestStreamsEndWithTheirSVID: a stream that outlives the SVID that opened it is
// cut, whatever its handler waits for, and the connection is good for nothing.
func TestStreamsEndWithTheirSVID(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{Files: files(), Change: func(c *controlplane.Config) { c.CA.SVIDTTL = 2 * time.Second }})
	conn := m.Dial(m.Agent("server"))
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(t.Context())
	require.NoError(t, err)
	logs, err := accesslogv3.NewAccessLogServiceClient(conn).StreamAccessLogs(t.Context())
	require.NoError(t, err)
	announced, err := sallyportv1.NewAnnouncerClient(conn).Announce(t.Context())
	require.NoError(t, err)
	for name, recv := range map[string]func() error{
		"ADS":        func() error { _, err := ads.Recv(); return err },
		"access log": func() error { return logs.RecvMsg(&accesslogv3.StreamAccessLogsResponse{}) },
		"announce":   func() error { _, err := announced.Recv(); return err },
	} {
		ended := make(chan error, 1)
		go func() { ended <- recv() }()
		select {
		case err := <-ended:
			if got := status.Code(err); got != codes.Unauthenticated {
				t.Errorf("%s ended with %v, want Unauthenticated", name, err)
			}
		case <-time.After(meshtest.Deadline):
			t.Fatalf("%s outlives its SVID", name)
		}
	}
	late, err := sallyportv1.NewAnnouncerClient(conn).Announce(t.Context())
	require.NoError(t, err)
	if _, err := late.Recv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a new stream on the old connection: %v, want Unauthenticated", err)
	}
}
