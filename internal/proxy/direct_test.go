package proxy

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// direct is p with a direct port that nothing uses now.
func direct(t *testing.T, p policy.Port) policy.Port {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p.Direct = uint16(ln.Addr().(*net.TCPAddr).Port)
	require.NoError(t, ln.Close())
	return p
}

// declare puts rules in force, and ports of which those that are direct are open
// when it returns.
func (s *server) declare(t *testing.T, rev int64, rules []policy.Rule, ports ...policy.Port) {
	t.Helper()
	s.views.Apply(xds.Update{Kind: xds.Rules, Rev: xds.Revision{Epoch: 1, N: rev}, Rules: policy.NewRuleset(rules), Ports: ports})
	want := 0
	for _, p := range ports {
		if p.Direct != 0 {
			want++
		}
	}
	require.Eventually(t, func() bool { return len(s.DirectAddrs()) == want }, 5*time.Second, time.Millisecond)
}

// direct dials the only direct port of s.
func (w *world) direct(s *server, who spiffeid.ID, change func(*tls.Config)) (*tls.Conn, error) {
	w.t.Helper()
	cfg := identity.ClientTLS(identity.TLSConfig{Source: w.source(who)}, identity.ExactPattern(payments))
	if change != nil {
		change(cfg)
	}
	raw, err := net.Dial("tcp", s.DirectAddrs()[0].String())
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = raw.Close() })
	require.NoError(w.t, raw.SetDeadline(time.Now().Add(10*time.Second)))
	conn := tls.Client(raw, cfg)
	return conn, conn.Handshake()
}

// gone waits for the end of a connection.
func gone(t *testing.T, c net.Conn) {
	t.Helper()
	_, err := io.Copy(io.Discard, c)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Error("the connection lives on")
	}
}

// A caller without sidecar reaches the app, whatever it offers by ALPN; the record
// says who it was and by which rule.
func TestDirectCarries(t *testing.T) {
	w := newWorld(t)
	s := w.listen(payments, w.app("tcp", echo))
	s.declare(t, 1, []policy.Rule{allow(orders)}, direct(t, tcpPort))
	for _, protos := range [][]string{nil, {"h2"}, {"anything"}} {
		c, err := w.direct(s, orders, func(c *tls.Config) { c.NextProtos = protos })
		require.NoError(t, err)
		roundTrip(t, c, "hello")
		require.NoError(t, c.CloseWrite())
		gone(t, c)
	}
	require.Eventually(t, func() bool { return s.flows.Len() == 3 }, 5*time.Second, time.Millisecond)
	f := s.flows.Newest(0, nil)[0]
	if f.Src != orders || f.Dst != payments || f.Port != tcpPort.Number || f.Rule.Policy != "charge-cards" || f.Outcome != flow.Closed || f.Received != 5 || f.Sent != 5 {
		t.Errorf("recorded %+v", f)
	}
}

// What a rule refuses at a tunnel it refuses here, also where only a request could
// tell. The app is not dialled, and the caller is told as far as the protocol can.
func TestDirectRefuses(t *testing.T) {
	w := newWorld(t)
	app := func(*net.TCPConn) { t.Error("the app was dialled") }
	asks := allow(orders)
	asks.HTTP = []policy.HTTPMatch{{Methods: []string{"POST"}}}
	grpcPort := policy.Port{Name: "rpc", Number: 9000, Protocol: policy.GRPC}
	for name, rules := range map[string][]policy.Rule{
		"no rule": nil, "of another": {allow(intruder)}, "denied": {allow(orders), deny(orders, "not today")}, "by request": {asks},
	} {
		t.Run(name, func(t *testing.T) {
			for _, p := range []policy.Port{tcpPort, httpPort, grpcPort} {
				s := w.listen(payments, w.app(p.Name, app))
				s.declare(t, 1, rules, direct(t, p))
				c, err := w.direct(s, orders, func(c *tls.Config) {
					if p.Protocol == policy.GRPC {
						c.NextProtos = []string{"h2"}
					}
				})
				require.NoError(t, err)
				told := ""
				switch p.Protocol {
				case policy.HTTP:
					_, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
					require.NoError(t, err)
					resp, err := http.ReadResponse(bufio.NewReader(c), nil)
					require.NoError(t, err)
					body, _ := io.ReadAll(resp.Body)
					if told = string(body); resp.StatusCode != http.StatusForbidden {
						t.Errorf("status %d, want 403", resp.StatusCode)
					}
				case policy.GRPC:
					told = grpcAnswer(t, c)
				}
				if p.Protocol == policy.TCP {
					gone(t, c)
				}
				_ = c.Close()
				f := only(t, s.flows)
				if f.Effect == policy.Allow || f.Outcome != flow.Refused || f.Src != orders {
					t.Errorf("%s: recorded %+v", p.Name, f)
				}
				if p.Protocol != policy.TCP && (!strings.Contains(told, f.ID) || strings.Contains(told, "not today") != (name == "denied")) {
					t.Errorf("%s: told %q", p.Name, told)
				}
				s.stop()
			}
		})
	}
}

