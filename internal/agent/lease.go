package agent

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/agent/endpoint"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	// appRenewals is how many times an app's SVID is renewed in its life, which
	// is an hour: an outage of the control plane leaves at least three quarters.
	appRenewals = 4
	// maxTokens bounds the JWT-SVIDs that are kept for one app.
	maxTokens = 64
)

// lease is one identity that is kept for apps: obtained when somebody asks,
// renewed while somebody follows, forgotten afterwards. Its goroutine is the only
// one that obtains.
type lease struct {
	wallet  *Wallet
	key     string
	uid     uint32               // of who asked first
	process *sallyportv1.Process // nil: the agent's own app
	feed    endpoint.Feed
	hurry   chan struct{} // cap 1: renew now

	followers int       // guarded by wallet.mu
	left      time.Time // guarded by wallet.mu; when the last follower went

	mu     sync.Mutex
	svid   *x509svid.SVID   // guarded by mu; nil: none
	life   time.Duration    // guarded by mu; of svid
	failed error            // guarded by mu; why there is no newer one
	denied error            // guarded by mu; the agent's own identity, which is the app's, was refused
	tokens map[string]token // guarded by mu; :: audience → JWT-SVID

	published *endpoint.Holding // owned by run
}

// token is a JWT-SVID that may be handed out until half of its life is over.
type token struct {
	text  string
	until time.Time
}

// run obtains and renews until ctx ends or nobody needs it.
func (l *lease) run(ctx context.Context) {
	failures := 0
	for {
		err := l.denial()
		if err == nil {
			err = l.obtain(ctx)
		}
		if ctx.Err() != nil {
			break
		}
		if err == nil {
			failures = 0
		} else {
			failures++
			l.fail(err)
		}
		if !l.wait(ctx, l.pause(failures)) {
			break
		}
		if l.wallet.drop(l) {
			return
		}
	}
	l.feed.Fail(endpoint.ErrStarting)
	l.wallet.drop(l)
}

// deny takes the identity away: the control plane refuses it to the agent itself.
func (l *lease) deny(err error) {
	l.mu.Lock()
	l.denied = err
	l.mu.Unlock()
	l.renewNow()
}

func (l *lease) denial() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.denied
	l.denied = nil
	return err
}

func (l *lease) renewNow() {
	select {
	case l.hurry <- struct{}{}:
	default: // it is to be renewed anyway
	}
}

func (l *lease) pause(failures int) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if failures > 0 {
		return pauseAfter(failures, l.remaining())
	}
	return time.Duration(float64(l.life) / appRenewals * (0.9 + 0.2*rand.Float64()))
}

// remaining is how long the SVID is still valid; the caller holds mu.
func (l *lease) remaining() time.Duration {
	if l.svid == nil {
		return 0
	}
	return l.svid.Certificates[0].NotAfter.Sub(l.wallet.agent.cfg.Now())
}

// wait sleeps for d by the injected clock and publishes new bundles meanwhile.
func (l *lease) wait(ctx context.Context, d time.Duration) bool {
	a := l.wallet.agent
	until := a.cfg.Now().Add(d)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		bundles, news := a.watchBundles()
		l.publish(bundles)
		left := until.Sub(a.cfg.Now())
		if left <= 0 || left > 2*d { // the latter: the clock was set back
			return true
		}
		timer.Reset(min(left, a.poll))
		select {
		case <-ctx.Done():
			return false
		case <-l.hurry:
			return true
		case <-timer.C:
		case <-news:
		}
	}
}

// publish hands on what is held now, if that is news.
func (l *lease) publish(bundles identity.Bundles) {
	l.mu.Lock()
	svid := l.svid
	l.mu.Unlock()
	if svid == nil {
		l.published = nil
		return
	}
	if p := l.published; p != nil && p.SVIDs[0] == svid && sameBundles(p.Bundles, bundles) {
		return
	}
	l.published = &endpoint.Holding{SVIDs: []*x509svid.SVID{svid}, Bundles: bundles}
	l.feed.Set(l.published)
}

