package controlplane

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

const (
	// maxEvidence bounds what can be explained, in bytes.
	maxEvidence = 256 << 10
	// explainTimeout bounds what a verifier asks of others.
	explainTimeout = 10 * time.Second
)

// Identities implements the RPC.
func (a *adminServer) Identities(ctx context.Context, req *sallyportv1.IdentitiesRequest) (*sallyportv1.IdentitiesResponse, error) {
	state := a.reconciler.current()
	if state == nil {
		return nil, errStarting()
	}
	wanted := func(string, spiffeid.ID) bool { return true }
	if ref := req.GetWorkload(); ref != "" {
		if _, ok := state.Rules.WorkloadByName(ref); ok { // a template's name stands for all of its identities
			wanted = func(name string, _ spiffeid.ID) bool { return name == ref }
		} else {
			id, err := a.resolve(state.Rules, ref)
			if err != nil {
				return nil, err
			}
			wanted = func(_ string, got spiffeid.ID) bool { return got == id }
		}
	}
	instances, err := a.registry.Instances(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "reading instances: %v", err)
	}
	connected := map[node]bool{}
	for _, n := range a.xds.Nodes() {
		connected[node{n.ID, n.Instance}] = true
	}
	revoked, err := a.registry.Revocations(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "reading revocations: %v", err)
	}
	resp := &sallyportv1.IdentitiesResponse{}
	for _, i := range instances {
		w, _ := state.Rules.Workload(i.ID)
		if !wanted(w.Name, i.ID) {
			continue
		}
		out := identityOf(i, w.Name, connected[node{i.ID, i.Name}])
		out.Revoked = revoked.Blocks(i)
		resp.Identities = append(resp.Identities, out)
	}
	if req.GetWorkload() == "" {
		resp.Revocations = revocationsOf(revoked)
	}
	slices.SortStableFunc(resp.Identities, func(a, b *sallyportv1.Identity) int { return strings.Compare(a.GetSpiffeId(), b.GetSpiffeId()) })
	return resp, nil
}

func revocationsOf(all registry.Revocations) (out []*sallyportv1.Revocation) {
	for _, v := range all.All {
		m := &sallyportv1.Revocation{
			Kind: string(v.Kind), Subject: v.Subject, Since: timestamppb.New(v.At), Actor: v.Actor, Reason: v.Reason, Blocked: v.Blocked,
		}
		if !v.Until.IsZero() && !v.Blocked && !v.Removed {
			m.Until = timestamppb.New(v.Until)
		}
		out = append(out, m)
	}
	return out
}

func identityOf(i registry.Instance, workload string, connected bool) *sallyportv1.Identity {
	out := &sallyportv1.Identity{
		SpiffeId: i.ID.String(), Workload: workload, Instance: i.Name, Evidence: i.Kind, Subject: i.Subject, Origin: i.Origin,
		Enrolled: timestamppb.New(i.Enrolled), Serial: i.Serial, Connected: connected,
	}
	if i.Vouched() {
		out.Agent = i.Via.String()
	}
	if !i.NotAfter.IsZero() {
		out.Expires = timestamppb.New(i.NotAfter)
	}
	return out
}

// ExplainIdentity implements the RPC. It redeems nothing and registers nobody.
func (a *adminServer) ExplainIdentity(ctx context.Context, req *sallyportv1.ExplainIdentityRequest) (*sallyportv1.ExplainIdentityResponse, error) {
	state := a.reconciler.current()
	if state == nil {
		return nil, errStarting()
	}
	v, problem, err := a.inspect(ctx, req)
	if err != nil {
		return nil, err
	}
	var via spiffeid.ID
	if v.Kind == policy.Unix {
		if via, err = a.agent(state.Rules, req.GetVia()); err != nil {
			return nil, err
		}
	}
	near, err := a.registry.Explain(v, via)
	if err != nil {
		return nil, errStarting()
	}
	resp := &sallyportv1.ExplainIdentityResponse{Kind: v.Kind, Selectors: map[string]*sallyportv1.Values{}, Problem: problem}
	for key, values := range v.Selectors {
		resp.Selectors[key] = &sallyportv1.Values{Values: values}
	}
	for _, n := range near {
		m := &sallyportv1.IdentityMatch{
			Workload: n.Workload.Name, Set: n.Workload.Set, Location: fmt.Sprintf("%s:%d", n.Workload.File, n.Workload.Line),
			Matches: n.Matches, Missed: n.Missed,
		}
		if n.Matches {
			m.SpiffeId = n.ID.String()
		}
		resp.Matches = append(resp.Matches, m)
	}
	return resp, nil
}

// inspect gives what is to be explained, and what is wrong with it as evidence.
func (a *adminServer) inspect(ctx context.Context, req *sallyportv1.ExplainIdentityRequest) (v attest.Verified, problem string, err error) {
	switch evidence := req.GetEvidence(); {
	case len(evidence) > maxEvidence:
		return v, "", status.Errorf(codes.InvalidArgument, "evidence of %d bytes: at most %d", len(evidence), maxEvidence)
	case len(evidence) == 0:
		return a.selectors(req)
	case strings.Contains(string(evidence), "-----BEGIN "):
		v, err = a.certificate(req, evidence)
	default:
		v, err = a.token(ctx, req, strings.TrimSpace(string(evidence)))
	}
	if errors.Is(err, attest.ErrBadEvidence) || errors.Is(err, attest.ErrUnreachable) {
		return v, err.Error(), nil
	}
	return v, "", err
}

