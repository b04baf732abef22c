package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
)

// result is how one end saw a connection: a whole handshake and one byte from
// the other side, which is when a client learns that it was refused.
type result struct {
	state tls.ConnectionState
	err   error
}

// connect runs both ends over loopback. An end that is done ends its writing only,
// so that a refusal reaches the other side as an alert.
func connect(t *testing.T, server, client *tls.Config) (s, c result) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	b, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	defer b.Close()
	a, err := l.Accept()
	require.NoError(t, err)
	defer a.Close()

	end := func(conn *tls.Conn, r *result) {
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		defer func() { _ = conn.NetConn().(*net.TCPConn).CloseWrite() }()
		if r.err = conn.Handshake(); r.err != nil {
			return
		}
		r.state = conn.ConnectionState()
		if _, r.err = conn.Write([]byte{1}); r.err == nil {
			_, r.err = io.ReadFull(conn, make([]byte, 1))
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { end(tls.Server(a, server), &s) })
	wg.Go(func() { end(tls.Client(b, client), &c) })
	wg.Wait()
	return s, c
}

// pair is a server, payments, and a client, orders, of one trust domain.
type pair struct {
	root           *authority
	server, client TLSConfig
}

func newPair(t *testing.T) *pair {
	root := newAuthority(t, shop)
	return &pair{
		root:   root,
		server: TLSConfig{Source: live(root.svid(paymentsID, nil), trusting(root)), Now: clock},
		client: TLSConfig{Source: live(root.svid(ordersID, nil), trusting(root)), Now: clock},
	}
}

func (p *pair) clientTLS() *tls.Config { return ClientTLS(p.client, ExactPattern(paymentsID)) }

func TestHandshake(t *testing.T) {
	p := newPair(t)
	s, c := connect(t, ServerTLS(p.server), p.clientTLS())
	require.NoError(t, s.err)
	require.NoError(t, c.err)
	for want, r := range map[spiffeid.ID]result{ordersID: s, paymentsID: c} {
		peer, err := PeerOf(r.state)
		if err != nil || peer.ID != want || peer.Leaf == nil {
			t.Errorf("got %v, %v, want %v", peer.ID, err, want)
		}
		if r.state.Version != tls.VersionTLS13 {
			t.Errorf("version %x", r.state.Version)
		}
	}
}

func TestHandshakeALPN(t *testing.T) {
	p := newPair(t)
	p.server.NextProtos, p.client.NextProtos = []string{"h2"}, []string{"x", "h2"}
	s, c := connect(t, ServerTLS(p.server), p.clientTLS())
	require.NoError(t, s.err)
	require.NoError(t, c.err)
	if s.state.NegotiatedProtocol != "h2" {
		t.Errorf("got %q", s.state.NegotiatedProtocol)
	}
}

// TestResumptionC1 lets both ends try to resume a session. The first row proves
// that the attempt works where the defence is taken out.
func TestResumptionC1(t *testing.T) {
	tickets := func(c *tls.Config) { c.SessionTicketsDisabled = false }
	cache := func(c *tls.Config) { c.ClientSessionCache = tls.NewLRUClientSessionCache(4) }
	none := func(*tls.Config) {}
	for name, c := range map[string]struct {
		server, client func(*tls.Config)
		resumed        bool
	}{
		"no defence":     {tickets, func(c *tls.Config) { tickets(c); cache(c) }, true},
		"hostile client": {none, func(c *tls.Config) { tickets(c); cache(c) }, false},
		"hostile server": {tickets, none, false},
		"caching client": {tickets, cache, false},
		"both ours":      {none, none, false},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			var mu sync.Mutex
			revoked, checks := false, 0
			p.server.Check = func(peer Peer) error {
				mu.Lock()
				defer mu.Unlock()
				checks++
				if revoked {
					return errors.New("revoked")
				}
				return nil
			}
			server, client := ServerTLS(p.server), p.clientTLS()
			client.ServerName = "payments" // what a cache is keyed by
			c.server(server)
			c.client(client)

			for range 2 {
				s, cl := connect(t, server, client)
				require.NoError(t, s.err)
				require.NoError(t, cl.err)
				if checks == 2 && (s.state.DidResume != c.resumed || cl.state.DidResume != c.resumed) {
					t.Errorf("resumed: server %v, client %v, want %v", s.state.DidResume, cl.state.DidResume, c.resumed)
				}
			}
			mu.Lock()
			revoked = true
			mu.Unlock()
			s, cl := connect(t, server, client)
			wantError(t, s.err, "refusing spiffe://shop.example/orders: revoked")
			wantError(t, cl.err, "bad certificate")
			if checks != 3 {
				t.Errorf("%d checks, want one for each of 3 connections", checks)
			}
		})
	}
}

