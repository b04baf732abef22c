// Package xds carries a sidecar's view of the mesh as standard Envoy v3
// resources: translate.go and parse.go are inverses of each other, server.go
// serves delta ADS from immutable snapshots, client.go keeps one stream and
// hands on each kind of resource by itself.
//
// It decides nothing (package policy does) and stores nothing.
package xds

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Revision orders states of the mesh. N counts within an epoch; a restore from
// backup starts a new epoch, so that sidecars do not refuse it as old. The zero
// Revision is before every other.
type Revision struct {
	Epoch int64
	N     int64
}

// String gives the form EPOCH.N, as in "1.42".
func (r Revision) String() string { return fmt.Sprintf("%d.%d", r.Epoch, r.N) }

// Less reports whether r is older than o.
func (r Revision) Less(o Revision) bool {
	return r.Epoch < o.Epoch || r.Epoch == o.Epoch && r.N < o.N
}

// ParseRevision reads what String wrote.
func ParseRevision(s string) (Revision, error) {
	e, n, ok := strings.Cut(s, ".")
	epoch, err1 := strconv.ParseInt(e, 10, 64)
	num, err2 := strconv.ParseInt(n, 10, 64)
	if !ok || err1 != nil || err2 != nil || epoch < 0 || num < 0 {
		return Revision{}, fmt.Errorf("revision %q: want EPOCH.N, as in 1.42", s)
	}
	return Revision{epoch, num}, nil
}

// Endpoint is one running instance of a service.
type Endpoint struct {
	Instance string
	Addr     netip.AddrPort // its tunnel listener
	Ports    []uint16       // declared ports this instance serves, ascending
	// Direct says that it has no sidecar: at Addr it takes plain mutual TLS for its
	// one port.
	Direct bool
}

// Service is a destination: a workload, its declared ports and where it runs.
type Service struct {
	ID        spiffeid.ID
	Ports     []policy.Port
	Endpoints []Endpoint // ordered by Instance
	MeshName  string     // of a foreign one: its name with the alias that its TrustDomain has here; "" if it has none
}

// View is everything one sidecar needs, and nothing else.
type View struct {
	Node     spiffeid.ID
	Rev      Revision
	Rules    *policy.Ruleset // For(Node)
	Ports    []policy.Port   // the node's own declared ports
	MaxStale policy.MaxStale // what becomes of the node's callers while revocations may be unknown
	Services []Service       // destinations the node asked for or may reach, ordered by ID
	Bundles  identity.Bundles
	// Level is what the node understands of the language; zero: policy.CurrentLevel.
	Level policy.Level
	// Revocations is the node's own trust domain's signed revocation list; nil:
	// there is none, and nothing is revoked.
	Revocations []byte
}

// Snapshot is the state of the whole mesh at one revision. It is immutable: the
// server cuts each node's View out of it.
type Snapshot struct {
	Rev   Revision
	Rules *policy.Ruleset
	// Services are every workload, with or without endpoints, what a template names
	// and has endpoints, and every foreign destination.
	Services map[spiffeid.ID]Service
	Bundles  identity.Bundles
	// Revoked are the IDs that gRPC servers refuse, which know no revocation list,
	// and that their clients are not told of.
	Revoked map[spiffeid.ID]bool
	// Revocations is as in View. A newer list may come with the same Rev.
	Revocations []byte
}

// service is what an ID serves; false for one that no workload has. The IDs of
// templates nobody can list: the rules know them.
func (s *Snapshot) service(id spiffeid.ID) (Service, bool) {
	if v, ok := s.Services[id]; ok || s.Rules == nil {
		return v, ok
	}
	w, ok := s.Rules.Workload(id)
	return Service{ID: id, Ports: w.Ports}, ok && w.Template
}
