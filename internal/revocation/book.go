package revocation

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

var (
	// ErrOlder says that the book holds a newer list than the one offered.
	ErrOlder = errors.New("older than the list held")
	// ErrConflict says that the list offered has the version of the one held and
	// says something else.
	ErrConflict = errors.New("the same version as the list held, with other entries")
)

// Book holds the newest list of each trust domain. Any number of goroutines may
// ask it; it never goes back. Make it with [NewBook].
type Book struct {
	bundles x509bundle.Source
	now     func() time.Time
	pages   atomic.Pointer[map[spiffeid.TrustDomain]page] // never nil; the map is immutable
	turned  chan struct{}                                 // cap 1: there is a new list
	signer  spiffeid.ID                                   // see Expect

	mu       sync.Mutex // orders changes and what watchers are told
	watchers []func(*List)
}

// page is a list and how it came.
type page struct {
	list     *List
	envelope []byte
}

// NewBook returns an empty book, which refuses nothing. Offers are believed by the
// bundles of that moment; now is the clock, nil is time.Now.
func NewBook(bundles x509bundle.Source, now func() time.Time) *Book {
	if now == nil {
		now = time.Now
	}
	b := &Book{bundles: bundles, now: now, turned: make(chan struct{}, 1)}
	b.pages.Store(&map[spiffeid.TrustDomain]page{})
	return b
}

// Expect says that the control plane of id's trust domain is called so: lists of
// that trust domain are believed if it signed them, and no others. It is called
// before any offer; other control planes are called [identity.ControlPlanePath].
func (b *Book) Expect(id spiffeid.ID) { b.signer = id }

// Offer takes in an envelope and reports whether that changed the book: a list
// that verifies now, and that has a greater version than the one held or, with the
// same entries, a later moment of issue. The signer's own issuer must not be
// refused by the list held. When Offer returns, the list is in force and every
// watcher has been told. The book keeps envelope. Errors are those of [Open],
// [ErrRevoked], [ErrOlder] and [ErrConflict]; with any of them nothing changes.
func (b *Book) Offer(envelope []byte) (newer bool, err error) {
	now := b.now()
	l, signer, err := open(envelope, b.bundles, now, b.signer)
	if err != nil {
		return false, err
	}
	return b.take(l, signer, envelope, now)
}

// Restore is Offer for what this very process has saved: the signer's certificate
// must have been valid when the list was issued, and may have expired since.
func (b *Book) Restore(envelope []byte) (newer bool, err error) {
	l, signer, err := open(envelope, b.bundles, time.Time{}, b.signer)
	if err != nil {
		return false, err
	}
	return b.take(l, signer, envelope, b.now())
}

func (b *Book) take(l *List, signer identity.Peer, envelope []byte, now time.Time) (newer bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := *b.pages.Load()
	held := old[l.td].list
	if h, refused := held.refusedIssuer(signer.Chain, now); refused {
		return false, fmt.Errorf("taking revocation list %s: %w: its signer's issuer with key %x", l.version, ErrRevoked, h)
	}
	if held != nil {
		switch {
		case l.version.Less(held.version):
			return false, fmt.Errorf("taking revocation list %s: %w, %s", l.version, ErrOlder, held.version)
		case l.version == held.version && l.content != held.content:
			return false, fmt.Errorf("taking revocation list %s: %w", l.version, ErrConflict)
		case l.version == held.version && !l.issued.After(held.issued):
			return false, nil
		}
	}
	next := maps.Clone(old)
	next[l.td] = page{l, envelope}
	b.pages.Store(&next)
	select {
	case b.turned <- struct{}{}:
	default:
	}
	b.tell(l)
	return true, nil
}

// tell calls the watchers. The caller holds mu.
func (b *Book) tell(l *List) {
	for _, fn := range b.watchers {
		fn(l)
	}
}

// Watch has fn called with each list that came into force, before the Offer that
// brought it returns, and with a list again when it begins to refuse more; see
// [Book.Run]. Calls follow one another. fn must not offer.
func (b *Book) Watch(fn func(*List)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.watchers = append(b.watchers, fn)
}

// Run tells the watchers when an issuer's moment has come, until ctx ends; it
// returns nil. Handshakes see that moment without it, live connections do not.
func (b *Book) Run(ctx context.Context) error {
	t := time.NewTimer(0)
	defer t.Stop()
	last := b.now() // watchers know what was refused until then
	for {
		due, ok := b.next(last)
		if ok {
			t.Reset(due.Sub(b.now()))
		} else {
			t.Stop()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-b.turned:
		case <-t.C:
			if ok && !b.now().Before(due) {
				b.retell(last)
				last = due
			}
		}
	}
}

// next returns the first moment after last from which a list refuses more.
func (b *Book) next(last time.Time) (first time.Time, ok bool) {
	for _, p := range *b.pages.Load() {
		if due, more := p.list.next(last); more && (!ok || due.Before(first)) {
			first, ok = due, true
		}
	}
	return first, ok
}

// retell tells of every list that has begun to refuse more since last.
func (b *Book) retell(last time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	for _, p := range *b.pages.Load() {
		if due, more := p.list.next(last); more && !due.After(now) {
			b.tell(p.list)
		}
	}
}

// Check returns an error that is [ErrRevoked] if the list of the peer's trust
// domain refuses it now. It may serve as identity.TLSConfig.Check.
func (b *Book) Check(p identity.Peer) error {
	l := b.List(p.ID.TrustDomain())
	if l == nil {
		return nil
	}
	return l.Check(p, b.now())
}

// CheckJWT is Check for a JWT-SVID of id that was issued at iat.
func (b *Book) CheckJWT(id spiffeid.ID, iat time.Time) error {
	return b.List(id.TrustDomain()).CheckJWT(id, iat)
}

// List returns the list of td, nil if there is none.
func (b *Book) List(td spiffeid.TrustDomain) *List { return (*b.pages.Load())[td].list }

// Envelope returns the list of td as it came, nil if there is none. It must not be
// changed.
func (b *Book) Envelope(td spiffeid.TrustDomain) []byte { return (*b.pages.Load())[td].envelope }

// Age is how long ago the list of td was issued; false if there is none.
func (b *Book) Age(td spiffeid.TrustDomain) (time.Duration, bool) {
	l := b.List(td)
	if l == nil {
		return 0, false
	}
	return max(b.now().Sub(l.issued), 0), true
}

// Presentable returns the list of td, and the envelope that proves it, while
// others would still believe the signer; a nil list otherwise.
func (b *Book) Presentable(td spiffeid.TrustDomain) (*List, []byte) {
	p := (*b.pages.Load())[td]
	if p.list == nil || !b.now().Before(p.list.expires) {
		return nil, nil
	}
	return p.list, p.envelope
}
