package endpoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: got %v (%v), want %v", what, got, err, want)
	}
}

// everyCall makes each call that the API offers; streams are read once.
func everyCall(api workload.SpiffeWorkloadAPIClient) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"FetchX509SVID": func(ctx context.Context) error {
			s, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			return first(s, err)
		},
		"FetchX509Bundles": func(ctx context.Context) error {
			s, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
			return first(s, err)
		},
		"FetchJWTBundles": func(ctx context.Context) error {
			s, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
			return first(s, err)
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
			return err
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "b"})
			return err
		},
	}
}

func first[T any](s grpc.ServerStreamingClient[T], err error) error {
	if err == nil {
		_, err = s.Recv()
	}
	return err
}

// WE 3.1 and 5: neither TLS nor a client certificate is asked for; one who insists
// on TLS gets no answer to his hello.
func TestWE3_1_5_PlainGRPC(t *testing.T) {
	o := open(t)
	if err := everyCall(o.raw(me()))["FetchX509SVID"](called(t)); err != nil {
		t.Errorf("without TLS: %v", err)
	}
	insist, err := grpc.NewClient("passthrough:///api", o.dialer(me()),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
	require.NoError(t, err)
	defer insist.Close()
	ctx, cancel := context.WithTimeout(called(t), time.Second)
	defer cancel()
	if err := everyCall(workload.NewSpiffeWorkloadAPIClient(insist))["FetchX509SVID"](ctx); err == nil {
		t.Error("with TLS: answered")
	}
}

// WE 4: a client that knows nothing but the environment finds the endpoint.
func TestWE4_EndpointFromEnvironment(t *testing.T) {
	o := open(t)
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+o.path)
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx)
	require.NoError(t, err)
	if svid.ID != ownID {
		t.Errorf("got %s", svid.ID)
	}
}

// WE 6, D6: without the metadata, every call is InvalidArgument, whoever calls.
func TestWE3_6_MetadataRequired(t *testing.T) { metadataRequired(t) }

func TestD6NoMetadata(t *testing.T) { metadataRequired(t) }

func metadataRequired(t *testing.T) {
	o := open(t)
	api := o.raw(me())
	for name, call := range everyCall(api) {
		for _, values := range [][]string{nil, {""}, {"false"}, {"TRUE"}, {"1"}, {"true", "true"}, {"true", "false"}} {
			md := metadata.MD{"workload.spiffe.io": values}
			ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(t.Context(), md), deadline)
			wantCode(t, fmt.Sprintf("%s with %q", name, values), call(ctx), codes.InvalidArgument)
			cancel()
		}
		if err := call(called(t)); status.Code(err) == codes.InvalidArgument && name != "ValidateJWTSVID" {
			t.Errorf("%s with the metadata: %v", name, err)
		}
	}
	if len(o.callers) > 2*len(everyCall(api)) {
		t.Error("the holder was asked before the metadata was looked at")
	}
}

