package relay

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kinds makes connections of each kind: the first end is Pipe's, the second the
// test's.
var kinds = map[string]func(testing.TB) (ours, far net.Conn){
	"tcp":  tcpPair,
	"unix": unixPair,
	"tls":  tlsPair,
}

func tcpPair(t testing.TB) (ours, far net.Conn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return accept(t, l)
}

func unixPair(t testing.TB) (ours, far net.Conn) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	require.NoError(t, err)
	return accept(t, l)
}

func accept(t testing.TB, l net.Listener) (ours, far net.Conn) {
	t.Helper()
	defer l.Close()
	far, err := net.Dial(l.Addr().Network(), l.Addr().String())
	require.NoError(t, err)
	ours, err = l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { ours.Close(); far.Close() })
	require.NoError(t, far.SetDeadline(time.Now().Add(20*time.Second)))
	return ours, far
}

// certificate is what every TLS connection of these tests presents; who it is
// does not matter here.
var certificate = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

func tlsPair(t testing.TB) (ours, far net.Conn) {
	ours, far = tcpPair(t)
	s := tls.Server(ours, &tls.Config{Certificates: []tls.Certificate{certificate()}, SessionTicketsDisabled: true})
	c := tls.Client(far, &tls.Config{InsecureSkipVerify: true})
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	require.NoError(t, c.Handshake())
	require.NoError(t, <-done)
	return s, c
}

// outcome is what Pipe returned.
type outcome struct {
	sent, received int64
	err            error
}

// start runs Pipe and returns how to wait for it, and a function that cuts it.
func start(t testing.TB, app, peer net.Conn, idle time.Duration) (wait func() outcome, cut context.CancelCauseFunc) {
	ctx, cut := context.WithCancelCause(context.Background())
	done := make(chan outcome, 1)
	go func() {
		var o outcome
		o.sent, o.received, o.err = Pipe(ctx, app, peer, idle)
		done <- o
	}()
	t.Cleanup(func() { cut(nil) })
	return func() outcome {
		t.Helper()
		select {
		case o := <-done:
			return o
		case <-time.After(20 * time.Second):
			t.Fatal("Pipe does not return")
			return outcome{}
		}
	}, cut
}
