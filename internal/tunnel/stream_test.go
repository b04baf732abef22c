package tunnel

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestEcho(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		cs, ss := sessions(t, a, b, Config{})
		c, s := streams(t, cs, ss)
		if c.DecisionID() != testID || s.DecisionID() != testID {
			t.Errorf("decision ids %q and %q, want %q", c.DecisionID(), s.DecisionID(), testID)
		}
		_, err := c.Write([]byte("ping"))
		require.NoError(t, err)
		readN(t, s, "ping")
		_, err = s.Write([]byte("pong"))
		require.NoError(t, err)
		readN(t, c, "pong")
		require.NoError(t, c.CloseWrite())
		readAll(t, s, "")
		require.NoError(t, s.CloseWrite())
		readAll(t, c, "")
		require.NoError(t, c.Close())
		require.NoError(t, s.Close())
		gone(t, cs)
		gone(t, ss)
		if _, err := ss.Accept(within(t, time.Second)); err != io.EOF {
			t.Errorf("Accept after the end: %v, want EOF", err)
		}
	})
}

// Either side may end its direction first, before or after the other has said
// anything, and go on reading for as long as it likes.
func TestB11HalfClose(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		c, s := pair(t, a, b, Config{})
		require.NoError(t, c.CloseWrite())
		readAll(t, s, "")
		for range 3 {
			_, err := s.Write([]byte("late"))
			require.NoError(t, err)
			readN(t, c, "late")
		}
		if _, err := c.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("Write after CloseWrite: %v, want ErrClosedPipe", err)
		}
		require.NoError(t, s.CloseWrite())
		require.NoError(t, s.CloseWrite())
		readAll(t, c, "")
	})
}

// lateConn returns from a Write that carries END_STREAM only after wait.
type lateConn struct {
	net.Conn
	wait func()
}

func (c *lateConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if len(p) == frameHead && p[3] == 0 && p[4] == 1 {
		c.wait()
	}
	return n, err
}

// A peer that has everything may hang up before our last write has returned. That
// is a clean end all the same.
func TestB11PeerHangsUpDuringCloseWrite(t *testing.T) {
	a, b := loopback(t)
	late := &lateConn{Conn: b}
	c, s := pair(t, a, late, Config{})
	late.wait = func() {
		require.Eventually(t, func() bool {
			s.s.mu.Lock()
			defer s.s.mu.Unlock()
			return s.s.err != nil
		}, 5*time.Second, time.Millisecond)
	}
	require.NoError(t, c.CloseWrite())
	readAll(t, s, "")
	require.NoError(t, s.CloseWrite())
	require.NoError(t, s.CloseWrite())
	readAll(t, c, "")
}

func TestB11HalfCloseServerFirst(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		cs, ss := sessions(t, a, b, Config{})
		c, s := streams(t, cs, ss)
		_, err := s.Write([]byte("banner"))
		require.NoError(t, err)
		require.NoError(t, s.CloseWrite())
		readAll(t, c, "banner")
		_, err = c.Write([]byte("answer"))
		require.NoError(t, err)
		require.NoError(t, c.CloseWrite())
		readAll(t, s, "answer")
		gone(t, cs)
		gone(t, ss)
	})
}

