package issuer

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("shop.example")

// server is a control plane's enrolment port on loopback.
type server struct {
	*Service
	ca       *ca.CA
	registry *registry.Registry
	audit    *audit.Log
	addr     string
	skew     atomic.Int64 // of the clock that all of them share
}

func (s *server) now() time.Time { return time.Now().Add(time.Duration(s.skew.Load())) }

func workload(name string) policy.CompiledWorkload {
	return policy.CompiledWorkload{
		Workload: policy.Workload{Name: name, Attest: []policy.Attest{{Kind: attest.KindJoinToken}}},
		ID:       spiffeid.RequireFromPath(td, "/shop/"+name),
	}
}

func newServer(t testing.TB) *server {
	t.Helper()
	mem := store.NewMemory()
	t.Cleanup(func() { mem.Close() })
	s := &server{}
	authority, err := ca.Open(t.Context(), ca.Config{TrustDomain: td, KeyDir: filepath.Join(t.TempDir(), "keys"), Store: mem, Now: s.now})
	require.NoError(t, err)
	s.ca = authority
	s.audit = audit.New(mem, s.now)
	s.registry = registry.New(registry.Config{Store: mem, Audit: s.audit, RootHash: authority.RootHash, Now: s.now})
	s.registry.SetWorkloads([]policy.CompiledWorkload{workload("payments"), workload("orders")})
	s.Service = New(Config{CA: authority, Registry: s.registry, Now: s.now})
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s.addr = lis.Addr().String()
	cfg := identity.TLSConfig{Source: authority.ServerSVID(), Now: s.now, OptionalClient: true, NextProtos: []string{"h2"}}
	srv := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(identity.ServerTLS(cfg))),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			return next(withPeer(ctx), req)
		}),
	)
	sallyportv1.RegisterEnrollmentServer(srv, s.Service)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(lis) }()
	t.Cleanup(func() {
		srv.Stop()
		<-done
	})
	return s
}

// withPeer does what the control plane's interceptor does.
func withPeer(ctx context.Context) context.Context {
	p, _ := peer.FromContext(ctx)
	if caller, err := identity.PeerOf(p.AuthInfo.(credentials.TLSInfo).State); err == nil {
		return identity.ContextWithPeer(ctx, caller)
	}
	return ctx
}

// client connects with an SVID, or without one.
func (s *server) client(t *testing.T, svid *x509svid.SVID) sallyportv1.EnrollmentClient {
	t.Helper()
	var live identity.Live
	live.SetBundles(identity.Bundles{td: spiffebundle.FromX509Authorities(td, s.ca.X509Roots())})
	live.SetSVID(svid)
	cfg := identity.TLSConfig{Source: &live, Now: s.now, OptionalClient: true}
	want := identity.ExactPattern(spiffeid.RequireFromPath(td, identity.ControlPlanePath))
	return s.clientTLS(t, identity.ClientTLS(cfg, want))
}

