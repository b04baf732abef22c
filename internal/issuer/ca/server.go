package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// serverSVID is what the control plane presents and trusts.
type serverSVID struct {
	svid    *x509svid.SVID
	issuer  *x509.Certificate
	cross   []*x509.Certificate
	bundle  *spiffebundle.Bundle
	renewAt time.Time
}

// ServerSVID is the control plane's own identity, under
// [identity.ControlPlanePath], renewed by Run with a fresh key. The chain that it
// presents ends with the root, so that a sidecar that enrols can compare the
// root's key with the hash in its join token.
func (c *CA) ServerSVID() identity.Source { return &c.live }

// advanceServer returns the present SVID while it fits the state and is young.
func (c *CA) advanceServer(s *state, now time.Time) (*serverSVID, error) {
	if h := c.server; h != nil && now.Before(h.renewAt) && h.issuer.Equal(s.signer.cert) && sameCerts(h.cross, s.serverCross) && h.bundle.Equal(s.bundle) {
		return h, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the control plane's key: %w", err)
	}
	id, err := spiffeid.FromPath(c.td, identity.ControlPlanePath)
	if err != nil {
		return nil, fmt.Errorf("naming the control plane: %w", err)
	}
	issued, err := c.issue(s, Request{ID: id, Key: key.Public(), names: c.cfg.ServerNames})
	if err != nil {
		return nil, err
	}
	chain := slices.Concat(issued.Chain[:2], s.signer.above, s.serverCross, []*x509.Certificate{s.active.cert})
	return &serverSVID{
		svid:    &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key},
		issuer:  s.signer.cert,
		cross:   s.serverCross,
		bundle:  s.bundle,
		renewAt: now.Add(issued.Chain[0].NotAfter.Sub(now) / 24),
	}, nil
}
