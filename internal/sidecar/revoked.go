package sidecar

import (
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/proxy"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	// staleAfter is after how long without news of revocations health tells, where
	// the workload does not say.
	staleAfter = 15 * time.Minute
	// forEver is for how long a sidecar has heard nothing that never heard anything.
	forEver = 100 * 365 * 24 * time.Hour
)

// openBook makes the book, and who shares it, and puts the saved list in force,
// which a borrowed identity has the bundles for only later, see borrowIdentity.
func (s *Sidecar) openBook() {
	s.book = revocation.NewBook(s.agent.Source(), s.now)
	if id, err := spiffeid.FromString(s.cfg.Identity.ControlPlaneID); err == nil { // "" by default
		s.book.Expect(id)
	}
	log := s.log.Named("revocation")
	s.keeper = revocation.NewKeeper(s.cfg.StateDir, log)
	if s.cfg.Identity.WorkloadAPI == "" {
		s.keeper.Restore(s.book)
	}
	s.near = proxy.NewNeighbours(proxy.NeighboursConfig{Source: s.agent.Source(), Book: s.book, Now: s.now, Log: log})
}

// check refuses a control plane that is revoked. There is a book before anything is
// dialled.
func (s *Sidecar) check(p identity.Peer) error { return s.book.Check(p) }

// checkJWT refuses tokens that an app has validated here.
func (s *Sidecar) checkJWT(subject spiffeid.ID, issued time.Time) error {
	return s.book.CheckJWT(subject, issued)
}

// watchBook has changes passed on and saved. It is called after those who cut
// connections.
func (s *Sidecar) watchBook() {
	s.book.Watch(s.near.Spread)
	s.book.Watch(func(l *revocation.List) {
		s.log.Debug("revocation list in force", "version", l.Version(), "entries", l.Len(), "issued", l.Issued())
		if svid, err := s.agent.Source().GetX509SVID(); err == nil && refuses(l, svid, s.now()) {
			s.log.Info("this sidecar's SVID is refused, or soon will be; renewing it", "version", l.Version())
			s.agent.RenewNow()
		}
		if s.wallet != nil {
			s.wallet.RenewIf(func(p identity.Peer) bool { return l.Names(p.Chain) || l.Check(p, s.now()) != nil })
		}
		if l.TrustDomain() == s.agent.ID().TrustDomain() {
			s.keeper.Note(s.book.Envelope(l.TrustDomain()))
		}
	})
}

// refuses reports whether l names an issuer of svid, or refuses it already.
func refuses(l *revocation.List, svid *x509svid.SVID, now time.Time) bool {
	own := identity.Peer{ID: svid.ID, Leaf: svid.Certificates[0], Chain: svid.Certificates}
	return l.Names(own.Chain) || l.Check(own, now) != nil
}

// stale is for how long a revocation may have gone unnoticed: since the control
// plane was last connected or, where a neighbour has passed on a later list, since
// that was signed.
func (s *Sidecar) stale() time.Duration {
	if s.health.Get(componentLink).Status == admin.OK {
		return 0
	}
	out := forEver
	if at := s.heard.Load(); at != 0 {
		out = s.now().Sub(time.Unix(0, at))
	}
	if age, ok := s.book.Age(s.agent.ID().TrustDomain()); ok {
		out = min(out, age)
	}
	return max(out, 0)
}

// revocationHealth says whether we know who is revoked, and whether we are.
func (s *Sidecar) revocationHealth() (admin.Status, string) {
	if svid, err := s.agent.Source().GetX509SVID(); err == nil {
		self := identity.Peer{ID: svid.ID, Leaf: svid.Certificates[0], Chain: svid.Certificates}
		if err := s.book.Check(self); err != nil {
			return admin.Down, fmt.Sprintf("this sidecar's own certificate is refused by its peers (%v); an operator can readmit it: sallyport identity unrevoke", err)
		}
	}
	stale, limit := s.stale(), s.views.Load().MaxStale()
	switch {
	case stale == forEver:
		return admin.OK, "" // it is starting, and other components say so
	case limit.After > 0 && limit.Refuse && stale > limit.After:
		return admin.Down, fmt.Sprintf("for %s nothing was heard of revocations, from the control plane or a neighbour: new connections are refused, as spec.maxStale says", stale.Round(time.Second))
	case limit.After > 0 && stale > limit.After, limit.After == 0 && stale > staleAfter:
		return admin.Degraded, fmt.Sprintf("for %s nothing was heard of revocations, from the control plane or a neighbour: somebody who was revoked since may still connect", stale.Round(time.Second))
	}
	return admin.OK, ""
}

// revocationState feeds the metrics.
func (s *Sidecar) revocationState() (admin.Revocation, bool) {
	td := s.agent.ID().TrustDomain()
	l := s.book.List(td)
	if l == nil {
		return admin.Revocation{}, false
	}
	return admin.Revocation{Version: l.Version().String(), Entries: l.Len(), Stale: s.stale()}, true
}
