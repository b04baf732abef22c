package agent

import (
	"context"
	"crypto/ecdsa"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// edge is the real service, which can be made to refuse what is asked for apps.
type edge struct {
	*issuer.Service
	mu     sync.Mutex
	refuse codes.Code   // guarded by mu; OK: not at all
	apps   atomic.Int32 // SVIDs issued for apps
}

func (e *edge) set(refuse codes.Code) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refuse = refuse
}

func (e *edge) refusal() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.refuse == codes.OK {
		return nil
	}
	return status.Error(e.refuse, "not for you")
}

func (e *edge) Renew(ctx context.Context, req *sallyportv1.RenewRequest) (*sallyportv1.RenewResponse, error) {
	if !req.GetApp() {
		return e.Service.Renew(ctx, req)
	}
	if err := e.refusal(); err != nil {
		return nil, err
	}
	e.apps.Add(1)
	return e.Service.Renew(ctx, req)
}

func (e *edge) IssueFor(ctx context.Context, req *sallyportv1.IssueForRequest) (*sallyportv1.IssueForResponse, error) {
	if err := e.refusal(); err != nil {
		return nil, err
	}
	e.apps.Add(1)
	return e.Service.IssueFor(ctx, req)
}

// workloads are two that enrol themselves, and two that the agent of payments may
// vouch for, by the path of their program.
func workloads() []policy.CompiledWorkload {
	out := []policy.CompiledWorkload{workload("payments"), workload("orders")}
	for _, name := range []string{"root", "user"} {
		w := workload(name)
		w.Attest = []policy.Attest{{Kind: policy.Unix, Via: []string{"/shop/payments"}, Select: map[string]string{"path": "/bin/" + name}}}
		out = append(out, w)
	}
	return out
}

// issue signs an SVID past the service.
func (c *controlPlane) issue(t *testing.T, path string) (*sallyportv1.SVID, *ecdsa.PrivateKey) {
	t.Helper()
	key, _, err := newKey()
	require.NoError(t, err)
	id := spiffeid.RequireFromPath(td, path)
	issued, err := c.ca.Issue(t.Context(), ca.Request{ID: id, Key: key.Public(), Instance: "test"})
	require.NoError(t, err)
	msg := &sallyportv1.SVID{SpiffeId: id.String(), ServerTime: timestamppb.New(c.clock.Now())}
	for _, cert := range issued.Chain {
		msg.Chain = append(msg.Chain, cert.Raw)
	}
	for _, cert := range issued.Bundle {
		msg.Bundle = append(msg.Bundle, cert.Raw)
	}
	return msg, key
}

// bundles are what the control plane pushes.
func (c *controlPlane) bundles() identity.Bundles { return identity.Bundles{td: c.ca.Bundle()} }
