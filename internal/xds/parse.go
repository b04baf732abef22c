package xds

import (
	"cmp"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Parse reads a whole view and is the inverse of [Translate]: the rules it gives
// decide as the originals do for every connection to the node. The node is who
// the listener names. On an error the view is empty.
//
// Listener and rules are read strictly: whatever is in them beyond what
// Translate writes is an error. In clusters, endpoints and secrets fields that
// this version does not know are ignored, as no decision hangs on them.
func Parse(in Resources) (View, error) {
	v, err := parseView(in)
	if err != nil {
		return View{}, err
	}
	return v, nil
}

func parseView(in Resources) (View, error) {
	got := make(map[string]map[string]any)
	if len(in.Types[ListenerType]) != 1 {
		return View{}, fmt.Errorf("parsing view: %d listeners, want one", len(in.Types[ListenerType]))
	}
	node, err := parseID(in.Types[ListenerType][0].GetName())
	if err != nil {
		return View{}, fmt.Errorf("parsing view: %w", err)
	}
	for typeURL, list := range in.Types {
		got[typeURL] = make(map[string]any, len(list))
		for _, r := range list {
			if _, twice := got[typeURL][r.GetName()]; twice {
				return View{}, fmt.Errorf("parsing view: resource %.100q is there twice", r.GetName())
			}
			if got[typeURL][r.GetName()], err = parseResource(node, typeURL, r); err != nil {
				return View{}, err
			}
		}
	}
	v := View{Node: node, Rev: in.Rev, Bundles: bundlesOf(got[SecretType]), Revocations: revocationsOf(node, got[RevocationType])}
	for _, s := range servicesOf(got[ClusterType], got[EndpointType]) {
		v.Services = append(v.Services, s)
	}
	slices.SortFunc(v.Services, func(a, b Service) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	state, err := rulesOf(node, got[ListenerType], got[ExtensionType])
	if err != nil {
		return View{}, err
	}
	if !state.matched {
		return View{}, errors.New("parsing view: the rules are incomplete, or were made for other ports")
	}
	v.Rules, v.Ports, v.MaxStale = state.rules, state.door.ports, state.door.maxStale
	return v, nil
}

// parseResource reads one resource: a Secret as []*x509.Certificate or JWT keys
// by key id, a Cluster as Service without endpoints, a ClusterLoadAssignment as
// []Endpoint, a Listener as door, a TypedExtensionConfig as rbacRules, a
// SignedRevocationList as []byte.
func parseResource(node spiffeid.ID, typeURL string, r *Resource) (any, error) {
	m := newMessage(typeURL)
	if m == nil {
		return nil, fmt.Errorf("parsing resource %.100q: type %.100q is not known", r.GetName(), typeURL)
	}
	if err := unpackAny(r.GetResource(), typeURL, m); err != nil {
		return nil, fmt.Errorf("parsing resource %.100q: %w", r.GetName(), err)
	}
	var name string
	var out any
	var err error
	switch m := m.(type) {
	case *tlsv3.Secret:
		name = m.GetName()
		out, err = parseSecret(m)
	case *clusterv3.Cluster:
		name = m.GetName()
		out, err = parseCluster(m)
	case *endpointv3.ClusterLoadAssignment:
		name = m.GetClusterName()
		out, err = parseEndpoints(m)
	case *listenerv3.Listener:
		name = m.GetName()
		out, err = parseListener(node, m)
	case *corev3.TypedExtensionConfig:
		name = m.GetName()
		out, err = parseRBAC(node, m)
	case *sallyportv1.SignedRevocationList:
		name, out, err = parseRevocations(node, m, r.GetResource().GetValue())
	}
	if err == nil && name != r.GetName() {
		err = fmt.Errorf("it names itself %.100q", name)
	}
	if err != nil {
		return nil, fmt.Errorf("parsing resource %.100q: %w", r.GetName(), err)
	}
	return out, nil
}

func parseID(s string) (spiffeid.ID, error) {
	id, err := spiffeid.FromString(s)
	if err != nil || id.String() != s {
		return spiffeid.ID{}, fmt.Errorf("%.100q is not a SPIFFE ID", s)
	}
	return id, nil
}

func parseListener(node spiffeid.ID, l *listenerv3.Listener) (door, error) {
	var d door
	for _, fc := range l.GetFilterChains() {
		number := fc.GetFilterChainMatch().GetDestinationPort().GetValue()
		if number > 65535 {
			return d, fmt.Errorf("port %d does not exist", number)
		}
		var direct uint16
		if f := ownFields(fc.GetMetadata())["direct"]; f != nil {
			n, err := portNumber(f)
			if err != nil {
				return d, err
			}
			direct = n
		}
		d.ports = append(d.ports, policy.Port{
			Direct:   direct,
			Name:     fc.GetName(),
			Number:   uint16(number),
			Protocol: policy.Protocol(ownFields(fc.GetMetadata())["protocol"].GetStringValue()),
		})
	}
	if err := checkPorts(d.ports); err != nil {
		return d, err
	}
	stale := ownFields(l.GetMetadata())["maxStale"].GetStructValue().GetFields()
	if after, err := time.ParseDuration(stale["after"].GetStringValue()); err == nil && after > 0 {
		d.maxStale = policy.MaxStale{After: after, Refuse: stale["then"].GetStringValue() == "refuse"}
	}
	if !proto.Equal(l, listenerOf(node, d)) {
		return d, fmt.Errorf("it is not the listener of %s, or holds something that this version does not understand", node)
	}
	return d, nil
}

func ownFields(md *corev3.Metadata) map[string]*structpb.Value {
	return md.GetFilterMetadata()[metadataKey].GetFields()
}

func parseCluster(c *clusterv3.Cluster) (Service, error) {
	id, err := parseID(c.GetName())
	if err != nil {
		return Service{}, err
	}
	tls := &tlsv3.UpstreamTlsContext{}
	if err := unpackAny(c.GetTransportSocket().GetTypedConfig(), upstreamTLSType, tls); err != nil {
		return Service{}, fmt.Errorf("transport socket: %w", err)
	}
	if !proto.Equal(tls, upstreamTLS(id)) {
		return Service{}, fmt.Errorf("the transport socket does not demand exactly %s", id)
	}
	s := Service{ID: id, MeshName: ownFields(c.GetMetadata())["meshName"].GetStringValue()}
	if len(s.MeshName) > maxMeshName {
		return Service{}, fmt.Errorf("a mesh name of %d bytes", len(s.MeshName))
	}
	for _, v := range ownFields(c.GetMetadata())["ports"].GetListValue().GetValues() {
		f := v.GetStructValue().GetFields()
		number, err := portNumber(f["number"])
		if err != nil {
			return Service{}, err
		}
		s.Ports = append(s.Ports, policy.Port{
			Name: f["name"].GetStringValue(), Number: number, Protocol: policy.Protocol(f["protocol"].GetStringValue()),
		})
	}
	return s, checkPorts(s.Ports)
}

func portNumber(v *structpb.Value) (uint16, error) {
	n := v.GetNumberValue()
	if !(n >= 1 && n <= 65535) || n != float64(uint16(n)) {
		return 0, fmt.Errorf("port %v does not exist", n)
	}
	return uint16(n), nil
}

func parseEndpoints(cla *endpointv3.ClusterLoadAssignment) ([]Endpoint, error) {
	if _, err := parseID(cla.GetClusterName()); err != nil {
		return nil, err
	}
	var out []Endpoint
	for _, group := range cla.GetEndpoints() {
		for _, lb := range group.GetLbEndpoints() {
			addr, err := parseAddr(lb.GetEndpoint().GetAddress())
			if err != nil {
				return nil, err
			}
			md := ownFields(lb.GetMetadata())
			e := Endpoint{Instance: md["instance"].GetStringValue(), Addr: addr, Direct: md["direct"].GetBoolValue()}
			for _, v := range md["ports"].GetListValue().GetValues() {
				p, err := portNumber(v)
				if err != nil {
					return nil, err
				}
				e.Ports = append(e.Ports, p)
			}
			if err := checkEndpoint(e); err != nil {
				return nil, err
			}
			out = append(out, e)
		}
	}
	slices.SortStableFunc(out, func(a, b Endpoint) int { return strings.Compare(a.Instance, b.Instance) })
	return out, nil
}

// parseSecret reads trust domain's certificates, or its JWT keys by key id.
func parseSecret(s *tlsv3.Secret) (any, error) {
	if name, ok := strings.CutPrefix(s.GetName(), jwtPrefix); ok {
		return parseJWTKeys(name, s.GetGenericSecret().GetSecret().GetInlineBytes())
	}
	return parseRoots(s)
}

func parseJWTKeys(name string, jwks []byte) (map[string]crypto.PublicKey, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil || td.IDString() != name {
		return nil, errors.New("it is not named by a trust domain")
	}
	b, err := jwtbundle.Parse(td, jwks)
	if err != nil {
		return nil, err
	}
	if b.Empty() {
		return nil, errors.New("it holds no key")
	}
	return b.JWTAuthorities(), nil
}

func parseRoots(s *tlsv3.Secret) ([]*x509.Certificate, error) {
	td, err := spiffeid.TrustDomainFromString(s.GetName())
	if err != nil || td.IDString() != s.GetName() {
		return nil, errors.New("it is not named by a trust domain")
	}
	var out []*x509.Certificate
	rest := s.GetValidationContext().GetTrustedCa().GetInlineBytes()
	for len(rest) > 0 {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("it holds something other than PEM certificates")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(out)+1, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("it holds no certificate")
	}
	return out, nil
}
