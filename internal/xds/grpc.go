package xds

import (
	"errors"
	"fmt"
	"net/netip"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// The resources that stock gRPC accepts (gRFC A27, A29, A36, A41): it knows no
// network filters, no secrets, no filters by name. Certificates come from the
// provider instance that its bootstrap file defines.

// CertificateProvider names the provider instance that bootstrap files define.
const CertificateProvider = "sallyport"

const (
	hcmType           = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
	routerType        = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
	downstreamTLSType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
)

// mustPack is packAny for messages made here, which always marshal.
func mustPack(typeURL string, m proto.Message) *anypb.Any {
	a, err := packAny(typeURL, m)
	if err != nil {
		panic(fmt.Sprintf("packing %s: %v", typeURL, err))
	}
	return a
}

// grpcFilters are the HTTP filters of a gRPC server: all must let a call pass.
type grpcFilters struct{ deny, allow *anypb.Any }

// newGRPCFilters writes rules that [policy.Ruleset.ForProxyless] gave; none: nobody
// may call.
func newGRPCFilters(node spiffeid.ID, rules *policy.Ruleset) (grpcFilters, error) {
	deny := &rbacv3.RBAC{Action: rbacv3.RBAC_DENY, Policies: map[string]*rbacv3.Policy{guardKey: guard()}}
	allow := &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW, Policies: map[string]*rbacv3.Policy{}}
	for n, r := range rules.Rules() {
		principals := principalsOf(r)
		if len(principals) == 0 {
			continue // matches nobody
		}
		if r.Audit || r.Anonymous || !r.Since.IsZero() || !r.Until.IsZero() {
			return grpcFilters{}, fmt.Errorf("encoding rules of %s: a gRPC server does not understand %s", node, r.Ref)
		}
		// A caller that is refused by a deny is told the key, so it holds what it may know.
		key, to := fmt.Sprintf("allow %d", n), allow
		if r.Effect == policy.Deny {
			key, to = fmt.Sprintf("deny %d", n), deny
			if r.Reason != "" {
				key += ": " + clip(r.Reason, 1024)
			}
		}
		to.Policies[key] = &rbacv3.Policy{Permissions: permissionsOf(r), Principals: principals}
	}
	var f grpcFilters
	var err1, err2 error
	f.deny, err1 = packAny(httpRBACType, &httprbacv3.RBAC{Rules: deny})
	f.allow, err2 = packAny(httpRBACType, &httprbacv3.RBAC{Rules: allow})
	if err := errors.Join(err1, err2); err != nil {
		return grpcFilters{}, fmt.Errorf("encoding rules of %s: %w", node, err)
	}
	return f, nil
}

func (f grpcFilters) size() int { return proto.Size(f.deny) + proto.Size(f.allow) }

// with gives the filters in order, with one that refuses the revoked, which a gRPC
// server does not learn of in another way.
func (f grpcFilters) with(revoked []spiffeid.ID) []*hcmv3.HttpFilter {
	out := []*hcmv3.HttpFilter{httpFilterOf(DenyRules, f.deny), httpFilterOf(AllowRules, f.allow), router()}
	if len(revoked) == 0 {
		return out
	}
	rule := policy.Rule{Effect: policy.Deny}
	for _, id := range revoked {
		rule.From = append(rule.From, identity.ExactPattern(id))
	}
	refuse := &rbacv3.RBAC{Action: rbacv3.RBAC_DENY, Policies: map[string]*rbacv3.Policy{
		"revoked": {Permissions: permissionsOf(rule), Principals: principalsOf(rule)},
	}}
	return append([]*hcmv3.HttpFilter{httpFilterOf("rbac-revoked", mustPack(httpRBACType, &httprbacv3.RBAC{Rules: refuse}))}, out...)
}

func httpFilterOf(name string, config *anypb.Any) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: config}}
}

func router() *hcmv3.HttpFilter {
	return httpFilterOf("router", mustPack(routerType, &routerv3.Router{}))
}

