package controlplane

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/catalog"
	"github.com/sallyport-mesh/sallyport/internal/federation"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/insight"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// adminServer is the operator's API. It changes nothing by itself: catalogue
// and registry do, and write their own audit records.
type adminServer struct {
	sallyportv1.UnimplementedAdminServer
	trustDomain spiffeid.TrustDomain
	catalog     *catalog.Catalog
	audit       *audit.Log
	registry    *registry.Registry
	xds         *xds.Server
	flows       *insight.Collector
	reconciler  *reconciler
	revoker     *revoker
	ca          *ca.CA
	status      *statusReporter
	verifiers   verifiers
	federation  *federation.Manager
	bundle      func() *spiffebundle.Bundle // the own trust domain's
	enrolment   func() error                // why nobody enrols here; nil: they do
	now         func() time.Time
}

// CreateToken implements the RPC.
func (a *adminServer) CreateToken(ctx context.Context, req *sallyportv1.CreateTokenRequest) (*sallyportv1.CreateTokenResponse, error) {
	if err := a.enrolment(); err != nil {
		return nil, err
	}
	actor, origin := caller(ctx)
	t, err := a.registry.CreateToken(ctx, registry.TokenRequest{Workload: req.GetWorkload(), TTL: req.GetTtl().AsDuration(), Actor: actor, Origin: origin})
	switch {
	case errors.Is(err, registry.ErrNotReady):
		return nil, errStarting()
	case registry.IsRequestError(err):
		return nil, status.Error(codes.InvalidArgument, err.Error())
	case err != nil:
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &sallyportv1.CreateTokenResponse{Token: t.Token, Expires: timestamppb.New(t.Expires), SpiffeId: t.ID.String()}, nil
}

// Status implements the RPC.
func (a *adminServer) Status(ctx context.Context, _ *sallyportv1.StatusRequest) (*sallyportv1.StatusResponse, error) {
	return a.status.report(ctx)
}

// Explain implements the RPC.
func (a *adminServer) Explain(_ context.Context, req *sallyportv1.ExplainRequest) (*sallyportv1.ExplainResponse, error) {
	state := a.reconciler.current()
	if state == nil {
		return nil, errStarting()
	}
	if id := req.GetDecisionId(); id != "" {
		f, ok := a.flows.Find(id)
		if !ok {
			return nil, status.Errorf(codes.NotFound, "no flow record with decision id %q is held", id)
		}
		e := insight.ExplainOne(state.Rules, f.Request, f.Start, f.PortName)
		e.Note = recorded(f, state.Rev.String())
		return &sallyportv1.ExplainResponse{Explanations: []*sallyportv1.Explanation{e}}, nil
	}
	return insight.Explain(state.Rules, a.trustDomain, req, a.now())
}

// recorded says what a flow record holds beside what the rules say now.
func recorded(f flow.Flow, rev string) string {
	note := fmt.Sprintf("recorded by %s: %s", f.Reporter, f.Outcome)
	switch {
	case f.Outcome == flow.Failed:
		note += ", verdict " + f.Verdict()
	case f.Side == flow.Outbound:
		note += ", the destination decided " + f.Verdict()
	default:
		note += fmt.Sprintf(", revision %s decided %s by %s", f.Revision, f.Verdict(), f.Rule)
	}
	if f.Error != "" {
		note += " (" + f.Error + ")"
	}
	return note + fmt.Sprintf("; above is what revision %s says", rev)
}

// resolve finds who is meant: a workload's name first, then any form of ID.
func (a *adminServer) resolve(rules *policy.Ruleset, ref string) (spiffeid.ID, error) {
	return insight.Resolve(rules, a.trustDomain, ref)
}

// Flows implements the RPC.
func (a *adminServer) Flows(req *sallyportv1.FlowsRequest, stream sallyportv1.Admin_FlowsServer) error {
	filter, err := a.filter(req)
	if err != nil {
		return err
	}
	err = a.flows.Flows(stream.Context(), filter, int(req.GetLimit()), req.GetFollow(), func(f flow.Flow, dropped uint64) error {
		data, err := f.MarshalJSON()
		if err != nil {
			return status.Errorf(codes.Internal, "encoding a flow record: %v", err)
		}
		return stream.Send(&sallyportv1.FlowsResponse{Flow: data, Dropped: dropped})
	})
	if stream.Context().Err() != nil {
		return status.FromContextError(stream.Context().Err()).Err()
	}
	return err
}

func (a *adminServer) filter(req *sallyportv1.FlowsRequest) (insight.Filter, error) {
	var f insight.Filter
	state := a.reconciler.current()
	if state == nil {
		return f, errStarting()
	}
	var err error
	if req.GetFrom() != "" {
		if f.Src, err = a.resolve(state.Rules, req.GetFrom()); err != nil {
			return f, err
		}
	}
	if req.GetTo() != "" {
		if f.Dst, err = a.resolve(state.Rules, req.GetTo()); err != nil {
			return f, err
		}
	}
	switch v := req.GetVerdict(); v {
	case "":
	case policy.Allow.String(), policy.Deny.String():
		effect := policy.Deny
		if v == policy.Allow.String() {
			effect = policy.Allow
		}
		f.Verdict = &effect
	default:
		return f, status.Errorf(codes.InvalidArgument, "verdict %q: want allow or deny", v)
	}
	return f, nil
}
