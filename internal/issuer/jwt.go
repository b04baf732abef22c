package issuer

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
)

// maxAudienceText is how much of a token's audiences the audit log shows, in bytes.
const maxAudienceText = 256

// maxJWTMessage leaves room for all audiences beside a process.
const maxJWTMessage = MaxMessage + ca.MaxAudiences*(ca.MaxAudience+8)

// IssueJWT issues a JWT-SVID to its subject: the caller's own instance, or a
// process for which the caller, an agent, vouches as in IssueFor.
func (s *Service) IssueJWT(ctx context.Context, req *sallyportv1.IssueJWTRequest) (*sallyportv1.IssueJWTResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, s.deadline)
	defer cancel()
	resp, err := s.issueJWT(ctx, req)
	if err != nil {
		s.refused("JWT-SVID refused", originOf(ctx), err)
		return nil, toStatus(err)
	}
	return resp, nil
}

func (s *Service) issueJWT(ctx context.Context, req *sallyportv1.IssueJWTRequest) (*sallyportv1.IssueJWTResponse, error) {
	// One share for both: an agent asks for its processes, a sidecar for its app.
	caller, err := s.caller(ctx, &s.processes)
	if err != nil {
		return nil, err
	}
	if err := checkMessageUpTo(req, maxJWTMessage); err != nil {
		return nil, err
	}
	if err := ca.CheckAudience(req.GetAudience()); err != nil {
		return nil, malformed("%v", err)
	}
	var inst registry.Instance
	var detail string
	if req.GetProcess() == nil {
		if inst, err = s.ownInstance(ctx, caller); err != nil {
			return nil, err
		}
		detail = enrolledBy(inst)
	} else {
		if inst, err = s.vouched(ctx, caller, req.GetProcess()); err != nil {
			return nil, err
		}
		detail = vouchedBy(inst)
	}
	jwt, err := s.cfg.CA.IssueJWT(ctx, ca.JWTRequest{ID: inst.ID, Audience: req.GetAudience()})
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Registry.Record(ctx, inst, registry.Issuance{
		Action: audit.ActionJWT, Actor: caller.ID.String(), Origin: originOf(ctx),
		Detail: fmt.Sprintf("for %.*q, %s", maxAudienceText, strings.Join(req.GetAudience(), " "), detail),
		Result: fmt.Sprintf("jti %s, until %s", jwt.ID, jwt.Expires.UTC().Format(time.RFC3339)),
	}); err != nil {
		return nil, err
	}
	s.log.Debug("issued a JWT-SVID", "spiffe_id", inst.ID, "instance", inst.Name, "caller", caller.ID, "jti", jwt.ID)
	return &sallyportv1.IssueJWTResponse{SpiffeId: inst.ID.String(), Token: jwt.Token, Expires: timestamppb.New(jwt.Expires)}, nil
}
