package xds

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// ServerConfig sets up a [Server]. The zero value of each field but Log is
// usable.
type ServerConfig struct {
	Log hclog.Logger // required
	// InstanceOf reads the instance out of the caller's certificate. A node that
	// claims another one is refused, and an instance holds at most three streams:
	// one more ends its oldest. Nil believes the claim.
	InstanceOf func(identity.Peer) string
	Now        func() time.Time // default time.Now

	// AnswerTimeout is how long a node may take to receive and answer one
	// response before its stream is cut. Default 30 s.
	AnswerTimeout time.Duration
	// SubscribeTimeout is how long after opening a stream may take to ask for
	// all types before [Server.WaitAcked] goes on without it. Default 10 s.
	SubscribeTimeout time.Duration
	// MaxStreams is how many streams one identity may hold. Default 1,000, so
	// the number of instances of one workload at one control plane.
	MaxStreams int
	// MaxSubscriptions is how many names, over all types, one stream may ask
	// for or declare to hold. Default 10,000.
	MaxSubscriptions int
}

// Server serves ADS, delta to sidecars and state of the world to gRPC without
// sidecar: to each node what its own identity needs, cut from
// the newest [Snapshot]. Who the node is, its certificate says; what it claims
// in its requests only names its instance. An identity that is no workload of
// the snapshot is sent the bundles and otherwise the empty view, which lets
// nothing in.
//
// Streams share nothing that they lock for longer than a map access. A change
// sets each stream's one-slot mailbox; the stream then compares the newest
// snapshot with what its node holds, so any number of changes while a node is
// busy become one response.
type Server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer

	cfg     ServerConfig
	current atomic.Pointer[prepared] // nil before the first snapshot
	publish sync.Mutex               // serialises SetSnapshot
	running sync.WaitGroup           // handlers and their goroutines

	mu      sync.Mutex
	closed  bool                       // guarded by mu
	streams map[*stream]struct{}       // guarded by mu
	held    map[spiffeid.ID]int        // guarded by mu :: identity → its open streams
	proved  map[holder][]*stream       // guarded by mu :: instance → its streams, oldest first; only with cfg.InstanceOf
	waiters map[chan struct{}]struct{} // guarded by mu; one-slot, told of each status change
}

// holder is an instance as its certificate proves it.
type holder struct {
	id        spiffeid.ID
	instance  string
	proxyless bool // not its sidecar
}

// most is how many streams it may hold. gRPC opens one for each target.
func (h holder) most() int {
	if h.proxyless {
		return maxProxyless
	}
	return maxSiblings
}

func (st *stream) holder() holder { return holder{st.peer.ID, st.instance, st.status.Proxyless} }

var _ discoveryv3.AggregatedDiscoveryServiceServer = (*Server)(nil)

// NewServer returns a server without a snapshot: until [Server.SetSnapshot]
// nodes may connect but are sent nothing.
func NewServer(cfg ServerConfig) *Server {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.AnswerTimeout == 0 {
		cfg.AnswerTimeout = 30 * time.Second
	}
	if cfg.SubscribeTimeout == 0 {
		cfg.SubscribeTimeout = 10 * time.Second
	}
	if cfg.MaxStreams == 0 {
		cfg.MaxStreams = 1000
	}
	if cfg.MaxSubscriptions == 0 {
		cfg.MaxSubscriptions = 10_000
	}
	return &Server{
		cfg:     cfg,
		streams: make(map[*stream]struct{}),
		held:    make(map[spiffeid.ID]int),
		proved:  make(map[holder][]*stream),
		waiters: make(map[chan struct{}]struct{}),
	}
}

// SetSnapshot makes snap what every node's view is cut from. It marshals what
// is new and returns; the streams send in their own time. snap must not change
// afterwards. A service or bundle that cannot be expressed is logged and keeps
// its last good form.
func (s *Server) SetSnapshot(snap *Snapshot) {
	s.publish.Lock()
	defer s.publish.Unlock()
	s.current.Store(prepare(snap, s.current.Load(), s.cfg.Log))
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := range s.streams {
		poke(st.dirty)
	}
}