func (s *server) clientTLS(t *testing.T, cfg *tls.Config) sallyportv1.EnrollmentClient {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+s.addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return sallyportv1.NewEnrollmentClient(conn)
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

func newCSR(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	require.NoError(t, err)
	return der
}

// attempt is one enrolment that tests spoil before it is sent.
type attempt struct {
	key, enrolment *ecdsa.PrivateKey
	hello          *sallyportv1.Hello
	proof          func(nonce []byte) []byte
	possession     func(nonce []byte) []byte // with a certificate; nil: without
}

func (s *server) tokenAttempt(t *testing.T) *attempt {
	t.Helper()
	return s.tokenAttemptFor(t, "payments")
}

func (s *server) tokenAttemptFor(t *testing.T, workload string) *attempt {
	t.Helper()
	created, err := s.registry.CreateToken(t.Context(), registry.TokenRequest{Workload: workload, Actor: "alice"})
	require.NoError(t, err)
	tok, err := attest.ParseToken(created.Token)
	require.NoError(t, err)
	a := s.newAttempt(t)
	a.hello.Evidence = &sallyportv1.Hello_JoinToken{JoinToken: &sallyportv1.JoinToken{Id: tok.ID, Secret: tok.Secret[:]}}
	return a
}

// newAttempt has no evidence yet.
func (s *server) newAttempt(t *testing.T) *attempt {
	t.Helper()
	a := &attempt{key: newKey(t), enrolment: newKey(t)}
	pub, err := x509.MarshalPKIXPublicKey(a.enrolment.Public())
	require.NoError(t, err)
	a.hello = &sallyportv1.Hello{Csr: newCSR(t, a.key), NewEnrollmentKey: pub, ClientTime: timestamppb.New(s.now())}
	return a
}

func (s *server) keyAttempt(t *testing.T, instance string, enrolment *ecdsa.PrivateKey) *attempt {
	t.Helper()
	a := &attempt{key: newKey(t), enrolment: enrolment}
	a.hello = &sallyportv1.Hello{
		Evidence: &sallyportv1.Hello_EnrollmentKey{EnrollmentKey: &sallyportv1.EnrollmentKey{Instance: instance}},
		Csr:      newCSR(t, a.key),
	}
	return a
}

func helloMsg(h *sallyportv1.Hello) *sallyportv1.EnrollRequest {
	return &sallyportv1.EnrollRequest{Message: &sallyportv1.EnrollRequest_Hello{Hello: h}}
}

func proofMsg(signature []byte) *sallyportv1.EnrollRequest {
	return &sallyportv1.EnrollRequest{Message: &sallyportv1.EnrollRequest_Proof{Proof: &sallyportv1.Proof{Signature: signature}}}
}

func (a *attempt) run(t *testing.T, c sallyportv1.EnrollmentClient) (*sallyportv1.SVID, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := c.Enroll(ctx)
	require.NoError(t, err)
	stream.Send(helloMsg(a.hello)) // what went wrong is said by Recv
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	nonce := resp.GetChallenge().GetNonce()
	var sig []byte
	if a.proof != nil {
		sig = a.proof(nonce)
	} else {
		sig, err = attest.Prove(a.enrolment, nonce, a.hello.GetCsr())
		require.NoError(t, err)
	}
	msg := proofMsg(sig)
	if a.possession != nil {
		msg.GetProof().EvidenceSignature = a.possession(nonce)
	}
	stream.Send(msg)
	if resp, err = stream.Recv(); err != nil {
		return nil, err
	}
	return resp.GetIssued(), nil
}

// enrolled gives an SVID ready to present.
func (s *server) enrolled(t *testing.T) (*x509svid.SVID, *sallyportv1.SVID, *attempt) {
	t.Helper()
	return s.enrolledBy(t, s.tokenAttempt(t))
}

func (s *server) enrolledBy(t *testing.T, a *attempt) (*x509svid.SVID, *sallyportv1.SVID, *attempt) {
	t.Helper()
	msg, err := a.run(t, s.client(t, nil))
	require.NoError(t, err)
	return toSVID(t, msg, a.key), msg, a
}

func toSVID(t *testing.T, msg *sallyportv1.SVID, key *ecdsa.PrivateKey) *x509svid.SVID {
	t.Helper()
	svid := &x509svid.SVID{ID: spiffeid.RequireFromString(msg.GetSpiffeId()), PrivateKey: key}
	for _, der := range msg.GetChain() {
		cert, err := x509.ParseCertificate(der)
		require.NoError(t, err)
		svid.Certificates = append(svid.Certificates, cert)
	}
	return svid
}

func TestEnrollThenRenewThenComeBack(t *testing.T) {
	s := newServer(t)
	svid, msg, first := s.enrolled(t)
	if got, want := msg.GetSpiffeId(), "spiffe://shop.example/shop/payments"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if len(msg.GetChain()) != 2 || len(msg.GetBundle()) != 1 {
		t.Errorf("got %d certificates and %d roots, want leaf, intermediate and one root", len(msg.GetChain()), len(msg.GetBundle()))
	}
	key := newKey(t)
	resp, err := s.client(t, svid).Renew(t.Context(), &sallyportv1.RenewRequest{Csr: newCSR(t, key)})
	require.NoError(t, err)
	renewed := toSVID(t, resp.GetSvid(), key)
	if renewed.ID != svid.ID || resp.GetSvid().GetInstance() != msg.GetInstance() {
		t.Errorf("renewed as %s, instance %s", renewed.ID, resp.GetSvid().GetInstance())
	}
	if !key.PublicKey.Equal(renewed.Certificates[0].PublicKey) {
		t.Error("renewed for another key")
	}
	back, err := s.keyAttempt(t, msg.GetInstance(), first.enrolment).run(t, s.client(t, nil))
	require.NoError(t, err)
	if back.GetSpiffeId() != msg.GetSpiffeId() || back.GetInstance() != msg.GetInstance() {
		t.Errorf("came back as %s, instance %s", back.GetSpiffeId(), back.GetInstance())
	}
	records, err := s.audit.Recent(t.Context(), 0)
	require.NoError(t, err)
	var actions []string
	for _, r := range records {
		actions = append(actions, r.Action)
		if r.Action == "svid.issue" && (!strings.HasPrefix(r.Result, "serial ") || r.Origin == "") {
			t.Errorf("got audit record %+v", r)
		}
	}
	if got, want := strings.Join(actions, " "), "svid.issue svid.issue token.redeem token.create"; got != want {
		t.Errorf("got audit records %q, want %q", got, want)
	}
}

// Losing the answer does not lose the token, and its repetition gives nothing to
// anyone but the holder of the enrolment key.
func TestEnrollAgainAfterALostAnswer(t *testing.T) {
	s := newServer(t)
	a := s.tokenAttempt(t)
	first, err := a.run(t, s.client(t, nil))
	require.NoError(t, err)
	again, err := a.run(t, s.client(t, nil))
	require.NoError(t, err)
	if again.GetInstance() != first.GetInstance() {
		t.Errorf("got instance %s, want %s", again.GetInstance(), first.GetInstance())
	}
	thief := *a
	thief.enrolment = newKey(t)
	if _, err := thief.run(t, s.client(t, nil)); status.Code(err) != codes.Unauthenticated {
		t.Errorf("with the registered key but without its private half: got %v", err)
	}
}

func TestD1OnlyTheKeyOfTheCSRIsUsed(t *testing.T) {
	s := newServer(t)
	a := s.tokenAttempt(t)
	ca, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:        pkix.Name{CommonName: "root", Organization: []string{"x"}, SerialNumber: "another-instance"},
		URIs:           []*url.URL{spiffeid.RequireFromPath(td, identity.ControlPlanePath).URL()},
		DNSNames:       []string{"payments.shop.mesh"},
		EmailAddresses: []string{"a@b.c"},
		IPAddresses:    []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtraExtensions: []pkix.Extension{
			{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}, // cA true
			{Id: []int{2, 5, 29, 15}, Critical: true, Value: []byte{0x03, 0x02, 0x01, 0x06}},       // keyCertSign, cRLSign
		},
	}, a.key)
	require.NoError(t, err)
	a.hello.Csr = ca
	msg, err := a.run(t, s.client(t, nil))
	require.NoError(t, err)
	leaf := toSVID(t, msg, a.key).Certificates[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].Path != "/shop/payments" {
		t.Errorf("got URIs %v", leaf.URIs)
	}
	if len(leaf.DNSNames)+len(leaf.EmailAddresses)+len(leaf.IPAddresses) != 0 {
		t.Errorf("got names %v %v %v", leaf.DNSNames, leaf.EmailAddresses, leaf.IPAddresses)
	}
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("got cA %v, key usage %b", leaf.IsCA, leaf.KeyUsage)
	}
	if leaf.Subject.CommonName != "" || leaf.Subject.SerialNumber != msg.GetInstance() {
		t.Errorf("got subject %s", leaf.Subject)
	}
}

