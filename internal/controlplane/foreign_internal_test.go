package controlplane

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// TestD8_ForeignIDBehindTLS: were a foreign SVID ever verified by TLS, no RPC
// would take it, not even one that takes nobody's.
func TestD8_ForeignIDBehindTLS(t *testing.T) {
	a := &authenticator{
		trustDomain: spiffeid.RequireTrustDomainFromString("test.example"), now: time.Now,
		member:  func(identity.Peer) error { return nil },
		revoked: func(identity.Peer, bool) error { return nil },
	}
	for id, want := range map[string]codes.Code{"spiffe://test.example/server": codes.OK, "spiffe://partner.example/server": codes.PermissionDenied} {
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
		ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{
			HandshakeComplete: true, PeerCertificates: []*x509.Certificate{cert},
		}}})
		for _, method := range []string{
			sallyportv1.Enrollment_Enroll_FullMethodName, sallyportv1.Enrollment_Renew_FullMethodName, sallyportv1.Announcer_Announce_FullMethodName,
			"/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources", "/anything/Else",
		} {
			if _, err := a.authenticate(ctx, method); status.Code(err) != want {
				t.Errorf("%s calls %s: %v, want %v", id, method, err, want)
			}
		}
	}
}
