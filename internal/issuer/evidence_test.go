package issuer

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// platform stands for a cluster or an OIDC issuer: it knows what the tokens that
// it made are worth. The real ones are tested in package attest.
type platform struct {
	kind  string
	asked atomic.Int32
	down  func(ctx context.Context) error // nil: it answers

	mu     sync.Mutex
	tokens map[string]attest.Verified // guarded by mu
}

func (p *platform) token(expires time.Time) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tokens == nil {
		p.tokens = map[string]attest.Verified{}
	}
	token := fmt.Sprintf("token %d", len(p.tokens))
	p.tokens[token] = attest.Verified{
		Kind: p.kind, Issuer: "prod", Subject: "shop/payments", Selectors: attest.Selectors{"namespace": {"shop"}, "claims.repository": {"shop"}},
		Once: hex.EncodeToString([]byte(p.kind + token)), Expires: expires,
	}
	return token
}

func (p *platform) Verify(ctx context.Context, token string) (attest.Verified, error) {
	p.asked.Add(1)
	if p.down != nil {
		return attest.Verified{}, p.down(ctx)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	v, ok := p.tokens[token]
	if !ok {
		return attest.Verified{}, fmt.Errorf("%w: the signature does not fit", attest.ErrBadEvidence)
	}
	return v, nil
}

// platforms are a server's: everything that it can be shown proves payments.
type platforms struct {
	*server
	t          *testing.T
	kube, oidc *platform
	factory    *x509.Certificate
	factoryKey *ecdsa.PrivateKey
}

func newPlatforms(t *testing.T) *platforms {
	t.Helper()
	p := &platforms{server: newServer(t), kube: &platform{kind: attest.KindKubernetes}, oidc: &platform{kind: attest.KindOIDC}, factoryKey: newKey(t)}
	p.factory = p.certificate(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "factory"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, p.factoryKey)
	file := filepath.Join(t.TempDir(), "factory.pem")
	require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.factory.Raw}), 0o600))
	pop, err := attest.NewX509Pop(attest.X509PopConfig{Name: "factory", CAFile: file, Now: p.now})
	require.NoError(t, err)
	p.cfg.X509Pop = map[string]*attest.X509Pop{"factory": pop}
	p.cfg.Kubernetes = map[string]TokenVerifier{"prod": p.kube}
	p.cfg.OIDC = map[string]TokenVerifier{"prod": p.oidc}
	p.admitAll()
	return p
}

func (p *platforms) admitAll() {
	payments := workload("payments")
	payments.Attest = append(payments.Attest,
		policy.Attest{Kind: attest.KindKubernetes, Select: map[string]string{"namespace": "shop"}},
		policy.Attest{Kind: attest.KindOIDC, Issuer: "prod", Select: map[string]string{"claims.repository": "shop"}},
		policy.Attest{Kind: attest.KindX509Pop, Select: map[string]string{"commonName": "press-7"}})
	p.registry.SetWorkloads([]policy.CompiledWorkload{payments, workload("orders")})
}

func (p *platforms) certificate(t *testing.T, tmpl *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	parent := p.factory
	if parent == nil {
		parent = tmpl
	}
	tmpl.SerialNumber, tmpl.NotBefore, tmpl.NotAfter = big.NewInt(time.Now().UnixNano()), p.now().Add(-time.Hour), p.now().Add(100*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), p.factoryKey)
	require.NoError(t, err)
	c, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return c
}

// attempts gives one of each kind, good for payments.
func (p *platforms) attempts(t *testing.T) map[string]*attempt {
	t.Helper()
	kube, oidc, pop := p.newAttempt(t), p.newAttempt(t), p.newAttempt(t)
	kube.hello.Evidence = &sallyportv1.Hello_Kubernetes{Kubernetes: &sallyportv1.BearerToken{Token: p.kube.token(p.now().Add(time.Hour))}}
	oidc.hello.Evidence = &sallyportv1.Hello_Oidc{Oidc: &sallyportv1.BearerToken{Token: p.oidc.token(p.now().Add(time.Hour)), Issuer: "prod"}}
	key := newKey(t)
	leaf := p.certificate(t, &x509.Certificate{Subject: pkix.Name{CommonName: "press-7"}, KeyUsage: x509.KeyUsageDigitalSignature}, key)
	pop.hello.Evidence = &sallyportv1.Hello_X509Pop{X509Pop: &sallyportv1.X509Pop{Chain: [][]byte{leaf.Raw}, Ca: "factory"}}
	pop.possession = func(nonce []byte) []byte {
		sig, err := attest.ProveX509Pop(key, nonce, pop.hello.GetCsr())
		require.NoError(t, err)
		return sig
	}
	return map[string]*attempt{attest.KindKubernetes: kube, attest.KindOIDC: oidc, attest.KindX509Pop: pop, attest.KindJoinToken: p.tokenAttempt(t)}
}

