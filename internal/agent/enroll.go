package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// enroll gets an SVID without one: with the enrolment key if there is one, else,
// or if the control plane refuses that and there is other evidence than was
// redeemed for it, with the evidence.
func (a *Agent) enroll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	a.mu.Lock()
	s := a.state
	a.mu.Unlock()
	if !s.enrolled() {
		p, err := a.proof()
		if err != nil {
			return err
		}
		return a.enrollBy(ctx, p)
	}
	err := a.enrollByKey(ctx, s)
	if err == nil || !isPermanent(err) || a.cfg.Evidence.IsZero() && a.cfg.Token == "" {
		return err
	}
	p, perr := a.proof()
	if perr != nil || p.name == s.Token && !p.again {
		return err
	}
	a.log.Warn("the earlier enrolment is refused; using the new evidence", "error", err)
	return a.enrollBy(ctx, p)
}

func (a *Agent) enrollByKey(ctx context.Context, s state) error {
	hello := &sallyportv1.Hello{Evidence: &sallyportv1.Hello_EnrollmentKey{
		EnrollmentKey: &sallyportv1.EnrollmentKey{Instance: s.Instance},
	}}
	link := a.anonymous(s.ID.TrustDomain())
	return link.with(ctx, func(conn *grpc.ClientConn) error {
		svid, key, err := a.converse(ctx, conn, hello, signers{enrolment: s.key})
		if err != nil {
			return err
		}
		return a.accept(svid, key, s.ID.TrustDomain(), nil)
	})
}

// enrollBy redeems evidence. The enrolment key is on disk before the evidence is
// sent, so that losing the answer does not lose it: the same key may repeat the
// redemption.
func (a *Agent) enrollBy(ctx context.Context, p proof) error {
	key, err := a.pendingKey(p.name)
	if err != nil {
		return permanent(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return permanent(fmt.Errorf("encoding the enrolment key: %w", err))
	}
	hello := &sallyportv1.Hello{NewEnrollmentKey: pub}
	p.fill(hello)
	link, server, err := a.stranger(p)
	if err != nil {
		return err
	}
	return link.with(ctx, func(conn *grpc.ClientConn) error {
		svid, svidKey, err := a.converse(ctx, conn, hello, signers{key, p.key})
		if err != nil {
			return err
		}
		return a.accept(svid, svidKey, server.Load().TrustDomain(), &pendingKey{p.name, key})
	})
}

// pendingKey returns the key that this evidence registers, making and saving it
// the first time. An earlier enrolment stays in force until the evidence is
// redeemed.
func (a *Agent) pendingKey(evidence string) (*ecdsa.PrivateKey, error) {
	a.mu.Lock()
	pending := a.state.pending
	a.mu.Unlock()
	if pending.key != nil && pending.Token == evidence {
		return pending.key, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the enrolment key: %w", err)
	}
	return key, a.update(func(s *state) { s.pending = pendingKey{Token: evidence, key: key} })
}

// signers answer a challenge.
type signers struct {
	enrolment *ecdsa.PrivateKey
	evidence  crypto.Signer // nil: the evidence needs no proof of its own
}

func (s signers) prove(nonce, csr []byte) (*sallyportv1.Proof, error) {
	signature, err := attest.Prove(s.enrolment, nonce, csr)
	if err != nil || s.evidence == nil {
		return &sallyportv1.Proof{Signature: signature}, err
	}
	possession, err := attest.ProveX509Pop(s.evidence, nonce, csr)
	return &sallyportv1.Proof{Signature: signature, EvidenceSignature: possession}, err
}

// converse conducts one Enroll stream: Hello, Challenge, Proof, Issued.
func (a *Agent) converse(ctx context.Context, conn *grpc.ClientConn, hello *sallyportv1.Hello, keys signers) (*sallyportv1.SVID, *ecdsa.PrivateKey, error) {
	key, csr, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	hello.Csr = csr
	hello.ClientTime = timestamppb.New(a.cfg.Now())
	ctx, cancel := context.WithCancel(ctx) // ends the stream
	defer cancel()
	stream, err := sallyportv1.NewEnrollmentClient(conn).Enroll(ctx)
	if err != nil {
		return nil, nil, err
	}
	resp, err := ask(stream, &sallyportv1.EnrollRequest{Message: &sallyportv1.EnrollRequest_Hello{Hello: hello}})
	if err != nil {
		return nil, nil, err
	}
	if resp.GetChallenge() == nil {
		return nil, nil, errors.New("enrolling: the control plane sent no challenge")
	}
	proof, err := keys.prove(resp.GetChallenge().GetNonce(), csr)
	if err != nil {
		return nil, nil, fmt.Errorf("enrolling: %w", err)
	}
	resp, err = ask(stream, &sallyportv1.EnrollRequest{Message: &sallyportv1.EnrollRequest_Proof{Proof: proof}})
	if err != nil {
		return nil, nil, err
	}
	return resp.GetIssued(), key, nil
}

// ask sends one message and waits for the answer. Why a send failed is said by
// the receive.
func ask(stream sallyportv1.Enrollment_EnrollClient, msg *sallyportv1.EnrollRequest) (*sallyportv1.EnrollResponse, error) {
	sent := stream.Send(msg)
	resp, err := stream.Recv()
	if err == nil {
		err = sent
	}
	return resp, err
}

// newKey makes the key of the next SVID and a CSR that carries nothing but its
// public half.
func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("making an SVID key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("making a CSR: %w", err)
	}
	return key, csr, nil
}

