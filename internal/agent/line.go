package agent

import (
	"context"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"

	"github.com/sallyport-mesh/sallyport/internal/agent/endpoint"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// line is the connection on which a wallet asks the control plane, kept from one
// request to the next. Each is of one SVID, also after it broke and was made again,
// and of the bundles that were trusted when it was opened: what another SVID asks
// for goes over another one.
type line struct {
	agent *Agent

	mu     sync.Mutex
	now    *shared // guarded by mu; nil: the next request opens one
	closed bool    // guarded by mu
}

// shared is a connection of several requests at a time.
type shared struct {
	link       *link
	conn       *grpc.ClientConn
	generation uint64 // of the agent's identity

	users int  // guarded by line.mu; the last one closes it once it is over
	over  bool // guarded by line.mu; nobody takes it any more
}

// oneSVID presents the same SVID for ever.
type oneSVID struct {
	x509bundle.Source
	svid *x509svid.SVID
}

func (o oneSVID) GetX509SVID() (*x509svid.SVID, error) { return o.svid, nil }

// with lets do use the connection, opening it if need be, and explains what failed.
// After a failure that is no refusal the next request tries another one.
func (l *line) with(ctx context.Context, do func(*grpc.ClientConn) error) error {
	s, err := l.take()
	if err != nil {
		return err
	}
	defer l.leave(s)
	if err = s.link.await(ctx, s.conn); err == nil {
		err = s.link.explain(do(s.conn))
	}
	if err != nil && !isRefusal(err) {
		l.retire(s)
	}
	return err
}

func (l *line) take() (*shared, error) {
	a := l.agent
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, endpoint.ErrStarting
	}
	generation := a.live.Generation() // read first: at worst there is one connection more
	if s := l.now; s != nil && s.generation == generation {
		s.users++
		return s, nil
	}
	svid, err := a.live.GetX509SVID()
	if err != nil {
		return nil, err
	}
	link := a.newLink(identity.TLSConfig{Source: oneSVID{&a.live, svid}}, svid.ID.TrustDomain())
	conn, err := link.open()
	if err != nil {
		return nil, err
	}
	l.retireLocked(l.now)
	l.now = &shared{link: link, conn: conn, generation: generation, users: 1}
	return l.now, nil
}

func (l *line) leave(s *shared) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s.users--
	s.endUnused()
}

// renew has the next request open another connection, for example because the
// control plane may be refused now.
func (l *line) renew() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.retireLocked(l.now)
}

// close refuses requests from now on. Those in progress end by themselves.
func (l *line) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.retireLocked(l.now)
}

func (l *line) retire(s *shared) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.retireLocked(s)
}

// retireLocked is called with mu held.
func (l *line) retireLocked(s *shared) {
	if s == nil {
		return
	}
	if l.now == s {
		l.now = nil
	}
	if !s.over {
		s.over = true
		s.endUnused()
	}
}

// endUnused is called with line.mu held.
func (s *shared) endUnused() {
	if s.over && s.users == 0 {
		_ = s.conn.Close() // fails only if it is closed already
	}
}
