package federation

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Config sets up a [Manager]. Own and OwnBundle may be left out together; Prefix,
// WebRoots, MinRefresh and MaxRefresh have defaults; the rest is required.
type Config struct {
	Own       spiffeid.TrustDomain
	OwnBundle func() *spiffebundle.Bundle // for endpoints with an ID of the own trust domain
	Store     store.Store
	Prefix    string // of the keys in Store; default "federation/"
	// Publish is handed what to trust of each foreign trust domain, first when
	// the first SetPeers and the store's content are both known and then with
	// each change. The map and the bundles must not be changed.
	Publish func(identity.Bundles)
	// Audit makes the record of a bundle that changed, which is written with it:
	// detail says which keys came and went. Nil: none is written.
	Audit      func(td spiffeid.TrustDomain, detail string) store.Op
	WebRoots   *x509.CertPool // for https_web; nil: the system's
	MinRefresh time.Duration  // least time between two fetches of one bundle; zero: 1 min
	MaxRefresh time.Duration  // most; zero: 1 h
	Now        func() time.Time
	Log        hclog.Logger
}

const (
	minRefresh     = time.Minute
	maxRefresh     = time.Hour
	defaultRefresh = 5 * time.Minute // of a bundle without a hint
)

// Manager holds the newest bundle of each foreign trust domain: it fetches, keeps
// it in the store, and drops it with its document. Whatever goes wrong leaves the
// last good bundle in force and shows in [Manager.Status].
type Manager struct {
	cfg   Config
	log   hclog.Logger
	fetch *fetcher
	dirty chan struct{} // one slot: peers or records are new

	mu       sync.Mutex
	peers    map[spiffeid.TrustDomain]Peer    // guarded by mu; nil before the first SetPeers
	rejected map[spiffeid.TrustDomain]string  // guarded by mu :: trust domain → why its document is not followed
	records  map[spiffeid.TrustDomain]kept    // guarded by mu; nil before the store has been read
	fetches  map[spiffeid.TrustDomain]attempt // guarded by mu

	bundles atomic.Pointer[identity.Bundles] // in force; the map is immutable
}

// attempt is how fetching has gone.
type attempt struct {
	success  time.Time // last
	problem  string    // "" if the last one succeeded
	failures uint64    // since the process started
}

// NewManager returns a manager that trusts nobody before its first SetPeers.
func NewManager(cfg Config) *Manager {
	if cfg.Prefix == "" {
		cfg.Prefix = "federation/"
	}
	if cfg.MinRefresh == 0 {
		cfg.MinRefresh = minRefresh
	}
	if cfg.MaxRefresh == 0 {
		cfg.MaxRefresh = maxRefresh
	}
	m := &Manager{cfg: cfg, log: cfg.Log, dirty: make(chan struct{}, 1), fetches: map[spiffeid.TrustDomain]attempt{}}
	m.fetch = &fetcher{trust: trust{m}, webRoots: cfg.WebRoots, now: cfg.Now}
	return m
}

// SetPeers replaces the list of foreign trust domains. One that is invalid, named
// twice, or the own, is not trusted; Status says so.
func (m *Manager) SetPeers(list []Peer) {
	peers, rejected := map[spiffeid.TrustDomain]Peer{}, map[spiffeid.TrustDomain]string{}
	for _, p := range list {
		err := p.Validate()
		if _, twice := peers[p.TrustDomain]; twice {
			err = errors.New("two documents define it")
		}
		if p.TrustDomain == m.cfg.Own {
			err = errors.New("it is the own trust domain")
		}
		if err != nil {
			rejected[p.TrustDomain] = err.Error()
			continue
		}
		peers[p.TrustDomain] = p
	}
	for td := range rejected {
		delete(peers, td)
	}
	m.update(func() { m.peers, m.rejected = peers, rejected })
}

func (m *Manager) update(change func()) {
	m.mu.Lock()
	change()
	m.mu.Unlock()
	select {
	case m.dirty <- struct{}{}:
	default:
	}
}

// Run fetches until ctx ends, and waits for what it started.
func (m *Manager) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.watchStore(ctx) })
	g.Go(func() error { return m.reconcile(ctx) })
	return g.Wait()
}

// following is one trust domain's goroutine.
type following struct {
	origin string
	stop   context.CancelFunc
	done   chan struct{}
}

func (f following) end() {
	f.stop()
	<-f.done
}

// reconcile is the sole owner of what is published and of the goroutines.
func (m *Manager) reconcile(ctx context.Context) error {
	running := map[spiffeid.TrustDomain]following{}
	defer func() {
		for _, f := range running {
			f.end()
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-m.dirty:
		}
		m.mu.Lock()
		ready, peers, records := m.peers != nil && m.records != nil, m.peers, maps.Clone(m.records)
		m.mu.Unlock()
		if !ready {
			continue
		}
		for td, f := range running {
			if p, ok := peers[td]; !ok || p.origin() != f.origin {
				f.end()
				delete(running, td)
				m.mu.Lock()
				delete(m.fetches, td)
				m.mu.Unlock()
			}
		}
		m.publish(peers, records)
		for td := range records {
			if _, ok := peers[td]; !ok {
				m.forget(ctx, td)
			}
		}
		for td, p := range peers {
			if _, ok := running[td]; !ok && p.URL != "" {
				fctx, stop := context.WithCancel(ctx)
				f := following{p.origin(), stop, make(chan struct{})}
				running[td] = f
				go func() {
					defer close(f.done)
					m.follow(fctx, p)
				}()
			}
		}
	}
}