// TestBundleChangeC1 withdraws an authority between two connections.
func TestBundleChangeC1(t *testing.T) {
	p := newPair(t)
	source := p.server.Source.(*Live)
	server, client := ServerTLS(p.server), p.clientTLS()
	client.ClientSessionCache, client.SessionTicketsDisabled = tls.NewLRUClientSessionCache(4), false
	s, c := connect(t, server, client)
	require.NoError(t, s.err)
	require.NoError(t, c.err)
	source.SetBundles(trusting(newAuthority(t, shop)))
	s, c = connect(t, server, client)
	wantError(t, s.err, "unknown authority")
	wantError(t, c.err, "bad certificate")
}

// TestVersionsC4: only TLS 1.3, which knows no renegotiation; without tickets
// (C1) there is no early data either.
func TestVersionsC4(t *testing.T) {
	for version := uint16(tls.VersionTLS10); version <= tls.VersionTLS13; version++ {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			want := ""
			if version < tls.VersionTLS13 {
				want = "protocol version"
			}
			p := newPair(t)
			old := p.clientTLS()
			old.MinVersion, old.MaxVersion = tls.VersionTLS10, version
			_, c := connect(t, ServerTLS(p.server), old)
			wantError(t, c.err, want)
			old = ServerTLS(p.server)
			old.MinVersion, old.MaxVersion = tls.VersionTLS10, version
			s, _ := connect(t, old, p.clientTLS())
			if (s.err != nil) != (want != "") {
				t.Errorf("server of that version: got %v", s.err)
			}
		})
	}
}

// TestHandshakeC5 presents bad certificates at both ends, also to a server that
// lets anonymous clients in.
func TestHandshakeC5(t *testing.T) {
	for name, edit := range map[string]func(*x509.Certificate){
		"no URI":    func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"payments"} },
		"two URIs":  func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) },
		"CA":        func(c *x509.Certificate) { c.IsCA = true },
		"wrong EKU": func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} },
		"expired":   func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Second) },
		"no path":   func(c *x509.Certificate) { c.URIs[0].Path = "" },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			bad := TLSConfig{Source: live(p.root.svid(ordersID, edit), trusting(p.root)), Now: clock}
			s, c := connect(t, ServerTLS(p.server), ClientTLS(bad, ExactPattern(paymentsID)))
			if s.err == nil || c.err == nil {
				t.Errorf("bad client: server %v, client %v", s.err, c.err)
			}
			p.server.OptionalClient = true
			s, c = connect(t, ServerTLS(p.server), ClientTLS(bad, ExactPattern(paymentsID)))
			if s.err == nil || c.err == nil {
				t.Errorf("bad client where none is needed: server %v, client %v", s.err, c.err)
			}
			s, c = connect(t, ServerTLS(bad), ClientTLS(p.client, ExactPattern(ordersID)))
			if s.err == nil || c.err == nil {
				t.Errorf("bad server: server %v, client %v", s.err, c.err)
			}
		})
	}
}

// TestStolenCertificate presents a good certificate without its key.
func TestStolenCertificate(t *testing.T) {
	p := newPair(t)
	svid := p.root.svid(ordersID, nil)
	svid.PrivateKey = newKey(t)
	thief := TLSConfig{Source: live(svid, trusting(p.root)), Now: clock}
	s, _ := connect(t, ServerTLS(p.server), ClientTLS(thief, ExactPattern(paymentsID)))
	wantError(t, s.err, "invalid signature")
	_, c := connect(t, ServerTLS(thief), ClientTLS(p.client, ExactPattern(ordersID)))
	wantError(t, c.err, "invalid signature")
}

func TestHandshakeC7(t *testing.T) {
	ours, theirs := newAuthority(t, shop), newAuthority(t, other)
	trust := Bundles{shop: spiffebundle.FromX509Authorities(shop, []*x509.Certificate{ours.cert}), other: spiffebundle.FromX509Authorities(other, []*x509.Certificate{theirs.cert})}
	server := TLSConfig{Source: live(ours.svid(paymentsID, nil), trust), Now: clock}
	forged := TLSConfig{Source: live(theirs.svid(ordersID, nil), trust), Now: clock}
	s, c := connect(t, ServerTLS(server), ClientTLS(forged, ExactPattern(paymentsID)))
	wantError(t, s.err, "unknown authority")
	wantError(t, c.err, "bad certificate")
}

