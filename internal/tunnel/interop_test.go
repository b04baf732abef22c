//lint:file-ignore SA1019 x/net's own client and server are the peers to test with, over one given connection.

package tunnel_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"

	"github.com/sallyport-mesh/sallyport/internal/tunnel"
)

var target = tunnel.Target{Host: "payments.shop.mesh", Port: 8080}

// talkative sessions put message frames on the wire, which stock peers ignore.
var talkative = tunnel.Config{Messages: messages(1 << 20)}

func messages(hello int) tunnel.Messages {
	return tunnel.Messages{Hello: make([]byte, hello), Limit: func(uint8) int { return 1 << 20 }, Receive: func(uint8, []byte) {}}
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func tcpPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		accepted <- c
	}()
	client, err = net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	server = <-accepted
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// serve runs our server on conn and echoes; it refuses the host "no".
func serve(t testing.TB, conn net.Conn, cfg tunnel.Config) (done chan error) {
	ctx := within(t)
	done = make(chan error, 1)
	go func() {
		done <- func() error {
			s, err := tunnel.Server(ctx, conn, cfg)
			if err != nil {
				return err
			}
			defer s.Close()
			in, err := s.Accept(ctx)
			if err != nil {
				return err
			}
			if in.Target.Host == "no" {
				return in.Refuse(403, "0123456789abcdef", "because")
			}
			st, err := in.Accept("0123456789abcdef")
			if err != nil {
				return err
			}
			if _, err := io.Copy(st, struct{ io.Reader }{st}); err != nil {
				return err
			}
			return st.CloseWrite()
		}()
	}()
	return done
}

// roundTrip sends a CONNECT by the stock transport over conn.
func roundTrip(t testing.TB, conn net.Conn, host string, body io.Reader) (*http.Response, error) {
	tr := &http2.Transport{
		AllowHTTP: true,
		DialTLSContext: func(context.Context, string, string, *tls.Config) (net.Conn, error) {
			return conn, nil
		},
	}
	t.Cleanup(tr.CloseIdleConnections)
	req := (&http.Request{
		Method: http.MethodConnect,
		URL:    &url.URL{Scheme: "http", Host: host},
		Host:   host,
		Header: http.Header{},
		Body:   io.NopCloser(body),
	}).WithContext(within(t))
	req.ContentLength = -1
	return tr.RoundTrip(req)
}

// The stock x/net client talks to our server: it sends before the answer, ends its
// direction first, and gets everything back.
func TestInteropClient(t *testing.T) {
	a, b := tcpPair(t)
	done := serve(t, b, talkative)
	pr, pw := io.Pipe()
	resp, err := roundTrip(t, a, target.String(), pr)
	require.NoError(t, err)
	defer resp.Body.Close()
	if id := resp.Header.Get("sallyport-decision-id"); resp.StatusCode != 200 || id != "0123456789abcdef" {
		t.Fatalf("status %d, decision %q", resp.StatusCode, id)
	}
	_, err = pw.Write([]byte("hello"))
	require.NoError(t, err)
	buf := make([]byte, 5)
	_, err = io.ReadFull(resp.Body, buf)
	if string(buf) != "hello" || err != nil {
		t.Fatalf("echo %q, %v", buf, err)
	}
	data := make([]byte, 8<<20)
	rand.Read(data)
	go func() {
		pw.Write(data)
		pw.Close()
	}()
	got, err := io.ReadAll(resp.Body)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
		t.Errorf("echo of %d bytes: %d bytes, %v", len(data), len(got), err)
	}
	if err := <-done; err != nil {
		t.Errorf("server: %v", err)
	}
}

func TestInteropClientRefused(t *testing.T) {
	a, b := tcpPair(t)
	done := serve(t, b, talkative)
	pr, pw := io.Pipe()
	defer pw.Close()
	resp, err := roundTrip(t, a, "no:1", pr)
	require.NoError(t, err)
	defer resp.Body.Close()
	if resp.StatusCode != 403 || resp.Header.Get("sallyport-decision-id") != "0123456789abcdef" ||
		resp.Header.Get("sallyport-reason") != "because" {
		t.Errorf("got %d %v", resp.StatusCode, resp.Header)
	}
	if err := <-done; err != nil {
		t.Errorf("server: %v", err)
	}
}

// stockServer runs x/net's server on conn.
func stockServer(t testing.TB, conn net.Conn, h http.HandlerFunc) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		(&http2.Server{}).ServeConn(conn, &http2.ServeConnOpts{Handler: h})
	}()
	t.Cleanup(func() { conn.Close(); <-done })
}

// Our client talks to the stock x/net server. That one cannot end its direction
// first on CONNECT, so the client does.
func TestInteropServer(t *testing.T) {
	a, b := tcpPair(t)
	stockServer(t, b, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.Host != target.String() {
			http.Error(w, "bad", http.StatusBadRequest)
			return
		}
		w.Header().Set("sallyport-decision-id", "abc")
		w.WriteHeader(200)
		rc := http.NewResponseController(w)
		rc.Flush()
		buf := make([]byte, 32<<10)
		for {
			n, err := r.Body.Read(buf)
			w.Write(buf[:n])
			rc.Flush()
			if err != nil {
				return
			}
		}
	})
	s, err := tunnel.Client(within(t), a, talkative)
	require.NoError(t, err)
	defer s.Close()
	st, err := s.Open(within(t), target)
	require.NoError(t, err)
	if st.DecisionID() != "abc" {
		t.Errorf("decision id %q", st.DecisionID())
	}
	s.Send(1, make([]byte, 1<<20))
	data := make([]byte, 4<<20)
	rand.Read(data)
	go func() {
		st.Write(data)
		st.CloseWrite()
	}()
	got, err := io.ReadAll(st)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("echo of %d bytes: %d bytes, %v", len(data), len(got), err)
	}
}

