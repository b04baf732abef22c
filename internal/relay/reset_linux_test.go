package relay

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// unread returns the number of bytes in the receive queue of c or of the
// connection under it.
func unread(c net.Conn) int {
	n := 0
	_ = rawConn(innermost(c)).Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
	return n
}

func waitFor(t *testing.T, what string, condition func() bool) {
	t.Helper()
	require.Eventually(t, condition, 5*time.Second, time.Millisecond, what)
}

// TestB11Reset resets one end after some bytes: they arrive at the other, and
// then an error, never a regular end.
func TestB11Reset(t *testing.T) {
	for appKind, newApp := range kinds {
		for peerKind, newPeer := range kinds {
			if appKind == "unix" || peerKind == "unix" {
				continue // knows no reset
			}
			t.Run(appKind+"-"+peerKind, func(t *testing.T) {
				t.Parallel()
				app, farApp := newApp(t)
				peer, farPeer := newPeer(t)
				wait, _ := start(t, app, peer, time.Minute)
				want := random(5, 300_000)
				var got []byte
				var readErr error
				var wg sync.WaitGroup
				wg.Go(func() { got, readErr = io.ReadAll(farPeer) })
				_, err := farApp.Write(want)
				require.NoError(t, err)
				flush(farApp) // a reset discards what the sender's kernel still holds
				waitFor(t, "Pipe to read what the reset might overtake", func() bool { return unread(app) == 0 })
				reset(farApp)
				wg.Wait()
				if readErr == nil {
					t.Error("the reset arrived as a regular end")
				}
				if !bytes.Equal(got, want) {
					t.Errorf("got %d bytes, want %d", len(got), len(want))
				}
				if o := wait(); o.err == nil || o.sent != int64(len(want)) {
					t.Errorf("got %+v", o)
				}
			})
		}
	}
}

// TestB11AnswerBeforeUpload has a server that answers at once and closes while
// the client is still sending: the answer arrives whole. If the server took a
// part only, which is a reset, the client must not see a regular end, which it
// could take for that of a longer answer.
func TestB11AnswerBeforeUpload(t *testing.T) {
	const rounds = 10
	answer := random(6, 50_000)
	for appKind, newApp := range kinds {
		for peerKind, newPeer := range kinds {
			if appKind == "unix" || peerKind == "unix" {
				continue // knows no reset
			}
			t.Run(appKind+"-"+peerKind, func(t *testing.T) {
				t.Parallel()
				for range rounds {
					app, farApp := newApp(t)
					peer, farPeer := newPeer(t)
					wait, _ := start(t, app, peer, time.Minute)
					uploaded := make(chan error, 1)
					go func() {
						upload := make([]byte, 10_000)
						for {
							if _, err := farApp.Write(upload); err != nil {
								uploaded <- err
								return
							}
						}
					}()
					_, err := io.ReadFull(farPeer, make([]byte, 100_000))
					require.NoError(t, err)
					_, err = farPeer.Write(answer)
					require.NoError(t, err)
					waitFor(t, "unread bytes, which make the close a reset", func() bool { return unread(farPeer) > 0 })
					require.NoError(t, innermost(farPeer).Close())
					got, rerr := io.ReadAll(farApp)
					if !bytes.Equal(got, answer) {
						t.Errorf("got %d bytes of %d (%v)", len(got), len(answer), rerr)
					}
					// The kernel reports the reset once, to whoever comes first.
					if werr := <-uploaded; rerr == nil && !errors.Is(werr, syscall.ECONNRESET) {
						t.Errorf("the reset arrived as a regular end; writing: %v", werr)
					}
					if o := wait(); o.err == nil || o.received != int64(len(answer)) {
						t.Errorf("got %+v", o)
					}
				}
			})
		}
	}
}

// roomy is a connection that demands room in its socket before CloseWrite, as
// crypto/tls does for its closing alert: it waits five seconds and breaks then.
type roomy struct {
	*net.TCPConn
	calls chan bool // whether there was room
}

func (r roomy) NetConn() net.Conn { return r.TCPConn }

func (r roomy) CloseWrite() error {
	r.calls <- r.room()
	return r.TCPConn.CloseWrite()
}

func (r roomy) room() (ok bool) {
	_ = rawConn(r.TCPConn).Control(func(fd uintptr) { ok = writable(fd) })
	return ok
}

// TestB11SlowReader ends a stream whose reader is slow: all of it arrives, and
// its end is not announced before there is room to do so.
func TestB11SlowReader(t *testing.T) {
	app, farApp := tcpPair(t)
	conn, farPeer := tcpPair(t)
	peer := roomy{conn.(*net.TCPConn), make(chan bool, 1)}
	wait, _ := start(t, app, peer, time.Minute)
	size := int64(0)
	for chunk := random(7, 4096); peer.room(); size += int64(len(chunk)) {
		_, err := farApp.Write(chunk)
		require.NoError(t, err)
		waitFor(t, "Pipe to take the chunk", func() bool { return unread(app) == 0 })
	}
	require.NoError(t, farApp.(CloseWriter).CloseWrite())
	select {
	case room := <-peer.calls: // the reader's kernel may have taken more by itself
		peer.calls <- room
	case <-time.After(100 * time.Millisecond):
	}
	got, err := io.Copy(io.Discard, farPeer)
	if err != nil || got != size {
		t.Errorf("got %d bytes, %v, want %d", got, err, size)
	}
	if !<-peer.calls {
		t.Error("the end was announced without room for it")
	}
	require.NoError(t, farPeer.(CloseWriter).CloseWrite())
	require.NoError(t, wait().err)
}

// TestB11SlowAnswer is TestB11AnswerBeforeUpload with a client that does not read
// at first and whose kernel cannot hold the answer.
func TestB11SlowAnswer(t *testing.T) {
	t.Parallel()
	app, farApp := tcpPair(t)
	peer, farPeer := tcpPair(t)
	require.NoError(t, app.(*net.TCPConn).SetWriteBuffer(1<<20))
	require.NoError(t, farApp.(*net.TCPConn).SetReadBuffer(32<<10))
	wait, _ := start(t, app, peer, time.Minute)
	answer := random(9, 300_000)
	_, err := farPeer.Write(answer)
	require.NoError(t, err)
	waitFor(t, "Pipe to take the answer", func() bool { return unread(peer) == 0 })
	require.NoError(t, farPeer.Close()) // a regular end, then a reset by what comes next
	for range 3 {
		_, err := farApp.Write([]byte("late"))
		require.NoError(t, err)
		time.Sleep(50 * time.Millisecond) // for the reset to be met, and acted upon too early if that were so
	}
	got, err := io.ReadAll(farApp)
	if !bytes.Equal(got, answer) || err != nil {
		t.Errorf("got %d bytes of %d, %v", len(got), len(answer), err)
	}
	if o := wait(); o.err == nil || o.received != int64(len(answer)) {
		t.Errorf("got %+v", o)
	}
}
