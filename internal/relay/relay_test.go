package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// random gives n bytes that depend on seed.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	chacha := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = chacha.Read(b)
	return b
}

// writeAll writes b in pieces of up to size bytes and then ends writing.
func writeAll(c net.Conn, b []byte, size int) error {
	for len(b) > 0 {
		n := min(size, len(b))
		if _, err := c.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return c.(CloseWriter).CloseWrite()
}

func each(t *testing.T, run func(t *testing.T, app, farApp, peer, farPeer net.Conn)) {
	for appKind, newApp := range kinds {
		for peerKind, newPeer := range kinds {
			t.Run(appKind+"-"+peerKind, func(t *testing.T) {
				t.Parallel()
				app, farApp := newApp(t)
				peer, farPeer := newPeer(t)
				run(t, app, farApp, peer, farPeer)
			})
		}
	}
}

// TestB11BothWays moves different amounts both ways at once, in tiny and in large
// writes, each side ending when it has sent everything.
func TestB11BothWays(t *testing.T) {
	for _, c := range []struct{ out, in, size int }{
		{0, 0, 1}, {1, 0, 1}, {0, 1, 1}, {5000, 3000, 1}, {200_000, 3, 777}, {300_000, 700_000, 100_000},
	} {
		t.Run(fmt.Sprintf("%d-%d", c.out, c.in), func(t *testing.T) {
			each(t, func(t *testing.T, app, farApp, peer, farPeer net.Conn) {
				out, in := random(1, c.out), random(2, c.in)
				wait, _ := start(t, app, peer, time.Minute)
				var gotOut, gotIn []byte
				errs := make([]error, 4)
				var wg sync.WaitGroup
				wg.Go(func() { errs[0] = writeAll(farApp, out, c.size) })
				wg.Go(func() { errs[1] = writeAll(farPeer, in, c.size) })
				wg.Go(func() { gotOut, errs[2] = io.ReadAll(farPeer) })
				wg.Go(func() { gotIn, errs[3] = io.ReadAll(farApp) })
				wg.Wait()
				require.NoError(t, errors.Join(errs...))
				if !bytes.Equal(gotOut, out) || !bytes.Equal(gotIn, in) {
					t.Errorf("got %d and %d bytes, want the %d and %d that were sent", len(gotOut), len(gotIn), len(out), len(in))
				}
				if got, want := wait(), (outcome{int64(c.out), int64(c.in), nil}); got != want {
					t.Errorf("got %+v, want %+v", got, want)
				}
			})
		})
	}
}

// TestB11HalfClose answers only after the request's end, which must arrive while
// the other direction stays open; then the same the other way round.
func TestB11HalfClose(t *testing.T) {
	for _, serverFirst := range []bool{false, true} {
		t.Run(fmt.Sprintf("serverFirst=%v", serverFirst), func(t *testing.T) {
			each(t, func(t *testing.T, app, farApp, peer, farPeer net.Conn) {
				first, second := farApp, farPeer
				if serverFirst {
					first, second = farPeer, farApp
				}
				wait, _ := start(t, app, peer, time.Minute)
				for i, question := range [][]byte{random(3, 100_000), random(4, 200_000)} {
					go writeAll(first, question, 4096) // its outcome is what the other side reads
					got, err := io.ReadAll(second)
					require.NoError(t, err)
					if !bytes.Equal(got, question) {
						t.Errorf("direction %d: got %d bytes, want %d", i, len(got), len(question))
					}
					first, second = second, first
				}
				require.NoError(t, wait().err)
			})
		})
	}
}

// TestB11EndBeforeUpload is the same with a server that ends regularly before it
// stops taking: the client sees that regular end.
func TestB11EndBeforeUpload(t *testing.T) {
	answer := random(8, 50_000)
	for range 10 {
		app, farApp := tcpPair(t)
		peer, farPeer := tcpPair(t)
		wait, _ := start(t, app, peer, time.Minute)
		_, err := farPeer.Write(answer)
		require.NoError(t, err)
		require.NoError(t, farPeer.Close()) // nothing unread: a regular end
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
		got, err := io.ReadAll(farApp)
		if !bytes.Equal(got, answer) || err != nil {
			t.Errorf("got %d bytes of %d, %v", len(got), len(answer), err)
		}
		<-uploaded
		if o := wait(); o.received != int64(len(answer)) {
			t.Errorf("got %+v", o)
		}
	}
}

// TestCutEndsBoth cancels while one direction waits for data and the other for
// room.
func TestCutEndsBoth(t *testing.T) {
	reason := errors.New("policy changed")
	each(t, func(t *testing.T, app, farApp, peer, farPeer net.Conn) {
		wait, cut := start(t, app, peer, 0)
		var wg sync.WaitGroup
		wg.Go(func() {
			for b := make([]byte, 64<<10); ; {
				if _, err := farApp.Write(b); err != nil {
					return
				}
			}
		})
		_, err := io.ReadFull(farPeer, make([]byte, 1<<20))
		require.NoError(t, err)
		begin := time.Now()
		cut(reason)
		if o := wait(); !errors.Is(o.err, reason) || o.received != 0 {
			t.Errorf("got %+v", o)
		}
		if took := time.Since(begin); took > time.Second {
			t.Errorf("took %s", took)
		}
		_, err = io.Copy(io.Discard, farPeer)
		_, isUnix := farPeer.(*net.UnixConn)
		if err == nil && !isUnix {
			t.Error("the cut arrived as a regular end")
		}
		wg.Wait() // the far app's writes end too
	})
}

func TestCutBeforeStart(t *testing.T) {
	app, farApp := tcpPair(t)
	peer, _ := tcpPair(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := Pipe(ctx, app, peer, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := io.ReadAll(farApp); err == nil {
		t.Error("the cut arrived as a regular end")
	}
}

func TestIdle(t *testing.T) {
	t.Parallel()
	const idle = 400 * time.Millisecond
	app, farApp := tcpPair(t)
	peer, farPeer := tlsPair(t)
	begin := time.Now()
	wait, _ := start(t, app, peer, idle)
	// One direction alone keeps both alive, for several timeouts.
	for range 20 {
		_, err := farPeer.Write([]byte{1})
		require.NoError(t, err)
		_, err = io.ReadFull(farApp, make([]byte, 1))
		require.NoError(t, err)
		time.Sleep(idle / 10)
	}
	last := time.Now()
	if last.Sub(begin) < 3*idle/2 {
		t.Fatal("the test is too fast to show anything")
	}
	if o := wait(); o != (outcome{0, 20, ErrIdle}) {
		t.Errorf("got %+v", o)
	}
	if took := time.Since(last); took < idle/2 || took > 5*idle {
		t.Errorf("ended after %s, want about %s", took, idle)
	}
	if _, err := io.ReadAll(farApp); err == nil {
		t.Error("the timeout arrived as a regular end")
	}
}

// TestIdleBlockedWriter: one direction has ended, the other cannot write.
func TestIdleBlockedWriter(t *testing.T) {
	t.Parallel()
	app, farApp := tcpPair(t)
	peer, farPeer := tcpPair(t)
	wait, _ := start(t, app, peer, 300*time.Millisecond)
	require.NoError(t, farPeer.(CloseWriter).CloseWrite())
	for b := make([]byte, 64<<10); ; {
		if _, err := farApp.Write(b); err != nil {
			break
		}
	}
	if o := wait(); !errors.Is(o.err, ErrIdle) {
		t.Errorf("got %+v", o)
	}
}

// TestWithoutCloseWrite: net.Pipe cannot end writing alone, so the whole ends.
func TestWithoutCloseWrite(t *testing.T) {
	app, farApp := net.Pipe()
	peer, farPeer := tcpPair(t)
	wait, _ := start(t, app, peer, time.Minute)
	go farPeer.Write([]byte("bye")) // what arrives below shows its outcome
	got := make([]byte, 3)
	_, err := io.ReadFull(farApp, got)
	require.NoError(t, err)
	require.NoError(t, farPeer.(CloseWriter).CloseWrite())
	rest, err := io.ReadAll(farApp)
	if string(got) != "bye" || len(rest) != 0 || err != nil {
		t.Errorf("got %q, %q, %v", got, rest, err)
	}
	if o := wait(); o.received != 3 {
		t.Errorf("got %+v", o)
	}
	farApp.Close()
}

// deaf takes no more but may go on sending, as a peer that has given up reading.
type deaf struct{ net.Conn }

func (deaf) Write([]byte) (int, error) { return 0, errors.New("deaf") }

// TestDeafPeer: what it still sends is delivered; when nothing has come for a
// while, all is over.
func TestDeafPeer(t *testing.T) {
	for _, messages := range []int{0, 4} {
		synctest.Test(t, func(t *testing.T) {
			app, farApp := net.Pipe()
			peer, farPeer := net.Pipe()
			wait, _ := start(t, app, deaf{peer}, time.Hour)
			synctest.Wait() // both directions wait for data
			_, err := farApp.Write([]byte("hello"))
			require.NoError(t, err)
			begin := time.Now()
			for range messages {
				time.Sleep(drainLimit - time.Second)
				_, err = farPeer.Write([]byte("news"))
				require.NoError(t, err)
				_, err = io.ReadFull(farApp, make([]byte, 4))
				require.NoError(t, err)
			}
			o := wait()
			if o.sent != 0 || o.received != int64(4*messages) || o.err == nil || o.err.Error() != "writing to peer: deaf" {
				t.Errorf("got %+v", o)
			}
			if got, want := time.Since(begin), time.Duration(messages)*(drainLimit-time.Second)+drainLimit; got != want {
				t.Errorf("ended after %s, want %s", got, want)
			}
		})
	}
}

func TestBufferFit(t *testing.T) {
	b := take(0)
	for i, c := range []struct{ n, want int }{
		{smallSize, mediumSize}, {mediumSize, largeSize}, {largeSize, largeSize}, {mediumSize, largeSize},
		{mediumSize / 2, mediumSize}, {smallSize, mediumSize}, {1, smallSize}, {1, smallSize}, {0, smallSize},
	} {
		b = b.fit(c.n)
		if got := len(*b.data); got != c.want {
			t.Errorf("step %d: after %d bytes a buffer of %d, want %d", i, c.n, got, c.want)
		}
	}
	b.give()
}

func BenchmarkPipe(b *testing.B) {
	for _, size := range []int{256, 64 << 10} {
		for name, newPeer := range kinds {
			b.Run(fmt.Sprintf("tcp-%s-%d", name, size), func(b *testing.B) {
				app, farApp := tcpPair(b)
				peer, farPeer := newPeer(b)
				wait, cut := start(b, app, peer, time.Hour)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				go func() {
					chunk := make([]byte, size)
					for {
						if _, err := farApp.Write(chunk); err != nil {
							return
						}
					}
				}()
				buf := make([]byte, size)
				for b.Loop() {
					if _, err := io.ReadFull(farPeer, buf); err != nil {
						b.Fatal(err)
					}
				}
				cut(nil)
				wait()
			})
		}
	}
}