// obtain gets an SVID for a fresh key and publishes it.
func (l *lease) obtain(ctx context.Context) error {
	select {
	case l.wallet.slots <- struct{}{}:
		defer func() { <-l.wallet.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	key, csr, err := newKey()
	if err != nil {
		return err
	}
	var msg *sallyportv1.SVID
	err = l.ask(ctx, func(ctx context.Context, c sallyportv1.EnrollmentClient) error {
		if l.process == nil {
			resp, err := c.Renew(ctx, &sallyportv1.RenewRequest{Csr: csr, App: true})
			msg = resp.GetSvid()
			return err
		}
		resp, err := c.IssueFor(ctx, &sallyportv1.IssueForRequest{Csr: csr, Process: l.process})
		msg = resp.GetSvid()
		return err
	})
	if err != nil {
		return err
	}
	return l.accept(msg, key)
}

// ask calls the control plane as the agent, in whose name the app's SVID is asked
// for.
func (l *lease) ask(ctx context.Context, do func(context.Context, sallyportv1.EnrollmentClient) error) error {
	a := l.wallet.agent
	if left := a.remaining(); left <= 0 {
		return fmt.Errorf("the agent's own SVID expired %v ago; it is being renewed", -left.Round(time.Second))
	}
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	return l.wallet.line.with(ctx, func(conn *grpc.ClientConn) error {
		return do(ctx, sallyportv1.NewEnrollmentClient(conn))
	})
}

// accept checks an issued SVID as a peer would and puts it in force.
func (l *lease) accept(msg *sallyportv1.SVID, key *ecdsa.PrivateKey) error {
	a := l.wallet.agent
	chain, roots, err := readSVID(msg)
	if err != nil {
		return err
	}
	td := a.ID().TrustDomain()
	peer, err := identity.Verify(chain, x509bundle.FromX509Authorities(td, roots), a.cfg.Now())
	switch {
	case err != nil:
		return fmt.Errorf("checking the app's SVID: %w", err)
	case !key.PublicKey.Equal(peer.Leaf.PublicKey):
		return errors.New("checking the app's SVID: it is for another key")
	case identity.Reserved(peer.ID):
		return fmt.Errorf("checking the app's SVID: %s is not a workload", peer.ID)
	case l.process == nil && peer.ID != a.ID():
		return fmt.Errorf("checking the app's SVID: it is for %s, and this is %s", peer.ID, a.ID())
	}
	a.learnRoots(roots)
	l.mu.Lock()
	first, back := l.svid == nil, l.failed != nil
	if !first && l.svid.ID != peer.ID {
		l.tokens = nil // of another identity
	}
	l.svid = &x509svid.SVID{ID: peer.ID, Certificates: chain, PrivateKey: key}
	l.life, l.failed = lifeOf(peer.Leaf, msg), nil
	l.mu.Unlock()
	switch {
	case first:
		l.wallet.log.Info("an app has received an identity", "spiffe_id", peer.ID, "uid", l.uid, "evidence", l.describe(), "not_after", peer.Leaf.NotAfter)
	case back:
		l.wallet.log.Info("an app's identity is renewed again", "spiffe_id", peer.ID, "not_after", peer.Leaf.NotAfter)
	default:
		l.wallet.log.Debug("an app's identity is renewed", "spiffe_id", peer.ID, "not_after", peer.Leaf.NotAfter)
	}
	bundles, _ := a.watchBundles()
	l.publish(bundles)
	return nil
}

// describe names the process by what people know it by.
func (l *lease) describe() string {
	if l.process == nil {
		return "own app"
	}
	var parts []string
	for _, k := range []string{"user", "path", "unit", "container"} {
		if v := l.process.GetSelectors()[k].GetValues(); len(v) > 0 {
			parts = append(parts, k+"="+v[0])
		}
	}
	return strings.Join(parts, " ")
}

// fail notes why there is no newer SVID. A valid one stays, unless the control
// plane says that there is no such identity: what it issued before is revoked
// then, and of no use to anybody.
func (l *lease) fail(err error) {
	denied := codeOf(err) == codes.PermissionDenied || codeOf(err) == codes.FailedPrecondition
	if denied {
		err = fmt.Errorf("%w: %w", endpoint.ErrDenied, err)
	}
	l.mu.Lock()
	if l.svid == nil && codeOf(err) == codes.Unauthenticated && errors.Is(l.failed, endpoint.ErrDenied) {
		l.mu.Unlock()
		return // nothing new: who is denied is not known either
	}
	news := l.failed == nil || l.failed.Error() != err.Error()
	l.failed = err
	if denied && codeOf(err) == codes.PermissionDenied {
		l.svid, l.tokens = nil, nil
	}
	gone := l.svid == nil
	l.mu.Unlock()
	if gone {
		l.feed.Fail(err)
	}
	if news {
		l.wallet.log.Warn("no SVID for an app; trying again while it asks", "uid", l.uid, "evidence", l.describe(), "error", err)
	}
}

// usable says why a newcomer cannot be given what is held. Followers of before
// keep what they have and wait for the next SVID.
func (l *lease) usable() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.svid != nil && l.remaining() <= 0 {
		return fmt.Errorf("the SVID expired at %s: %w", l.svid.Certificates[0].NotAfter.UTC().Format(time.RFC3339), l.reason())
	}
	return nil
}

func (l *lease) reason() error {
	if l.failed == nil {
		return errors.New("it is being renewed")
	}
	return l.failed
}

// jwt gives a JWT-SVID, the last one while it is young.
func (l *lease) jwt(ctx context.Context, id spiffeid.ID, audience []string) (string, error) {
	now := l.wallet.agent.cfg.Now()
	key := strings.Join(audience, "\x00")
	l.mu.Lock()
	have, ok := l.tokens[key]
	l.mu.Unlock()
	if ok && now.Before(have.until) {
		return have.text, nil
	}
	var resp *sallyportv1.IssueJWTResponse
	err := l.ask(ctx, func(ctx context.Context, c sallyportv1.EnrollmentClient) (err error) {
		resp, err = c.IssueJWT(ctx, &sallyportv1.IssueJWTRequest{Audience: audience, Process: l.process})
		return err
	})
	if code := codeOf(err); code == codes.PermissionDenied || code == codes.FailedPrecondition {
		return "", fmt.Errorf("%w: %w", endpoint.ErrDenied, err)
	}
	if err != nil {
		return "", err
	}
	if resp.GetSpiffeId() != id.String() {
		return "", fmt.Errorf("checking the issued JWT-SVID: it is for %s, not for %s", resp.GetSpiffeId(), id)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.tokens) >= maxTokens || l.tokens == nil {
		l.tokens = map[string]token{}
	}
	l.tokens[key] = token{resp.GetToken(), now.Add(resp.GetExpires().AsTime().Sub(now) / 2)}
	return resp.GetToken(), nil
}

func (l *lease) renewIf(refused func(identity.Peer) bool) {
	l.mu.Lock()
	svid := l.svid
	l.mu.Unlock()
	if svid == nil || !refused(identity.Peer{ID: svid.ID, Leaf: svid.Certificates[0], Chain: svid.Certificates}) {
		return
	}
	l.mu.Lock()
	l.tokens = nil // they are of the same identity, or of a key that went with the issuer
	l.mu.Unlock()
	l.renewNow()
}

func (l *lease) identity() Identity {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := Identity{UID: l.uid, Denied: errors.Is(l.failed, endpoint.ErrDenied)}
	if l.failed != nil {
		i.Detail = l.failed.Error()
	}
	if l.svid != nil {
		i.ID, i.NotAfter = l.svid.ID, l.svid.Certificates[0].NotAfter
		i.Late = l.remaining() < l.life/2
	}
	return i
}