// grpcAnswer makes one call and gives the status and message that refuse it.
func grpcAnswer(t *testing.T, c net.Conn) string {
	t.Helper()
	_, err := io.WriteString(c, http2.ClientPreface)
	require.NoError(t, err)
	fr := http2.NewFramer(c, c)
	fr.ReadMetaHeaders = hpack.NewDecoder(4<<10, nil)
	require.NoError(t, fr.WriteSettings())
	var head strings.Builder
	enc := hpack.NewEncoder(&head)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", "/a.B/C"}, {":authority", "a"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		require.NoError(t, enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}))
	}
	require.NoError(t, fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte(head.String()), EndHeaders: true}))
	for {
		frame, err := fr.ReadFrame()
		require.NoError(t, err)
		h, ok := frame.(*http2.MetaHeadersFrame)
		if !ok {
			continue
		}
		fields := map[string]string{}
		for _, f := range h.Fields {
			fields[f.Name] = f.Value
		}
		if fields["grpc-status"] != "7" || !h.StreamEnded() {
			t.Errorf("answered %v", h.Fields)
		}
		return fields["grpc-message"]
	}
}

// F6: whoever is revoked is cut from direct ports too, and does not come back.
func TestF6DirectRevokedIsCut(t *testing.T) {
	w := newWorld(t)
	s := w.listen(payments, w.app("tcp", echo))
	s.declare(t, 1, []policy.Rule{allow(orders)}, direct(t, tcpPort))
	c, err := w.direct(s, orders, nil)
	require.NoError(t, err)
	roundTrip(t, c, "hello")
	list := w.revoke(1, orders)
	offer(t, s.book, list)
	gone(t, c)
	if f := only(t, s.flows); f.Outcome != flow.Cut || !strings.Contains(f.Error, "revoked") {
		t.Errorf("recorded %+v", f)
	}
	old := w.ca.svid(t, orders) // of before, as its not-before says
	if c, err := w.direct(s, orders, func(c *tls.Config) {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &tls.Certificate{Certificate: [][]byte{old.Certificates[0].Raw}, PrivateKey: old.PrivateKey}, nil
		}
	}); err == nil {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("the revoked one is served")
		}
	}
	// The caller may learn of it before it is counted.
	require.Eventually(t, func() bool { return s.HandshakeFailures()["revoked"] == 1 }, 5*time.Second, time.Millisecond, "handshakes of the revoked")
}