func (m *Manager) publish(peers map[spiffeid.TrustDomain]Peer, records map[spiffeid.TrustDomain]kept) {
	next := identity.Bundles{}
	for td, p := range peers {
		if b := held(p, records); b != nil && !b.Empty() { // an empty one is a valid way to be trusted no more
			next[td] = b
		}
	}
	old := m.bundles.Swap(&next)
	if old == nil || !maps.EqualFunc(*old, next, (*spiffebundle.Bundle).Equal) {
		m.cfg.Publish(next)
	}
}

// held is the latest bundle of p.
func held(p Peer, records map[spiffeid.TrustDomain]kept) *spiffebundle.Bundle {
	if k, ok := records[p.TrustDomain]; ok && k.origin == p.origin() {
		return k.bundle
	}
	return p.Bootstrap
}

// follow fetches p's bundle again and again until ctx ends.
func (m *Manager) follow(ctx context.Context, p Peer) {
	failed := 0
	for {
		b, err := m.refresh(ctx, p)
		if ctx.Err() != nil {
			return
		}
		m.note(p, err)
		wait := m.interval(p, b)
		if failed++; err == nil {
			failed = 0
		} else {
			wait = min(wait, m.cfg.MinRefresh/10<<min(failed, 16))
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait*9/10 + rand.N(wait/5+1)): // ±10 %: not everybody at once
		}
	}
}

func (m *Manager) refresh(ctx context.Context, p Peer) (*spiffebundle.Bundle, error) {
	data, err := m.fetch.fetch(ctx, p)
	if err != nil {
		return nil, err
	}
	b, err := identity.ParseBundle(p.TrustDomain, data)
	if err != nil {
		return nil, err
	}
	return b, m.keep(ctx, p, b)
}

// interval is how long to wait after b, or where that is nil after what is held.
func (m *Manager) interval(p Peer, b *spiffebundle.Bundle) time.Duration {
	if b == nil {
		m.mu.Lock()
		b = held(p, m.records)
		m.mu.Unlock()
	}
	if b != nil {
		if hint, ok := b.RefreshHint(); ok {
			return min(max(hint, m.cfg.MinRefresh), m.cfg.MaxRefresh)
		}
	}
	return min(max(defaultRefresh, m.cfg.MinRefresh), m.cfg.MaxRefresh)
}

func (m *Manager) note(p Peer, err error) {
	m.mu.Lock()
	a := m.fetches[p.TrustDomain]
	was := a.problem
	if err == nil {
		a.success, a.problem = m.cfg.Now(), ""
	} else {
		a.problem = err.Error()
		a.failures++
	}
	m.fetches[p.TrustDomain] = a
	m.mu.Unlock()
	switch {
	case a.problem != "" && a.problem != was:
		m.log.Warn("fetching a foreign bundle; the last good one stays in force", "trust_domain", p.TrustDomain.Name(), "error", a.problem)
	case a.problem == "" && was != "":
		m.log.Info("fetching a foreign bundle works again", "trust_domain", p.TrustDomain.Name())
	}
}

// Status is how one foreign trust domain fares.
type Status struct {
	TrustDomain spiffeid.TrustDomain
	Profile     Profile // "": a fixed bundle
	URL         string
	Bundle      *spiffebundle.Bundle // in force; nil: nothing is trusted
	Success     time.Time            // of the last fetch that succeeded, or of the last change before a restart; zero: none yet
	Problem     string               // why there is no newer one; "" if all is well
	Failures    uint64               // fetches that failed since the process started
}

// Status of every foreign trust domain, ordered by name.
func (m *Manager) Status() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Status
	for td, why := range m.rejected {
		out = append(out, Status{TrustDomain: td, Problem: why})
	}
	for td, p := range m.peers {
		a := m.fetches[td]
		s := Status{TrustDomain: td, URL: p.URL, Success: a.success, Problem: a.problem, Failures: a.failures}
		if p.URL != "" {
			s.Profile = p.Profile
		}
		if k, ok := m.records[td]; ok && k.origin == p.origin() && s.Success.IsZero() {
			s.Success = k.fetched
		}
		if all := m.bundles.Load(); all != nil {
			s.Bundle = (*all)[td]
		}
		if s.Problem == "" && s.Bundle == nil && (s.URL == "" || !a.success.IsZero()) {
			s.Problem = "its bundle holds no key: nothing of it is trusted"
		}
		if s.Problem == "" && s.Bundle != nil {
			s.Problem = ending(s.Bundle, m.cfg.Now())
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b Status) int { return a.TrustDomain.Compare(b.TrustDomain) })
	return out
}

// ending says so when the last of b's X.509 authorities has less than a sixth of
// its life left, before anybody is refused for it.
func ending(b *spiffebundle.Bundle, now time.Time) string {
	var last *x509.Certificate
	for _, c := range b.X509Authorities() {
		if last == nil || c.NotAfter.After(last.NotAfter) {
			last = c
		}
	}
	if last == nil || last.NotAfter.Sub(now) >= last.NotAfter.Sub(last.NotBefore)/6 {
		return ""
	}
	return fmt.Sprintf("the last authority in its bundle ends at %s: it has to publish a new one", last.NotAfter.UTC().Format(time.RFC3339))
}

// trust is what endpoints with https_spiffe are verified with: the latest bundle
// of the endpoint ID's own trust domain (SPIFFE Federation 5.2.2).
type trust struct{ m *Manager }

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (t trust) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	var b *spiffebundle.Bundle
	if td == t.m.cfg.Own {
		b = t.m.cfg.OwnBundle()
	} else if all := t.m.bundles.Load(); all != nil {
		b = (*all)[td]
	}
	if b == nil {
		return nil, fmt.Errorf("no bundle of %s is held", td)
	}
	return b.X509Bundle(), nil
}