func TestEnrollByEveryKindThenRenewThenComeBack(t *testing.T) {
	p := newPlatforms(t)
	for kind, a := range p.attempts(t) {
		t.Run(kind, func(t *testing.T) {
			svid, msg, _ := p.enrolledBy(t, a)
			if svid.ID.Path() != "/shop/payments" {
				t.Errorf("got %s", svid.ID)
			}
			inst, err := p.registry.Instance(t.Context(), msg.GetInstance())
			require.NoError(t, err)
			leaf := svid.Certificates[0]
			if inst.Kind != kind || inst.Serial != hex.EncodeToString(leaf.SerialNumber.Bytes()) || !inst.NotAfter.Equal(leaf.NotAfter) || inst.Origin == "" || inst.Subject == "" {
				t.Errorf("got %+v", inst)
			}
			records, err := p.audit.Recent(t.Context(), 1)
			require.NoError(t, err)
			if r := records[0]; r.Action != audit.ActionIssue || r.Result != "serial "+inst.Serial || !strings.Contains(r.Detail, "by "+kind) || !strings.Contains(r.Detail, inst.Subject) {
				t.Errorf("got audit record %+v", r)
			}
			_, err = p.client(t, svid).Renew(t.Context(), &sallyportv1.RenewRequest{Csr: newCSR(t, newKey(t))})
			require.NoError(t, err)
			back, err := p.keyAttempt(t, msg.GetInstance(), a.enrolment).run(t, p.client(t, nil))
			require.NoError(t, err)
			if back.GetInstance() != msg.GetInstance() {
				t.Errorf("came back as %s", back.GetInstance())
			}
			again, err := a.run(t, p.client(t, nil)) // as after a lost answer
			require.NoError(t, err)
			if again.GetInstance() != msg.GetInstance() {
				t.Errorf("again: got instance %s, want %s", again.GetInstance(), msg.GetInstance())
			}
		})
	}
}

func TestD1OnlyTheKeyOfTheCSRIsUsedByEveryKind(t *testing.T) {
	p := newPlatforms(t)
	for kind, a := range p.attempts(t) {
		var err error
		a.hello.Csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
			Subject: pkix.Name{CommonName: "root", SerialNumber: "another-instance"},
			URIs:    []*url.URL{spiffeid.RequireFromPath(td, "/shop/orders").URL()}, DNSNames: []string{"orders.shop.mesh"},
			ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}},
		}, a.key)
		require.NoError(t, err)
		svid, msg, _ := p.enrolledBy(t, a)
		leaf := svid.Certificates[0]
		if len(leaf.URIs) != 1 || leaf.URIs[0].Path != "/shop/payments" || len(leaf.DNSNames) != 0 || leaf.IsCA || leaf.Subject.CommonName != "" || leaf.Subject.SerialNumber != msg.GetInstance() {
			t.Errorf("%s: got %s %v %v", kind, leaf.Subject, leaf.URIs, leaf.DNSNames)
		}
	}
}