// poke fills a one-slot mailbox.
func poke(box chan struct{}) {
	select {
	case box <- struct{}{}:
	default:
	}
}

// DeltaAggregatedResources implements the ADS RPC. It ends with Unauthenticated
// when there is no caller or its certificate has expired, PermissionDenied when
// it claims to be someone else or was disconnected, ResourceExhausted at a
// limit, and Unavailable on Close.
func (s *Server) DeltaAggregatedResources(ads deltaStream) error { return s.serve(ads, false) }

// serve serves one stream. Without proxy, whoever is at its other end enforces
// rules by itself, as far as [proxyless] says.
func (s *Server) serve(ads deltaStream, withoutProxy bool) error {
	peer, ok := identity.PeerFromContext(ads.Context())
	if !ok || peer.Leaf == nil || peer.ID.IsZero() {
		return status.Error(codes.Unauthenticated, "a client certificate is required")
	}
	st, err := s.open(peer, withoutProxy)
	if err != nil {
		return err
	}
	defer s.end(st)
	return st.run(ads)
}

func (s *Server) open(peer identity.Peer, withoutProxy bool) (*stream, error) {
	st := newStream(s, peer)
	st.status.Proxyless = withoutProxy
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, status.Error(codes.Unavailable, "the control plane is stopping")
	}
	if s.held[peer.ID] >= s.cfg.MaxStreams {
		return nil, status.Errorf(codes.ResourceExhausted, "%s holds %d streams already", peer.ID, s.cfg.MaxStreams)
	}
	if s.cfg.InstanceOf != nil {
		s.join(st)
	}
	s.held[peer.ID]++
	s.streams[st] = struct{}{}
	s.running.Add(1)
	return st, nil
}

// join counts st among the streams of its instance and ends the oldest if they
// are too many: a sidecar that reconnects is never locked out by what it left
// behind. The caller holds s.mu.
func (s *Server) join(st *stream) {
	h := st.holder()
	if all := s.proved[h]; len(all) == h.most() {
		all[0].end(status.Error(codes.ResourceExhausted, "newer streams of the same instance took its place"))
		s.proved[h] = all[1:]
	}
	s.proved[h] = append(s.proved[h], st)
}

// leave undoes join. The caller holds s.mu.
func (s *Server) leave(st *stream) {
	h := st.holder()
	s.proved[h] = slices.DeleteFunc(s.proved[h], func(o *stream) bool { return o == st })
	if len(s.proved[h]) == 0 {
		delete(s.proved, h)
	}
}

func (s *Server) end(st *stream) {
	s.mu.Lock()
	s.leave(st)
	delete(s.streams, st)
	if s.held[st.peer.ID]--; s.held[st.peer.ID] == 0 {
		delete(s.held, st.peer.ID)
	}
	s.mu.Unlock()
	s.changed()
	s.running.Done()
}

// Close ends every stream, refuses new ones, and returns when nothing of this
// server runs any more.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cut(status.Error(codes.Unavailable, "the control plane is stopping"))
	s.running.Wait()
}

func (s *Server) cut(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := range s.streams {
		st.end(why)
	}
}

// NodeStatus says how far one connected node has come.
type NodeStatus struct {
	ID        spiffeid.ID
	Instance  string    // as the node names itself; "" before its first request
	Acked     Revision  // it holds and has acknowledged everything up to here; zero before it has all kinds
	Nack      string    // what it refuses at present and why, with the type in front; "" if nothing
	NackRev   Revision  // the revision that it refused; zero without Nack
	Connected time.Time // when the stream was opened

	Proxyless   bool         // it is a gRPC client or server without sidecar
	Narrowed    string       // rules that mean less at the node than they say; "" if none
	Level       policy.Level // what it understands of the policy language; 0 before its first request
	SVIDExpires time.Time    // not-after of the certificate that opened the stream
	Unknown     bool         // its ID is no workload of the newest snapshot: it is sent the empty view
	Revocations bool         // it has acknowledged the newest revocation list, or there is none

	complete    bool   // it has asked for all that a sidecar needs
	revocations string // version of the list that it has acknowledged; "" if none
}

