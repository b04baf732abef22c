//go:build e2e

package e2e

import (
	"context"
	"crypto/tls"
	"testing"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcstatus "google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

// callEverything calls every RPC there is without a certificate.
func callEverything(ctx context.Context, t *testing.T, addr string) {
	t.Helper()
	// The server's certificate is not what is tested here.
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}))) //nolint:gosec // see above
	require.NoError(t, err)
	defer conn.Close()
	for _, d := range []struct {
		desc grpc.ServiceDesc
		want map[string]codes.Code // default Unauthenticated
	}{
		{desc: sallyportv1.Enrollment_ServiceDesc, want: map[string]codes.Code{"Enroll": codes.InvalidArgument}},
		{desc: sallyportv1.Announcer_ServiceDesc},
		{desc: discoveryv3.AggregatedDiscoveryService_ServiceDesc},
		{desc: accesslogv3.AccessLogService_ServiceDesc},
		{desc: sallyportv1.Admin_ServiceDesc, want: map[string]codes.Code{"*": codes.Unimplemented}},
	} {
		var names []string
		for _, m := range d.desc.Methods {
			names = append(names, m.MethodName)
		}
		for _, s := range d.desc.Streams {
			names = append(names, s.StreamName)
		}
		for _, name := range names {
			want, ok := d.want[name]
			if !ok {
				want, ok = d.want["*"]
			}
			if !ok {
				want = codes.Unauthenticated
			}
			if got := callEmpty(ctx, conn, "/"+d.desc.ServiceName+"/"+name); got != want {
				t.Errorf("%s/%s without a certificate: %v, want %v", d.desc.ServiceName, name, got, want)
			}
		}
	}
}

// callEmpty sends one empty message, which is valid for every type, and returns
// the status.
func callEmpty(ctx context.Context, conn *grpc.ClientConn, method string) codes.Code {
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return grpcstatus.Code(err)
	}
	_ = stream.SendMsg(&sallyportv1.StatusRequest{}) // the status of RecvMsg says what happened
	_ = stream.CloseSend()
	for {
		if err := stream.RecvMsg(&sallyportv1.StatusRequest{}); err != nil {
			return grpcstatus.Code(err)
		}
	}
}