func TestEnrollRefusesEvidence(t *testing.T) {
	for _, c := range []struct {
		kind, name string
		spoil      func(*platforms, *attempt)
		code       codes.Code
		text       string
	}{
		{attest.KindKubernetes, "unknown token", func(_ *platforms, a *attempt) { a.hello.GetKubernetes().Token = "x" }, codes.Unauthenticated, "signature does not fit"},
		{attest.KindKubernetes, "no token", func(_ *platforms, a *attempt) { a.hello.GetKubernetes().Token = "" }, codes.InvalidArgument, "token of 1 to"},
		{attest.KindKubernetes, "large token", func(_ *platforms, a *attempt) {
			a.hello.GetKubernetes().Token = strings.Repeat("x", attest.MaxBearer+1)
		}, codes.InvalidArgument, "token of 1 to"},
		{attest.KindKubernetes, "empty message", func(_ *platforms, a *attempt) { a.hello.Evidence = &sallyportv1.Hello_Kubernetes{} }, codes.InvalidArgument, ""},
		{attest.KindKubernetes, "unknown cluster", func(_ *platforms, a *attempt) { a.hello.GetKubernetes().Issuer = "test" }, codes.FailedPrecondition, `no issuer "test" on this control plane; it has prod`},
		{attest.KindKubernetes, "which cluster", func(p *platforms, _ *attempt) { p.cfg.Kubernetes["test"] = p.kube }, codes.FailedPrecondition, "name one of prod, test"},
		{attest.KindKubernetes, "not configured", func(p *platforms, _ *attempt) { p.cfg.Kubernetes = nil }, codes.FailedPrecondition, "attest.kubernetes in its configuration"},
		{attest.KindOIDC, "not configured", func(p *platforms, _ *attempt) { p.cfg.OIDC = nil }, codes.FailedPrecondition, "attest.oidc in its configuration"},
		{attest.KindX509Pop, "not configured", func(p *platforms, _ *attempt) { p.cfg.X509Pop = nil }, codes.FailedPrecondition, "attest.x509pop in its configuration"},
		{attest.KindKubernetes, "E3 of another kind", func(p *platforms, a *attempt) {
			a.hello.GetKubernetes().Token = p.oidc.token(p.now().Add(time.Hour)) + "0"
		}, codes.Unauthenticated, "signature"},
		{attest.KindOIDC, "E3 issuer cannot be asked", func(p *platforms, _ *attempt) {
			p.oidc.down = func(context.Context) error { return fmt.Errorf("%w: no route", attest.ErrUnreachable) }
		}, codes.Unavailable, "cannot be asked"},
		{attest.KindOIDC, "E3 issuer fails in its own way", func(p *platforms, _ *attempt) {
			p.oidc.down = func(context.Context) error { return fmt.Errorf("boom") }
		}, codes.Internal, "log says why"},
		{attest.KindOIDC, "no enrolment key", func(_ *platforms, a *attempt) { a.hello.NewEnrollmentKey = nil }, codes.InvalidArgument, "enrolment key"},
		{attest.KindOIDC, "clock ahead", func(p *platforms, a *attempt) { a.hello.ClientTime.Seconds += 3600 }, codes.FailedPrecondition, "ahead"},
		{attest.KindOIDC, "used by another", func(p *platforms, a *attempt) {
			other := *a
			_, err := other.run(p.t, p.client(p.t, nil))
			require.NoError(p.t, err)
			a.enrolment = newKey(p.t)
			a.hello.NewEnrollmentKey, err = x509.MarshalPKIXPublicKey(a.enrolment.Public())
			require.NoError(p.t, err)
		}, codes.Unauthenticated, "redeemed already"},
		{attest.KindOIDC, "repeated with the registered key but without its private half", func(p *platforms, a *attempt) {
			_, err := a.run(p.t, p.client(p.t, nil))
			require.NoError(p.t, err)
			a.enrolment = newKey(p.t)
		}, codes.Unauthenticated, "proof"},
		{attest.KindOIDC, "D4 nobody admits it", func(p *platforms, _ *attempt) {
			p.registry.SetWorkloads([]policy.CompiledWorkload{workload("payments")})
		}, codes.PermissionDenied, "no workload admits this evidence"},
		{attest.KindOIDC, "two admit it", func(p *platforms, _ *attempt) {
			twin := policy.Attest{Kind: attest.KindOIDC, Issuer: "prod", Select: map[string]string{"claims.repository": "shop"}}
			one, two := workload("one"), workload("two")
			one.Attest, two.Attest = []policy.Attest{twin}, []policy.Attest{twin}
			p.registry.SetWorkloads([]policy.CompiledWorkload{one, two})
		}, codes.FailedPrecondition, "more than one workload"},
		{attest.KindOIDC, "a signature that is not asked for", func(_ *platforms, a *attempt) { a.possession = func([]byte) []byte { return []byte("x") } }, codes.InvalidArgument, "x509pop only"},
		{attest.KindX509Pop, "no possession", func(_ *platforms, a *attempt) { a.possession = nil }, codes.Unauthenticated, "proof does not fit"},
		{attest.KindX509Pop, "replayed possession", func(_ *platforms, a *attempt) {
			good := a.possession
			a.possession = func([]byte) []byte { return good(make([]byte, attest.NonceSize)) }
		}, codes.Unauthenticated, "proof does not fit"},
		{attest.KindX509Pop, "no chain", func(_ *platforms, a *attempt) { a.hello.GetX509Pop().Chain = nil }, codes.InvalidArgument, "chain of 1 to"},
		{attest.KindX509Pop, "the CA itself", func(p *platforms, a *attempt) {
			a.hello.GetX509Pop().Chain = [][]byte{p.factory.Raw}
			a.possession = func(nonce []byte) []byte {
				sig, err := attest.ProveX509Pop(p.factoryKey, nonce, a.hello.GetCsr())
				require.NoError(p.t, err)
				return sig
			}
		}, codes.Unauthenticated, "authority"},
		{attest.KindX509Pop, "expired", func(p *platforms, a *attempt) {
			p.skew.Store(int64(101 * time.Hour))
			a.hello.ClientTime.Seconds += 101 * 3600
			require.NoError(p.t, p.ca.Advance(p.t.Context()))
		}, codes.Unauthenticated, "is valid from"},
	} {
		t.Run(c.kind+" "+c.name, func(t *testing.T) {
			p := newPlatforms(t)
			p.t = t
			a := p.attempts(t)[c.kind]
			c.spoil(p, a)
			msg, err := a.run(t, p.client(t, nil))
			if status.Code(err) != c.code || !strings.Contains(status.Convert(err).Message(), c.text) {
				t.Errorf("got %v, %v; want %v with %q", msg.GetSpiffeId(), err, c.code, c.text)
			}
		})
	}
}

