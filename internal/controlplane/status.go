package controlplane

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/federation"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// statusReporter answers "is the mesh well, and if not, what to do".
type statusReporter struct {
	version     string
	source      string // where policy comes from
	started     time.Time
	problems    []func() string // of the watched directory, the authorities, the revocation list
	authorities func() []*sallyportv1.Authority
	instances   func(context.Context) ([]registry.Instance, error)
	revocations func(context.Context) (registry.Revocations, error)
	xds         *xds.Server
	reconciler  *reconciler
	federation  *federation.Manager
	doors       *doorman
	now         func() time.Time
}

func (s *statusReporter) report(ctx context.Context) (*sallyportv1.StatusResponse, error) {
	state := s.reconciler.current()
	if state == nil {
		return nil, errStarting()
	}
	instances, err := s.instances(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "reading instances: %v", err)
	}
	revoked, err := s.revocations(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "reading revocations: %v", err)
	}
	resp := &sallyportv1.StatusResponse{
		TrustDomain: s.reconciler.trustDomain.Name(), Revision: state.Rev.String(), Version: s.version,
		Started: timestamppb.New(s.started), PolicySource: s.source, Authorities: s.authorities(),
	}
	for _, problem := range s.problems {
		if p := problem(); p != "" {
			resp.Problems = append(resp.Problems, p)
		}
	}
	if state.Rev.N == 0 {
		resp.Problems = append(resp.Problems, "no policy was ever applied, so nobody can enrol: sallyport apply DIR")
	}
	var troubles []string
	if resp.Doors, err = s.doors.open(ctx, state, s.now()); err != nil {
		return nil, status.Errorf(codes.Unavailable, "reading the history: %v", err)
	}
	resp.Federated, troubles = federated(s.federation)
	resp.Problems = append(resp.Problems, troubles...)
	nodes := map[node]xds.NodeStatus{}
	for _, n := range s.xds.Nodes() {
		nodes[node{n.ID, n.Instance}] = better(nodes[node{n.ID, n.Instance}], n)
		if n.Unknown {
			resp.Problems = append(resp.Problems, fmt.Sprintf("a sidecar of %s is connected, but no Workload has this ID; everything is denied to it: stop it", n))
		}
	}
	resp.Problems = append(resp.Problems, narrowed(s.xds.Nodes())...)
	byID := map[spiffeid.ID][]registry.Instance{} // :: workload → instances
	for _, i := range instances {
		byID[i.ID] = append(byID[i.ID], i)
	}
	endpoints := s.reconciler.currentEndpoints()
	for _, w := range state.Rules.Workloads() {
		ws := &sallyportv1.WorkloadStatus{Name: w.Name, Set: w.Set, SpiffeId: w.ID.String()}
		ws.MeshName, _ = identity.MeshName(w.ID)
		for _, i := range byID[w.ID] {
			is := instanceStatus(i, nodes, endpoints[w.ID])
			if n := nodes[node{i.ID, i.Name}]; n.Proxyless && len(w.Endpoints) > 0 {
				is.Endpoint = listedOf(w)
			}
			is.Revoked = revoked.Blocks(i)
			ws.Instances = append(ws.Instances, is)
		}
		resp.Workloads = append(resp.Workloads, ws)
		if text := refused(w, revoked); text != "" {
			resp.Problems = append(resp.Problems, text)
			continue
		}
		resp.Problems = append(resp.Problems, problems(w, ws, append(slices.Clone(endpoints[w.ID]), listed(w)...), state.Rev.String())...)
	}
	return resp, nil
}

// refused says that an operator has revoked the workload and has not readmitted it.
func refused(w policy.CompiledWorkload, revoked registry.Revocations) string {
	for _, v := range revoked.All {
		if v.Kind == registry.RevokedID && v.Blocked && v.Subject == w.ID.String() {
			return fmt.Sprintf("%s: revoked by %s at %s (%s), so nobody can be it: sallyport identity unrevoke %s", w.Name, v.Actor, v.At.UTC().Format(time.RFC3339), cmp.Or(v.Reason, "no reason given"), w.Name)
		}
	}
	return ""
}

// better chooses of two streams of one instance the one that tells more of it: its
// sidecar's, or of gRPC's one that refuses something.
func better(a, b xds.NodeStatus) xds.NodeStatus {
	if a.ID.IsZero() || a.Proxyless && (!b.Proxyless || b.Nack != "") {
		return b
	}
	return a
}

// narrowed tells of nodes that cannot enforce some rules as they are written.
func narrowed(nodes []xds.NodeStatus) []string {
	var out []string
	for _, n := range nodes {
		what := "a sidecar of an older version"
		if n.Proxyless {
			what = "a gRPC server without sidecar"
		}
		if n.Narrowed != "" {
			out = append(out, fmt.Sprintf("%s, %s, cannot enforce %s as written: of these it allows less and denies more, see docs/policy.md", n, what, n.Narrowed))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// listedOf words the addresses of w's document.
func listedOf(w policy.CompiledWorkload) string {
	text := w.Endpoints[0].String()
	if more := len(w.Endpoints) - 1; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// node is one sidecar: its certificate says both.
type node struct {
	id       spiffeid.ID
	instance string
}

func instanceStatus(i registry.Instance, nodes map[node]xds.NodeStatus, eps []xds.Endpoint) *sallyportv1.InstanceStatus {
	out := &sallyportv1.InstanceStatus{Instance: i.Name}
	if n, ok := nodes[node{i.ID, i.Name}]; ok {
		out.SvidExpires = timestamppb.New(n.SVIDExpires)
		out.Connected, out.Acked, out.Nack = true, n.Acked.String(), n.Nack
	}
	for _, ep := range eps {
		if ep.Instance == i.Name {
			out.Endpoint = ep.Addr.String()
		}
	}
	return out
}

// problems says what is wrong with one workload, each with what to do.
func problems(w policy.CompiledWorkload, ws *sallyportv1.WorkloadStatus, eps []xds.Endpoint, rev string) []string {
	var out []string
	connected, announced := 0, 0
	served := map[uint16]bool{} // :: port → some instance announces it
	for _, ep := range eps {
		announced++
		for _, p := range ep.Ports {
			served[p] = true
		}
	}
	for _, i := range ws.GetInstances() {
		if i.GetConnected() {
			connected++
		}
		switch {
		case i.GetNack() != "":
			out = append(out, fmt.Sprintf("%s (%s) refuses revision %s and keeps the last good one: %s", w.Name, i.GetInstance(), rev, i.GetNack()))
		case i.GetConnected() && len(w.Ports) > 0 && i.GetEndpoint() == "":
			out = append(out, fmt.Sprintf("%s (%s) is connected but has announced no endpoint: look at its sidecar's /healthz, or list the address of a gRPC server without sidecar under spec.endpoints", w.Name, i.GetInstance()))
		}
	}
	for _, p := range w.Ports {
		if announced > 0 && !served[p.Number] {
			out = append(out, fmt.Sprintf("%s: no instance serves its port %s (%d): name it under app in the sidecar's configuration", w.Name, p.Name, p.Number))
		}
	}
	if n := len(ws.GetInstances()); n > 0 && connected == 0 && len(w.Ports) > 0 {
		out = append(out, fmt.Sprintf("%s: no instance is connected (%d enrolled): start its sidecar, or look at the sidecar's log", w.Name, n))
	}
	return out
}
