package proxy

import (
	"fmt"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// untrusted is why a connection ends whose peer new bundles do not verify.
const untrusted = "the peer's issuer is no longer trusted"

// proof is how a peer proved who it is. It is immutable.
type proof struct {
	peer  identity.Peer
	at    time.Time // of the handshake
	trust uint64    // View.trust from before the handshake
}

// holds reports whether the handshake would succeed with today's bundles. It
// does not ask today's clock: a certificate that expires later ends nothing.
func (p *proof) holds(bundles x509bundle.Source) bool {
	_, err := identity.Verify(p.peer.Chain, bundles, p.at)
	return err == nil
}

// judge is who says whether a proof still counts.
type judge struct {
	views   *Views
	bundles x509bundle.Source
	book    *revocation.Book
}

// proved notes how c's peer proved itself and returns why that does not count any
// more, "" if it does. It is noted before it is compared with what is in force:
// either the comparison sees newer bundles and lists, or the recheck of those sees
// c.
func (c *conn) proved(p *proof, j judge) (why string) {
	c.peer.Store(p)
	if err := j.book.Check(p.peer); err != nil {
		return err.Error()
	}
	if j.views.Load().trust != p.trust && !p.holds(j.bundles) {
		return untrusted
	}
	return ""
}

// distrusted reports whether c's peer has proved itself in a way that does not
// hold any more.
func (c *conn) distrusted(bundles x509bundle.Source) bool {
	p := c.peer.Load()
	return p != nil && !p.holds(bundles)
}

// distrust is v where the peer is not believed any more: nothing but that counts.
func (v verdict) distrust(why string) verdict {
	return verdict{status: http.StatusForbidden, why: why, portName: v.portName, revision: v.revision}
}

// cutRevoked cuts the connections whose peer's proof the book refuses; base gives
// what the record says besides.
func (t *conns) cutRevoked(book *revocation.Book, base func(*conn) verdict) {
	for _, c := range t.all() {
		p := c.peer.Load()
		if p == nil {
			continue // it will ask by itself
		}
		if err := book.Check(p.peer); err != nil {
			if c.revoked.CompareAndSwap(false, true) {
				t.revoked.Add(1)
			}
			c.cancel(&cutError{base(c).distrust(err.Error())})
		}
	}
}

// fresh is v unless the workload refuses callers while it may not know who is
// revoked. Only new connections ask: live ones stay.
func (in *Inbound) fresh(v verdict) verdict {
	limit := in.cfg.Views.Load().maxStale
	if !limit.Refuse || limit.After == 0 || in.cfg.Stale == nil {
		return v
	}
	stale := in.cfg.Stale()
	if stale <= limit.After {
		return v
	}
	return verdict{
		status: http.StatusServiceUnavailable, portName: v.portName, revision: v.revision, told: staleReason,
		why: fmt.Sprintf("for %s nothing was heard of revocations, and maxStale is %s", stale.Round(time.Second), limit.After),
	}
}

// staleReason is what a caller is told.
const staleReason = "the destination may not know who is revoked and refuses new connections; see spec.maxStale"
