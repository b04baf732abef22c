package controlplane

import (
	"context"
	"encoding/hex"
	"errors"
	"net/netip"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Revoke implements the RPC.
func (a *adminServer) Revoke(ctx context.Context, req *sallyportv1.RevokeRequest) (*sallyportv1.RevokeResponse, error) {
	return a.order(ctx, req, a.registry.Revoke)
}

// Unrevoke implements the RPC.
func (a *adminServer) Unrevoke(ctx context.Context, req *sallyportv1.RevokeRequest) (*sallyportv1.RevokeResponse, error) {
	return a.order(ctx, req, a.registry.Unrevoke)
}

func (a *adminServer) order(ctx context.Context, req *sallyportv1.RevokeRequest, do func(context.Context, registry.Order) (registry.Revocations, error)) (*sallyportv1.RevokeResponse, error) {
	subject, err := a.subject(ctx, req.GetSubject())
	if err != nil {
		return nil, err
	}
	return a.carryOut(ctx, registry.Order{Subjects: []registry.Subject{subject}, Reason: req.GetReason()}, req.GetWait(), do)
}

func (a *adminServer) carryOut(ctx context.Context, o registry.Order, wait *durationpb.Duration, do func(context.Context, registry.Order) (registry.Revocations, error)) (*sallyportv1.RevokeResponse, error) {
	o.Actor, o.Origin = caller(ctx)
	before, err := a.registry.Revocations(ctx)
	if err != nil {
		return nil, revokeStatus(err)
	}
	all, err := do(ctx, o)
	if err != nil {
		return nil, revokeStatus(err)
	}
	if all.Number == before.Number {
		return nil, status.Errorf(codes.NotFound, "%s is not revoked, or cannot be readmitted; see: sallyport identity list", o.Subjects[0].Name)
	}
	resp := &sallyportv1.RevokeResponse{List: listVersion(all.Number)}
	for _, s := range o.Subjects {
		resp.Subjects = append(resp.Subjects, string(s.Kind)+" "+s.Name)
	}
	if d := wait.AsDuration(); d > 0 {
		a.waitRevoked(ctx, resp, all.Number, min(d, maxWait))
	}
	return resp, nil
}

// waitRevoked fills in who holds the list numbered number.
func (a *adminServer) waitRevoked(ctx context.Context, resp *sallyportv1.RevokeResponse, number int64, limit time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := a.revoker.published(ctx, number); err != nil {
		return
	}
	missing := a.xds.WaitRevocations(ctx)
	for _, n := range missing {
		if n.Nack != "" {
			resp.Nacks = append(resp.Nacks, n.String()+": "+n.Nack)
		} else {
			resp.Pending = append(resp.Pending, n.String())
		}
	}
	resp.Acked = uint32(max(len(a.xds.Nodes())-len(missing), 0))
}

// subject finds out what is meant: a workload's name, an instance, a serial, or
// any form of ID.
func (a *adminServer) subject(ctx context.Context, ref string) (registry.Subject, error) {
	state := a.reconciler.current()
	if state == nil {
		return registry.Subject{}, errStarting()
	}
	if text, ok := strings.CutPrefix(ref, "serial:"); ok {
		return serialSubject(text)
	}
	if w, ok := state.Rules.WorkloadByName(ref); ok {
		if w.Template {
			return registry.Subject{}, status.Errorf(codes.InvalidArgument, "%s is a template: name one of its IDs, as sallyport identity list shows them", ref)
		}
		return registry.Subject{Kind: registry.RevokedID, Name: w.ID.String()}, nil
	}
	if _, err := a.registry.Instance(ctx, ref); err == nil {
		return registry.Subject{Kind: registry.RevokedInstance, Name: ref}, nil
	} else if !errors.Is(err, registry.ErrUnknownInstance) {
		return registry.Subject{}, revokeStatus(err)
	}
	if strings.Contains(ref, "/") {
		id, err := a.resolve(state.Rules, ref)
		if err != nil {
			return registry.Subject{}, err
		}
		if identity.Reserved(id) {
			return registry.Subject{}, status.Errorf(codes.InvalidArgument, "%s is the control plane's: taint its authority instead (sallyport ca taint)", id)
		}
		if !id.MemberOf(a.trustDomain) {
			return registry.Subject{}, status.Errorf(codes.InvalidArgument, "%s is of another trust domain, which revokes it itself; a deny rule refuses it here", id)
		}
		return registry.Subject{Kind: registry.RevokedID, Name: id.String()}, nil
	}
	if s, ok, err := a.issuedSerial(ctx, ref); ok || err != nil {
		return s, err
	}
	return registry.Subject{}, status.Errorf(codes.NotFound,
		"%q: no workload, instance or known serial has this name; write an ID as /PATH, and a serial that is not the newest of an instance as serial:HEX", ref)
}

// serialSubject reads a serial in hex, without leading zeros in the end.
func serialSubject(text string) (registry.Subject, error) {
	text = strings.ToLower(strings.ReplaceAll(text, ":", ""))
	if len(text)%2 == 1 {
		text = "0" + text
	}
	b, err := hex.DecodeString(text)
	for len(b) > 0 && b[0] == 0 {
		b = b[1:]
	}
	if err != nil || len(b) == 0 || len(b) > 20 { // RFC 5280 section 4.1.2.2
		return registry.Subject{}, status.Errorf(codes.InvalidArgument, "serial %q: want 1 to 20 bytes in hex", text)
	}
	return registry.Subject{Kind: registry.RevokedSerial, Name: hex.EncodeToString(b)}, nil
}

// issuedSerial finds a serial among the newest of all instances.
func (a *adminServer) issuedSerial(ctx context.Context, text string) (registry.Subject, bool, error) {
	s, err := serialSubject(text)
	if err != nil {
		return registry.Subject{}, false, nil // it is none, then
	}
	all, err := a.registry.Instances(ctx)
	if err != nil {
		return registry.Subject{}, false, revokeStatus(err)
	}
	for _, i := range all {
		if i.Serial == s.Name {
			return s, true, nil
		}
	}
	return registry.Subject{}, false, nil
}

// Ban implements the RPC.
func (a *adminServer) Ban(ctx context.Context, req *sallyportv1.BanRequest) (*sallyportv1.RevokeResponse, error) {
	state := a.reconciler.current()
	if state == nil {
		return nil, errStarting()
	}
	all, err := a.registry.Instances(ctx)
	if err != nil {
		return nil, revokeStatus(err)
	}
	on, err := a.onNode(state.Rules, req.GetNode())
	if err != nil {
		return nil, err
	}
	agents := map[string]bool{} // :: SPIFFE ID of those on the node, which may have vouched for others
	o := registry.Order{Reason: req.GetReason()}
	ban := func(i registry.Instance) {
		o.Subjects = append(o.Subjects, registry.Subject{Kind: registry.RevokedInstance, Name: i.Name})
	}
	for _, i := range all {
		if on(i) {
			agents[i.ID.String()] = true
			ban(i)
		}
	}
	for _, i := range all {
		if !on(i) && i.Vouched() && agents[i.Via.String()] {
			ban(i)
		}
	}
	if len(o.Subjects) == 0 {
		return nil, status.Errorf(codes.NotFound, "%q: no instance lives there; see: sallyport identity list", req.GetNode())
	}
	return a.carryOut(ctx, o, req.GetWait(), a.registry.Revoke)
}

// onNode tells which instances live on a node: an address, an instance, or a
// workload, which is an agent's as a rule.
func (a *adminServer) onNode(rules *policy.Ruleset, node string) (func(registry.Instance) bool, error) {
	if addr, err := netip.ParseAddr(node); err == nil {
		return func(i registry.Instance) bool {
			from, err := netip.ParseAddrPort(i.Origin)
			return err == nil && from.Addr().Unmap() == addr.Unmap()
		}, nil
	}
	if w, ok := rules.WorkloadByName(node); ok && !w.Template {
		return func(i registry.Instance) bool { return i.ID == w.ID }, nil
	}
	if strings.Contains(node, "/") {
		id, err := a.resolve(rules, node)
		if err != nil {
			return nil, err
		}
		return func(i registry.Instance) bool { return i.ID == id }, nil
	}
	return func(i registry.Instance) bool { return i.Name == node }, nil
}

// Taint implements the RPC. What the key signed is refused once everybody has had
// the time to renew.
func (a *adminServer) Taint(ctx context.Context, req *sallyportv1.TaintRequest) (*sallyportv1.TaintResponse, error) {
	if a.ca == nil {
		return nil, status.Error(codes.FailedPrecondition, "an external issuer signs the SVIDs: its keys are its own to replace")
	}
	actor, origin := caller(ctx)
	t, by, err := a.ca.Taint(ctx, req.GetAuthority())
	switch {
	case errors.Is(err, ca.ErrUnknownAuthority):
		return nil, status.Error(codes.NotFound, err.Error())
	case err != nil:
		return nil, revokeStatus(err)
	}
	if err := a.audit.Append(ctx, audit.Record{
		Actor: actor, Origin: origin, Action: "ca.taint", Subject: t.Kind + " " + t.Subject, Detail: "key " + t.KeyHash, Result: "replaced by " + by,
	}); err != nil {
		return nil, revokeStatus(err)
	}
	return &sallyportv1.TaintResponse{Authority: t.Subject, ReplacedBy: by}, nil
}

func revokeStatus(err error) error {
	switch {
	case errors.Is(err, registry.ErrTooManyRevocations):
		return status.Error(codes.ResourceExhausted, err.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	default:
		return status.Error(codes.Unavailable, err.Error())
	}
}
