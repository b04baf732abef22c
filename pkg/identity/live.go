package identity

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
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
	bundles    map[spiffeid.TrustDomain]trusted // nil before the first SetBundles
}

// trusted is one bundle, taken apart once and not at each handshake.
type trusted struct {
	x509 *x509bundle.Bundle
	jwt  *jwtbundle.Bundle
}

var (
	_ Source           = (*Live)(nil)
	_ jwtbundle.Source = (*Live)(nil)
)

// SetSVID replaces the SVID to present. The SVID must not be changed afterwards;
// nil withdraws it.
func (l *Live) SetSVID(svid *x509svid.SVID) {
	l.update(func(s *liveState) { s.svid = svid })
}

// SetBundles replaces the authorities to trust, of every trust domain at once. A
// trust domain that is missing or has no authority is not trusted. The bundles
// are copied; certificates and keys must not be changed afterwards.
func (l *Live) SetBundles(all Bundles) {
	bundles := make(map[spiffeid.TrustDomain]trusted, len(all))
	for td, b := range all {
		if b != nil && b.TrustDomain() == td { // a bundle under another's name is never believed
			bundles[td] = trusted{b.X509Bundle(), b.JWTBundle()}
		}
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
	b, err := l.trusted(td)
	if err == nil && b.x509.Empty() {
		err = fmt.Errorf("no X.509 authority for trust domain %q", td.Name())
	}
	if err != nil {
		return nil, err
	}
	return b.x509, nil
}

// GetJWTBundleForTrustDomain returns the keys to check JWT-SVIDs of td with. Its
// errors and the bundle's ownership are those of GetX509BundleForTrustDomain.
func (l *Live) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	b, err := l.trusted(td)
	if err == nil && b.jwt.Empty() {
		err = fmt.Errorf("no JWT authority for trust domain %q", td.Name())
	}
	if err != nil {
		return nil, err
	}
	return b.jwt, nil
}

func (l *Live) trusted(td spiffeid.TrustDomain) (trusted, error) {
	s := l.state.Load()
	if s == nil || s.bundles == nil {
		return trusted{}, ErrNoIdentity
	}
	b, ok := s.bundles[td]
	if !ok {
		return trusted{}, fmt.Errorf("no bundle for trust domain %q", td.Name())
	}
	return b, nil
}