func TestEnrollRefuses(t *testing.T) {
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	require.NoError(t, err)
	for _, c := range []struct {
		name  string
		spoil func(*testing.T, *server, *attempt)
		code  codes.Code
		text  string
	}{
		{"no evidence", func(_ *testing.T, _ *server, a *attempt) { a.hello.Evidence = nil }, codes.InvalidArgument, "join-token"},
		{"empty token", func(_ *testing.T, _ *server, a *attempt) { a.hello.GetJoinToken().Reset() }, codes.InvalidArgument, "secret"},
		{"wrong secret", func(_ *testing.T, _ *server, a *attempt) { a.hello.GetJoinToken().Secret[0] ^= 1 }, codes.Unauthenticated, "unknown join token"},
		{"no CSR", func(_ *testing.T, _ *server, a *attempt) { a.hello.Csr = nil }, codes.InvalidArgument, "CSR of 0 bytes"},
		{"large CSR", func(_ *testing.T, _ *server, a *attempt) { a.hello.Csr = make([]byte, maxCSR+1) }, codes.InvalidArgument, "CSR of 8193 bytes"},
		{"large message", func(_ *testing.T, _ *server, a *attempt) { a.hello.Csr = make([]byte, MaxMessage) }, codes.InvalidArgument, "at most 16384"},
		{"CSR of noise", func(_ *testing.T, _ *server, a *attempt) { a.hello.Csr = []byte("noise") }, codes.InvalidArgument, "parsing the CSR"},
		{"CSR with a bad signature", func(_ *testing.T, _ *server, a *attempt) { a.hello.Csr[len(a.hello.Csr)-1] ^= 1 }, codes.InvalidArgument, "CSR"},
		{"CSR of P-521", func(t *testing.T, _ *server, a *attempt) { a.hello.Csr = newCSR(t, p521) }, codes.InvalidArgument, "use P-256"},
		{"no enrolment key", func(_ *testing.T, _ *server, a *attempt) { a.hello.NewEnrollmentKey = nil }, codes.InvalidArgument, "enrolment key"},
		{"field of a later version", func(_ *testing.T, _ *server, a *attempt) {
			a.hello.ProtoReflect().SetUnknown([]byte{0x7a, 0x01, 'x'})
		}, codes.InvalidArgument, "field 15 of Hello is not supported"},
		{"no proof", func(_ *testing.T, _ *server, a *attempt) { a.proof = func([]byte) []byte { return nil } }, codes.Unauthenticated, "proof"},
		{"proof of another key", func(t *testing.T, _ *server, a *attempt) { a.enrolment = newKey(t) }, codes.Unauthenticated, "proof"},
		{"proof of another CSR", func(t *testing.T, _ *server, a *attempt) {
			a.proof = func(nonce []byte) []byte {
				sig, err := attest.Prove(a.enrolment, nonce, []byte("csr"))
				require.NoError(t, err)
				return sig
			}
		}, codes.Unauthenticated, "proof"},
		{"clock behind", func(_ *testing.T, s *server, a *attempt) {
			a.hello.ClientTime = timestamppb.New(s.now().Add(-2 * time.Minute))
		}, codes.FailedPrecondition, "2m0s behind"},
		{"clock ahead", func(_ *testing.T, s *server, a *attempt) {
			a.hello.ClientTime = timestamppb.New(s.now().Add(time.Hour))
		}, codes.FailedPrecondition, "1h0m0s ahead"},
		{"expired token", func(_ *testing.T, s *server, a *attempt) {
			s.skew.Store(int64(registry.DefaultTokenTTL))
			a.hello.ClientTime = timestamppb.New(s.now())
		}, codes.Unauthenticated, "expired"},
		{"used token", func(t *testing.T, s *server, a *attempt) {
			_, err := a.run(t, s.client(t, nil))
			require.NoError(t, err)
			a.enrolment = newKey(t)
			a.hello.NewEnrollmentKey, err = x509.MarshalPKIXPublicKey(a.enrolment.Public())
			require.NoError(t, err)
		}, codes.Unauthenticated, "already used"},
		{"workload gone", func(_ *testing.T, s *server, _ *attempt) {
			s.registry.SetWorkloads([]policy.CompiledWorkload{workload("orders")})
		}, codes.PermissionDenied, "no such workload"},
		{"D4 unknown instance", func(t *testing.T, s *server, a *attempt) {
			*a = *s.keyAttempt(t, "00000000000000000000", a.enrolment)
		}, codes.Unauthenticated, "unknown instance"},
		{"D4 another's instance", func(t *testing.T, s *server, a *attempt) {
			_, other, _ := s.enrolled(t)
			*a = *s.keyAttempt(t, other.GetInstance(), a.enrolment)
		}, codes.Unauthenticated, "proof"},
		{"workload gone, with an enrolment key", func(t *testing.T, s *server, a *attempt) {
			msg, err := a.run(t, s.client(t, nil))
			require.NoError(t, err)
			s.registry.SetWorkloads([]policy.CompiledWorkload{workload("orders")})
			*a = *s.keyAttempt(t, msg.GetInstance(), a.enrolment)
		}, codes.PermissionDenied, "no such workload"},
		{"removed instance", func(t *testing.T, s *server, a *attempt) {
			msg, err := a.run(t, s.client(t, nil))
			require.NoError(t, err)
			require.NoError(t, s.registry.Remove(t.Context(), msg.GetInstance(), "alice"))
			*a = *s.keyAttempt(t, msg.GetInstance(), a.enrolment)
		}, codes.Unauthenticated, "unknown instance"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t)
			a := s.tokenAttempt(t)
			c.spoil(t, s, a)
			msg, err := a.run(t, s.client(t, nil))
			if status.Code(err) != c.code || !strings.Contains(status.Convert(err).Message(), c.text) {
				t.Errorf("got %v, %v; want %v with %q", msg.GetSpiffeId(), err, c.code, c.text)
			}
			if strings.Contains(status.Convert(err).Message(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
		})
	}
}

