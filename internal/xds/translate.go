package xds

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// tunnelPort is where sidecars listen by default. The listener must name an
// address to be valid; a sidecar listens where its own configuration says.
const tunnelPort = 15008

// Translate writes a view as Envoy resources. Rules for other destinations than
// v.Node are left out, and a view without rules has two empty rules resources,
// which deny everything. It fails for what the wire cannot say: an invalid port,
// endpoint or name, an empty trust bundle.
func Translate(v View) (Resources, error) {
	out := Resources{Rev: v.Rev, Types: make(map[string][]*Resource)}
	add := func(typeURL string, r *Resource, err error) error {
		out.Types[typeURL] = append(out.Types[typeURL], r)
		return err
	}
	for _, td := range sortedDomains(v.Bundles) {
		rs, err := bundleResources(td, v.Bundles[td])
		if err != nil {
			return Resources{}, err
		}
		out.Types[SecretType] = append(out.Types[SecretType], rs...)
	}
	if v.Revocations != nil {
		r, err := revocationResource(v.Revocations)
		if err == nil && r.Name != v.Node.TrustDomain().IDString() {
			err = fmt.Errorf("encoding revocation list: it is one of %s, not of %s", r.Name, v.Node.TrustDomain())
		}
		if err := add(RevocationType, r, err); err != nil {
			return Resources{}, err
		}
	}
	for _, s := range v.Services {
		c, err1 := clusterResource(s)
		e, err2 := endpointResource(s)
		if err := errors.Join(add(ClusterType, c, err1), add(EndpointType, e, err2)); err != nil {
			return Resources{}, err
		}
	}
	own, err := ownResources(v.Node, door{v.Ports, v.MaxStale}, v.Rules, cmp.Or(v.Level, policy.CurrentLevel))
	if err != nil {
		return Resources{}, err
	}
	maps.Copy(out.Types, own)
	return out, nil
}

// ownResources makes what is for one node alone: its listener and its rules. One
// that reads requests gets them twice: in full, and, for its connections and for
// whoever knows no more than those, as a lower level has them.
func ownResources(node spiffeid.ID, d door, rules *policy.Ruleset, level policy.Level) (map[string][]*Resource, error) {
	l, err := listenerResource(node, d)
	if err != nil {
		return nil, err
	}
	if rules == nil {
		rules = policy.NewRuleset(nil)
	}
	list, names := rules.Rules(), []string{AllowRules, DenyRules}
	if level >= policy.LevelRequests {
		names = append(names, HTTPAllowRules, HTTPDenyRules)
	}
	narrow := list
	if level >= policy.LevelRequests {
		below, _ := rules.ForLevel(policy.LevelWindows)
		narrow = below.Rules()
	}
	out := map[string][]*Resource{ListenerType: {l}}
	for _, name := range names {
		said := list
		if k, _ := rulesNamed(name); !k.requests {
			said = narrow
		}
		r, err := rbacResource(name, node, fingerprintOf(d.ports), said)
		if err != nil {
			return nil, err
		}
		out[ExtensionType] = append(out[ExtensionType], r)
	}
	return out, nil
}

// door is what a node's listener says, besides whose it is.
type door struct {
	ports    []policy.Port
	maxStale policy.MaxStale
}

func listenerResource(node spiffeid.ID, d door) (*Resource, error) {
	if node.IsZero() {
		return nil, errors.New("encoding listener: no SPIFFE ID")
	}
	if err := checkPorts(d.ports); err != nil {
		return nil, fmt.Errorf("encoding listener of %s: %w", node, err)
	}
	return encode(ListenerType, node.String(), listenerOf(node, d))
}

func listenerOf(node spiffeid.ID, d door) *listenerv3.Listener {
	l := &listenerv3.Listener{
		Name:             node.String(),
		Address:          socketAddress("0.0.0.0", tunnelPort),
		TrafficDirection: corev3.TrafficDirection_INBOUND,
	}
	if d.maxStale.After > 0 {
		then := "hold"
		if d.maxStale.Refuse {
			then = "refuse"
		}
		l.Metadata = ownMetadata("maxStale", structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{
			"after": structpb.NewStringValue(d.maxStale.After.String()), "then": structpb.NewStringValue(then),
		}}))
	}
	for _, p := range d.ports {
		md := ownMetadata("protocol", structpb.NewStringValue(string(p.Protocol)))
		if p.Direct != 0 {
			md.FilterMetadata[metadataKey].Fields["direct"] = structpb.NewNumberValue(float64(p.Direct))
		}
		l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{
			Name:             p.Name,
			FilterChainMatch: &listenerv3.FilterChainMatch{DestinationPort: wrapperspb.UInt32(uint32(p.Number))},
			Filters:          []*listenerv3.Filter{rbacReference(DenyRules), rbacReference(AllowRules)},
			Metadata:         md,
		})
	}
	return l
}

