package controlplane

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// behindTLS is a call by id, as if TLS had verified it.
func behindTLS(t *testing.T, id string) *peer.Peer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{spiffeid.RequireFromString(id).URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return &peer.Peer{AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{
		HandshakeComplete: true, PeerCertificates: []*x509.Certificate{cert},
	}}}
}

// TestD8_RolesBehindTLS: every RPC of the network port, and one that nobody knows
// yet, called by each role that TLS lets through. Foreign SVIDs are refused there
// too, were they ever verified.
func TestD8_RolesBehindTLS(t *testing.T) {
	const (
		enroll = sallyportv1.Enrollment_Enroll_FullMethodName
		ads    = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResources_FullMethodName
		sotw   = discoveryv3.AggregatedDiscoveryService_StreamAggregatedResources_FullMethodName
	)
	a := &authenticator{
		trustDomain: spiffeid.RequireTrustDomainFromString("test.example"), now: time.Now,
		member: func(p identity.Peer) error {
			if p.ID.Path() == "/gone" || p.ID.Path() == "/revoked" {
				return status.Error(codes.PermissionDenied, "no Workload")
			}
			return nil
		},
		revoked: func(p identity.Peer, orphan bool) error {
			if p.ID.Path() == "/revoked" {
				return errors.New("revoked")
			}
			return nil
		},
	}
	methods, _ := RPCs(t)
	methods = append(methods, "/anything/Else", "/sallyport.v1.Enrollment/EnrollMore")
	for _, role := range []struct {
		name string
		peer *peer.Peer
		code codes.Code
		open []string // what it may call all the same
	}{
		{"member", behindTLS(t, "spiffe://test.example/server"), codes.OK, nil},
		{"nobody", &peer.Peer{AuthInfo: credentials.TLSInfo{}}, codes.Unauthenticated, []string{enroll}},
		{"without TLS", &peer.Peer{}, codes.Unauthenticated, nil},
		{"without a workload", behindTLS(t, "spiffe://test.example/gone"), codes.PermissionDenied, []string{enroll, ads, sotw}},
		{"revoked", behindTLS(t, "spiffe://test.example/revoked"), codes.Unauthenticated, []string{enroll}},
		{"control plane", behindTLS(t, "spiffe://test.example/sallyport/controlplane"), codes.PermissionDenied, nil},
		{"foreign", behindTLS(t, "spiffe://partner.example/server"), codes.PermissionDenied, nil},
	} {
		for _, method := range methods {
			want := role.code
			for _, open := range role.open {
				if method == open {
					want = codes.OK
				}
			}
			if _, err := a.authenticate(peer.NewContext(t.Context(), role.peer), method); status.Code(err) != want {
				t.Errorf("%s calls %s: %v, want %v", role.name, method, err, want)
			}
		}
	}
	if _, err := a.authenticate(t.Context(), enroll); status.Code(err) != codes.Unauthenticated {
		t.Errorf("from nowhere: %v", err)
	}
}