// TestHandshakeC8: a valid SVID of the wrong server, or a bundle that is missing,
// fails the handshake, so that nothing is ever sent in the clear.
func TestHandshakeC8(t *testing.T) {
	p := newPair(t)
	wrong := map[string]Pattern{"other ID": ExactPattern(ordersID), "zero": {}}
	var err error
	wrong["other trust domain"], err = ParsePattern("spiffe://other.example/**")
	require.NoError(t, err)
	for name, pattern := range wrong {
		_, c := connect(t, ServerTLS(p.server), ClientTLS(p.client, pattern))
		if c.err == nil {
			t.Errorf("%s: the wrong server was accepted", name)
		}
	}
	_, c := connect(t, ServerTLS(p.server), ClientTLS(p.client, ExactPattern(ordersID)))
	wantError(t, c.err, "server is spiffe://shop.example/payments, want spiffe://shop.example/orders")

	svid := p.root.svid(ordersID, nil)
	p.client.Source = live(svid, Bundles{})
	_, c = connect(t, ServerTLS(p.server), p.clientTLS())
	wantError(t, c.err, "no bundle for trust domain")

	for _, optional := range []bool{false, true} {
		p.client = TLSConfig{Source: new(Live), Now: clock, OptionalClient: optional}
		_, c = connect(t, ServerTLS(p.server), p.clientTLS())
		wantError(t, c.err, "no identity yet")
	}
	p = newPair(t)
	p.server.Source = new(Live)
	s, c := connect(t, ServerTLS(p.server), p.clientTLS())
	wantError(t, s.err, "no identity yet")
	if c.err == nil {
		t.Error("a server without identity was accepted")
	}
}

func TestAnonymousClient(t *testing.T) {
	p := newPair(t)
	anonymous := live(nil, trusting(p.root))
	client := ClientTLS(TLSConfig{Source: anonymous, Now: clock, OptionalClient: true}, ExactPattern(paymentsID))

	s, c := connect(t, ServerTLS(p.server), client)
	if s.err == nil {
		t.Error("let in although a certificate is demanded")
	}
	wantError(t, c.err, "certificate required")

	checked := false
	p.server.OptionalClient = true
	p.server.Check = func(Peer) error { checked = true; return nil }
	s, c = connect(t, ServerTLS(p.server), client)
	require.NoError(t, s.err)
	require.NoError(t, c.err)
	if _, err := PeerOf(s.state); !errors.Is(err, ErrAnonymous) {
		t.Errorf("got %v, want %v", err, ErrAnonymous)
	}
	if checked {
		t.Error("a peer that there is not was checked")
	}

	anonymous.SetSVID(p.root.svid(ordersID, nil)) // enrolled
	s, c = connect(t, ServerTLS(p.server), client)
	require.NoError(t, s.err)
	require.NoError(t, c.err)
	if peer, err := PeerOf(s.state); err != nil || peer.ID != ordersID || !checked {
		t.Errorf("got %v, %v, checked %v", peer.ID, err, checked)
	}

	strict := ClientTLS(TLSConfig{Source: live(nil, trusting(p.root)), Now: clock}, ExactPattern(paymentsID))
	_, c = connect(t, ServerTLS(p.server), strict)
	wantError(t, c.err, "no identity yet")
}

func TestPeerOfUnfinished(t *testing.T) {
	p := newPair(t)
	s, c := connect(t, ServerTLS(p.server), p.clientTLS())
	require.NoError(t, s.err)
	require.NoError(t, c.err)
	s.state.HandshakeComplete = false
	peer, err := PeerOf(s.state)
	wantError(t, err, "not complete")
	if !peer.ID.IsZero() || peer.Leaf != nil || peer.Chain != nil {
		t.Errorf("got %v", peer)
	}
}

// TestRotation: each handshake presents the SVID of its moment.
func TestRotation(t *testing.T) {
	p := newPair(t)
	source := p.client.Source.(*Live)
	server, client := ServerTLS(p.server), p.clientTLS()
	for range 3 {
		svid := p.root.svid(ordersID, nil)
		source.SetSVID(svid)
		s, c := connect(t, server, client)
		require.NoError(t, s.err)
		require.NoError(t, c.err)
		if !s.state.PeerCertificates[0].Equal(svid.Certificates[0]) {
			t.Error("an old SVID was presented")
		}
	}
}
