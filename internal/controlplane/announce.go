package controlplane

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// withdrawTimeout bounds the store write that follows the end of a stream.
const withdrawTimeout = 5 * time.Second

// announcer serves Announce: an endpoint is published as long as its stream
// lives, and may name only what the caller's SVID entitles it to.
type announcer struct {
	sallyportv1.UnimplementedAnnouncerServer
	endpoints *endpoints
	ranges    []netip.Prefix
	ports     func(spiffeid.ID) ([]policy.Port, bool) // declared ports of a workload
	instance  func(context.Context, identity.Peer) (string, error)
	log       hclog.Logger
	slots     slots

	mu    sync.Mutex
	lost  chan struct{} // guarded by mu; closed when every stream has to announce again
	drain chan struct{} // closed when the control plane stops
}

func (a *announcer) lostChan() chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.lost == nil {
		a.lost = make(chan struct{})
	}
	return a.lost
}

// reannounce ends every stream; sidecars come back and announce again.
func (a *announcer) reannounce() {
	lost := a.lostChan()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.lost == lost {
		a.lost = nil
		close(lost)
	}
}

// Announce implements the RPC.
func (a *announcer) Announce(stream sallyportv1.Announcer_AnnounceServer) error {
	ctx := stream.Context()
	caller, ok := identity.PeerFromContext(ctx)
	if !ok {
		return status.Error(codes.Unauthenticated, "Announce needs an SVID")
	}
	instance, err := a.instance(ctx, caller)
	if err != nil {
		return status.Errorf(codes.PermissionDenied, "announcing: %v", err)
	}
	observed, err := observedAddr(ctx)
	if err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	s := &announceStream{
		a: a, stream: stream, caller: caller.ID, instance: instance, observed: observed,
		again: make(chan struct{}, 1), replaced: make(chan struct{}),
	}
	s.limit = a.slots.enter(s)
	defer a.slots.leave(s) // after the endpoint is withdrawn
	defer s.end()

	requests, errs := make(chan *sallyportv1.AnnounceRequest), make(chan error, 1)
	go receive(ctx, stream, requests, errs)
	lost := a.lostChan()
	for {
		select {
		case req := <-requests:
			if err := s.handle(ctx, req); err != nil {
				return err
			}
		case err := <-errs:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-s.again:
			if err := s.republish(ctx); err != nil {
				return err
			}
		case <-s.replaced:
			return status.Errorf(codes.ResourceExhausted, "instance %s has opened %d newer streams", instance, maxStreamsPerInstance)
		case <-lost:
			return status.Error(codes.Unavailable, "announce again")
		case <-a.drain:
			s.keep = true
			return status.Error(codes.Unavailable, "control plane is stopping")
		}
	}
}

// receive feeds a select loop; it ends with the stream's context.
func receive(ctx context.Context, stream sallyportv1.Announcer_AnnounceServer, out chan<- *sallyportv1.AnnounceRequest, errs chan<- error) {
	for {
		req, err := stream.Recv()
		if err != nil {
			errs <- err
			return
		}
		select {
		case out <- req:
		case <-ctx.Done():
			return
		}
	}
}

// announceStream is one sidecar's stream; its goroutine owns it.
type announceStream struct {
	a        *announcer
	stream   sallyportv1.Announcer_AnnounceServer
	caller   spiffeid.ID
	instance string
	observed netip.Addr

	limit     *rate.Limiter
	again     chan struct{} // one slot: a newer stream of this instance has ended
	replaced  chan struct{} // closed when the instance has too many streams
	published record
	rev       int64 // of published; zero: nothing is
	keep      bool  // leave the endpoint in place when the stream ends
}