// rbacReference fetches a filter by name. Until it is there Envoy holds the
// listener back: it has no default that could let something pass.
func rbacReference(name string) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_ConfigDiscovery{
		ConfigDiscovery: &corev3.ExtensionConfigSource{ConfigSource: overADS(), TypeUrls: []string{rbacType}},
	}}
}

func clusterResource(s Service) (*Resource, error) {
	if s.ID.IsZero() {
		return nil, errors.New("encoding cluster: no SPIFFE ID")
	}
	if err := checkPorts(s.Ports); err != nil {
		return nil, fmt.Errorf("encoding cluster %s: %w", s.ID, err)
	}
	if len(s.MeshName) > maxMeshName {
		return nil, fmt.Errorf("encoding cluster %s: its mesh name has %d bytes", s.ID, len(s.MeshName))
	}
	name := s.ID.String()
	tls, err := packAny(upstreamTLSType, upstreamTLS(s.ID))
	if err != nil {
		return nil, fmt.Errorf("encoding cluster %s: %w", s.ID, err)
	}
	md := ownMetadata("ports", portValues(s.Ports))
	if s.MeshName != "" {
		md.FilterMetadata[metadataKey].Fields["meshName"] = structpb.NewStringValue(s.MeshName)
	}
	return encode(ClusterType, name, &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: overADS()},
		TransportSocket: &corev3.TransportSocket{
			Name:       "envoy.transport_sockets.tls",
			ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: tls},
		},
		Metadata: md,
	})
}

// upstreamTLS demands the exact SPIFFE ID under the bundle of its own trust
// domain.
func upstreamTLS(id spiffeid.ID) *tlsv3.UpstreamTlsContext {
	return &tlsv3.UpstreamTlsContext{CommonTlsContext: &tlsv3.CommonTlsContext{
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
			TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		},
		ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{
			CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				DefaultValidationContext: &tlsv3.CertificateValidationContext{
					MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{{
						SanType: tlsv3.SubjectAltNameMatcher_URI,
						Matcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: id.String()}},
					}},
				},
				ValidationContextSdsSecretConfig: &tlsv3.SdsSecretConfig{
					Name: id.TrustDomain().IDString(), SdsConfig: overADS(),
				},
			},
		},
	}}
}

func endpointResource(s Service) (*Resource, error) {
	cla := &endpointv3.ClusterLoadAssignment{ClusterName: s.ID.String()}
	group := &endpointv3.LocalityLbEndpoints{}
	for _, e := range s.Endpoints {
		if err := checkEndpoint(e); err != nil {
			return nil, fmt.Errorf("encoding endpoints of %s: %w", s.ID, err)
		}
		group.LbEndpoints = append(group.LbEndpoints, lbEndpoint(e))
	}
	if len(group.LbEndpoints) > 0 {
		cla.Endpoints = []*endpointv3.LocalityLbEndpoints{group}
	}
	return encode(EndpointType, s.ID.String(), cla)
}

func lbEndpoint(e Endpoint) *endpointv3.LbEndpoint {
	ports := make([]*structpb.Value, 0, len(e.Ports))
	for _, p := range slices.Compact(slices.Sorted(slices.Values(e.Ports))) {
		ports = append(ports, structpb.NewNumberValue(float64(p)))
	}
	md := ownMetadata("instance", structpb.NewStringValue(e.Instance))
	md.FilterMetadata[metadataKey].Fields["ports"] = structpb.NewListValue(&structpb.ListValue{Values: ports})
	if e.Direct {
		md.FilterMetadata[metadataKey].Fields["direct"] = structpb.NewBoolValue(true)
	}
	return &endpointv3.LbEndpoint{
		HealthStatus: corev3.HealthStatus_HEALTHY,
		Metadata:     md,
		HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
			Address: socketAddress(e.Addr.Addr().String(), uint32(e.Addr.Port())),
		}},
	}
}