// D6: the endpoint is a unix socket; there is no way to have it listen on TCP.
func TestD6TCP(t *testing.T) {
	for _, path := range []string{"127.0.0.1:0", "tcp://127.0.0.1:8081", "@abstract", ""} {
		s, err := New(Config{Path: path, Holder: &desk{}})
		if err != nil {
			continue
		}
		if s.Addr().Network() != "unix" {
			t.Errorf("%q: listening on %s %s", path, s.Addr().Network(), s.Addr())
		}
		require.NoError(t, s.Close())
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := (kernelCredentials{}).ServerHandshake(a); err == nil {
		t.Error("a connection without peer credentials was let in")
	}
}

// D6: another user's process gets its own identity, or none, and never ours.
func TestD6AnotherUser(t *testing.T) {
	needRoot(t)
	o := open(t)
	got, err := o.client(alice).FetchX509SVID(called(t))
	require.NoError(t, err)
	if got.ID != aliceID {
		t.Errorf("alice got %s", got.ID)
	}
	for name, call := range everyCall(o.raw(stranger)) {
		wantCode(t, "a stranger's "+name, call(called(t)), codes.PermissionDenied)
	}
	for _, id := range []spiffeid.ID{ownID, otherID} {
		_, err := o.raw(alice).FetchJWTSVID(called(t), &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: id.String()})
		wantCode(t, "alice asks for a token of "+id.String(), err, codes.PermissionDenied)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.callers {
		if c.PID != int32(os.Getpid()) {
			t.Errorf("the holder was told pid %d, this is %d", c.PID, os.Getpid())
		}
	}
}

// WE 7, WA 2: nothing but the Workload API is on the service.
func TestWE7_WA2_NoFurtherRPC(t *testing.T) {
	o := open(t)
	cc := o.conn(me())
	for _, method := range []string{"/SpiffeWorkloadAPI/FetchEverything", "/grpc.health.v1.Health/Check", "/sallyport.v1.Admin/Status"} {
		wantCode(t, method, cc.Invoke(called(t), method, &emptypb.Empty{}, &emptypb.Empty{}), codes.Unimplemented)
	}
	stream, err := reflectionv1.NewServerReflectionClient(cc).ServerReflectionInfo(called(t))
	require.NoError(t, err)
	require.NoError(t, stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}))
	resp, err := stream.Recv()
	require.NoError(t, err, "WE 7: reflection is on")
	var names []string
	for _, s := range resp.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	want := []string{
		"SpiffeWorkloadAPI", "envoy.service.secret.v3.SecretDiscoveryService",
		"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection",
	}
	if slices.Sort(names); !slices.Equal(names, want) {
		t.Errorf("got %q, want %q", names, want)
	}
}

func TestWE7_PermissionDeniedWithoutIdentity(t *testing.T) {
	o := open(t)
	o.fail(fmt.Errorf("%w: nothing fits uid 7", ErrDenied))
	for name, call := range everyCall(o.raw(me())) {
		wantCode(t, name, call(called(t)), codes.PermissionDenied)
	}
}

func TestWE7_UnavailableWhileStarting(t *testing.T) {
	o := open(t)
	for _, starting := range []error{ErrStarting, identity.ErrNoIdentity, errors.New("the control plane is away")} {
		o.fail(starting)
		for name, call := range everyCall(o.raw(me())) {
			wantCode(t, name, call(called(t)), codes.Unavailable)
		}
	}
}

// WA 1: go-spiffe's own client is served both profiles.
func TestWA1_BothProfiles(t *testing.T) {
	o := open(t)
	c := o.client(me())
	ctx := called(t)
	x, err := c.FetchX509Context(ctx)
	require.NoError(t, err)
	if got := x.DefaultSVID().ID; got != ownID {
		t.Errorf("X.509: got %s", got)
	}
	j, err := c.FetchJWTBundles(ctx)
	require.NoError(t, err)
	if !j.Has(shop) || !j.Has(partner) {
		t.Error("JWT: bundles are missing")
	}
}