func (s *announceStream) handle(ctx context.Context, req *sallyportv1.AnnounceRequest) error {
	if req.GetDraining() {
		if err := s.withdraw(ctx); err != nil {
			return status.Errorf(codes.Unavailable, "withdrawing the endpoint: %v", err)
		}
		return s.stream.Send(&sallyportv1.AnnounceResponse{})
	}
	r, err := s.check(req)
	if err != nil {
		return err
	}
	if err := s.limit.Wait(ctx); err != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	if s.rev != 0 && r.key() != s.published.key() {
		if err := s.withdraw(ctx); err != nil {
			return status.Errorf(codes.Unavailable, "withdrawing the endpoint: %v", err)
		}
	}
	if err := s.publish(ctx, r); err != nil {
		return err
	}
	return s.stream.Send(&sallyportv1.AnnounceResponse{Published: r.Addr.String()})
}

func (s *announceStream) publish(ctx context.Context, r record) error {
	rev, err := s.a.endpoints.publish(ctx, r)
	if err != nil {
		return status.Errorf(codes.Unavailable, "publishing the endpoint: %v", err)
	}
	s.published, s.rev = r, rev
	s.a.log.Debug("endpoint announced", "id", s.caller, "instance", s.instance, "address", r.Addr)
	return nil
}

// republish says again what a newer stream, now over, had replaced.
func (s *announceStream) republish(ctx context.Context) error {
	if s.rev == 0 {
		return nil
	}
	return s.publish(ctx, s.published)
}

// check holds the request against what the caller may say.
func (s *announceStream) check(req *sallyportv1.AnnounceRequest) (record, error) {
	addr := s.observed
	if req.GetAddress() != "" {
		var err error
		if addr, err = netip.ParseAddr(req.GetAddress()); err != nil {
			return record{}, status.Errorf(codes.InvalidArgument, "address %q: want an IP address", req.GetAddress())
		}
		addr = addr.Unmap()
		inRange := slices.ContainsFunc(s.a.ranges, func(p netip.Prefix) bool { return p.Contains(addr) })
		if addr != s.observed && !inRange {
			return record{}, status.Errorf(codes.PermissionDenied,
				"address %s: this connection comes from %s, and the control plane's announce.ranges do not cover it", addr, s.observed)
		}
	}
	if req.GetTunnelPort() == 0 || req.GetTunnelPort() > 65535 {
		return record{}, status.Errorf(codes.InvalidArgument, "tunnel_port %d: want 1 to 65535", req.GetTunnelPort())
	}
	declared, ok := s.a.ports(s.caller)
	if !ok {
		return record{}, status.Errorf(codes.PermissionDenied, "no Workload has the ID %s", s.caller)
	}
	ports := make([]uint16, 0, len(declared))
	for _, p := range req.GetPorts() {
		if !slices.ContainsFunc(declared, func(d policy.Port) bool { return uint32(d.Number) == p }) {
			return record{}, status.Errorf(codes.PermissionDenied, "port %d is not declared by the Workload of %s", p, s.caller)
		}
		ports = append(ports, uint16(p))
	}
	slices.Sort(ports)
	return record{
		ID: s.caller.String(), Instance: s.instance,
		Addr: netip.AddrPortFrom(addr, uint16(req.GetTunnelPort())), Ports: slices.Compact(ports),
	}, nil
}

func (s *announceStream) withdraw(ctx context.Context) error {
	if s.rev == 0 {
		return nil
	}
	if err := s.a.endpoints.withdraw(ctx, s.published, s.rev); err != nil {
		return err
	}
	s.rev = 0
	return nil
}

// end withdraws what is still published. The stream's context is over by now.
// When the control plane itself stops, endpoints stay: their sidecars live on
// and will announce again.
func (s *announceStream) end() {
	if s.keep {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.stream.Context()), withdrawTimeout)
	defer cancel()
	if err := s.withdraw(ctx); err != nil {
		s.a.log.Warn("withdrawing an endpoint; it stays until its lease ends", "id", s.caller, "error", err)
	}
}

func observedAddr(ctx context.Context) (netip.Addr, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return netip.Addr{}, errors.New("no transport information")
	}
	t, ok := p.Addr.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}, errors.New("not a TCP connection")
	}
	return t.AddrPort().Addr().Unmap(), nil
}