// bundleResources gives a bundle as one Secret of certificates, named by the trust
// domain, and one of JWT keys, as far as it has either. Private keys never travel.
func bundleResources(td spiffeid.TrustDomain, bundle *spiffebundle.Bundle) ([]*Resource, error) {
	if td.IsZero() || bundle == nil || bundle.Empty() {
		return nil, fmt.Errorf("encoding trust bundle of %q: it is empty", td)
	}
	var out []*Resource
	if roots := bundle.X509Authorities(); len(roots) > 0 {
		r, err := secretResource(td, roots)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	if jwt := bundle.JWTBundle(); !jwt.Empty() {
		r, err := jwtResource(jwt)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// jwtPrefix stands before the trust domain in the names of Secrets that hold JWT
// keys.
const jwtPrefix = "jwt:"

// jwtResource carries the keys as a JWKS (RFC 7517 section 5).
func jwtResource(bundle *jwtbundle.Bundle) (*Resource, error) {
	jwks, err := bundle.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encoding JWT bundle of %s: %w", bundle.TrustDomain(), err)
	}
	name := jwtPrefix + bundle.TrustDomain().IDString()
	return encode(SecretType, name, &tlsv3.Secret{
		Name: name,
		Type: &tlsv3.Secret_GenericSecret{GenericSecret: &tlsv3.GenericSecret{
			Secret: &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: jwks}},
		}},
	})
}

// secretResource carries certificates.
func secretResource(td spiffeid.TrustDomain, roots []*x509.Certificate) (*Resource, error) {
	var b bytes.Buffer
	for _, c := range roots {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return nil, fmt.Errorf("encoding trust bundle of %s: %w", td, err)
		}
	}
	name := td.IDString()
	return encode(SecretType, name, &tlsv3.Secret{
		Name: name,
		Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			TrustedCa: &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b.Bytes()}},
		}},
	})
}

func overADS() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

func socketAddress(host string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

func ownMetadata(field string, v *structpb.Value) *corev3.Metadata {
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
		metadataKey: {Fields: map[string]*structpb.Value{field: v}},
	}}
}

func portValues(ports []policy.Port) *structpb.Value {
	list := &structpb.ListValue{}
	for _, p := range ports {
		list.Values = append(list.Values, structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{
			"name":     structpb.NewStringValue(p.Name),
			"number":   structpb.NewNumberValue(float64(p.Number)),
			"protocol": structpb.NewStringValue(string(p.Protocol)),
		}}))
	}
	return structpb.NewListValue(list)
}

// checkPorts accepts what a workload may declare, in both directions.
func checkPorts(ports []policy.Port) error {
	names, numbers, direct := make(map[string]bool, len(ports)), make(map[uint16]bool, len(ports)), make(map[uint16]bool)
	for _, p := range ports {
		switch {
		case p.Name == "" || len(p.Name) > 63 || strings.Trim(p.Name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "":
			return fmt.Errorf("port name %.100q is not a DNS label", p.Name)
		case p.Number == 0:
			return fmt.Errorf("port %s has no number", p.Name)
		case p.Protocol != policy.TCP && p.Protocol != policy.HTTP && p.Protocol != policy.GRPC:
			return fmt.Errorf("port %s: protocol %.100q is none of tcp, http, grpc", p.Name, p.Protocol)
		case names[p.Name] || numbers[p.Number]:
			return fmt.Errorf("port %s (%d) is declared twice", p.Name, p.Number)
		case p.Direct != 0 && direct[p.Direct]:
			return fmt.Errorf("direct port %d is declared twice", p.Direct)
		}
		names[p.Name], numbers[p.Number], direct[p.Direct] = true, true, true
	}
	return nil
}

func checkEndpoint(e Endpoint) error {
	switch {
	case e.Instance == "" || len(e.Instance) > maxInstance || !utf8.ValidString(e.Instance):
		return fmt.Errorf("instance %.100q: want 1 to %d bytes of UTF-8", e.Instance, maxInstance)
	case !e.Addr.IsValid() || e.Addr.Addr().Zone() != "" || e.Addr.Port() == 0:
		return fmt.Errorf("instance %s: address %s cannot be dialled", e.Instance, e.Addr)
	}
	return nil
}

func sortedDomains(m identity.Bundles) []spiffeid.TrustDomain {
	return slices.SortedFunc(maps.Keys(m), func(a, b spiffeid.TrustDomain) int { return a.Compare(b) })
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

func parseAddr(a *corev3.Address) (netip.AddrPort, error) {
	ip, err := netip.ParseAddr(a.GetSocketAddress().GetAddress())
	port := a.GetSocketAddress().GetPortValue()
	if err != nil || port == 0 || port > 65535 {
		return netip.AddrPort{}, fmt.Errorf("address %.100q cannot be dialled", a.GetSocketAddress().GetAddress())
	}
	return netip.AddrPortFrom(ip, uint16(port)), nil
}