// WA 4.3: the first message comes at once, and each is the full set.
func TestWA4_3_FullSetAtOnceAndOnChange(t *testing.T) {
	o := open(t)
	api := o.raw(me())
	x, err := api.FetchX509SVID(called(t), &workload.X509SVIDRequest{})
	require.NoError(t, err)
	b, err := api.FetchX509Bundles(called(t), &workload.X509BundlesRequest{})
	require.NoError(t, err)
	j, err := api.FetchJWTBundles(called(t), &workload.JWTBundlesRequest{})
	require.NoError(t, err)
	svids, err := x.Recv()
	require.NoError(t, err)
	roots, err := b.Recv()
	require.NoError(t, err)
	keys, err := j.Recv()
	require.NoError(t, err)
	if len(svids.Svids) != 2 || len(roots.Bundles) != 2 || len(keys.Bundles) != 2 {
		t.Errorf("got %d SVIDs, %d bundles, %d JWT bundles, want 2 each", len(svids.Svids), len(roots.Bundles), len(keys.Bundles))
	}

	// Only the SVIDs change: bundles are not sent again.
	renewed := o.authority.issue(t, ownID)
	o.feed.Set(&Holding{SVIDs: append(slices.Clone(o.svids[1:]), renewed), Bundles: o.bundles})
	svids, err = x.Recv()
	require.NoError(t, err)
	if got := svids.Svids[1].X509Svid; len(svids.Svids) != 2 || !strings.HasPrefix(string(got), string(renewed.Certificates[0].Raw)) {
		t.Error("the renewed SVID was not sent, or not the full set")
	}
	// The bundles change: everybody is told, the next message holds that change
	// and no repetition before it.
	rotated := o.bundles[shop].Clone()
	rotated.AddX509Authority(newAuthority(t, shop).root)
	require.NoError(t, rotated.AddJWTAuthority("second", newKey(t).Public()))
	o.feed.Set(&Holding{SVIDs: o.svids, Bundles: identity.Bundles{shop: rotated}})
	roots, err = b.Recv()
	require.NoError(t, err)
	keys, err = j.Recv()
	require.NoError(t, err)
	if certs, err := x509.ParseCertificates(roots.Bundles[shop.IDString()]); err != nil || len(certs) != 2 || len(roots.Bundles) != 1 || len(keys.Bundles) != 1 {
		t.Errorf("got %d bundles of %d roots, %v", len(roots.Bundles), len(certs), err)
	}
}

// An identity that is taken away ends the streams.
func TestWE7_PermissionDeniedWhenIdentityIsLost(t *testing.T) {
	o := open(t)
	s, err := o.raw(me()).FetchX509SVID(called(t), &workload.X509SVIDRequest{})
	require.NoError(t, err)
	require.NoError(t, first(s, nil))
	o.feed.Fail(ErrDenied)
	wantCode(t, "the stream", first(s, nil), codes.PermissionDenied)
}

func fetchSVIDs(t *testing.T, o *office) *workload.X509SVIDResponse {
	t.Helper()
	s, err := o.raw(me()).FetchX509SVID(called(t), &workload.X509SVIDRequest{})
	require.NoError(t, err)
	resp, err := s.Recv()
	require.NoError(t, err)
	return resp
}

// WA 5.2.1: all fields; DER, leaf first; PKCS#8; the own bundle; unique hints.
func TestWA5_2_1_X509SVIDResponse(t *testing.T) {
	o := open(t)
	resp := fetchSVIDs(t, o)
	if len(resp.Svids) != 2 {
		t.Fatalf("got %d SVIDs, want 2", len(resp.Svids))
	}
	for i, m := range resp.Svids {
		want := o.svids[i]
		chain, err := x509.ParseCertificates(m.X509Svid)
		require.NoError(t, err)
		if len(chain) != 2 || !chain[0].Equal(want.Certificates[0]) || !chain[1].Equal(want.Certificates[1]) {
			t.Errorf("%s: chain is not the leaf and its intermediate", m.SpiffeId)
		}
		key, err := x509.ParsePKCS8PrivateKey(m.X509SvidKey)
		require.NoError(t, err)
		if k, ok := key.(interface{ Equal(x any) bool }); m.SpiffeId != want.ID.String() || ok && !k.Equal(want.PrivateKey) {
			t.Errorf("%s: another ID or key", m.SpiffeId)
		}
		roots, err := x509.ParseCertificates(m.Bundle)
		require.NoError(t, err)
		if len(roots) != 1 || !roots[0].Equal(o.authority.root) {
			t.Errorf("%s: the bundle is not the own trust domain's", m.SpiffeId)
		}
	}
	if a, b := resp.Svids[0].Hint, resp.Svids[1].Hint; a != "internal" || b != "" {
		t.Errorf("hints %q and %q: want the first to keep it, and no other to have it", a, b)
	}
}

