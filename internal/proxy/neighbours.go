package proxy

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/tunnel"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Limits of fetching a list from a neighbour. docs/tunnel.md tells of them.
const (
	askAfter   = 50 * time.Millisecond // for the control plane's own push to come first
	answerIn   = 10 * time.Second      // until an answer is given up
	shunFor    = time.Minute           // for which an identity is not asked that did not help
	maxFetches = 2                     // at once, from different identities
)

// NeighboursConfig holds what [Neighbours] need. Source and Book are required.
type NeighboursConfig struct {
	Source identity.Source // who we are: the list of our trust domain is passed on
	Book   *revocation.Book
	Now    func() time.Time
	Log    hclog.Logger
}

// Neighbours passes the revocation list on between sidecars that have a tunnel
// between them, so that one which the control plane cannot reach learns it all the
// same. docs/tunnel.md is its protocol. A nil Neighbours says nothing.
type Neighbours struct {
	cfg  NeighboursConfig
	news chan struct{} // cap 1: Run has something to look at

	mu       sync.Mutex
	live     map[*neighbour]struct{}    // guarded by mu; sessions
	ahead    map[*neighbour]struct{}    // guarded by mu; those that claim a newer list than ours
	fetching map[spiffeid.ID]*neighbour // guarded by mu; who was asked
	shunned  map[spiffeid.ID]time.Time  // guarded by mu; until when
	counts   map[string]uint64          // guarded by mu
}

// neighbour is the other end of one session.
type neighbour struct {
	all   *Neighbours
	id    spiffeid.ID
	hello edition // what we have told it before the session stood

	// Guarded by all.mu.
	session   *tunnel.Session // nil before start
	claim     edition         // what it says to have
	heard     time.Time       // when it said so
	asked     time.Time       // when we asked for it
	delivered []byte          // its answer, for Run to read
	served    edition         // what we have sent it
}

// NewNeighbours returns Neighbours without a session. Run must run for lists to be
// fetched.
func NewNeighbours(cfg NeighboursConfig) *Neighbours {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Neighbours{
		cfg: cfg, news: make(chan struct{}, 1),
		live: make(map[*neighbour]struct{}), ahead: make(map[*neighbour]struct{}),
		fetching: make(map[spiffeid.ID]*neighbour), shunned: make(map[spiffeid.ID]time.Time),
		counts: make(map[string]uint64),
	}
}

// Lists counts the lists that neighbours have sent, by what became of them:
// accepted, superseded, unverified, refused, forged, and unanswered for those that
// did not come.
func (n *Neighbours) Lists() map[string]uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.counts)
}

// trustDomain is whose list is passed on; zero before the first SVID.
func (n *Neighbours) trustDomain() spiffeid.TrustDomain {
	svid, err := n.cfg.Source.GetX509SVID()
	if err != nil {
		return spiffeid.TrustDomain{}
	}
	return svid.ID.TrustDomain()
}

// held is the edition in force here.
func (n *Neighbours) held() edition { return editionOf(n.cfg.Book.List(n.trustDomain())) }

// join prepares a session with id. It returns nil for one with whom the list is not
// spoken of; every method of a nil neighbour does nothing.
func (n *Neighbours) join(id spiffeid.ID) *neighbour {
	if n == nil || id.TrustDomain() != n.trustDomain() {
		return nil
	}
	l, _ := n.cfg.Book.Presentable(id.TrustDomain())
	return &neighbour{all: n, id: id, hello: editionOf(l)}
}

// messages is what the session needs.
func (b *neighbour) messages() tunnel.Messages {
	if b == nil {
		return tunnel.Messages{}
	}
	return tunnel.Messages{Hello: b.hello.encode(b.id.TrustDomain()), Limit: b.limit, Receive: b.receive}
}

// start begins once the session stands. It is registered before the book is asked
// again: a list that came meanwhile is told either here or by Spread.
func (b *neighbour) start(s *tunnel.Session) {
	if b == nil {
		return
	}
	b.all.mu.Lock()
	defer b.all.mu.Unlock()
	b.session = s
	b.all.live[b] = struct{}{}
	if l, _ := b.all.cfg.Book.Presentable(b.id.TrustDomain()); b.hello.less(editionOf(l)) {
		b.tellLocked(editionOf(l))
	}
	b.all.poke()
}

// leave ends what start began.
func (b *neighbour) leave() {
	if b == nil {
		return
	}
	b.all.mu.Lock()
	defer b.all.mu.Unlock()
	delete(b.all.live, b)
	delete(b.all.ahead, b)
	if b.all.fetching[b.id] == b {
		delete(b.all.fetching, b.id)
		b.all.poke() // somebody else may be asked
	}
}

