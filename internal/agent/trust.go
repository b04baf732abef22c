package agent

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// stranger presents nothing; the server must be the control plane of whatever
// trust domain the roots are of that come with the evidence: a join token names
// one, for all else the trust bundle is a file. The handshake stores its ID in
// server.
func (a *Agent) stranger(p proof) (l *link, server *atomic.Pointer[spiffeid.ID], err error) {
	choose := pinnedRoot(p.token)
	if p.token == nil {
		roots, err := readTrustBundle(a.cfg.TrustBundle)
		if err != nil {
			return nil, nil, err
		}
		choose = func([]*x509.Certificate) ([]*x509.Certificate, error) { return roots, nil }
	}
	server = new(atomic.Pointer[spiffeid.ID])
	l = a.newLink(identity.TLSConfig{Source: bundlesOnly{&a.live}, OptionalClient: true}, spiffeid.TrustDomain{})
	l.tls.VerifyConnection = func(s tls.ConnectionState) error {
		id, err := a.verifyStranger(s.PeerCertificates, choose)
		if err != nil {
			return untrusted{err}
		}
		server.Store(&id)
		return nil
	}
	return l, server, nil
}

// pinnedRoot takes the root that the server presents last if it is the one that
// the token names by the hash of its public key.
func pinnedRoot(t *attest.Token) func(chain []*x509.Certificate) ([]*x509.Certificate, error) {
	return func(chain []*x509.Certificate) ([]*x509.Certificate, error) {
		if len(chain) < 2 {
			return nil, errors.New("it presents no root; is this address a Sallyport control plane's?")
		}
		if root := chain[len(chain)-1]; t.PinsRoot(root) {
			return []*x509.Certificate{root}, nil
		}
		return nil, errors.New("the join token was made by another control plane, or before its root was renewed; nothing was sent to this one; " +
			"check the address, or make a new token on this control plane: sallyport token create")
	}
}

// verifyStranger checks a server of which only the roots are known, like any other
// SVID; it has to be a control plane.
func (a *Agent) verifyStranger(chain []*x509.Certificate, choose func([]*x509.Certificate) ([]*x509.Certificate, error)) (spiffeid.ID, error) {
	roots, err := choose(chain)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if len(chain) == 0 {
		return spiffeid.ID{}, identity.ErrAnonymous
	}
	id, err := x509svid.IDFromCert(chain[0])
	if err != nil {
		return spiffeid.ID{}, err
	}
	peer, err := identity.Verify(chain, x509bundle.FromX509Authorities(id.TrustDomain(), roots), a.cfg.Now())
	if err != nil {
		return spiffeid.ID{}, err
	}
	if peer.ID != controlPlaneID(peer.ID.TrustDomain()) {
		return spiffeid.ID{}, fmt.Errorf("the server is %s and no control plane; check the address", peer.ID)
	}
	return peer.ID, nil
}

// readTrustBundle reads roots: PEM, or a SPIFFE bundle (SPIFFE Trust Domain and
// Bundle 4).
func readTrustBundle(path string) ([]*x509.Certificate, error) {
	if path == "" {
		return nil, errors.New("trustBundle is required: a file with the roots of the control plane, to which this evidence must not go before it is known")
	}
	text, err := readFile(path, maxPEM)
	if err != nil {
		return nil, fmt.Errorf("reading trustBundle: %w", err)
	}
	data := []byte(text)
	var roots []*x509.Certificate
	if bytes.HasPrefix(data, []byte("{")) {
		b, err := identity.ParseBundle(spiffeid.TrustDomain{}, data)
		if err != nil {
			return nil, fmt.Errorf("reading trustBundle %s: %w", path, err)
		}
		roots = b.X509Authorities()
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("reading trustBundle %s: it holds a %s; only certificates belong there", path, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading trustBundle %s: %w", path, err)
		}
		roots = append(roots, cert)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("trustBundle %s holds no certificate, neither as PEM nor as a SPIFFE bundle", path)
	}
	return roots, nil
}
