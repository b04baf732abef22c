// Package issuer is the enrolment service: evidence in, X.509-SVID out.
//
// It only conducts the dialogue. What evidence is worth is package attest's, who
// may be whom is package registry's, and signing is package ca's. It verifies no
// peers either: the server in front of it does, and puts the caller into the
// context ([identity.ContextWithPeer]) for every RPC but Enroll.
package issuer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/peer"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
)

const (
	// enrollDeadline is how long one enrolment may take, and silence how long the
	// client may be silent when it is its turn.
	enrollDeadline = 10 * time.Second
	silence        = 3 * time.Second
	// maxEnrolling bounds the enrolments in progress after their Hello.
	maxEnrolling = 512
)

// Config configures a [Service]. CA and Registry are required.
type Config struct {
	CA       *ca.CA
	Registry *registry.Registry
	// Who may vouch, by the name that the control plane's configuration gives. A
	// kind for which there is nobody is refused.
	X509Pop          map[string]*attest.X509Pop
	Kubernetes, OIDC map[string]TokenVerifier
	// ShortLived reports whether somebody verifies the SVIDs of an ID who receives no
	// revocations: they live [AppTTL] at most. Nil: nobody's are.
	ShortLived func(spiffeid.ID) bool

	Now func() time.Time // nil: time.Now
	Log hclog.Logger     // nil: discard
}

// Service implements the Enrollment gRPC service.
type Service struct {
	sallyportv1.UnimplementedEnrollmentServer
	cfg      Config
	log      hclog.Logger
	lobby    lobby         // streams that have no Hello yet
	unproven lobby         // streams that have no Proof yet, of evidence that is unchecked until then
	slots    chan struct{} // one per enrolment in progress
	deadline time.Duration
	silence  time.Duration

	// Of newcomers by their evidence, of all others by instance.
	newcomers, enrolments, renewals, processes limiter
	outside                                    gate // to those who know what tokens are worth

	refusals *rate.Limiter // of log lines
	unlogged atomic.Uint64 // refusals since the last line
}

var _ sallyportv1.EnrollmentServer = (*Service)(nil)

// New makes a Service.
func New(cfg Config) *Service {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	return &Service{
		cfg: cfg, log: cfg.Log.Named("issuer"),
		slots: make(chan struct{}, maxEnrolling), deadline: enrollDeadline, silence: silence,
		newcomers:  limiter{rate: rate.Every(newcomerEvery), burst: newcomerBurst},
		enrolments: limiter{rate: rate.Every(enrollEvery), burst: enrollBurst},
		renewals:   limiter{rate: renewRate, burst: renewBurst},
		processes:  limiter{rate: processRate, burst: processBurst},
		outside:    gate{slots: make(chan struct{}, maxOutside)},
		refusals:   rate.NewLimiter(refusalRate, refusalRate),
	}
}

// Enroll conducts one enrolment: Hello, Challenge, Proof, Issued, and nothing
// else in between. It ends after 10 seconds, or 3 of silence, whatever the client
// does.
func (s *Service) Enroll(stream sallyportv1.Enrollment_EnrollServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), s.deadline)
	defer cancel()
	origin := originOf(ctx)
	if err := s.enroll(ctx, dialogue{stream, s.silence}, origin); err != nil {
		s.refused("enrolment refused", origin, err)
		return toStatus(err)
	}
	return nil
}

