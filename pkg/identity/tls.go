package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// TLSConfig says who we are and whom we believe. Source is required.
type TLSConfig struct {
	Source Source

	// Check may refuse a peer whose certificate is valid, for example because it
	// was revoked. It runs in every handshake, before the peer has proved that
	// it holds the key: it must have no side effects.
	Check func(Peer) error

	// Now is the clock; nil is time.Now.
	Now func() time.Time

	// OptionalClient lets the client be anonymous. ServerTLS: a client without
	// a certificate is let in ([PeerOf] says [ErrAnonymous]), one with a bad
	// certificate is not. ClientTLS: while Source has no SVID none is presented,
	// as needed to enrol.
	OptionalClient bool

	NextProtos []string // ALPN, most preferred first
}

// ErrAnonymous says that the peer presented no certificate.
var ErrAnonymous = errors.New("peer presented no certificate")

// ServerTLS returns the configuration of a server that demands an SVID of its
// client: TLS 1.3 only, no session tickets, so that every connection is verified
// anew ([Verify]) with the bundles of that moment. It authenticates; whether the
// client may do anything is policy's.
func ServerTLS(c TLSConfig) *tls.Config {
	t := c.base()
	t.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.certificate() }
	t.ClientAuth = tls.RequireAnyClientCert
	if c.OptionalClient {
		t.ClientAuth = tls.RequestClientCert
	}
	t.VerifyConnection = func(s tls.ConnectionState) error {
		if c.OptionalClient && len(s.PeerCertificates) == 0 {
			return nil
		}
		_, err := c.verify(s)
		return err
	}
	return t
}

// ClientTLS returns the configuration of a client that presents its SVID and
// accepts only a server whose SPIFFE ID matches. The zero Pattern accepts none.
// DNS names and addresses are never looked at.
func ClientTLS(c TLSConfig, server Pattern) *tls.Config {
	t := c.base()
	t.InsecureSkipVerify = true // replaced by VerifyConnection: an SVID carries no host name
	t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, err := c.certificate()
		if c.OptionalClient && errors.Is(err, ErrNoIdentity) {
			return &tls.Certificate{}, nil
		}
		return cert, err
	}
	t.VerifyConnection = func(s tls.ConnectionState) error {
		peer, err := c.verify(s)
		if err != nil {
			return err
		}
		if !server.Match(peer.ID) {
			return fmt.Errorf("server is %s, want %s", peer.ID, server)
		}
		return nil
	}
	return t
}

func (c TLSConfig) base() *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
		NextProtos:                  c.NextProtos,
		Time:                        c.now,
	}
}

func (c TLSConfig) now() time.Time {
	if c.Now == nil {
		return time.Now()
	}
	return c.Now()
}

func (c TLSConfig) certificate() (*tls.Certificate, error) {
	svid, err := c.Source.GetX509SVID()
	if err != nil {
		return nil, err
	}
	cert := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, link := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, link.Raw)
	}
	return cert, nil
}

func (c TLSConfig) verify(s tls.ConnectionState) (Peer, error) {
	peer, err := Verify(s.PeerCertificates, c.Source, c.now())
	if err != nil {
		return Peer{}, err
	}
	if c.Check != nil {
		if err := c.Check(peer); err != nil {
			return Peer{}, fmt.Errorf("refusing %s: %w", peer.ID, err)
		}
	}
	return peer, nil
}

// PeerOf returns the other end of a connection made with [ServerTLS] or
// [ClientTLS], once its handshake is complete. [ErrAnonymous] means that the
// client presented no certificate. Of a connection made with any other
// configuration it says nothing: it does not verify again.
func PeerOf(s tls.ConnectionState) (Peer, error) {
	if !s.HandshakeComplete {
		return Peer{}, errors.New("TLS handshake not complete")
	}
	if len(s.PeerCertificates) == 0 {
		return Peer{}, ErrAnonymous
	}
	return peerFrom(s.PeerCertificates)
}

func peerFrom(chain []*x509.Certificate) (Peer, error) {
	id, err := leafID(chain[0])
	if err != nil {
		return Peer{}, err
	}
	return Peer{ID: id, Leaf: chain[0], Chain: chain}, nil
}
