package issuer

import (
	"context"
	"crypto"
	"encoding/hex"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// AppTTL bounds the life of SVIDs that go to apps, whose peers may receive no
// pushed revocation.
const AppTTL = time.Hour

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
	return &sallyportv1.RenewResponse{Svid: svid}, nil
}

func (s *Service) renew(ctx context.Context, req *sallyportv1.RenewRequest) (*sallyportv1.SVID, error) {
	caller, err := s.caller(ctx, &s.renewals)
	if err != nil {
		return nil, err
	}
	if err := checkMessage(req); err != nil {
		return nil, err
	}
	key, err := readCSR(req.GetCsr())
	if err != nil {
		return nil, err
	}
	inst, err := s.ownInstance(ctx, caller)
	if err != nil {
		return nil, err
	}
	is := issuance{inst: inst, key: key, action: audit.ActionRenew, actor: caller.ID.String(), detail: enrolledBy(inst)}
	if req.GetApp() {
		is.ttl, is.detail = AppTTL, "for its app; "+is.detail
	}
	return s.issue(ctx, is)
}

// caller is whose SVID this call came with, if it may call now: ration gives each
// instance its share.
func (s *Service) caller(ctx context.Context, ration *limiter) (identity.Peer, error) {
	caller, ok := identity.PeerFromContext(ctx)
	if !ok {
		return caller, errAnonymous
	}
	now := s.cfg.Now()
	if now.After(caller.Leaf.NotAfter) { // the connection may be older than that
		return caller, fmt.Errorf("%w at %s; enrol again", errExpired, caller.Leaf.NotAfter.Format(time.RFC3339))
	}
	if instance := ca.Instance(caller.Leaf); !ration.allow(instance, now) {
		return caller, fmt.Errorf("instance %s: %w", instance, errTooOften)
	}
	return caller, nil
}

// ownInstance is the caller's, if it may have more for itself: what an agent
// vouches for is issued through the agent, which says so anew each time.
func (s *Service) ownInstance(ctx context.Context, caller identity.Peer) (registry.Instance, error) {
	inst, err := s.cfg.Registry.Entitlement(ctx, caller.ID, ca.Instance(caller.Leaf))
	if err == nil && inst.Vouched() {
		err = fmt.Errorf("instance %s: %w", inst.Name, registry.ErrVouched)
	}
	return inst, err
}

func enrolledBy(inst registry.Instance) string {
	return fmt.Sprintf("instance %s, enrolled by %s", inst.Name, inst.Evidence())
}

// issuance is one SVID to make.
type issuance struct {
	inst   registry.Instance
	key    crypto.PublicKey
	ttl    time.Duration // zero: the CA's
	action string        // for the audit log, as are the others
	actor  string
	detail string
}

// issue makes an SVID and records it: none leaves unrecorded.
func (s *Service) issue(ctx context.Context, is issuance) (*sallyportv1.SVID, error) {
	if s.cfg.ShortLived != nil && s.cfg.ShortLived(is.inst.ID) && (is.ttl == 0 || is.ttl > AppTTL) {
		is.ttl = AppTTL
	}
	issued, err := s.cfg.CA.Issue(ctx, ca.Request{ID: is.inst.ID, Key: is.key, Instance: is.inst.Name, TTL: is.ttl})
	if err != nil {
		return nil, err
	}
	leaf, origin := issued.Chain[0], originOf(ctx)
	serial := hex.EncodeToString(leaf.SerialNumber.Bytes())
	if err := s.cfg.Registry.Record(ctx, is.inst, registry.Issuance{
		Action: is.action, Actor: is.actor, Origin: origin, Detail: is.detail, Result: "serial " + serial,
		Serial: serial, NotAfter: leaf.NotAfter,
	}); err != nil {
		return nil, err
	}
	if is.action == audit.ActionIssue {
		s.log.Info("enrolled", "spiffe_id", is.inst.ID, "instance", is.inst.Name, "evidence", is.inst.Kind, "serial", serial, "origin", origin)
	} else {
		s.log.Debug("issued", "spiffe_id", is.inst.ID, "instance", is.inst.Name, "caller", is.actor, "serial", serial)
	}
	msg := &sallyportv1.SVID{SpiffeId: is.inst.ID.String(), Instance: is.inst.Name, ServerTime: timestamppb.New(s.cfg.Now())}
	for _, c := range issued.Chain {
		msg.Chain = append(msg.Chain, c.Raw)
	}
	for _, c := range issued.Bundle {
		msg.Bundle = append(msg.Bundle, c.Raw)
	}
	return msg, nil
}
