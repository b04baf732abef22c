package identity

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// ErrNoIdentity says that no SVID, or no bundle, has been received yet.
var ErrNoIdentity = errors.New("no identity yet")

// Live is the [Source] of a process whose SVID and bundles are replaced while it
// runs. Readers load one pointer and never wait. The zero value is ready and
// answers [ErrNoIdentity].
type Live struct {
	state atomic.Pointer[liveState]
}

// liveState is immutable once published.
type liveState struct {
	generation uint64
	svid       *x509svid.SVID
	bundles    map[spiffeid.TrustDomain]*x509bundle.Bundle // nil before the first SetBundles
}

var _ Source = (*Live)(nil)

// SetSVID replaces the SVID to present. The SVID must not be changed afterwards;
// nil withdraws it.
func (l *Live) SetSVID(svid *x509svid.SVID) {
	l.update(func(s *liveState) { s.svid = svid })
}

// SetBundles replaces the authorities to trust, of every trust domain at once. A
// trust domain that is missing or has no authority is not trusted. The map and
// its slices are copied; the certificates must not be changed afterwards.
func (l *Live) SetBundles(authorities map[spiffeid.TrustDomain][]*x509.Certificate) {
	bundles := make(map[spiffeid.TrustDomain]*x509bundle.Bundle, len(authorities))
	for td, certs := range authorities {
		bundles[td] = x509bundle.FromX509Authorities(td, slices.Clone(certs))
	}
	l.update(func(s *liveState) { s.bundles = bundles })
}

func (l *Live) update(change func(*liveState)) {
	for {
		old := l.state.Load()
		var next liveState
		if old != nil {
			next = *old
		}
		next.generation++
		change(&next)
		if l.state.CompareAndSwap(old, &next) {
			return
		}
	}
}

// Generation returns a number that changes with every SetSVID and SetBundles; 0
// before the first. A pooled connection belongs to one generation.
func (l *Live) Generation() uint64 {
	if s := l.state.Load(); s != nil {
		return s.generation
	}
	return 0
}

// GetX509SVID returns the current SVID, or [ErrNoIdentity].
func (l *Live) GetX509SVID() (*x509svid.SVID, error) {
	s := l.state.Load()
	if s == nil || s.svid == nil {
		return nil, ErrNoIdentity
	}
	return s.svid, nil
}

// GetX509BundleForTrustDomain returns what to trust for td. It fails with
// [ErrNoIdentity] before the first SetBundles. The bundle belongs to the Live
// and must not be changed.
func (l *Live) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	s := l.state.Load()
	if s == nil || s.bundles == nil {
		return nil, ErrNoIdentity
	}
	b, ok := s.bundles[td]
	if !ok || b.Empty() {
		return nil, fmt.Errorf("no bundle for trust domain %q", td.Name())
	}
	return b, nil
}