// A direction whose reader is stuck fills its window and stops; the other streams
// on, many windows' worth.
func TestB11BlockedDirectionDoesNotStallTheOther(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		c, s := pair(t, a, b, Config{Window: minWindow})
		stuck := make(chan int, 1)
		go func() {
			n, _ := c.Write(make([]byte, 1<<20)) // nobody reads it
			stuck <- n
		}()
		const total = 8 << 20
		go func() {
			io.CopyN(s, zeros{}, total)
			s.CloseWrite()
		}()
		n, err := io.Copy(io.Discard, c)
		if n != total || err != nil {
			t.Errorf("streamed %d bytes, %v; want %d", n, err, total)
		}
		c.Close()
		if n := <-stuck; n > minWindow {
			t.Errorf("%d bytes were accepted beyond a window of %d", n, minWindow)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Both directions at once, in writes of every size, 100 MB in all.
func TestTransferHashed(t *testing.T) {
	a, b := loopback(t)
	c, s := pair(t, a, b, Config{})
	const each = 50 << 20
	var wg sync.WaitGroup
	check := func(from, to *Stream, seed uint64) {
		sent, got := sha256.New(), sha256.New()
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, 1))
			buf := make([]byte, 100<<10)
			for i := range buf {
				buf[i] = byte(rnd.Uint32())
			}
			for left := each; left > 0; {
				p := buf[:min(left, 1+rnd.IntN(len(buf)))]
				sent.Write(p)
				if _, err := from.Write(p); err != nil {
					t.Error(err)
					return
				}
				left -= len(p)
			}
			from.CloseWrite()
		})
		wg.Go(func() {
			n, err := io.Copy(got, struct{ io.Reader }{to})
			if n != each || err != nil {
				t.Errorf("received %d bytes, %v", n, err)
			}
		})
		t.Cleanup(func() {
			if string(sent.Sum(nil)) != string(got.Sum(nil)) {
				t.Error("received other bytes than were sent")
			}
		})
	}
	check(c, s, 1)
	check(s, c, 2)
	wg.Wait()
}

func TestRefuse(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		cs, ss := sessions(t, a, b, Config{})
		ctx := within(t, 10*time.Second)
		go func() {
			in, err := ss.Accept(ctx)
			if err != nil {
				return
			}
			in.Refuse(403, testID, "no\r\nsuch \x1b[31mluck "+strings.Repeat("é", 300))
		}()
		_, err := cs.Open(ctx, target)
		var r *Refused
		if !errors.As(err, &r) || r.Status != 403 || r.DecisionID != testID {
			t.Fatalf("Open: %v, want a refusal with 403", err)
		}
		if !strings.HasPrefix(r.Reason, "no  such  [31mluck é") || len(r.Reason) > MaxReason || len(r.Reason) < MaxReason-2 {
			t.Errorf("reason %q", r.Reason)
		}
		gone(t, cs)
		gone(t, ss)
		if _, err := cs.Open(ctx, target); err == nil {
			t.Error("Open on a refused session succeeded")
		}
	})
}

func TestAnswerOnlyOnceAndWell(t *testing.T) {
	a, b := loopback(t)
	cs, ss := sessions(t, a, b, Config{})
	ctx := within(t, 10*time.Second)
	opened := make(chan *Stream)
	go func() {
		c, _ := cs.Open(ctx, target)
		opened <- c
	}()
	in, err := ss.Accept(ctx)
	require.NoError(t, err)
	if in.Target != target {
		t.Errorf("target %v, want %v", in.Target, target)
	}
	for _, id := range []string{"", "a b", "é", strings.Repeat("x", MaxDecisionID+1)} {
		if _, err := in.Accept(id); err == nil {
			t.Errorf("decision id %q accepted", id)
		}
	}
	if err := in.Refuse(200, testID, ""); err == nil {
		t.Error("refused with status 200")
	}
	_, err = in.Accept(testID)
	require.NoError(t, err)
	if _, err := in.Accept(testID); err == nil {
		t.Error("accepted twice")
	}
	if err := in.Refuse(403, testID, ""); err == nil {
		t.Error("refused after acceptance")
	}
	require.NotNil(t, <-opened)
	if _, err := cs.Open(ctx, target); !errors.Is(err, ErrUsed) {
		t.Errorf("second Open: %v, want ErrUsed", err)
	}
}

