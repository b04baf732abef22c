// Package issuer is the enrolment service: evidence in, X.509-SVID out.
//
// It only conducts the dialogue. What evidence is worth is package attest's, who
// may be whom is package registry's, and signing is package ca's. It verifies no
// peers either: the server in front of it does, and puts the caller into the
// context ([identity.ContextWithPeer]) for every RPC but Enroll.
package issuer

import (
	"context"
	"crypto"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	// enrollDeadline is how long one enrolment may take, and silence how long the
	// client may be silent when it is its turn.
	enrollDeadline = 10 * time.Second
	silence        = 3 * time.Second
	// maxEnrolling bounds the enrolments in progress after their Hello.
	maxEnrolling = 512
)

// Config configures a [Service]. CA, Registry and Audit are required.
type Config struct {
	CA       *ca.CA
	Registry *registry.Registry
	Audit    *audit.Log
	Now      func() time.Time // nil: time.Now
	Log      hclog.Logger     // nil: discard
}

// Service implements the Enrollment gRPC service.
type Service struct {
	sallyportv1.UnimplementedEnrollmentServer
	cfg      Config
	log      hclog.Logger
	lobby    lobby         // streams that have no Hello yet
	slots    chan struct{} // one per enrolment in progress
	deadline time.Duration
	silence  time.Duration

	enrolments, renewals limiter
	refusals             *rate.Limiter // of log lines
	unlogged             atomic.Uint64 // refusals since the last line
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
		enrolments: limiter{rate: rate.Every(enrollEvery), burst: enrollBurst},
		renewals:   limiter{rate: renewRate, burst: renewBurst},
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
	msg, err := s.recvHello(ctx, d, origin)
	if err != nil {
		return err
	}
	// Not before: a slot is for those who said something.
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		return errBusy
	}
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
	if msg, err = d.recv(ctx); err != nil {
		return err
	}
	signature, err := readProof(msg)
	if err != nil {
		return err
	}
	if err := attest.CheckProof(ev.key, nonce, h.csr, signature); err != nil {
		return err
	}
	inst, err := ev.accept(ctx, origin)
	if err != nil {
		return err
	}
	if !s.enrolments.allow(inst.Name, s.cfg.Now()) {
		return fmt.Errorf("instance %s: %w", inst.Name, errTooOften)
	}
	svid, err := s.issue(ctx, inst.ID, inst.Name, h.key)
	if err != nil {
		return err
	}
	// Recorded before it is sent: no SVID of an enrolment leaves unrecorded.
	if err := s.cfg.Audit.Append(ctx, audit.Record{
		Actor: inst.ID.String(), Origin: origin, Action: audit.ActionIssue, Subject: inst.ID.String(),
		Detail: "by " + ev.kind + ", instance " + inst.Name, Result: "serial " + svid.serial,
	}); err != nil {
		return err
	}
	s.log.Info("enrolled", "spiffe_id", inst.ID, "instance", inst.Name, "evidence", ev.kind, "serial", svid.serial, "origin", origin)
	return d.issued(svid.SVID)
}

func (s *Service) recvHello(ctx context.Context, d dialogue, origin string) (*sallyportv1.EnrollRequest, error) {
	ctx, leave := s.lobby.enter(ctx, hostOf(origin))
	defer leave()
	return d.recv(ctx)
}

// refused logs a refusal, and counts those for which there is no line.
func (s *Service) refused(message, origin string, reason error) {
	if !s.refusals.AllowN(s.cfg.Now(), 1) {
		s.unlogged.Add(1)
		return
	}
	s.log.Info(message, "origin", origin, "reason", reason, "unlogged_before", s.unlogged.Swap(0))
}

// Renew issues a new SVID to the caller for a fresh key. The instance is the one
// that the caller's present certificate was issued to (see [ca.Instance]): it is
// signed by the CA, so an instance cannot renew as another one, and removing an
// instance ends its renewals whatever it says of itself.
func (s *Service) Renew(ctx context.Context, req *sallyportv1.RenewRequest) (*sallyportv1.RenewResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, s.deadline)
	defer cancel()
	svid, err := s.renew(ctx, req)
	if err != nil {
		s.refused("renewal refused", originOf(ctx), err)
		return nil, toStatus(err)
	}
	return &sallyportv1.RenewResponse{Svid: svid.SVID}, nil
}

func (s *Service) renew(ctx context.Context, req *sallyportv1.RenewRequest) (*issuedSVID, error) {
	caller, ok := identity.PeerFromContext(ctx)
	if !ok {
		return nil, errAnonymous
	}
	if now := s.cfg.Now(); now.After(caller.Leaf.NotAfter) { // the connection may be older than that
		return nil, fmt.Errorf("%w at %s; enrol again", errExpired, caller.Leaf.NotAfter.Format(time.RFC3339))
	}
	instance := ca.Instance(caller.Leaf)
	if !s.renewals.allow(instance, s.cfg.Now()) {
		return nil, fmt.Errorf("instance %s: %w", instance, errTooOften)
	}
	if err := checkMessage(req); err != nil {
		return nil, err
	}
	key, err := readCSR(req.GetCsr())
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Registry.Entitled(ctx, caller.ID, instance); err != nil {
		return nil, err
	}
	svid, err := s.issue(ctx, caller.ID, instance, key)
	if err != nil {
		return nil, err
	}
	s.log.Debug("renewed", "spiffe_id", caller.ID, "instance", instance, "serial", svid.serial)
	return svid, nil
}

type issuedSVID struct {
	*sallyportv1.SVID
	serial string
}

func (s *Service) issue(ctx context.Context, id spiffeid.ID, instance string, key crypto.PublicKey) (*issuedSVID, error) {
	issued, err := s.cfg.CA.Issue(ctx, ca.Request{ID: id, Key: key, Instance: instance})
	if err != nil {
		return nil, err
	}
	msg := &sallyportv1.SVID{SpiffeId: id.String(), Instance: instance, ServerTime: timestamppb.New(s.cfg.Now())}
	for _, c := range issued.Chain {
		msg.Chain = append(msg.Chain, c.Raw)
	}
	for _, c := range issued.Bundle {
		msg.Bundle = append(msg.Bundle, c.Raw)
	}
	return &issuedSVID{msg, hex.EncodeToString(issued.Chain[0].SerialNumber.Bytes())}, nil
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