// Nodes returns the status of every open stream, ordered by ID, instance and
// age.
func (s *Server) Nodes() []NodeStatus {
	p := s.current.Load()
	s.mu.Lock()
	out := make([]NodeStatus, 0, len(s.streams))
	for st := range s.streams {
		n := st.currentStatus()
		if p != nil {
			_, known := p.snap.service(n.ID)
			n.Unknown = !known
			n.Revocations = n.revoked(p)
		}
		out = append(out, n)
	}
	s.mu.Unlock()
	slices.SortFunc(out, func(a, b NodeStatus) int {
		if c := strings.Compare(a.ID.String(), b.ID.String()); c != 0 {
			return c
		}
		if c := strings.Compare(a.Instance, b.Instance); c != 0 {
			return c
		}
		return a.Connected.Compare(b.Connected)
	})
	return out
}

// WaitAcked waits until every connected node has answered for rev or a later
// revision, or until ctx is done. Acked nodes hold everything of it (a node that
// rev does not concern does so at once); nacks refuse a part of it and keep the
// last good state of that kind; pending ones have not answered: ctx ended before,
// or they connected just now. A stream that ServerConfig.SubscribeTimeout after
// its opening has not asked for all types is no sidecar's: unless it refuses
// something it is in none of the three.
func (s *Server) WaitAcked(ctx context.Context, rev Revision) (acked, pending, nacks []NodeStatus) {
	s.wait(ctx, func() bool { return s.settled(rev) })
	for _, n := range s.Nodes() {
		switch {
		case n.refused(rev):
			nacks = append(nacks, n)
		case n.holds(rev):
			acked = append(acked, n)
		case s.owes(n, rev):
			pending = append(pending, n)
		}
	}
	return acked, pending, nacks
}

// wait asks over is anew after each change of a status, until it is true or ctx is
// done.
func (s *Server) wait(ctx context.Context, over func() bool) {
	wake := make(chan struct{}, 1)
	s.mu.Lock()
	s.waiters[wake] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.waiters, wake)
		s.mu.Unlock()
	}()
	late := time.NewTicker(max(s.cfg.SubscribeTimeout/10, time.Millisecond)) // a stream becomes late without an event
	defer late.Stop()
	for !over() && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-wake:
		case <-late.C:
		}
	}
}

// settled reports whether rev is out and no open stream still owes an answer. It
// stops at the first that does, so asking often is cheap.
func (s *Server) settled(rev Revision) bool {
	if p := s.current.Load(); p == nil || p.snap.Rev.Less(rev) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := range s.streams {
		if s.owes(st.currentStatus(), rev) {
			return false
		}
	}
	return true
}

// owes reports whether rev waits for an answer of n.
func (s *Server) owes(n NodeStatus, rev Revision) bool {
	return !s.late(n) && !n.refused(rev) && !n.holds(rev)
}

// late reports whether n has had the time to ask for all that a sidecar needs, and
// has not.
func (s *Server) late(n NodeStatus) bool {
	return !n.complete && s.cfg.Now().Sub(n.Connected) >= s.cfg.SubscribeTimeout
}

func (n NodeStatus) refused(rev Revision) bool { return n.Nack != "" && !n.NackRev.Less(rev) }

func (n NodeStatus) holds(rev Revision) bool { return n.Nack == "" && !n.Acked.Less(rev) }

// changed tells everyone who waits that a status is new.
func (s *Server) changed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.waiters {
		poke(w)
	}
}

// String names the node for logs and errors.
func (n NodeStatus) String() string { return fmt.Sprintf("%s (%s)", n.ID, n.Instance) }