func TestCloseResets(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		cs, ss := sessions(t, a, b, Config{})
		c, s := streams(t, cs, ss)
		_, err := c.Write([]byte("some"))
		require.NoError(t, err)
		readN(t, s, "some")
		require.NoError(t, s.CloseWrite()) // one direction is not both
		require.NoError(t, c.Close())
		n, err := s.Read(make([]byte, 10))
		if n != 0 || !errors.Is(err, ErrReset) || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Read: %d, %v; want a reset", n, err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read after Close: %v, want ErrClosed", err)
		}
		if _, err := c.Write(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write after Close: %v, want ErrClosed", err)
		}
		gone(t, cs)
		gone(t, ss)
	})
}

// A reset frees a writer that waits for the window, and a reader.
func TestResetWakesWriter(t *testing.T) {
	a, b := loopback(t)
	c, s := pair(t, a, b, Config{})
	werr := make(chan error)
	go func() {
		_, err := c.Write(make([]byte, 1<<20))
		werr <- err
	}()
	_, err := s.Read(make([]byte, 1))
	require.NoError(t, err)
	s.Close()
	if err := <-werr; !errors.Is(err, ErrReset) {
		t.Errorf("Write: %v, want ErrReset", err)
	}
}

// A connection that breaks off is never a clean end.
func TestTornConnection(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		c, s := pair(t, a, b, Config{})
		_, err := s.Write([]byte("half a"))
		require.NoError(t, err)
		readN(t, c, "half a")
		b.Close()
		_, err = c.Read(make([]byte, 1))
		if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Read: %v, want ErrUnexpectedEOF", err)
		}
	})
}

// What was received before the connection broke off is still read.
func TestTornConnectionKeepsData(t *testing.T) {
	a, b := loopback(t)
	c, s := pair(t, a, b, Config{})
	_, err := s.Write([]byte("data"))
	require.NoError(t, err)
	waitBuffered(t, c, 4)
	b.(*net.TCPConn).SetLinger(0)
	b.Close()
	got, err := io.ReadAll(c)
	if string(got) != "data" || err == nil {
		t.Errorf("read %q, %v; want data and an error", got, err)
	}
}

func waitBuffered(t testing.TB, st *Stream, n int) {
	t.Helper()
	require.Eventually(t, func() bool {
		st.s.mu.Lock()
		defer st.s.mu.Unlock()
		return st.buf.n >= n
	}, 5*time.Second, time.Millisecond)
}

func TestDeadlines(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		c, s := pair(t, a, b, Config{})
		require.NoError(t, c.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
		_, err := c.Read(make([]byte, 1))
		if ne, ok := err.(net.Error); !ok || !ne.Timeout() || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read: %v, want a timeout", err)
		}
		require.NoError(t, c.SetWriteDeadline(time.Now().Add(20*time.Millisecond)))
		n, err := c.Write(make([]byte, 1<<20))
		if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 {
			t.Errorf("Write: %d, %v; want a timeout after a window", n, err)
		}
		// Both go on once the deadline is lifted.
		require.NoError(t, c.SetDeadline(time.Time{}))
		got := make(chan int64)
		go func() {
			n, _ := io.Copy(io.Discard, s)
			got <- n
		}()
		m, err := c.Write(make([]byte, 1<<20))
		require.NoError(t, err)
		require.NoError(t, c.CloseWrite())
		if g := <-got; g != int64(n+m) {
			t.Errorf("peer got %d bytes of %d", g, n+m)
		}
		_, err = s.Write([]byte("x"))
		require.NoError(t, err)
		readN(t, c, "x")
		// A deadline set while a read waits takes effect.
		done := make(chan error)
		go func() {
			_, err := c.Read(make([]byte, 1))
			done <- err
		}()
		c.SetDeadline(time.Unix(1, 0))
		if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read: %v, want a timeout", err)
		}
	})
}

