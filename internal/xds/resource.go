package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Type URLs of the resources on the wire.
const (
	ListenerType  = "type.googleapis.com/envoy.config.listener.v3.Listener"
	ClusterType   = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointType  = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	SecretType    = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	ExtensionType = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"

	RevocationType = "type.googleapis.com/sallyport.v1.SignedRevocationList"

	httpRBACType    = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC"
	rbacType        = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC"
	upstreamTLSType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
)

// wireTypes returns every type that is served, in the order of sending: trust
// first, then destinations, then what the node itself lets in.
func wireTypes() []string {
	return []string{SecretType, RevocationType, ClusterType, EndpointType, ListenerType, ExtensionType}
}

// optionalType reports whether a node may do without a type: those of before the
// revocation list do not ask for it.
func optionalType(typeURL string) bool { return typeURL == RevocationType }

// Kind is a part of a view that is applied, acknowledged and refused by itself,
// so that a bad rule never holds back endpoints or trust.
type Kind string

// Kinds and the resource types that make them up.
const (
	Bundles     Kind = "bundles"     // Secret
	Revocations Kind = "revocations" // SignedRevocationList
	Endpoints   Kind = "endpoints"   // Cluster, ClusterLoadAssignment
	Rules       Kind = "rules"       // Listener, TypedExtensionConfig
)

func kindOf(typeURL string) Kind {
	switch typeURL {
	case SecretType:
		return Bundles
	case RevocationType:
		return Revocations
	case ClusterType, EndpointType:
		return Endpoints
	default:
		return Rules
	}
}

// Update is the whole state of one kind. Only the fields of its kind are set;
// whoever receives one may keep it but must not change it.
type Update struct {
	Kind    Kind
	Rev     Revision
	Bundles identity.Bundles // Bundles
	// Revocations is the signed list as it came, unchecked; nil where it was
	// withdrawn. Revocations.
	Revocations []byte
	Services    map[spiffeid.ID]Service // Endpoints
	Rules       *policy.Ruleset         // Rules: what the node lets in
	Ports       []policy.Port           // Rules: the node's own declared ports
	MaxStale    policy.MaxStale         // Rules
}

// Resource is one named, versioned resource as it travels. Its version is a
// hash of its content.
type Resource = discoveryv3.Resource

// Resources is a view in wire form.
type Resources struct {
	Rev   Revision
	Types map[string][]*Resource // :: type URL → resources in order of name
}

// Names of the two resources that hold a node's rules. Both are asked, deny
// first; both must let a connection pass.
const (
	DenyRules  = "rbac-deny"
	AllowRules = "rbac-allow"
)

// Names of the two that hold all of a node's rules, for a node that reads requests.
// There the first two hold what is left of them for whoever does not.
const (
	HTTPDenyRules  = "rbac-http-deny"
	HTTPAllowRules = "rbac-http-allow"
)

const metadataKey = "sallyport" // filter_metadata namespace of declared ports and instances

// encode marshals m deterministically, so that equal content has an equal
// version in every process built from the same sources.
func encode(typeURL, name string, m proto.Message) (*Resource, error) {
	body, err := packAny(typeURL, m)
	if err != nil {
		return nil, fmt.Errorf("encoding resource %q: %w", name, err)
	}
	sum := sha256.Sum256(body.Value)
	return &Resource{Name: name, Version: hex.EncodeToString(sum[:16]), Resource: body}, nil
}

func packAny(typeURL string, m proto.Message) (*anypb.Any, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	return &anypb.Any{TypeUrl: typeURL, Value: b}, nil
}

// unpackAny reads a into m, which must be of the type that a declares.
func unpackAny(a *anypb.Any, typeURL string, m proto.Message) error {
	if a.GetTypeUrl() != typeURL {
		return fmt.Errorf("type %q where %q belongs", a.GetTypeUrl(), typeURL)
	}
	return proto.Unmarshal(a.GetValue(), m)
}

// newMessage returns an empty message of a served type, nil for another.
func newMessage(typeURL string) proto.Message {
	switch typeURL {
	case ListenerType:
		return &listenerv3.Listener{}
	case ClusterType:
		return &clusterv3.Cluster{}
	case EndpointType:
		return &endpointv3.ClusterLoadAssignment{}
	case SecretType:
		return &tlsv3.Secret{}
	case ExtensionType:
		return &corev3.TypedExtensionConfig{}
	case RevocationType:
		return &sallyportv1.SignedRevocationList{}
	}
	return nil
}
