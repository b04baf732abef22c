package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// edge answers for apps and processes as a control plane does whose workloads are
// named after the uid and path of the process. Everything else is the real
// service.
type edge struct {
	*issuer.Service
	cp  *controlPlane
	key *ecdsa.PrivateKey // of JWT-SVIDs

	mu     sync.Mutex
	refuse codes.Code              // of IssueFor and of Renew for the app; OK: none
	spoil  func(*sallyportv1.SVID) // changes what is issued
	apps   atomic.Int32            // SVIDs issued for apps
	jwts   atomic.Int32
}

const edgeKID = "edge"

func newEdge(t *testing.T, cp *controlPlane) *edge {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return &edge{Service: cp.service, cp: cp, key: key}
}

func (e *edge) set(refuse codes.Code, spoil func(*sallyportv1.SVID)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refuse, e.spoil = refuse, spoil
}

func (e *edge) issue(ctx context.Context, id spiffeid.ID, csr []byte) (*sallyportv1.SVID, error) {
	e.mu.Lock()
	refuse, spoil := e.refuse, e.spoil
	e.mu.Unlock()
	if refuse != codes.OK {
		return nil, status.Error(refuse, "not for you")
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	issued, err := e.cp.ca.Issue(ctx, ca.Request{ID: id, Key: req.PublicKey, Instance: "app"})
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	msg := &sallyportv1.SVID{SpiffeId: id.String(), ServerTime: timestamppb.New(e.cp.clock.Now())}
	for _, c := range issued.Chain {
		msg.Chain = append(msg.Chain, c.Raw)
	}
	for _, c := range issued.Bundle {
		msg.Bundle = append(msg.Bundle, c.Raw)
	}
	if spoil != nil {
		spoil(msg)
	}
	e.apps.Add(1)
	return msg, nil
}

func (e *edge) Renew(ctx context.Context, req *sallyportv1.RenewRequest) (*sallyportv1.RenewResponse, error) {
	caller, ok := identity.PeerFromContext(ctx)
	if !req.GetApp() || !ok {
		return e.Service.Renew(ctx, req)
	}
	svid, err := e.issue(ctx, caller.ID, req.GetCsr())
	return &sallyportv1.RenewResponse{Svid: svid}, err
}

func idOf(p *sallyportv1.Process) (spiffeid.ID, error) {
	path := p.GetSelectors()["path"].GetValues()
	if len(path) == 0 {
		return spiffeid.ID{}, status.Error(codes.PermissionDenied, "no workload fits")
	}
	return spiffeid.FromPath(td, path[0])
}

func (e *edge) IssueFor(ctx context.Context, req *sallyportv1.IssueForRequest) (*sallyportv1.IssueForResponse, error) {
	id, err := idOf(req.GetProcess())
	if err != nil {
		return nil, err
	}
	svid, err := e.issue(ctx, id, req.GetCsr())
	return &sallyportv1.IssueForResponse{Svid: svid}, err
}

func (e *edge) IssueJWT(ctx context.Context, req *sallyportv1.IssueJWTRequest) (*sallyportv1.IssueJWTResponse, error) {
	caller, _ := identity.PeerFromContext(ctx)
	id := caller.ID
	if req.GetProcess() != nil {
		var err error
		if id, err = idOf(req.GetProcess()); err != nil {
			return nil, err
		}
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: e.key, KeyID: edgeKID}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, err
	}
	expires := e.cp.clock.Now().Add(5 * time.Minute)
	token, err := jwt.Signed(signer).Claims(map[string]any{
		"sub": id.String(), "aud": req.GetAudience(), "exp": expires.Unix(), "jti": fmt.Sprint(e.jwts.Add(1)),
	}).Serialize()
	return &sallyportv1.IssueJWTResponse{SpiffeId: id.String(), Token: token, Expires: timestamppb.New(expires)}, err
}

// bundles are what the control plane would push.
func (e *edge) bundles(t *testing.T) identity.Bundles {
	b := spiffebundle.FromX509Authorities(td, e.cp.ca.Bundle())
	require.NoError(t, b.AddJWTAuthority(edgeKID, e.key.Public()))
	return identity.Bundles{td: b}
}