// An edit cuts live connections at once; without its direct port a listener goes,
// and its connections with it; a port in use is opened once it is free.
func TestDirectFollowsTheView(t *testing.T) {
	w := newWorld(t)
	s := w.listen(payments, w.app("tcp", echo))
	port := direct(t, tcpPort)
	s.declare(t, 1, []policy.Rule{allow(orders)}, port)
	c, err := w.direct(s, orders, nil)
	require.NoError(t, err)
	roundTrip(t, c, "hello")
	s.declare(t, 2, nil, port)
	gone(t, c)
	s.declare(t, 3, []policy.Rule{allow(orders)}, port)
	c, err = w.direct(s, orders, nil)
	require.NoError(t, err)
	roundTrip(t, c, "hello")
	s.declare(t, 4, []policy.Rule{allow(orders)}, tcpPort)
	gone(t, c)

	busy := direct(t, tcpPort)
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(busy.Direct)})
	require.NoError(t, err)
	s.views.Apply(xds.Update{Kind: xds.Rules, Rev: xds.Revision{Epoch: 1, N: 5}, Rules: policy.NewRuleset([]policy.Rule{allow(orders)}), Ports: []policy.Port{busy}})
	require.Eventually(t, func() bool { return len(s.DirectErrors()) == 1 }, 5*time.Second, time.Millisecond)
	require.NoError(t, ln.Close())
	require.Eventually(t, func() bool { return len(s.DirectAddrs()) == 1 && len(s.DirectErrors()) == 0 }, 10*time.Second, time.Millisecond)
}

// C4, C5: what the tunnel port refuses in a handshake a direct port does.
func TestC4DirectVersions(t *testing.T) {
	w := newWorld(t)
	s := w.listen(payments, w.app("tcp", echo))
	s.declare(t, 1, []policy.Rule{allow(orders)}, direct(t, tcpPort))
	other := newWorld(t) // whose CA nobody here knows
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2":        func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"no certificate": func(c *tls.Config) { c.GetClientCertificate = nil },
		"another CA": func(c *tls.Config) {
			svid := other.ca.svid(t, orders)
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &tls.Certificate{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey}, nil
			}
		},
	} {
		c, err := w.direct(s, orders, change)
		if err == nil { // a server refuses after the client has finished
			_, _ = io.WriteString(c, "hello")
			_, err = c.Read(make([]byte, 1))
		}
		if err == nil {
			t.Errorf("%s: served", name)
		}
	}
	if n := s.flows.Len(); n != 0 {
		t.Errorf("%d records of callers that nobody knows", n)
	}
}

// instance is a server without sidecar: it demands an SVID and echoes.
func (w *world) instance(who spiffeid.ID) xds.Endpoint {
	w.t.Helper()
	cfg := identity.ServerTLS(identity.TLSConfig{Source: w.source(who)})
	app := w.app("", func(raw *net.TCPConn) {
		c := tls.Server(raw, cfg)
		_, _ = io.Copy(c, c)
		_ = c.CloseWrite()
	})
	e := xds.Endpoint{Instance: app.Address, Ports: []uint16{tcpPort.Number}, Direct: true}
	require.NoError(w.t, e.Addr.UnmarshalText([]byte(app.Address)))
	return e
}

// C8: a sidecar speaks to an instance without sidecar by mutual TLS, and to nobody
// else who stands at its address.
func TestC8DirectInstance(t *testing.T) {
	w := newWorld(t)
	c := w.client(orders, "/shop/payments:tcp", w.instance(payments))
	conn := c.dial(t)
	roundTrip(t, conn, "hello")
	require.NoError(t, conn.CloseWrite())
	gone(t, conn)
	if f := only(t, c.flows); f.Outcome != flow.Closed || f.Dst != payments || f.Sent != 5 {
		t.Errorf("recorded %+v", f)
	}
	wrong := w.client(orders, "/shop/payments:tcp", w.instance(intruder))
	if conn, err := net.Dial("tcp", wrong.Addrs()[0].String()); err == nil { // else it is reset already
		_, _ = conn.Write([]byte("secret"))
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		gone(t, conn)
		_ = conn.Close()
	}
	if f := only(t, wrong.flows); f.Outcome != flow.Failed || !strings.Contains(f.Error, "authenticating") || f.Sent != 0 {
		t.Errorf("recorded %+v", f)
	}
	// A revoked instance is cut as any server.
	revoked := w.client(orders, "/shop/payments:tcp", w.instance(payments))
	conn = revoked.dial(t)
	roundTrip(t, conn, "hello")
	offer(t, revoked.book, w.revoke(1, payments))
	gone(t, conn)
}