// everyRequest is the one route of a listener.
func everyRequest(r *routev3.Route) *hcmv3.HttpConnectionManager_RouteConfig {
	r.Match = &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: ""}}
	return &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
		Name:         "all",
		VirtualHosts: []*routev3.VirtualHost{{Name: "all", Domains: []string{"*"}, Routes: []*routev3.Route{r}}},
	}}
}

// serverListener demands client certificates: without mutual TLS nobody gets as far
// as a rule.
func serverListener(name string, addr netip.AddrPort, filters []*hcmv3.HttpFilter) *listenerv3.Listener {
	tls := &tlsv3.DownstreamTlsContext{
		RequireClientCertificate: wrapperspb.Bool(true),
		CommonTlsContext: providerTLS(&tlsv3.CertificateValidationContext{
			CaCertificateProviderInstance: providerInstance(),
		}),
	}
	manager := &hcmv3.HttpConnectionManager{
		StatPrefix:     "inbound",
		RouteSpecifier: everyRequest(&routev3.Route{Action: &routev3.Route_NonForwardingAction{NonForwardingAction: &routev3.NonForwardingAction{}}}),
		HttpFilters:    filters,
	}
	return &listenerv3.Listener{
		Name:             name,
		Address:          socketAddress(addr.Addr().String(), uint32(addr.Port())),
		TrafficDirection: corev3.TrafficDirection_INBOUND,
		FilterChains: []*listenerv3.FilterChain{{
			Name:            "all",
			Filters:         []*listenerv3.Filter{{Name: "http", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: mustPack(hcmType, manager)}}},
			TransportSocket: tlsSocket(mustPack(downstreamTLSType, tls)),
		}},
	}
}

func clientListener(name string) *listenerv3.Listener {
	manager := &hcmv3.HttpConnectionManager{
		RouteSpecifier: everyRequest(&routev3.Route{Action: &routev3.Route_Route{Route: &routev3.RouteAction{
			ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: name},
		}}}),
		HttpFilters: []*hcmv3.HttpFilter{router()},
	}
	return &listenerv3.Listener{Name: name, ApiListener: &listenerv3.ApiListener{ApiListener: mustPack(hcmType, manager)}}
}

// grpcCluster demands exactly the destination's ID.
func grpcCluster(name string, id spiffeid.ID) *clusterv3.Cluster {
	tls := &tlsv3.UpstreamTlsContext{CommonTlsContext: providerTLS(&tlsv3.CertificateValidationContext{
		CaCertificateProviderInstance: providerInstance(),
		//lint:ignore SA1019 gRPC reads this field and not the newer one
		MatchSubjectAltNames: []*matcherv3.StringMatcher{matchExact(id.String())},
	})}
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: overADS(), ServiceName: name},
		TransportSocket:      tlsSocket(mustPack(upstreamTLSType, tls)),
	}
}

func grpcEndpoints(name string, addrs []netip.AddrPort) *endpointv3.ClusterLoadAssignment {
	cla := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	if len(addrs) == 0 {
		return cla
	}
	group := &endpointv3.LocalityLbEndpoints{Locality: &corev3.Locality{}, LoadBalancingWeight: wrapperspb.UInt32(1)}
	for _, a := range addrs {
		group.LbEndpoints = append(group.LbEndpoints, &endpointv3.LbEndpoint{
			HealthStatus: corev3.HealthStatus_HEALTHY,
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Address: socketAddress(a.Addr().String(), uint32(a.Port())),
			}},
		})
	}
	cla.Endpoints = []*endpointv3.LocalityLbEndpoints{group}
	return cla
}

func providerInstance() *tlsv3.CertificateProviderPluginInstance {
	return &tlsv3.CertificateProviderPluginInstance{InstanceName: CertificateProvider}
}

func providerTLS(validation *tlsv3.CertificateValidationContext) *tlsv3.CommonTlsContext {
	return &tlsv3.CommonTlsContext{
		TlsCertificateProviderInstance: providerInstance(),
		ValidationContextType:          &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: validation},
	}
}

func tlsSocket(config *anypb.Any) *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name:       "envoy.transport_sockets.tls",
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: config},
	}
}