func TestEnrollIsOneFlowOnly(t *testing.T) {
	s := newServer(t)
	c := s.client(t, nil)
	a := s.tokenAttempt(t)
	for name, msgs := range map[string][]*sallyportv1.EnrollRequest{
		"proof first":   {proofMsg([]byte("x"))},
		"nothing":       {{}},
		"two hellos":    {helloMsg(a.hello), helloMsg(a.hello)},
		"empty message": {helloMsg(a.hello), {}},
		"half-way":      {helloMsg(a.hello)},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := c.Enroll(ctx)
		require.NoError(t, err)
		for _, m := range msgs {
			stream.Send(m)
		}
		stream.CloseSend()
		for err == nil {
			var resp *sallyportv1.EnrollResponse
			resp, err = stream.Recv()
			if resp.GetIssued() != nil {
				t.Errorf("%s: issued", name)
			}
		}
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: got %v", name, err)
		}
		cancel()
	}
}

func TestSilentEnrolmentEnds(t *testing.T) {
	s := newServer(t)
	s.silence = 50 * time.Millisecond
	stream, err := s.client(t, nil).Enroll(t.Context())
	require.NoError(t, err)
	if _, err := stream.Recv(); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("before Hello: got %v", err)
	}
	stream, err = s.client(t, nil).Enroll(t.Context())
	require.NoError(t, err)
	require.NoError(t, stream.Send(helloMsg(s.tokenAttempt(t).hello)))
	_, err = stream.Recv()
	require.NoError(t, err)
	if _, err := stream.Recv(); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("before Proof: got %v", err)
	}
}

