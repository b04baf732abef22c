package ca

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
)

// maxRefreshHint is how often, at most, a peer that asks for the bundle is told
// to ask.
const maxRefreshHint = 5 * time.Minute

// Bundle is what peers are to trust of this trust domain: active, next and
// retiring authorities. Its sequence number grows with every change of its
// content, over restarts and replicas (SPIFFE Trust Domain and Bundle 4.1.1); its
// refresh hint is in whole seconds. The caller must not change it.
func (c *CA) Bundle() *spiffebundle.Bundle { return c.state.Load().bundle }

// X509Roots returns the X.509 authorities of [CA.Bundle], oldest first. The
// caller must not change them.
func (c *CA) X509Roots() []*x509.Certificate { return c.state.Load().certs() }

func (s *state) certs() []*x509.Certificate {
	certs := make([]*x509.Certificate, len(s.roots))
	for i, r := range s.roots {
		certs[i] = r.cert
	}
	return certs
}

// makeBundle takes every record, so that the store alone decides what a sequence
// number means.
func (c *CA) makeBundle(s *state, b *book) (*spiffebundle.Bundle, error) {
	bundle := spiffebundle.FromX509Authorities(c.td, s.certs())
	for _, k := range s.jwts {
		kid, err := keyID(k.cert.PublicKey)
		if err != nil {
			return nil, err
		}
		if err := bundle.AddJWTAuthority(kid, k.cert.PublicKey); err != nil {
			return nil, fmt.Errorf("publishing a JWT key: %w", err)
		}
	}
	bundle.SetSequenceNumber(b.seq)
	bundle.SetRefreshHint(c.refreshHint())
	return bundle, nil
}

// refreshHint lets a peer ask four times while a new authority is published and
// not yet used.
func (c *CA) refreshHint() time.Duration {
	hint := min(c.cfg.RootTTL, c.cfg.JWTKeyTTL) / 12 / 4
	return max(min(hint, maxRefreshHint).Truncate(time.Second), time.Second)
}

// RootHash is the SHA-256 of the active root's public key (PKIX, DER), which a
// join token carries so that a sidecar can authenticate the control plane.
func (c *CA) RootHash() [sha256.Size]byte {
	return sha256.Sum256(c.state.Load().active.cert.RawSubjectPublicKeyInfo)
}

// WatchBundle calls fn with the current bundle at once and then with each new
// one, until ctx ends or fn fails; it returns that error. A slow fn sees only the
// newest. fn must not change the bundle.
func (c *CA) WatchBundle(ctx context.Context, fn func(*spiffebundle.Bundle) error) error {
	return watch(ctx, c, func(s *state) *spiffebundle.Bundle { return s.bundle }, (*spiffebundle.Bundle).Equal, fn)
}

func watch[T any](ctx context.Context, c *CA, of func(*state) T, same func(a, b T) bool, fn func(T) error) error {
	var last T
	for first := true; ; first = false {
		s := c.state.Load()
		if now := of(s); first || !same(last, now) {
			if err := fn(now); err != nil {
				return err
			}
			last = now
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.superseded:
		}
	}
}

func sameCerts(a, b []*x509.Certificate) bool {
	return slices.EqualFunc(a, b, (*x509.Certificate).Equal)
}

// Kinds of [Authority].
const (
	KindRoot         = "root"
	KindIntermediate = "intermediate"
	KindJWT          = "jwt"
)

// Authority is one signing key, for status output.
type Authority struct {
	Kind     string
	Subject  string // common name, unique
	KeyHash  string // SHA-256 of the SubjectPublicKeyInfo, lower-case hex
	State    string // next, active, retiring or tainted
	NotAfter time.Time
}

// Authorities lists roots, JWT keys and the intermediates of all replicas, of each
// kind the oldest first.
func (c *CA) Authorities() []Authority { return slices.Clone(c.state.Load().authorities) }

// describe fills in what follows from the rest of the state.
func (c *CA) describe(s *state, b *book, now time.Time) {
	s.tainted = s.effective(b)
	s.authorities = describe(KindRoot, s.roots, s.active)
	s.authorities = append(s.authorities, describe(KindJWT, s.jwts, s.jwt)...)
	issuers := slices.SortedFunc(maps.Values(b.issuers), func(x, y *issuerRecord) int {
		return cmp.Or(x.cert.NotBefore.Compare(y.cert.NotBefore), cmp.Compare(keyHash(x.cert), keyHash(y.cert)))
	})
	for i, rec := range issuers {
		state := "active"
		switch {
		case b.tainted[keyHash(rec.cert)] != nil:
			state = "tainted"
		case slices.ContainsFunc(issuers[i+1:], func(later *issuerRecord) bool {
			return later.Replica == rec.Replica && b.tainted[keyHash(later.cert)] == nil
		}):
			state = "retiring"
		}
		s.authorities = append(s.authorities, authorityOf(KindIntermediate, rec.cert, state))
	}
	s.cross, s.serverCross = nil, nil
	if x := s.active.cross; x != nil && now.Before(x.NotAfter) {
		s.serverCross = []*x509.Certificate{x}
		if now.Before(s.active.activeFrom.Add(c.cfg.SVIDTTL)) {
			s.cross = s.serverCross
		}
	}
}

func describe(kind string, anchors []*anchor, active *anchor) (list []Authority) {
	state := "retiring"
	for _, a := range anchors {
		switch {
		case a == active:
			state = "active"
		case state != "retiring":
			state = "next"
		}
		shown := state
		if a.taint != nil {
			shown = "tainted"
		}
		list = append(list, authorityOf(kind, a.cert, shown))
	}
	return list
}

func authorityOf(kind string, cert *x509.Certificate, state string) Authority {
	return Authority{Kind: kind, Subject: cert.Subject.CommonName, KeyHash: keyHash(cert), State: state, NotAfter: cert.NotAfter}
}