func TestInteropServerRefuses(t *testing.T) {
	a, b := tcpPair(t)
	stockServer(t, b, func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "a body that nobody reads", http.StatusServiceUnavailable)
	})
	s, err := tunnel.Client(within(t), a, talkative)
	require.NoError(t, err)
	defer s.Close()
	_, err = s.Open(within(t), target)
	var r *tunnel.Refused
	if !errors.As(err, &r) || r.Status != 503 || r.DecisionID != "" {
		t.Errorf("got %v, want a refusal with 503", err)
	}
}

// tlsPair wraps a TCP pair; the certificate is of no interest here.
func tlsPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	a, b := tcpPair(t)
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return tls.Client(a, &tls.Config{InsecureSkipVerify: true}), // only the closing of TLS is tested
		tls.Server(b, &tls.Config{Certificates: []tls.Certificate{cert}})
}

// Over TLS too, the last bytes reach a slow reader though their sender has closed,
// and both ends end without waiting for a timeout.
func TestFinalDataSurvivesCloseTLS(t *testing.T) {
	a, b := tlsPair(t)
	c, s := streams(t, a, b)
	const total = 1 << 20
	go func() {
		c.st.Write(make([]byte, total))
		c.st.CloseWrite()
		io.Copy(io.Discard, c.st)
		c.st.Close()
	}()
	require.NoError(t, s.st.CloseWrite())
	n, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{s.st}, make([]byte, 1000))
	if n != total || err != nil {
		t.Errorf("received %d, %v; want %d", n, err, total)
	}
	s.st.Close()
	start := time.Now()
	s.sess.Close()
	c.sess.Close()
	if d := time.Since(start); d > time.Second {
		t.Errorf("sessions took %v to end", d)
	}
}

type end struct {
	sess *tunnel.Session
	st   *tunnel.Stream
}

func streams(t testing.TB, a, b net.Conn) (c, s end) {
	t.Helper()
	ctx := within(t)
	accepted := make(chan end)
	go func() {
		defer close(accepted)
		sess, err := tunnel.Server(ctx, b, talkative)
		if err != nil {
			return
		}
		if in, err := sess.Accept(ctx); err == nil {
			st, _ := in.Accept("0123456789abcdef")
			accepted <- end{sess, st}
		}
	}()
	sess, err := tunnel.Client(ctx, a, talkative)
	require.NoError(t, err)
	st, err := sess.Open(ctx, target)
	require.NoError(t, err)
	c, s = end{sess, st}, <-accepted
	require.NotNil(t, s.st)
	t.Cleanup(func() { c.sess.Close(); s.sess.Close() })
	return c, s
}

// BenchmarkOpen opens a stream on a fresh loopback connection, echoes one byte and
// closes, all without TLS; "hello" with a message from each end.
func BenchmarkOpen(b *testing.B) {
	run := func(b *testing.B, cfg tunnel.Config) {
		for range b.N {
			x, y := tcpPair(b)
			done := serve(b, y, cfg)
			s, err := tunnel.Client(context.Background(), x, cfg)
			require.NoError(b, err)
			st, err := s.Open(context.Background(), target)
			require.NoError(b, err)
			st.Write([]byte("x"))
			st.CloseWrite()
			_, err = io.ReadAll(st)
			require.NoError(b, err)
			s.Close()
			<-done
		}
	}
	b.Run("silent", func(b *testing.B) { run(b, tunnel.Config{}) })
	b.Run("hello", func(b *testing.B) { run(b, tunnel.Config{Messages: messages(50)}) })
}

// BenchmarkEcho is one round trip of 100 bytes on an open stream.
func BenchmarkEcho(b *testing.B) {
	x, y := tlsPair(b)
	c, s := streams(b, x, y)
	go io.Copy(s.st, struct{ io.Reader }{s.st})
	buf := make([]byte, 100)
	b.ResetTimer()
	b.ReportAllocs()
	for range b.N {
		c.st.Write(buf)
		io.ReadFull(c.st, buf)
	}
}

// BenchmarkBulk moves data one way over TLS; "raw" is the same without the tunnel.
func BenchmarkBulk(b *testing.B) {
	buf := make([]byte, 64<<10)
	run := func(b *testing.B, w io.Writer, r io.Reader) {
		b.SetBytes(int64(len(buf)))
		b.ReportAllocs()
		got := make(chan struct{})
		go func() {
			defer close(got)
			io.CopyN(io.Discard, struct{ io.Reader }{r}, int64(b.N)*int64(len(buf)))
		}()
		for range b.N {
			w.Write(buf)
		}
		<-got
	}
	b.Run("tunnel", func(b *testing.B) {
		x, y := tlsPair(b)
		c, s := streams(b, x, y)
		run(b, c.st, s.st)
	})
	b.Run("raw", func(b *testing.B) {
		x, y := tlsPair(b)
		run(b, x, y)
	})
}
