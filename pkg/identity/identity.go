// Package identity holds names and TLS: SPIFFE IDs and patterns over them, the
// SVID and bundles a process presents and trusts, and TLS configurations that
// authenticate the peer.
//
// It does not authorise: who may talk to whom is package policy's. It does not
// fetch: whoever obtains an SVID puts it into a [Live]. It imports no grpc.
package identity

import (
	"context"
	"crypto/x509"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Source gives the SVID to present and the bundles to trust. Neither method
// blocks; each fails with [ErrNoIdentity] before there is something to give.
type Source interface {
	x509svid.Source
	x509bundle.Source
}

// Bundles is what to trust, by trust domain: X.509 and JWT authorities. They are
// never merged (SPIFFE Federation 4.2). A bundle must not change once it is in
// the hands of several.
type Bundles = map[spiffeid.TrustDomain]*spiffebundle.Bundle

// Peer is the authenticated other end of a TLS connection.
type Peer struct {
	ID    spiffeid.ID
	Leaf  *x509.Certificate
	Chain []*x509.Certificate // as presented, leaf first
}

type peerKey struct{}

// ContextWithPeer returns a context that carries the authenticated caller.
func ContextWithPeer(ctx context.Context, p Peer) context.Context {
	return context.WithValue(ctx, peerKey{}, p)
}

// PeerFromContext returns the caller that [ContextWithPeer] stored; false means
// the call is anonymous.
func PeerFromContext(ctx context.Context) (Peer, bool) {
	p, ok := ctx.Value(peerKey{}).(Peer)
	return p, ok
}
