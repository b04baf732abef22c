package xds

import (
	"context"
	"errors"
	"io"
	"strconv"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

type deltaStream = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer

// stream is one node's ADS stream. Its handler's goroutine owns every field
// without a note; two helpers, which end with the stream, receive and send, as
// both may block for as long as the node likes.
type stream struct {
	srv      *Server
	peer     identity.Peer
	instance string        // as its certificate says; only with ServerConfig.InstanceOf
	dirty    chan struct{} // one slot: there is a new snapshot
	cut      chan error    // one slot: end now

	subs  map[string]*subscription // :: type URL
	nonce uint64
	queue []*discoveryv3.DeltaDiscoveryResponse // at most one per type
	busy  bool                                  // a send is under way
	sent  chan error                            // its result

	mu     sync.Mutex
	status NodeStatus // guarded by mu
}

func newStream(s *Server, peer identity.Peer) *stream {
	st := &stream{
		srv: s, peer: peer,
		dirty: make(chan struct{}, 1),
		cut:   make(chan error, 1),
		sent:  make(chan error, 1),
		subs:  make(map[string]*subscription),
	}
	if s.cfg.InstanceOf != nil {
		st.instance = s.cfg.InstanceOf(peer)
	}
	st.status = NodeStatus{ID: peer.ID, Connected: s.cfg.Now(), SVIDExpires: peer.Leaf.NotAfter}
	return st
}

// end makes run return why, unless it has been told before.
func (st *stream) end(why error) {
	select {
	case st.cut <- why:
	default:
	}
}

// run serves the stream until it ends. It returns at once when it has to, even
// while a send blocks: returning is what makes the blocked send give up.
func (st *stream) run(ads deltaStream) error {
	ctx, cancel := context.WithCancel(ads.Context())
	defer cancel()
	requests := make(chan *discoveryv3.DeltaDiscoveryRequest)
	ended := make(chan error, 1)
	st.srv.running.Go(func() { ended <- receive(ctx, ads, requests) })
	clock := time.NewTimer(0)
	defer clock.Stop()
	for {
		select {
		case err := <-st.cut:
			return err
		case err := <-ended:
			return err
		case r := <-requests:
			if err := st.request(r); err != nil {
				return err
			}
		case <-st.dirty:
		case err := <-st.sent:
			if st.busy = false; err != nil {
				return err
			}
		case <-clock.C:
		}
		st.refresh()
		st.send(ads)
		wait, err := st.deadline()
		if err != nil {
			return err
		}
		clock.Reset(wait)
	}
}

// receive hands on requests one by one and no faster than a sidecar needs: a
// node that sends more is slowed down by flow control.
func receive(ctx context.Context, ads deltaStream, out chan<- *discoveryv3.DeltaDiscoveryRequest) error {
	pace := rate.NewLimiter(requestRate, requestBurst)
	for {
		r, err := ads.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := pace.Wait(ctx); err != nil {
			return status.FromContextError(ctx.Err()).Err()
		}
		select {
		case out <- r:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// request takes in one request: who it says it is, what it answers, what it
// asks for.
func (st *stream) request(r *discoveryv3.DeltaDiscoveryRequest) error {
	if err := checkRequest(r); err != nil {
		return err
	}
	if err := st.identify(r.GetNode()); err != nil {
		return err
	}
	if newMessage(r.GetTypeUrl()) == nil {
		// A newer sidecar may want more than this version has; it is not told so.
		st.srv.cfg.Log.Debug("unknown resource type asked for", "id", st.peer.ID, "type", clip(r.GetTypeUrl(), 200))
		return nil
	}
	t, known := st.subs[r.GetTypeUrl()]
	if !known {
		t = newSubscription(r.GetTypeUrl())
		st.subs[r.GetTypeUrl()] = t
		st.mu.Lock()
		st.status.complete = st.complete()
		st.mu.Unlock()
	}
	nacked := t.nack
	t.settle(r)
	if t.nack != "" && t.nack != nacked {
		st.srv.cfg.Log.Warn("node refuses an update", "id", st.peer.ID, "instance", st.currentStatus().Instance, "revision", t.nackRev, "error", t.nack)
	}
	t.change(r, !known)
	return st.checkNames()
}

// complete reports whether the node has asked for all that a sidecar needs, or for
// what gRPC asks first.
func (st *stream) complete() bool {
	if st.status.Proxyless { // written before the stream began
		return st.subs[ListenerType] != nil
	}
	for _, typeURL := range wireTypes() {
		if st.subs[typeURL] == nil && !optionalType(typeURL) {
			return false
		}
	}
	return true
}

// checkNames bounds what a stream makes the server remember: names asked for,
// and names held or dropped that are no service.
func (st *stream) checkNames() error {
	p := st.srv.current.Load()
	names, size := 0, 0
	for _, t := range st.subs {
		for name := range t.names {
			names, size = names+1, size+len(name)
		}
		for name := range t.have {
			if _, named := t.names[name]; !named && (p == nil || p.services[name] == nil) {
				names, size = names+1, size+len(name)
			}
		}
	}
	if limit := st.srv.cfg.MaxSubscriptions; names > limit || size > maxNameBytes {
		return status.Errorf(codes.ResourceExhausted, "more than %d resource names, or %d bytes of them, on one stream", limit, maxNameBytes)
	}
	return nil
}

// identify takes the instance, and what it understands, from the first request,
// compares the former with the proved one if there is one, and holds the stream to
// it.
func (st *stream) identify(node *corev3.Node) error {
	instance := node.GetId()
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.status.Instance != "" && (instance == "" || instance == st.status.Instance) {
		return nil
	}
	if err := checkInstance(instance); err != nil {
		return err
	}
	if st.status.Instance != "" {
		return status.Error(codes.PermissionDenied, "node.id changed within a stream")
	}
	if st.srv.cfg.InstanceOf != nil && instance != st.instance {
		return status.Errorf(codes.PermissionDenied, "node.id is %s, the certificate is for instance %q", instance, st.instance)
	}
	st.status.Instance, st.status.Level = instance, levelOf(node)
	return nil
}

// refresh compares what the node holds with the newest snapshot, queues what
// differs, and notes how far the node is.
func (st *stream) refresh() {
	p := st.srv.current.Load()
	if p == nil || len(st.subs) == 0 {
		return
	}
	now := st.currentStatus()
	v := nodeView{p: p, slice: p.slice(sliceKey{st.peer.ID, now.Level, now.Proxyless})}
	for _, typeURL := range wireTypes() {
		t := st.subs[typeURL]
		if t == nil || t.pending != nil || t.seen == p {
			continue
		}
		t.seen = p
		if own := typeURL == ListenerType || typeURL == ExtensionType; own && v.slice.err != nil {
			t.nack, t.nackRev = "translating rules: "+v.slice.err.Error(), p.snap.Rev
			continue
		}
		resp := t.next(v)
		if resp == nil {
			continue
		}
		st.nonce++
		resp.Nonce = strconv.FormatUint(st.nonce, 10)
		t.pending.nonce, t.pending.since = resp.Nonce, st.srv.cfg.Now()
		st.queue = append(st.queue, resp)
	}
	st.report(v)
}

// send starts sending the next queued response unless one is under way.
func (st *stream) send(ads deltaStream) {
	if st.busy || len(st.queue) == 0 {
		return
	}
	resp := st.queue[0]
	st.queue, st.busy = st.queue[1:], true
	st.srv.running.Go(func() { st.sent <- ads.Send(resp) })
}

// deadline returns how long nothing can be due, or why the stream must end.
func (st *stream) deadline() (time.Duration, error) {
	now := st.srv.cfg.Now()
	wait := st.peer.Leaf.NotAfter.Sub(now)
	if wait <= 0 {
		return 0, status.Error(codes.Unauthenticated, "the client certificate has expired; connect with a new one")
	}
	for _, t := range st.subs {
		if t.pending == nil {
			continue
		}
		left := t.pending.since.Add(st.srv.cfg.AnswerTimeout).Sub(now)
		if left <= 0 {
			return 0, status.Errorf(codes.DeadlineExceeded, "no answer about %s for %s", shortType(t.typeURL), st.srv.cfg.AnswerTimeout)
		}
		wait = min(wait, left)
	}
	return wait, nil
}

// report publishes the node's status. A node has come as far as the type that
// is furthest behind, and nowhere before it has asked for all that it needs.
func (st *stream) report(v nodeView) {
	st.mu.Lock()
	old := st.status
	next := old
	next.Acked, next.Nack, next.NackRev, next.Narrowed = Revision{}, "", Revision{}, v.slice.narrowed
	if st.complete() {
		next.Acked = st.subs[ListenerType].acked
		for _, t := range st.subs {
			if t.acked.Less(next.Acked) {
				next.Acked = t.acked
			}
		}
	}
	if st.status.Proxyless && st.holds(v.p) { // its rules say who is revoked
		next.revocations = v.p.revocations.GetVersion()
	}
	if t := st.subs[RevocationType]; t != nil {
		next.revocations = t.have[st.peer.ID.TrustDomain().IDString()]
	}
	for _, typeURL := range wireTypes() {
		if t := st.subs[typeURL]; t != nil && t.nack != "" && next.Nack == "" {
			next.Nack, next.NackRev = t.nack, t.nackRev
		}
	}
	st.status = next
	st.mu.Unlock()
	if next != old {
		st.srv.changed()
	}
}

// holds reports whether the node has acknowledged all that it is to be told of p.
func (st *stream) holds(p *prepared) bool {
	for _, t := range st.subs {
		if t.seen != p || t.pending != nil || t.nack != "" {
			return false
		}
	}
	return len(st.subs) > 0
}

func (st *stream) currentStatus() NodeStatus {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.status
}