// No bundle of its own trust domain: no SVID is handed out either.
func TestWA5_2_1_NoSVIDWithoutBundle(t *testing.T) {
	o := open(t)
	o.feed.Set(&Holding{SVIDs: o.svids, Bundles: identity.Bundles{partner: o.bundles[partner]}})
	wantCode(t, "FetchX509SVID", everyCall(o.raw(me()))["FetchX509SVID"](called(t)), codes.Unavailable)
}

// WA 5.2.2: bundles include the own trust domain's; beside SVIDs stand only the
// others', each by itself.
func TestWA5_2_2_Bundles(t *testing.T) {
	o := open(t)
	federated := fetchSVIDs(t, o).FederatedBundles
	foreign, err := x509.ParseCertificates(federated[partner.IDString()])
	require.NoError(t, err)
	if len(federated) != 1 || len(foreign) != 1 || !foreign[0].Equal(o.foreign.root) {
		t.Errorf("federated: got %d bundles", len(federated))
	}
	set, err := o.client(me()).FetchX509Bundles(called(t))
	require.NoError(t, err)
	for td, root := range map[spiffeid.TrustDomain]*x509.Certificate{shop: o.authority.root, partner: o.foreign.root} {
		b, err := set.GetX509BundleForTrustDomain(td)
		require.NoError(t, err)
		if len(b.X509Authorities()) != 1 || !b.HasX509Authority(root) {
			t.Errorf("%s: got %d roots, want its own only", td, len(b.X509Authorities()))
		}
	}
}

// WA 6.2.2: JWT bundles hold JWT keys and nothing else.
func TestWA6_2_2_JWTKeysOnly(t *testing.T) {
	o := open(t)
	s, err := o.raw(me()).FetchJWTBundles(called(t), &workload.JWTBundlesRequest{})
	require.NoError(t, err)
	resp, err := s.Recv()
	require.NoError(t, err)
	if len(resp.Bundles) != 2 {
		t.Errorf("got %d bundles, want 2", len(resp.Bundles))
	}
	for td, raw := range resp.Bundles {
		var doc struct{ Keys []map[string]any }
		require.NoError(t, json.Unmarshal(raw, &doc))
		if len(doc.Keys) != 1 || doc.Keys[0]["x5c"] != nil || doc.Keys[0]["kid"] == nil {
			t.Errorf("%s: got %s", td, raw)
		}
	}
}

// WA 7: what is not offered answers Unimplemented.
func TestWA7_WITUnimplemented(t *testing.T) {
	o := open(t)
	api := o.raw(me())
	svids, err := api.FetchWITSVID(called(t), &workload.WITSVIDRequest{})
	wantCode(t, "FetchWITSVID", first(svids, err), codes.Unimplemented)
	bundles, err := api.FetchWITBundles(called(t), &workload.WITBundlesRequest{})
	wantCode(t, "FetchWITBundles", first(bundles, err), codes.Unimplemented)
}

// WA 8: the first SVID is the default.
func TestWA8_FirstIsDefault(t *testing.T) {
	o := open(t)
	src, err := workloadapi.NewX509Source(called(t), workloadapi.WithClient(o.client(me())))
	require.NoError(t, err)
	defer src.Close()
	svid, err := src.GetX509SVID()
	require.NoError(t, err)
	if svid.ID != ownID || svid.Hint != "internal" {
		t.Errorf("got %s, hint %q", svid.ID, svid.Hint)
	}
}

// SDS knows no SPIFFE metadata, and needs none.
func TestWE6_SDSAndReflectionAreExempt(t *testing.T) {
	o := open(t)
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	_, err := secretv3.NewSecretDiscoveryServiceClient(o.conn(me())).FetchSecrets(ctx, nil)
	require.NoError(t, err)
}
