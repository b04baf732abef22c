package xds

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// ServerListeners begins the name of a gRPC server's listener; its address
// follows. Bootstrap files have it in server_listener_resource_name_template.
const ServerListeners = "grpc/server?xds.resource.listening_address="

// maxFilters bounds the rules of a gRPC server, in bytes: grpc-go takes responses of
// 4 MiB.
const maxFilters = 3 << 20

// proxyless is what a gRPC client or server without sidecar is told. It names what
// it wants: a server the listener of its own address, a client MESHNAME:PORT of what
// it dials, as listener, cluster and endpoints. A destination that policy does not
// let it reach does not exist, nor does an address whose port it does not declare.
type proxyless struct {
	id      spiffeid.ID
	known   bool // a workload has the ID
	ports   []policy.Port
	filters grpcFilters // of its own ports; the same for each
}

// newProxyless makes n's dialect, and notes which rules a gRPC server does not
// understand as they are written.
func newProxyless(n *nodeSlice, id spiffeid.ID, rules *policy.Ruleset) (*proxyless, error) {
	g := &proxyless{id: id, known: n.known, ports: n.ports}
	var mine *policy.Ruleset
	if rules != nil && n.known {
		var changed []policy.RuleRef
		mine, changed = rules.For(id).ForProxyless()
		n.narrowed = list(changed)
	}
	var err error
	if g.filters, err = newGRPCFilters(id, mine); err != nil {
		return g, err
	}
	if size := g.filters.size(); size > maxFilters {
		return g, fmt.Errorf("rules of %s would take %d bytes; a gRPC server accepts %d", id, size, maxFilters)
	}
	return g, nil
}

// find returns the resource of that name if there is one and the node may have it.
func (g *proxyless) find(p *prepared, typeURL, name string) *Resource {
	if !g.known || p.snap.Revoked[g.id] {
		return nil
	}
	var m proto.Message
	if addr, ok := strings.CutPrefix(name, ServerListeners); ok {
		if typeURL != ListenerType {
			return nil
		}
		m = g.server(p, name, addr)
	} else if d, ok := g.destination(p, name); ok {
		m = d.resource(typeURL)
	}
	if m == nil {
		return nil
	}
	r, err := encode(typeURL, name, m)
	if err != nil {
		return nil // what was made here always marshals
	}
	return r
}

// server is the listener of an address with a declared grpc port.
func (g *proxyless) server(p *prepared, name, address string) proto.Message {
	addr, err := netip.ParseAddrPort(address)
	declared := func(port policy.Port) bool { return port.Number == addr.Port() && port.Protocol == policy.GRPC }
	if err != nil || addr.Addr().Zone() != "" || addr.String() != address || !slices.ContainsFunc(g.ports, declared) {
		return nil
	}
	var revoked []spiffeid.ID
	for id := range p.snap.Revoked {
		if p.snap.Rules.Decide(policy.Request{Src: id, Dst: g.id, Port: addr.Port()}).Effect != policy.Deny {
			revoked = append(revoked, id)
		}
	}
	slices.SortFunc(revoked, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
	return serverListener(name, addr, g.filters.with(revoked))
}

// grpcDestination is a port of a workload that a client dials.
type grpcDestination struct {
	name  string // MESHNAME:PORT
	id    spiffeid.ID
	addrs []netip.AddrPort // ascending
}

// destination finds what a client may reach: a grpc port of an own workload that
// some rule opens for it.
func (g *proxyless) destination(p *prepared, name string) (grpcDestination, bool) {
	host, text, _ := strings.Cut(name, ":")
	n, err := strconv.ParseUint(text, 10, 16)
	id, err2 := identity.ParseRef(g.id.TrustDomain(), host)
	if err != nil || err2 != nil || strconv.FormatUint(n, 10) != text {
		return grpcDestination{}, false
	}
	if mesh, ok := identity.MeshName(id); !ok || mesh != host {
		return grpcDestination{}, false
	}
	s, ok := p.snap.service(id)
	i := slices.IndexFunc(s.Ports, func(port policy.Port) bool { return port.Number == uint16(n) && port.Protocol == policy.GRPC })
	if !ok || i < 0 || p.snap.Revoked[id] {
		return grpcDestination{}, false
	}
	if p.snap.Rules.Decide(policy.Request{Src: g.id, Dst: id, Port: uint16(n)}).Effect == policy.Deny {
		return grpcDestination{}, false
	}
	return grpcDestination{name, id, directAddrs(s.Endpoints, s.Ports[i])}, true
}

// directAddrs are where a port is served by plain mutual TLS: by instances without
// sidecar, and by the direct listeners of sidecars.
func directAddrs(eps []Endpoint, port policy.Port) []netip.AddrPort {
	var out []netip.AddrPort
	for _, e := range eps {
		switch {
		case !slices.Contains(e.Ports, port.Number):
		case e.Direct:
			out = append(out, e.Addr)
		case port.Direct != 0:
			out = append(out, netip.AddrPortFrom(e.Addr.Addr(), port.Direct))
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}

func (d grpcDestination) resource(typeURL string) proto.Message {
	switch typeURL {
	case ListenerType:
		return clientListener(d.name)
	case ClusterType:
		return grpcCluster(d.name, d.id)
	case EndpointType:
		return grpcEndpoints(d.name, d.addrs)
	}
	return nil
}

// list names rules for people.
func list(refs []policy.RuleRef) string {
	const most = 5
	var out []string
	for i, r := range refs {
		if i == most {
			out = append(out, fmt.Sprintf("%d more", len(refs)-most))
			break
		}
		out = append(out, r.String())
	}
	return strings.Join(out, ", ")
}
