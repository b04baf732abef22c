package issuer

import (
	"context"
	"fmt"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// IssueFor issues an SVID to a process for which the caller, an agent, vouches.
// Only a workload that names this very agent can result, so a host that was taken
// over gives away what its own workloads are and nothing else. The SVID lives
// [AppTTL] at most, and ends with the agent's own: nobody renews it but the agent.
func (s *Service) IssueFor(ctx context.Context, req *sallyportv1.IssueForRequest) (*sallyportv1.IssueForResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, s.deadline)
	defer cancel()
	svid, err := s.issueFor(ctx, req)
	if err != nil {
		s.refused("SVID for a process refused", originOf(ctx), err)
		return nil, toStatus(err)
	}
	return &sallyportv1.IssueForResponse{Svid: svid}, nil
}

func (s *Service) issueFor(ctx context.Context, req *sallyportv1.IssueForRequest) (*sallyportv1.SVID, error) {
	caller, err := s.caller(ctx, &s.processes)
	if err != nil {
		return nil, err
	}
	if err := checkMessage(req); err != nil {
		return nil, err
	}
	key, err := readCSR(req.GetCsr())
	if err != nil {
		return nil, err
	}
	inst, err := s.vouched(ctx, caller, req.GetProcess())
	if err != nil {
		return nil, err
	}
	return s.issue(ctx, issuance{
		inst: inst, key: key, ttl: min(AppTTL, caller.Leaf.NotAfter.Sub(s.cfg.Now())), action: audit.ActionRenew, actor: caller.ID.String(), detail: vouchedBy(inst),
	})
}

// vouched is the instance that the caller's word makes of a process.
func (s *Service) vouched(ctx context.Context, caller identity.Peer, p *sallyportv1.Process) (registry.Instance, error) {
	v, err := readProcess(p)
	if err != nil {
		return registry.Instance{}, err
	}
	agent, err := s.ownInstance(ctx, caller)
	if err != nil {
		return registry.Instance{}, err
	}
	return s.cfg.Registry.Vouch(ctx, agent, v)
}

func vouchedBy(inst registry.Instance) string {
	return fmt.Sprintf("instance %s, by %s; agent's instance %s", inst.Name, inst.Evidence(), inst.Agent)
}