func (s *Service) enroll(ctx context.Context, d dialogue, origin string) error {
	msg, err := s.recvIn(ctx, d, &s.lobby, origin)
	if err != nil {
		return err
	}
	// Not before: a slot is for those who said something.
	leave, err := s.slot()
	if err != nil {
		return err
	}
	defer func() { leave() }()
	h, err := s.readHello(msg)
	if err != nil {
		return err
	}
	ev, err := s.evidence(ctx, h)
	if err != nil {
		return err
	}
	nonce, err := attest.NewNonce()
	if err != nil {
		return err
	}
	if err := d.challenge(nonce); err != nil {
		return err
	}
	if ev.checked {
		msg, err = d.recv(ctx)
	} else { // anyone can come as far as this, so not with a slot
		leave()
		msg, err = s.recvIn(ctx, d, &s.unproven, origin)
		var busy error
		if leave, busy = s.slot(); busy != nil {
			return errors.Join(err, busy)
		}
	}
	if err != nil {
		return err
	}
	proof, err := readProof(msg, ev.kind)
	if err != nil {
		return err
	}
	if err := attest.CheckProof(ev.key, nonce, h.csr, proof.GetSignature()); err != nil {
		return err
	}
	inst, err := ev.accept(ctx, answer{origin, nonce, proof.GetEvidenceSignature()})
	if err != nil {
		return err
	}
	if !s.enrolments.allow(inst.Name, s.cfg.Now()) {
		return fmt.Errorf("instance %s: %w", inst.Name, errTooOften)
	}
	is := issuance{inst: inst, key: h.key, action: audit.ActionIssue, actor: inst.ID.String()}
	is.detail = fmt.Sprintf("by %s, instance %s", inst.Evidence(), inst.Name)
	if ev.kind == attest.KindEnrollmentKey {
		is.detail = fmt.Sprintf("by %s, %s", ev.kind, enrolledBy(inst))
	}
	svid, err := s.issue(ctx, is)
	if err != nil {
		return err
	}
	return d.issued(svid)
}

// recvIn waits for the next message in a lobby.
func (s *Service) recvIn(ctx context.Context, d dialogue, l *lobby, origin string) (*sallyportv1.EnrollRequest, error) {
	ctx, leave := l.enter(ctx, hostOf(origin))
	defer leave()
	return d.recv(ctx)
}

// slot takes one of the slots, or says that none is free. leave is never nil.
func (s *Service) slot() (leave func(), err error) {
	select {
	case s.slots <- struct{}{}:
		return sync.OnceFunc(func() { <-s.slots }), nil
	default:
		return func() {}, errBusy
	}
}

// refused logs a refusal, and counts those for which there is no line.
func (s *Service) refused(message, origin string, reason error) {
	if !s.refusals.AllowN(s.cfg.Now(), 1) {
		s.unlogged.Add(1)
		return
	}
	facts := []any{"origin", origin, "reason", reason, "unlogged_before", s.unlogged.Swap(0)}
	if none, ok := errors.AsType[*registry.NoMatchError](reason); ok {
		facts = append(facts, "nearest", none.Nearest())
	}
	s.log.Info(message, facts...)
}

func originOf(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr.String()
	}
	return "unknown"
}

// dialogue is the server's side of an Enroll stream.
type dialogue struct {
	stream  sallyportv1.Enrollment_EnrollServer
	silence time.Duration // how long the client may be silent
}

// recv waits for the next message until silence is over or ctx ends. gRPC has no receive with a
// deadline: when ctx ends first, the goroutine here ends with the stream, which
// the caller ends by returning.
func (d dialogue) recv(ctx context.Context) (*sallyportv1.EnrollRequest, error) {
	ctx, cancel := context.WithTimeout(ctx, d.silence)
	defer cancel()
	type result struct {
		msg *sallyportv1.EnrollRequest
		err error
	}
	got := make(chan result, 1)
	go func() {
		msg, err := d.stream.Recv()
		got <- result{msg, err}
	}()
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case r := <-got:
		if errors.Is(r.err, io.EOF) {
			return nil, malformed("the client ended the enrolment half-way")
		}
		if r.err != nil {
			return nil, streamError{r.err}
		}
		return r.msg, nil
	}
}

func (d dialogue) challenge(nonce []byte) error {
	return d.send(&sallyportv1.EnrollResponse{Message: &sallyportv1.EnrollResponse_Challenge{
		Challenge: &sallyportv1.Challenge{Nonce: nonce},
	}})
}

func (d dialogue) issued(svid *sallyportv1.SVID) error {
	return d.send(&sallyportv1.EnrollResponse{Message: &sallyportv1.EnrollResponse_Issued{Issued: svid}})
}

func (d dialogue) send(msg *sallyportv1.EnrollResponse) error {
	if err := d.stream.Send(msg); err != nil {
		return streamError{err}
	}
	return nil
}

// streamError is what gRPC said of the stream itself; it is a status already.
type streamError struct{ error }