// Whoever has not answered the challenge makes nobody be asked.
func TestTokensAreVerifiedAfterTheChallenge(t *testing.T) {
	p := newPlatforms(t)
	a := p.attempts(t)[attest.KindKubernetes]
	a.proof = func([]byte) []byte { return []byte("x") }
	if _, err := a.run(t, p.client(t, nil)); status.Code(err) != codes.Unauthenticated {
		t.Errorf("got %v", err)
	}
	if n := p.kube.asked.Load(); n != 0 {
		t.Errorf("asked %d times", n)
	}
	a.proof = nil
	_, err := a.run(t, p.client(t, nil))
	require.NoError(t, err)
	if n := p.kube.asked.Load(); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
}

// One host with slow tokens takes its share of the calls and no more; some more of
// its own wait.
func TestOutsideCallsAreBounded(t *testing.T) {
	p := newPlatforms(t)
	entered, release := make(chan struct{}, 100), make(chan struct{})
	p.kube.down = func(ctx context.Context) error {
		entered <- struct{}{}
		select {
		case <-release:
		case <-ctx.Done():
		}
		return attest.ErrUnreachable
	}
	c := p.client(t, nil)
	var wg sync.WaitGroup
	for range maxWaitingOfHost {
		a := p.attempts(t)[attest.KindKubernetes]
		wg.Go(func() {
			if _, err := a.run(t, c); status.Code(err) != codes.Unavailable {
				t.Errorf("within the share: got %v", err)
			}
		})
	}
	for range maxOutsideOfHost {
		<-entered
	}
	waiting := func() int {
		p.outside.mu.Lock()
		defer p.outside.mu.Unlock()
		n := 0
		for _, h := range p.outside.hosts {
			n += h.users
		}
		return n
	}
	require.Eventually(t, func() bool { return waiting() == maxWaitingOfHost }, 3*time.Second, time.Millisecond)
	if len(entered) != 0 {
		t.Errorf("%d calls beyond the share", len(entered))
	}
	if _, err := p.attempts(t)[attest.KindKubernetes].run(t, c); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("beyond what may wait: got %v", err)
	}
	close(release)
	wg.Wait()
	if len(p.outside.hosts) != 0 || len(p.outside.slots) != 0 {
		t.Errorf("left behind: %v, %d slots", p.outside.hosts, len(p.outside.slots))
	}
}

// A stranger who shows junk and then waits holds nobody up.
func TestUnprovenEvidenceHoldsNoSlot(t *testing.T) {
	p := newPlatforms(t)
	c := p.client(t, nil)
	for range cap(p.slots) - 1 {
		p.slots <- struct{}{}
	}
	for _, evidence := range []*attempt{p.attempts(t)[attest.KindX509Pop], p.attempts(t)[attest.KindOIDC]} {
		stream, err := c.Enroll(t.Context())
		require.NoError(t, err)
		require.NoError(t, stream.Send(helloMsg(evidence.hello)))
		_, err = stream.Recv() // the challenge, never answered
		require.NoError(t, err)
	}
	if _, err := p.tokenAttempt(t).run(t, c); err != nil {
		t.Errorf("got %v", err)
	}
}

// One certificate cannot fill the store with instances.
func TestNewcomersOfOneBearerAreBounded(t *testing.T) {
	p := newPlatforms(t)
	a := p.attempts(t)[attest.KindX509Pop]
	c := p.client(t, nil)
	for i := range newcomerBurst + 1 {
		a.enrolment = newKey(t)
		var err error
		a.hello.NewEnrollmentKey, err = x509.MarshalPKIXPublicKey(a.enrolment.Public())
		require.NoError(t, err)
		_, err = a.run(t, c)
		if want := map[bool]codes.Code{true: codes.OK, false: codes.ResourceExhausted}[i < newcomerBurst]; status.Code(err) != want {
			t.Fatalf("instance %d: got %v, want %v", i+1, err, want)
		}
	}
	if _, err := p.attempts(t)[attest.KindX509Pop].run(t, c); err != nil {
		t.Errorf("another certificate: got %v", err)
	}
}