// Spread tells everybody who has not said to have it of a list that came into
// force. It does not wait.
func (n *Neighbours) Spread(l *revocation.List) {
	if l.TrustDomain() != n.trustDomain() {
		return
	}
	if now, _ := n.cfg.Book.Presentable(l.TrustDomain()); now != l {
		return // its signer's time is over, or a newer one is on its way here
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for b := range n.live {
		b.tellLocked(editionOf(l))
	}
}

func (b *neighbour) tellLocked(e edition) {
	if b.claim.less(e) {
		b.session.Send(haveList, e.encode(b.id.TrustDomain()))
	}
}

// limit says how large a message may be. A list comes only when it was asked for.
func (b *neighbour) limit(kind uint8) int {
	switch kind {
	case haveList, wantList:
		return maxHave
	case theList:
		b.all.mu.Lock()
		defer b.all.mu.Unlock()
		if b.all.fetching[b.id] == b && b.delivered == nil {
			return revocation.MaxEnvelope
		}
	}
	return 0
}

func (b *neighbour) receive(kind uint8, message []byte) {
	switch kind {
	case haveList:
		if e, err := decodeEdition(message, b.id.TrustDomain()); err == nil {
			b.claims(e)
		}
	case wantList:
		b.serve()
	case theList:
		b.all.mu.Lock()
		defer b.all.mu.Unlock()
		if b.all.fetching[b.id] == b {
			b.delivered = message
			b.all.poke()
		}
	}
}

// claims notes what the other end has.
func (b *neighbour) claims(e edition) {
	held := b.all.held()
	b.all.mu.Lock()
	defer b.all.mu.Unlock()
	b.claim, b.heard = e, b.all.cfg.Now()
	if e.worth(held) {
		b.all.ahead[b] = struct{}{}
		b.all.poke()
	}
}

// serve sends our list, unless it did so before.
func (b *neighbour) serve() {
	l, envelope := b.all.cfg.Book.Presentable(b.id.TrustDomain())
	b.all.mu.Lock()
	defer b.all.mu.Unlock()
	if e := editionOf(l); b.session != nil && b.served.less(e) {
		b.served = e
		b.session.Send(theList, envelope)
	}
}

func (n *Neighbours) poke() {
	select {
	case n.news <- struct{}{}:
	default:
	}
}

// Run fetches newer lists until ctx ends; it returns nil.
func (n *Neighbours) Run(ctx context.Context) error {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-n.news:
		case <-t.C:
		}
		for _, b := range n.takeDelivered() {
			n.read(b)
		}
		if wait, ok := n.ask(); ok {
			t.Reset(wait)
		} else {
			t.Stop()
		}
	}
}

func (n *Neighbours) takeDelivered() (out []*neighbour) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for id, b := range n.fetching {
		if b.delivered != nil {
			delete(n.fetching, id)
			out = append(out, b)
		}
	}
	return out
}

// read offers the book what b has delivered. Whoever still claims to have something
// newer afterwards was of no help.
func (n *Neighbours) read(b *neighbour) {
	n.mu.Lock()
	envelope := b.delivered
	b.delivered = nil
	n.mu.Unlock()
	newer, err := n.cfg.Book.Offer(envelope)
	outcome := outcomeOf(newer, err)
	if outcome == forged {
		b.session.Reject("a revocation list that nobody signed")
		n.cfg.Log.Warn("a neighbour sent a forged revocation list", "peer", b.id, "error", err)
	} else {
		n.cfg.Log.Debug("revocation list from a neighbour", "peer", b.id, "outcome", outcome, "error", err)
	}
	held := n.held()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.counts[outcome]++
	if b.claim.worth(held) {
		n.shunned[b.id] = n.cfg.Now().Add(shunFor)
	}
}

// forged is the outcome of what no honest neighbour can have taken for a list.
const forged = "forged"

func outcomeOf(newer bool, err error) string {
	switch {
	case newer:
		return "accepted"
	case err == nil, errors.Is(err, revocation.ErrOlder), errors.Is(err, revocation.ErrConflict):
		return "superseded"
	case errors.Is(err, revocation.ErrUnknownSigner), errors.Is(err, revocation.ErrExpired):
		return "unverified"
	case errors.Is(err, revocation.ErrRevoked):
		return "refused"
	}
	return forged
}

// ask gives up those who do not answer, asks others, and returns after how long to
// look again, if at all.
func (n *Neighbours) ask() (wait time.Duration, again bool) {
	held, now := n.held(), n.cfg.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	at := func(t time.Time) {
		if d := max(t.Sub(now), 0); !again || d < wait {
			wait, again = d, true
		}
	}
	for id, b := range n.fetching {
		if due := b.asked.Add(answerIn); b.delivered == nil && !now.Before(due) {
			delete(n.fetching, id)
			n.shunned[id] = now.Add(shunFor)
			n.counts["unanswered"]++
		} else {
			at(due)
		}
	}
	maps.DeleteFunc(n.shunned, func(_ spiffeid.ID, until time.Time) bool { return !now.Before(until) })
	for b := range n.ahead {
		until, shun := n.shunned[b.id]
		switch due := b.heard.Add(askAfter); {
		case !b.claim.worth(held):
			delete(n.ahead, b)
		case n.fetching[b.id] != nil || b.session == nil:
		case shun:
			at(until)
		case now.Before(due):
			at(due)
		case len(n.fetching) < maxFetches:
			n.fetching[b.id], b.asked = b, now
			b.session.Send(wantList, b.claim.encode(b.id.TrustDomain()))
			at(now.Add(answerIn))
		}
	}
	return wait, again
}