func TestEnrolmentsInProgressAreBounded(t *testing.T) {
	s := newServer(t)
	for range cap(s.slots) {
		s.slots <- struct{}{}
	}
	a := s.tokenAttempt(t)
	if _, err := a.run(t, s.client(t, nil)); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
	<-s.slots
	if _, err := a.run(t, s.client(t, nil)); err != nil {
		t.Error(err)
	}
}

func TestD8RenewRefuses(t *testing.T) {
	s := newServer(t)
	svid, msg, _ := s.enrolled(t)
	csr := &sallyportv1.RenewRequest{Csr: newCSR(t, newKey(t))}
	renew := func(svid *x509svid.SVID) error {
		_, err := s.client(t, svid).Renew(t.Context(), csr)
		return err
	}
	require.NoError(t, renew(svid))
	forged := newKey(t)
	issued, err := s.ca.Issue(t.Context(), ca.Request{ID: svid.ID, Key: forged.Public(), Instance: "00000000000000000000"})
	require.NoError(t, err)
	orders, err := s.ca.Issue(t.Context(), ca.Request{ID: spiffeid.RequireFromPath(td, "/shop/orders"), Key: forged.Public(), Instance: msg.GetInstance()})
	require.NoError(t, err)
	serverSVID, err := s.ca.ServerSVID().GetX509SVID()
	require.NoError(t, err)
	for _, c := range []struct {
		name string
		svid *x509svid.SVID
		code codes.Code
	}{
		{"no certificate", nil, codes.Unauthenticated},
		{"unknown instance", &x509svid.SVID{ID: svid.ID, Certificates: issued.Chain, PrivateKey: forged}, codes.Unauthenticated},
		{"instance of another workload", &x509svid.SVID{ID: svid.ID, Certificates: orders.Chain, PrivateKey: forged}, codes.Unauthenticated},
		{"the control plane's role", serverSVID, codes.Unauthenticated},
		{"certificate of another key", &x509svid.SVID{ID: svid.ID, Certificates: svid.Certificates, PrivateKey: forged}, codes.Unavailable},
	} {
		if err := renew(c.svid); status.Code(err) != c.code {
			t.Errorf("%s: got %v, want %v", c.name, err, c.code)
		}
	}
	for name, req := range map[string]*sallyportv1.RenewRequest{
		"no CSR": {}, "noise": {Csr: []byte("x")}, "large": {Csr: make([]byte, MaxMessage+1)},
	} {
		if _, err := s.client(t, svid).Renew(t.Context(), req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: got %v", name, err)
		}
	}

	kept := s.client(t, svid) // its connection will outlive the SVID
	_, err = kept.Renew(t.Context(), csr)
	require.NoError(t, err)
	s.registry.SetWorkloads(nil)
	if err := renew(svid); status.Code(err) != codes.PermissionDenied {
		t.Errorf("workload gone: got %v", err)
	}
	s.registry.SetWorkloads([]policy.CompiledWorkload{workload("payments")})
	require.NoError(t, s.registry.Remove(t.Context(), msg.GetInstance(), "alice"))
	if err := renew(svid); status.Code(err) != codes.Unauthenticated {
		t.Errorf("instance removed: got %v", err)
	}
	s.skew.Store(int64(25 * time.Hour))
	require.NoError(t, s.ca.Advance(t.Context()))
	if _, err := kept.Renew(t.Context(), csr); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "expired") {
		t.Errorf("expired on a live connection: got %v", err)
	}
	if err := renew(svid); status.Code(err) != codes.Unavailable {
		t.Errorf("expired: got %v", err)
	}
}

