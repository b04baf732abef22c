package proxy

import (
	"crypto/x509"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// proof is how a peer proved who it is. It is immutable.
type proof struct {
	chain []*x509.Certificate // as presented, leaf first
	at    time.Time           // of the handshake
	trust uint64              // View.trust from before the handshake
}

// holds reports whether the handshake would succeed with today's bundles. It
// does not ask today's clock: a certificate that expires later ends nothing.
func (p *proof) holds(bundles x509bundle.Source) bool {
	_, err := identity.Verify(p.chain, bundles, p.at)
	return err == nil
}

// proved notes how c's peer proved itself and reports whether that still holds.
// It is noted before it is compared with the newest view: either the comparison
// sees newer bundles, or the recheck of those sees c.
func (c *conn) proved(p *proof, views *Views, bundles x509bundle.Source) bool {
	c.peer.Store(p)
	return views.Load().trust == p.trust || p.holds(bundles)
}

// distrusted reports whether c's peer has proved itself in a way that does not
// hold any more.
func (c *conn) distrusted(bundles x509bundle.Source) bool {
	p := c.peer.Load()
	return p != nil && !p.holds(bundles)
}

// untrusted is v where the peer's issuer is no longer trusted: nothing but that
// counts.
func (v verdict) untrusted() verdict {
	return verdict{status: http.StatusForbidden, why: "the peer's issuer is no longer trusted", portName: v.portName, revision: v.revision}
}
