package insight

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Explain answers what would happen to a connection or a request, and which line
// decides, at the moment that req names, else now. Questions about recorded decisions
// are for the caller. Its errors are of package status.
func Explain(rules *policy.Ruleset, td spiffeid.TrustDomain, req *sallyportv1.ExplainRequest, now time.Time) (*sallyportv1.ExplainResponse, error) {
	from, err := Resolve(rules, td, req.GetFrom())
	if err != nil {
		return nil, err
	}
	to, err := Resolve(rules, td, req.GetTo())
	if err != nil {
		return nil, err
	}
	ports, err := explainPorts(rules, to, req.GetPort())
	if err != nil {
		return nil, err
	}
	request, err := explainRequest(req)
	if err != nil {
		return nil, err
	}
	at := now
	if req.GetAt() != nil {
		at = req.GetAt().AsTime()
	}
	resp := &sallyportv1.ExplainResponse{}
	for _, p := range ports {
		e := ExplainOne(rules, policy.Request{Src: from, Dst: to, Port: p.Number, HTTP: request}, at, p.Name)
		if _, known := rules.Workload(from); !known {
			e.Note = strings.TrimPrefix(e.Note+"; no Workload of this mesh is "+from.String(), "; ")
		}
		if foreign := to.TrustDomain(); foreign != td {
			e.Note = strings.TrimPrefix(e.Note+"; "+foreign.Name()+" decides for itself as well", "; ")
		}
		resp.Explanations = append(resp.Explanations, e)
	}
	return resp, nil
}

// Resolve finds who is meant in trust domain td: a workload's name first, then any
// form of ID. Its errors are of package status.
func Resolve(rules *policy.Ruleset, td spiffeid.TrustDomain, ref string) (spiffeid.ID, error) {
	if w, ok := rules.WorkloadByName(ref); ok && w.Template {
		return spiffeid.ID{}, status.Errorf(codes.InvalidArgument, "%s is a template (%s): name one of its IDs, as sallyport identity list --workload %s shows them", ref, w.Workload.ID, ref)
	} else if ok {
		return w.ID, nil
	}
	id, err := identity.ParseRef(td, ref)
	if err != nil {
		return id, status.Errorf(codes.InvalidArgument, "%q: no workload has this name, and it is no ID: %v", ref, err)
	}
	return id, nil
}

func explainPorts(rules *policy.Ruleset, to spiffeid.ID, port string) ([]policy.Port, error) {
	w, known := rules.Destination(to)
	if !known {
		return nil, status.Errorf(codes.NotFound, "%s is no workload of this mesh and under workloads of no TrustDomain document, so nothing can be allowed to it", to)
	}
	if port == "" {
		if len(w.Ports) == 0 {
			return nil, status.Errorf(codes.InvalidArgument, "%s declares no ports, so nobody can call it", w.Name)
		}
		return w.Ports, nil
	}
	i := slices.IndexFunc(w.Ports, func(p policy.Port) bool { return p.Name == port || strconv.Itoa(int(p.Number)) == port })
	if i < 0 {
		names := make([]string, len(w.Ports))
		for i, p := range w.Ports {
			names[i] = fmt.Sprintf("%s (%d)", p.Name, p.Number)
		}
		return nil, status.Errorf(codes.NotFound, "%s declares no port %s; it declares %s", w.Name, port, strings.Join(names, ", "))
	}
	return w.Ports[i : i+1], nil
}

// explainRequest reads the request that is asked about; nil: the connection.
func explainRequest(req *sallyportv1.ExplainRequest) (*policy.HTTPRequest, error) {
	if req.GetMethod() == "" && req.GetPath() == "" {
		if req.GetHost() != "" || len(req.GetHeaders()) > 0 {
			return nil, status.Error(codes.InvalidArgument, "a host or headers without a request: name method and path too")
		}
		return nil, nil
	}
	out := &policy.HTTPRequest{Method: req.GetMethod(), Path: req.GetPath(), Host: req.GetHost(), Header: map[string][]string{}}
	for _, line := range req.GetHeaders() {
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return nil, status.Errorf(codes.InvalidArgument, "header %q: want name: value", line)
		}
		name = http.CanonicalHeaderKey(strings.TrimSpace(name))
		out.Header[name] = append(out.Header[name], strings.TrimSpace(value))
	}
	return out, nil
}

// ExplainOne says what the rules make of one question at a moment.
func ExplainOne(rules *policy.Ruleset, q policy.Request, at time.Time, portName string) *sallyportv1.Explanation {
	e := rules.ExplainAt(q, at)
	if portName == "" {
		portName = strconv.Itoa(int(q.Port))
	}
	out := &sallyportv1.Explanation{
		From: q.Src.String(), To: q.Dst.String(), Port: portName,
		Verdict: e.Effect.String(), Reason: e.Reason, Missed: e.Missed, Note: e.Note,
	}
	if q.HTTP != nil {
		out.Request = q.HTTP.Method + " " + q.HTTP.Path
	}
	if e.Would != e.Effect {
		out.Would = e.Would.String()
	}
	for _, r := range []struct {
		ref            policy.RuleRef
		name, location *string
	}{{e.Rule, &out.Rule, &out.Location}, {e.Nearest, &out.Nearest, &out.NearestLocation}, {e.Audited, &out.Audited, &out.AuditedLocation}} {
		if !r.ref.IsZero() {
			*r.name, *r.location = ruleName(r.ref), r.ref.Location()
		}
	}
	return out
}

func ruleName(r policy.RuleRef) string {
	if r.Set == "" {
		return r.Policy
	}
	return r.Set + "/" + r.Policy
}
