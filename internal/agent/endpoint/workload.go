package endpoint

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// workloadAPI implements the SPIFFE Workload API. What it does not implement, such
// as the Incubating WIT-SVIDs, answers Unimplemented (SPIFFE Workload API 7).
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	server *Server
}

// FetchX509SVID sends all of the caller's SVIDs, and again with each change.
func (w *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(w.server, stream, x509SVIDs)
}

// FetchX509Bundles sends all bundles, the own trust domain's included, and again
// with each change.
func (w *workloadAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(w.server, stream, x509Bundles)
}

// FetchJWTBundles sends all JWT bundles, and again with each change.
func (w *workloadAPI) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return follow(w.server, stream, jwtBundles)
}

// message is a pointer to a protobuf message T.
type message[T any] interface {
	*T
	proto.Message
}

// follow sends what make makes of the caller's holding, at once and whenever it
// has become another.
func follow[T any, M message[T]](s *Server, stream grpc.ServerStreamingServer[T], build func(*Holding) (M, error)) error {
	var sent M
	return s.eachHolding(stream.Context(), func(h *Holding) error {
		msg, err := build(h)
		if err != nil {
			return err
		}
		if sent != nil && proto.Equal(sent, msg) {
			return nil
		}
		sent = msg
		return stream.Send((*T)(msg))
	})
}

// eachHolding calls do with what the caller holds and again after each change,
// until do fails, ctx ends, the endpoint stops, or the caller loses its identity.
func (s *Server) eachHolding(ctx context.Context, do func(*Holding) error) error {
	feed, err := s.hold(ctx)
	if err != nil {
		return err
	}
	for {
		h, news, err := feed.Get()
		if err != nil {
			return toStatus(err)
		}
		if h != nil {
			if err := do(h); err != nil {
				return toStatus(err)
			}
		}
		if err := s.await(ctx, news); err != nil {
			return err
		}
	}
}

func (s *Server) hold(ctx context.Context) (*Feed, error) {
	caller, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	feed, err := s.holder.Hold(ctx, caller)
	return feed, toStatus(err)
}

func (s *Server) await(ctx context.Context, news <-chan struct{}) error {
	select {
	case <-news:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	case <-s.stopping:
		return status.Error(codes.Unavailable, "the agent is stopping")
	}
}

// holding waits for what the caller holds now.
func (s *Server) holding(ctx context.Context) (*Holding, error) {
	feed, err := s.hold(ctx)
	if err != nil {
		return nil, err
	}
	for {
		h, news, err := feed.Get()
		if h != nil || err != nil {
			return h, toStatus(err)
		}
		if err := s.await(ctx, news); err != nil {
			return nil, err
		}
	}
}

// toStatus is the code of what a Holder says. Whoever has no identity is told so;
// of all else it can be hoped that it passes.
func toStatus(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrDenied):
		return status.Error(codes.PermissionDenied, err.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Unavailable, err.Error())
}

// hintsOf gives each SVID's hint. They are unique: of several that are the same
// the first SVID has it (SPIFFE Workload API 5.2.1).
func hintsOf(h *Holding) []string {
	out := make([]string, len(h.SVIDs))
	for i, svid := range h.SVIDs {
		if !slices.Contains(out, svid.Hint) {
			out[i] = svid.Hint
		}
	}
	return out
}

func x509SVIDs(h *Holding) (*workload.X509SVIDResponse, error) {
	if len(h.SVIDs) == 0 {
		return nil, ErrDenied
	}
	resp := &workload.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
	own := map[spiffeid.TrustDomain]bool{}
	hints := hintsOf(h)
	for i, svid := range h.SVIDs {
		td := svid.ID.TrustDomain()
		own[td] = true
		bundle := h.Bundles[td]
		if bundle == nil || len(bundle.X509Authorities()) == 0 {
			return nil, fmt.Errorf("no bundle of trust domain %s yet", td)
		}
		chain, key, err := svid.MarshalRaw()
		if err != nil {
			return nil, fmt.Errorf("encoding the SVID of %s: %w", svid.ID, err)
		}
		resp.Svids = append(resp.Svids, &workload.X509SVID{
			SpiffeId: svid.ID.String(), X509Svid: chain, X509SvidKey: key,
			Bundle: joinDER(bundle.X509Authorities()), Hint: hints[i],
		})
	}
	for td, der := range derBundles(h.Bundles) {
		if !own[td] {
			resp.FederatedBundles[td.IDString()] = der
		}
	}
	return resp, nil
}

func x509Bundles(h *Holding) (*workload.X509BundlesResponse, error) {
	resp := &workload.X509BundlesResponse{Bundles: map[string][]byte{}}
	for td, der := range derBundles(h.Bundles) {
		resp.Bundles[td.IDString()] = der
	}
	return resp, nil
}

// derBundles leaves out trust domains without X.509 authorities: an empty bundle
// would be an error to some clients, and they trust nothing of them either way.
func derBundles(bundles identity.Bundles) map[spiffeid.TrustDomain][]byte {
	out := make(map[spiffeid.TrustDomain][]byte, len(bundles))
	for td, b := range bundles {
		if roots := b.X509Authorities(); len(roots) > 0 {
			out[td] = joinDER(roots)
		}
	}
	return out
}

func joinDER(certs []*x509.Certificate) []byte {
	ders := make([][]byte, len(certs))
	for i, c := range certs {
		ders[i] = c.Raw
	}
	return bytes.Join(ders, nil)
}

func jwtBundles(h *Holding) (*workload.JWTBundlesResponse, error) {
	resp := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
	for td, b := range h.Bundles {
		if len(b.JWTAuthorities()) == 0 {
			continue
		}
		keys, err := b.JWTBundle().Marshal() // JWT keys only (SPIFFE Workload API 6.2.2)
		if err != nil {
			return nil, fmt.Errorf("encoding the JWT bundle of %s: %w", td, err)
		}
		resp.Bundles[td.IDString()] = keys
	}
	return resp, nil
}
