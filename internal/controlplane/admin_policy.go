package controlplane

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/catalog"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

const (
	defaultList = 50
	maxList     = 10_000
	maxWait     = 5 * time.Minute
)

func listLimit(n uint32) int {
	if n == 0 {
		return defaultList
	}
	return int(min(n, maxList))
}

// Apply implements the RPC.
func (a *adminServer) Apply(ctx context.Context, req *sallyportv1.ApplyRequest) (*sallyportv1.ApplyResponse, error) {
	change := catalog.Change{Sets: map[string]map[string][]byte{}, DryRun: req.GetDryRun()}
	change.Actor, change.Origin = caller(ctx)
	for _, s := range req.GetSets() {
		if _, twice := change.Sets[s.GetName()]; twice {
			return nil, status.Errorf(codes.InvalidArgument, "set %q is given twice", s.GetName())
		}
		change.Sets[s.GetName()] = s.GetFiles()
	}
	return a.apply(ctx, change, req.GetWait())
}

// RemoveSet implements the RPC.
func (a *adminServer) RemoveSet(ctx context.Context, req *sallyportv1.RemoveSetRequest) (*sallyportv1.ApplyResponse, error) {
	change := catalog.Change{Remove: []string{req.GetName()}}
	change.Actor, change.Origin = caller(ctx)
	return a.apply(ctx, change, req.GetWait())
}

func (a *adminServer) apply(ctx context.Context, change catalog.Change, wait *durationpb.Duration) (*sallyportv1.ApplyResponse, error) {
	result, err := a.catalog.Apply(ctx, change)
	if err != nil {
		return nil, applyStatus(err)
	}
	return a.applied(ctx, result, change.DryRun, wait)
}

// Rollback implements the RPC.
func (a *adminServer) Rollback(ctx context.Context, req *sallyportv1.RollbackRequest) (*sallyportv1.ApplyResponse, error) {
	rev, err := xds.ParseRevision(req.GetRevision())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	actor, origin := caller(ctx)
	result, err := a.catalog.Rollback(ctx, catalog.Rev(rev), actor, origin)
	if err != nil {
		return nil, applyStatus(err)
	}
	return a.applied(ctx, result, false, req.GetWait())
}

func (a *adminServer) applied(ctx context.Context, result catalog.Result, dryRun bool, wait *durationpb.Duration) (*sallyportv1.ApplyResponse, error) {
	rev := xds.Revision{Epoch: result.Epoch, N: result.N}
	resp := &sallyportv1.ApplyResponse{Revision: rev.String(), Unchanged: result.Unchanged, Diff: result.Diff, Tests: result.Tests}
	if dryRun || wait.AsDuration() <= 0 {
		return resp, nil
	}
	ctx, cancel := context.WithTimeout(ctx, min(wait.AsDuration(), maxWait))
	defer cancel()
	acked, pending, nacks := a.xds.WaitAcked(ctx, rev)
	resp.Acked = uint32(len(acked))
	for _, n := range pending {
		resp.Pending = append(resp.Pending, n.String())
	}
	for _, n := range nacks {
		resp.Nacks = append(resp.Nacks, n.String()+": "+n.Nack)
	}
	return resp, nil
}

// applyStatus maps the catalogue's errors to status codes.
func applyStatus(err error) error {
	var files policy.Errors
	switch {
	case errors.As(err, &files), errors.Is(err, catalog.ErrTests), errors.Is(err, catalog.ErrInvariants), errors.Is(err, catalog.ErrLastWorkload),
		errors.Is(err, policy.ErrNoWorkload), errors.Is(err, catalog.ErrTooLarge):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, catalog.ErrWatched):
		return status.Error(codes.FailedPrecondition, err.Error())
	case errors.Is(err, catalog.ErrNoSet), errors.Is(err, catalog.ErrNoRevision):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, catalog.ErrConflict):
		return status.Error(codes.Aborted, err.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	default:
		return status.Error(codes.Unavailable, err.Error())
	}
}

// History implements the RPC.
func (a *adminServer) History(ctx context.Context, req *sallyportv1.HistoryRequest) (*sallyportv1.HistoryResponse, error) {
	entries, err := a.catalog.History(ctx, listLimit(req.GetLimit()))
	if err != nil {
		return nil, applyStatus(err)
	}
	resp := &sallyportv1.HistoryResponse{}
	for _, e := range entries {
		resp.Revisions = append(resp.Revisions, &sallyportv1.Revision{
			Revision: e.Rev.String(), Time: timestamppb.New(e.Time),
			Actor: e.Actor, Origin: e.Origin, Summary: e.Summary, Current: e.Current,
		})
	}
	return resp, nil
}

// Files implements the RPC.
func (a *adminServer) Files(ctx context.Context, req *sallyportv1.FilesRequest) (*sallyportv1.FilesResponse, error) {
	state := a.reconciler.current()
	if state == nil {
		return nil, errStarting()
	}
	rev := xds.Revision(state.Rev)
	if req.GetRevision() != "" {
		var err error
		if rev, err = xds.ParseRevision(req.GetRevision()); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
	}
	sets, err := a.catalog.Files(ctx, catalog.Rev(rev))
	if err != nil {
		return nil, applyStatus(err)
	}
	resp := &sallyportv1.FilesResponse{Revision: rev.String()}
	for name, files := range sets {
		resp.Sets = append(resp.Sets, &sallyportv1.Set{Name: name, Files: files})
	}
	return resp, nil
}

// Audit implements the RPC.
func (a *adminServer) Audit(ctx context.Context, req *sallyportv1.AuditRequest) (*sallyportv1.AuditResponse, error) {
	read := a.audit.Recent
	if req.GetRenewals() {
		read = a.audit.Renewals
	}
	records, err := read(ctx, listLimit(req.GetLimit()))
	if err != nil {
		return nil, status.Error(codes.Unavailable, fmt.Sprintf("reading the audit log: %v", err))
	}
	resp := &sallyportv1.AuditResponse{}
	for _, r := range records {
		resp.Records = append(resp.Records, &sallyportv1.AuditRecord{
			Time: timestamppb.New(r.Time), Actor: r.Actor, Origin: r.Origin, Action: r.Action,
			Subject: r.Subject, Detail: r.Detail, Result: r.Result,
		})
	}
	return resp, nil
}

func errStarting() error {
	return status.Error(codes.Unavailable, "the control plane is still starting; try again in a moment")
}
