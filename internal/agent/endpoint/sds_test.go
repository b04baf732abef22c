package endpoint

import (
	"crypto/tls"
	"crypto/x509"
	"slices"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

func (o *office) sds(uid uint32) secretv3.SecretDiscoveryServiceClient {
	return secretv3.NewSecretDiscoveryServiceClient(o.conn(uid))
}

func unpack(t *testing.T, resources ...*anypb.Any) map[string]*tlsv3.Secret {
	t.Helper()
	out := map[string]*tlsv3.Secret{}
	for _, r := range resources {
		var s tlsv3.Secret
		require.NoError(t, r.UnmarshalTo(&s))
		out[s.Name] = &s
	}
	return out
}

func names(m map[string]*tlsv3.Secret) []string {
	var out []string
	for n := range m {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// Each name gives what SPIRE's agent gives under it.
func TestSDSNames(t *testing.T) {
	o := open(t)
	fetch := func(names ...string) map[string]*tlsv3.Secret {
		resp, err := o.sds(me()).FetchSecrets(called(t), &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: names})
		require.NoError(t, err)
		if resp.TypeUrl != secretType {
			t.Errorf("type %q", resp.TypeUrl)
		}
		return unpack(t, resp.Resources...)
	}
	for name, want := range map[string]*x509.Certificate{
		"default": o.svids[0].Certificates[0], ownID.String(): o.svids[0].Certificates[0], otherID.String(): o.svids[1].Certificates[0],
	} {
		got := fetch(name)[name].GetTlsCertificate()
		pair, err := tls.X509KeyPair(got.GetCertificateChain().GetInlineBytes(), got.GetPrivateKey().GetInlineBytes())
		require.NoError(t, err, name)
		if !pair.Leaf.Equal(want) || len(pair.Certificate) != 2 {
			t.Errorf("%s: another certificate, or no intermediate", name)
		}
	}
	for name, want := range map[string]*x509.Certificate{
		"ROOTCA": o.authority.root, shop.IDString(): o.authority.root, partner.IDString(): o.foreign.root,
	} {
		roots := fetch(name)[name].GetValidationContext().GetTrustedCa().GetInlineBytes()
		if string(roots) != string(pemOf([]*x509.Certificate{want})) {
			t.Errorf("%s: another bundle", name)
		}
	}
	var all tlsv3.SPIFFECertValidatorConfig
	custom := fetch("ALL")["ALL"].GetValidationContext().GetCustomValidatorConfig()
	require.NoError(t, custom.GetTypedConfig().UnmarshalTo(&all))
	if custom.GetName() != spiffeValidator || len(all.TrustDomains) != 2 || all.TrustDomains[0].Name != "partner.example" {
		t.Errorf("ALL: got %v", custom)
	}
	want := []string{ownID.String(), otherID.String(), partner.IDString(), shop.IDString()}
	slices.Sort(want)
	if got := names(fetch()); !slices.Equal(got, want) {
		t.Errorf("no names: got %q, want %q", got, want)
	}
	// Another's, or nobody's: as if they did not exist.
	if got := fetch(aliceID.String(), "spiffe://shop.example/nobody", "spiffe://elsewhere.example", "shop.example", "nonsense"); len(got) != 0 {
		t.Errorf("got %q", names(got))
	}
	_, err := o.sds(me()).FetchSecrets(called(t), &discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"})
	wantCode(t, "another type", err, codes.InvalidArgument)
}

func TestD6SDSAnotherUser(t *testing.T) {
	needRoot(t)
	o := open(t)
	resp, err := o.sds(alice).FetchSecrets(called(t), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", ownID.String()}})
	require.NoError(t, err)
	got := unpack(t, resp.Resources...)
	cert := got["default"].GetTlsCertificate().GetCertificateChain().GetInlineBytes()
	if len(got) != 1 || len(cert) == 0 || string(cert) == string(pemOf(o.svids[0].Certificates)) {
		t.Errorf("got %q", names(got))
	}
	_, err = o.sds(stranger).FetchSecrets(called(t), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
	wantCode(t, "a stranger", err, codes.PermissionDenied)
	s, err := o.sds(stranger).StreamSecrets(called(t))
	require.NoError(t, err)
	_, err = s.Recv()
	wantCode(t, "a stranger's stream", err, codes.PermissionDenied)
}

// State of the world: an answer to each new set of names and each change; an ACK,
// a NACK or an old nonce is answered by nothing.
func TestSDSStream(t *testing.T) {
	o := open(t)
	s, err := o.sds(me()).StreamSecrets(called(t))
	require.NoError(t, err)
	ask := func(version, nonce string, names ...string) {
		t.Helper()
		require.NoError(t, s.Send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, VersionInfo: version, ResponseNonce: nonce, ResourceNames: names}))
	}
	recv := func(want ...string) *discoveryv3.DiscoveryResponse {
		t.Helper()
		resp, err := s.Recv()
		require.NoError(t, err)
		if got := names(unpack(t, resp.Resources...)); !slices.Equal(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
		return resp
	}
	ask("", "", "default")
	one := recv("default")
	ask(one.VersionInfo, one.Nonce, "default")
	ask(one.VersionInfo, one.Nonce, "default", "ROOTCA")
	two := recv("ROOTCA", "default")
	ask(one.VersionInfo, one.Nonce, "ALL") // about the first answer: outdated
	require.NoError(t, s.Send(&discoveryv3.DiscoveryRequest{
		TypeUrl: secretType, VersionInfo: one.VersionInfo, ResponseNonce: two.Nonce, ResourceNames: []string{"default", "ROOTCA"},
		Node: &corev3.Node{Id: "test"}, ErrorDetail: &status.Status{Message: "no"},
	}))
	renewed := o.authority.issue(t, ownID)
	h := &Holding{Bundles: o.bundles}
	h.SVIDs = append(h.SVIDs, renewed)
	o.feed.Set(h)
	three := recv("ROOTCA", "default")
	if three.VersionInfo == two.VersionInfo || three.Nonce == two.Nonce {
		t.Errorf("version %s and nonce %s again", three.VersionInfo, three.Nonce)
	}
	require.NoError(t, s.CloseSend())
	if _, err := s.Recv(); err == nil {
		t.Error("a message after the client has closed")
	}
}

// Incremental: what changed, and what does not exist, once each.
func TestSDSDelta(t *testing.T) {
	o := open(t)
	s, err := o.sds(me()).DeltaSecrets(called(t))
	require.NoError(t, err)
	recv := func(removed []string, want ...string) *discoveryv3.DeltaDiscoveryResponse {
		t.Helper()
		resp, err := s.Recv()
		require.NoError(t, err)
		var got []string
		for _, r := range resp.Resources {
			got = append(got, r.Name)
		}
		if !slices.Equal(got, want) || !slices.Equal(resp.RemovedResources, removed) {
			t.Fatalf("got %q and removed %q, want %q and %q", got, resp.RemovedResources, want, removed)
		}
		require.NoError(t, s.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResponseNonce: resp.Nonce}))
		return resp
	}
	require.NoError(t, s.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesSubscribe: []string{"default", aliceID.String()}}))
	one := recv([]string{aliceID.String()}, "default")
	require.NoError(t, s.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA", partner.IDString()}}))
	recv(nil, "ROOTCA", partner.IDString())
	h := &Holding{Bundles: o.bundles}
	h.SVIDs = append(h.SVIDs, o.authority.issue(t, ownID))
	o.feed.Set(h)
	two := recv(nil, "default")
	if one.Resources[0].Version == two.Resources[0].Version {
		t.Error("the same version for another certificate")
	}
	require.NoError(t, s.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"default"}, ResourceNamesSubscribe: []string{shop.IDString()}}))
	recv(nil, shop.IDString())
	o.feed.Set(&Holding{SVIDs: o.svids, Bundles: identity.Bundles{shop: o.bundles[shop]}})
	recv([]string{partner.IDString()})

	// A client that comes back says what it has and is sent only the rest.
	again, err := o.sds(me()).DeltaSecrets(called(t))
	require.NoError(t, err)
	all, err := o.sds(me()).FetchSecrets(called(t), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
	require.NoError(t, err)
	require.NotEmpty(t, all.Resources)
	have, err := secretsOf(&Holding{SVIDs: o.svids, Bundles: o.bundles}, []string{"default"})
	require.NoError(t, err)
	require.NoError(t, again.Send(&discoveryv3.DeltaDiscoveryRequest{
		ResourceNamesSubscribe: []string{"default", "ROOTCA"}, InitialResourceVersions: map[string]string{"default": have[0].version},
	}))
	s = again
	recv(nil, "ROOTCA")
	require.NoError(t, again.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"*"}}))
	recv(nil, shop.IDString(), ownID.String(), otherID.String())
}