// accept checks an issued SVID as a peer would and puts it in force. A newly
// registered enrolment key comes with it and replaces the earlier enrolment.
func (a *Agent) accept(msg *sallyportv1.SVID, key *ecdsa.PrivateKey, td spiffeid.TrustDomain, registered *pendingKey) error {
	chain, roots, err := readSVID(msg)
	if err != nil {
		return err
	}
	peer, err := identity.Verify(chain, x509bundle.FromX509Authorities(td, roots), a.cfg.Now())
	if err != nil {
		return fmt.Errorf("checking the issued SVID: %w", err)
	}
	a.mu.Lock()
	known := a.state.ID
	a.mu.Unlock()
	switch {
	case !key.PublicKey.Equal(peer.Leaf.PublicKey):
		return errors.New("checking the issued SVID: it is for another key")
	case identity.Reserved(peer.ID):
		return fmt.Errorf("checking the issued SVID: %s is not a workload", peer.ID)
	case registered == nil && peer.ID != known:
		return fmt.Errorf("checking the issued SVID: it is for %s, and this is %s", peer.ID, known)
	case msg.GetInstance() == "":
		return errors.New("checking the issued SVID: it names no instance")
	}
	err = a.update(func(s *state) {
		if registered != nil {
			s.enrolment = enrolment{ID: peer.ID, Instance: msg.GetInstance(), Token: registered.Token, key: registered.key}
			s.pending = pendingKey{}
			s.bundles = nil // of the mesh that the earlier enrolment was in
		}
		s.bundles = withRoots(s.bundles, td, roots)
		s.life = lifeOf(peer.Leaf, msg)
		a.live.SetBundles(s.bundles)
	})
	if err != nil && registered != nil {
		return permanent(err)
	}
	if err != nil {
		a.log.Warn("the trust bundle is in force, but not saved for the next start", "error", err)
	}
	a.install(&x509svid.SVID{ID: peer.ID, Certificates: chain, PrivateKey: key})
	return nil
}

// learnRoots notes the roots of the own trust domain as they came with an SVID.
func (a *Agent) learnRoots(roots []*x509.Certificate) {
	err := a.update(func(s *state) {
		bundles := withRoots(s.bundles, s.ID.TrustDomain(), roots)
		if !sameBundles(s.bundles, bundles) {
			s.bundles = bundles
			a.live.SetBundles(bundles)
		}
	})
	if err != nil {
		a.log.Warn("the trust bundle is in force, but not saved for the next start", "error", err)
	}
}

// withRoots replaces the X.509 authorities of one trust domain; its JWT
// authorities, and all of the others', come by push.
func withRoots(bundles identity.Bundles, td spiffeid.TrustDomain, roots []*x509.Certificate) identity.Bundles {
	out := maps.Clone(bundles)
	if out == nil {
		out = identity.Bundles{}
	}
	own := spiffebundle.New(td)
	if b := out[td]; b != nil {
		own = b.Clone()
	}
	own.SetX509Authorities(roots)
	out[td] = own
	return out
}

// readSVID takes an issued SVID apart; it verifies nothing.
func readSVID(msg *sallyportv1.SVID) (chain, roots []*x509.Certificate, err error) {
	if chain, err = parseCerts(msg.GetChain()); err != nil {
		return nil, nil, fmt.Errorf("reading the issued SVID: %w", err)
	}
	if roots, err = parseCerts(msg.GetBundle()); err != nil {
		return nil, nil, fmt.Errorf("reading the trust bundle: %w", err)
	}
	return chain, roots, nil
}

// lifeOf measures an SVID's life by the control plane's clock, which is the one
// that set its end.
func lifeOf(leaf *x509.Certificate, msg *sallyportv1.SVID) time.Duration {
	if msg.GetServerTime() == nil {
		return leaf.NotAfter.Sub(leaf.NotBefore)
	}
	return max(leaf.NotAfter.Sub(msg.GetServerTime().AsTime()), time.Second)
}

// install puts an SVID in force, after its bundle.
func (a *Agent) install(svid *x509svid.SVID) {
	leaf := svid.Certificates[0]
	a.live.SetSVID(svid)
	a.mu.Lock()
	first := a.status.NotAfter.IsZero()
	back := a.status.Detail != "" && !first
	a.status.NotAfter = leaf.NotAfter
	a.status.Detail, a.status.Since = "", time.Time{}
	if !first {
		a.status.Renewals++
	}
	a.mu.Unlock()
	switch {
	case first:
		a.log.Info("identity received", "spiffe_id", svid.ID, "instance", a.Instance(), "not_after", leaf.NotAfter)
		close(a.ready)
	case back:
		a.log.Info("identity renewed again", "not_after", leaf.NotAfter)
	default:
		a.log.Debug("identity renewed", "not_after", leaf.NotAfter)
	}
}

func parseCerts(ders [][]byte) ([]*x509.Certificate, error) {
	const most = 16
	if len(ders) == 0 || len(ders) > most {
		return nil, fmt.Errorf("%d certificates: want 1 to %d", len(ders), most)
	}
	certs, err := x509.ParseCertificates(bytes.Join(ders, nil))
	if err == nil && len(certs) != len(ders) {
		err = errors.New("several certificates in one field")
	}
	return certs, err
}