func TestToStatusHidesInternals(t *testing.T) {
	err := toStatus(net.ErrClosed)
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "closed") {
		t.Errorf("got %v", err)
	}
}

func FuzzEnrollMessages(f *testing.F) {
	s := newServer(f)
	key := newKey(f)
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	require.NoError(f, err)
	f.Add(newCSR(f, key), pub, "AAAAAAAAAAAAAAAAAAAAAA", make([]byte, 32), "", []byte{})
	f.Add([]byte{0x30}, []byte{}, "", []byte{}, "0123456789abcdef0123", []byte{0x1a, 0x01, 'x'})
	f.Add(newCSR(f, key), pub, "x509pop", []byte{0x30}, "", []byte{})
	f.Add(newCSR(f, key), pub, "oidc", []byte("a.b.c"), "", []byte{})
	f.Fuzz(func(t *testing.T, csr, enrolKey []byte, id string, secret []byte, instance string, unknown []byte) {
		h := &sallyportv1.Hello{Csr: csr, NewEnrollmentKey: enrolKey}
		h.Evidence = &sallyportv1.Hello_JoinToken{JoinToken: &sallyportv1.JoinToken{Id: id, Secret: secret}}
		switch {
		case instance != "":
			h.Evidence = &sallyportv1.Hello_EnrollmentKey{EnrollmentKey: &sallyportv1.EnrollmentKey{Instance: instance}}
		case id == "x509pop":
			h.Evidence = &sallyportv1.Hello_X509Pop{X509Pop: &sallyportv1.X509Pop{Chain: [][]byte{secret}}}
		case id == "oidc":
			h.Evidence = &sallyportv1.Hello_Oidc{Oidc: &sallyportv1.BearerToken{Token: string(secret)}}
		}
		h.ProtoReflect().SetUnknown(unknown)
		got, err := s.readHello(helloMsg(h))
		if err != nil {
			return
		}
		if len(unknown) > 0 || got.key == nil || (got.newKey == nil) != (instance != "") {
			t.Errorf("accepted half a Hello: %+v", got)
		}
		if ca.CheckKey(got.key) != nil || len(csr) > maxCSR {
			t.Error("accepted a bad key")
		}
		// Nobody is in this registry, so no evidence may be good.
		ev, err := s.evidence(t.Context(), got)
		if err != nil {
			return
		}
		if _, err := ev.accept(t.Context(), answer{}); err == nil {
			t.Error("accepted evidence that was never given out")
		}
	})
}