// A write deadline holds also where the connection below takes no byte.
func TestWriteDeadlineInsideFrame(t *testing.T) {
	t.Parallel()
	a, b := net.Pipe() // nobody reads b after the answer
	defer b.Close()
	c := answered(t, a, b)
	start := time.Now()
	c.SetWriteDeadline(start.Add(20 * time.Millisecond))
	if _, err := c.Write([]byte("stuck")); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Write: %v, want a timeout", err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("deadline took effect after %v", d)
	}
	gone(t, c.s)
}

// A dead peer does not hold a writer for ever, deadline or not.
func TestWriteTimeout(t *testing.T) {
	t.Parallel()
	a, b := net.Pipe()
	defer b.Close()
	c := answered(t, a, b)
	c.s.mu.Lock()
	c.s.cfg.WriteTimeout = 20 * time.Millisecond
	c.s.deadline = time.Time{}
	c.s.mu.Unlock()
	if _, err := c.Write([]byte("stuck")); err == nil {
		t.Error("Write to a dead peer succeeded")
	}
	gone(t, c.s)
}

func TestOpenCancelled(t *testing.T) {
	a, b := loopback(t)
	cs, ss := sessions(t, a, b, Config{})
	ctx, cancel := context.WithCancel(context.Background())
	opened := make(chan error)
	go func() {
		_, err := cs.Open(ctx, target)
		opened <- err
	}()
	in, err := ss.Accept(within(t, 10*time.Second))
	require.NoError(t, err)
	cancel()
	if err := <-opened; !errors.Is(err, context.Canceled) {
		t.Errorf("Open: %v, want Canceled", err)
	}
	gone(t, cs)
	gone(t, ss)
	if _, err := in.Accept(testID); !errors.Is(err, ErrReset) {
		t.Errorf("Accept: %v, want ErrReset", err)
	}
}

// Session.Close cuts at once and tells the peer so.
func TestSessionCloseCuts(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		cs, ss := sessions(t, a, b, Config{})
		c, s := streams(t, cs, ss)
		go func() {
			for {
				if _, err := s.Write(make([]byte, 10000)); err != nil {
					return
				}
			}
		}()
		_, err := c.Read(make([]byte, 1))
		require.NoError(t, err)
		ss.Close()
		_, err = io.Copy(io.Discard, c)
		if err == nil {
			t.Error("a cut looks like a clean end")
		}
		gone(t, cs)
	})
}

func TestGoAwayBeforeRequest(t *testing.T) {
	a, b := loopback(t)
	cs, ss := sessions(t, a, b, Config{})
	ss.GoAway()
	gone(t, cs)
	gone(t, ss)
	if _, err := cs.Open(within(t, time.Second), target); !errors.Is(err, ErrUnprocessed) {
		t.Errorf("Open: %v, want ErrUnprocessed", err)
	}
}

// The last bytes reach a peer that reads slowly, though the sender is long closed
// and the peer has sent control frames all the while.
func TestFinalDataSurvivesClose(t *testing.T) {
	for range 20 {
		a, b := loopback(t)
		c, s := pair(t, a, b, Config{})
		require.NoError(t, s.CloseWrite())
		readAll(t, c, "")
		const total = 1 << 20
		go func() {
			c.Write(make([]byte, total))
			c.CloseWrite()
			c.Close()
		}()
		n, err := io.Copy(io.Discard, struct{ io.Reader }{s})
		if n != total || err != nil {
			t.Fatalf("received %d, %v; want %d", n, err, total)
		}
		c.s.Close()
		s.s.Close()
	}
}

// An idle stream holds no buffer after a burst.
func TestBufferReleased(t *testing.T) {
	a, b := loopback(t)
	c, s := pair(t, a, b, Config{})
	go c.Write(make([]byte, 1<<20))
	_, err := io.CopyN(io.Discard, s, 1<<20)
	require.NoError(t, err)
	s.s.mu.Lock()
	defer s.s.mu.Unlock()
	if len(s.buf.queue) != 0 {
		t.Errorf("%d chunks held by an idle stream", len(s.buf.queue))
	}
}