func (a *adminServer) selectors(req *sallyportv1.ExplainIdentityRequest) (v attest.Verified, problem string, err error) {
	v = attest.Verified{Kind: req.GetKind(), Issuer: req.GetIssuer(), Selectors: attest.Selectors{}}
	counts := a.verifiers.count()
	if _, known := counts[v.Kind]; !known && v.Kind != policy.Unix {
		kinds := slices.Sorted(maps.Keys(counts))
		return v, "", status.Errorf(codes.InvalidArgument, "kind %q: selectors belong to one of %s, %s", v.Kind, strings.Join(kinds, ", "), policy.Unix)
	}
	for key, values := range req.GetSelectors() {
		v.Selectors[key] = values.GetValues()
	}
	if len(v.Selectors) == 0 {
		return v, "", status.Error(codes.InvalidArgument, "nothing to explain: give evidence or selectors")
	}
	if n, known := counts[v.Kind]; known && n == 0 {
		problem = fmt.Sprintf("attest.%s is not configured on this control plane, so no evidence of this kind is accepted", v.Kind)
	}
	return v, problem, nil
}

// certificate explains a PEM chain, leaf first. Other blocks, such as the key
// behind it, are not looked at.
func (a *adminServer) certificate(req *sallyportv1.ExplainIdentityRequest, rest []byte) (attest.Verified, error) {
	var chain [][]byte
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			chain = append(chain, block.Bytes)
		}
	}
	if kind := req.GetKind(); kind != "" && kind != policy.X509Pop {
		return attest.Verified{}, status.Errorf(codes.InvalidArgument, "kind %s: a PEM file is evidence of kind %s", kind, policy.X509Pop)
	}
	pop, _, err := verifierOf(policy.X509Pop, a.verifiers.x509pop, req.GetIssuer())
	if err != nil {
		return attest.Verified{}, err
	}
	return pop.Inspect(chain)
}

// token explains a platform's token as its verifier sees it.
func (a *adminServer) token(ctx context.Context, req *sallyportv1.ExplainIdentityRequest, token string) (attest.Verified, error) {
	kind, found := attest.Unverified(token)
	if kind == "" {
		return attest.Verified{}, status.Error(codes.InvalidArgument, "the evidence is neither PEM nor a token of the form header.claims.signature")
	}
	if req.GetKind() != "" && req.GetKind() != kind {
		return attest.Verified{}, status.Errorf(codes.InvalidArgument, "kind %s: this token is evidence of kind %s", req.GetKind(), kind)
	}
	all := a.verifiers.oidc
	if kind == attest.KindKubernetes {
		all = a.verifiers.kubernetes
	}
	verifier, name, err := verifierOf(kind, all, req.GetIssuer())
	if err != nil {
		return attest.Verified{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, explainTimeout)
	defer cancel()
	v, err := verifier.Verify(ctx, token)
	if err != nil { // say which workload it would prove if it were good
		v = attest.Verified{Kind: kind, Issuer: name, Selectors: found}
	}
	return v, err
}

// agent is who vouches: the one that is named, or the only one that any Workload
// names.
func (a *adminServer) agent(rules *policy.Ruleset, ref string) (spiffeid.ID, error) {
	if ref != "" {
		id, err := a.resolve(rules, ref)
		if err == nil && id.IsZero() {
			err = status.Errorf(codes.InvalidArgument, "%s is a template: give the agent's ID", ref)
		}
		return id, err
	}
	named := map[string]bool{}
	for _, w := range slices.Concat(rules.Workloads(), rules.Templates()) {
		for _, entry := range w.Attest {
			for _, via := range entry.Via {
				named[via] = true
			}
		}
	}
	all := slices.Sorted(maps.Keys(named))
	switch len(all) {
	case 0:
		return spiffeid.ID{}, status.Error(codes.FailedPrecondition, "no Workload names an agent (attest: - {kind: unix, via: [/ID], …}), so a process proves nothing")
	case 1:
		return a.resolve(rules, all[0])
	}
	return spiffeid.ID{}, status.Errorf(codes.InvalidArgument, "say by which agent (--via): Workloads name %s", strings.Join(all[:min(len(all), 20)], ", "))
}

// verifierOf finds who checks evidence, the issuer that is named or the only one,
// and its name.
func verifierOf[V any](kind string, all map[string]V, name string) (v V, _ string, err error) {
	names := slices.Sorted(maps.Keys(all))
	switch {
	case len(all) == 0:
		return v, "", status.Errorf(codes.FailedPrecondition, "attest.%s is not configured on this control plane, so no evidence of this kind is accepted", kind)
	case name == "" && len(all) > 1:
		return v, "", status.Errorf(codes.InvalidArgument, "say by which issuer (--issuer): attest.%s has %s", kind, strings.Join(names, ", "))
	case name == "":
		name = names[0]
	}
	v, ok := all[name]
	if !ok {
		return v, "", status.Errorf(codes.InvalidArgument, "attest.%s has no %q; it has %s", kind, name, strings.Join(names, ", "))
	}
	return v, name, nil
}
