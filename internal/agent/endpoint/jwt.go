package endpoint

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Limits of what goes into a token (api/sallyport/v1, IssueJWTRequest).
const (
	maxAudiences = 16
	maxAudience  = 1024 // bytes
)

// FetchJWTSVID issues JWT-SVIDs of the caller's own identities: of one, or without
// spiffe_id of all (SPIFFE Workload API 6.2.1).
func (w *workloadAPI) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if err := checkAudience(req.GetAudience()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	var only spiffeid.ID
	if req.GetSpiffeId() != "" {
		var err error
		if only, err = spiffeid.FromString(req.GetSpiffeId()); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
		}
	}
	caller, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	h, err := w.server.holding(ctx)
	if err != nil {
		return nil, err
	}
	resp := &workload.JWTSVIDResponse{}
	hints := hintsOf(h)
	for i, svid := range h.SVIDs {
		if !only.IsZero() && svid.ID != only {
			continue
		}
		token, err := w.server.holder.JWT(ctx, caller, svid.ID, req.GetAudience())
		if err != nil {
			return nil, toStatus(err)
		}
		resp.Svids = append(resp.Svids, &workload.JWTSVID{SpiffeId: svid.ID.String(), Svid: token, Hint: hints[i]})
	}
	if len(resp.Svids) == 0 {
		return nil, status.Errorf(codes.PermissionDenied, "%s is not an identity of this process", only)
	}
	return resp, nil
}

func checkAudience(audience []string) error {
	if n := len(audience); n == 0 || n > maxAudiences {
		return fmt.Errorf("%d audiences: want 1 to %d", n, maxAudiences)
	}
	for _, a := range audience {
		if a == "" || len(a) > maxAudience {
			return fmt.Errorf("audience of %d bytes: want 1 to %d", len(a), maxAudience)
		}
	}
	return nil
}

// ValidateJWTSVID checks a token completely, by the keys of its subject's own
// trust domain and no other (SPIFFE Workload API 6.2.3 and 6.3). A token that is
// not good is InvalidArgument.
func (w *workloadAPI) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if req.GetAudience() == "" || req.GetSvid() == "" {
		return nil, status.Error(codes.InvalidArgument, "audience and svid are required")
	}
	h, err := w.server.holding(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkTokenHeader(req.GetSvid()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	svid, err := jwtsvid.ParseAndValidate(req.GetSvid(), keySource(h.Bundles), []string{req.GetAudience()})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := w.server.notRevoked(svid); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	claims, err := structpb.NewStruct(svid.Claims)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "claims: %v", err)
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: svid.ID.String(), Claims: claims}, nil
}

// notRevoked asks about a valid token. One that does not say when it was issued
// counts as the oldest.
func (s *Server) notRevoked(svid *jwtsvid.SVID) error {
	if s.checkJWT == nil {
		return nil
	}
	var issued time.Time
	if at, ok := svid.Claims["iat"].(float64); ok {
		issued = time.Unix(int64(at), 0)
	}
	return s.checkJWT(svid.ID, issued)
}

// checkTokenHeader refuses what JWT-SVID section 2 does not allow in a header: a
// token that brings or names its own key is an attack, even where nobody looks at
// those fields.
func checkTokenHeader(token string) error {
	head, _, _ := strings.Cut(token, ".")
	raw, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil {
		return errors.New("not a token in compact form")
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return errors.New("not a token in compact form")
	}
	for name := range fields {
		switch name {
		case "alg", "kid", "typ":
		default:
			return fmt.Errorf("header %q: a JWT-SVID has alg, kid and typ only", name)
		}
	}
	return nil
}

// keySource gives the JWT keys of bundles.
type keySource identity.Bundles

// GetJWTBundleForTrustDomain implements jwtbundle.Source.
func (k keySource) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	if b := k[td]; b != nil {
		return b.GetJWTBundleForTrustDomain(td)
	}
	return nil, fmt.Errorf("no bundle for trust domain %s", td)
}
