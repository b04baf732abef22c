package tunnel

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// Stream is one tunnelled byte stream, a net.Conn. Its methods may be called by
// several goroutines. The two directions do not wait for each other.
type Stream struct {
	s          *Session
	id         uint32
	decisionID string        // set before users see the stream
	answered   chan struct{} // client: closed on the response or on failure
	wlock      sync.Mutex    // one Write or CloseWrite at a time; before Session.wmu

	// Guarded by s.mu.
	buf        buffer
	granted    inflow
	allowed    outflow
	open       bool // the response was 2xx
	isAnswered bool
	recvEnd    bool  // END_STREAM received
	sentEnd    bool  // END_STREAM sent
	shut       bool  // CloseWrite called
	closed     bool  // Close called
	writing    bool  // a frame of ours is on its way into conn, or waits for its turn
	rerr, werr error // what Read says once the buffer is empty; what Write says
	rd, wd     deadline
}

func (s *Session) newStreamLocked(id uint32) *Stream {
	st := &Stream{
		s: s, id: id, answered: make(chan struct{}),
		granted: newInflow(s.cfg.Window), allowed: outflow(s.peerInitial),
	}
	s.st = st
	return st
}

// Open asks the peer for a stream to t and waits for the answer until ctx ends. It
// returns *Refused where the peer said no, and an error that is ErrUnprocessed
// where it has not looked at the request. The session is of no further use after
// an error.
func (s *Session) Open(ctx context.Context, t Target) (*Stream, error) {
	if _, err := ParseTarget(t.String()); err != nil {
		return nil, fmt.Errorf("opening stream: %w", err)
	}
	s.mu.Lock()
	if s.server || s.st != nil || s.goingAway || s.err != nil {
		err := s.err
		s.mu.Unlock()
		if err == nil {
			err = ErrUsed
		}
		return nil, fmt.Errorf("opening stream to %v: %w", t, err)
	}
	st := s.newStreamLocked(1)
	s.mu.Unlock()

	stop := context.AfterFunc(ctx, func() { st.reset(ctx.Err()) })
	err := s.writeHeaders(st.id, false, [2]string{":method", "CONNECT"}, [2]string{":authority", t.String()})
	if err == nil {
		<-st.answered
	}
	if !stop() {
		st.reset(ctx.Err()) // at the latest now
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !st.open || st.rerr != nil {
		if st.rerr != nil {
			err = st.rerr
		}
		return nil, fmt.Errorf("opening stream to %v: %w", t, err)
	}
	return st, nil
}

// DecisionID returns the id under which the accepting side records the stream. It
// is empty where a foreign peer sent none.
func (st *Stream) DecisionID() string { return st.decisionID }

// Read returns data that has come in. After the peer's CloseWrite it returns
// io.EOF, after its reset an error that is ErrReset and syscall.ECONNRESET, and
// where the connection below broke off an error that is never io.EOF: then the data
// is incomplete. What came in before is returned first.
func (st *Stream) Read(p []byte) (int, error) {
	s := st.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case st.closed:
			return 0, net.ErrClosed
		case st.rd.expired:
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		case st.buf.n > 0:
			n := st.buf.read(p)
			st.consumedLocked(n)
			return n, nil
		case st.recvEnd:
			return 0, io.EOF
		case st.rerr != nil:
			return 0, st.rerr
		}
		s.readable.Wait()
	}
}

// consumedLocked grants the peer the room that n bytes took.
func (st *Stream) consumedLocked(n int) {
	s := st.s
	if s.ending || st.recvEnd {
		return // nothing more will come
	}
	stream, conn := st.granted.give(n), s.granted.give(n)
	if stream+conn == 0 {
		return
	}
	s.pending.streamUpdate += stream
	s.pending.connUpdate += conn
	s.kick()
}

// Write sends p in frames of up to 16 KiB, as far as the peer's windows go, and
// waits for more. Where a write deadline passes, data up to n is sent and the rest may
// be written later; but a frame that is stuck half-way then, for 200 ms more, ends
// the session, as its rest cannot be sent later.
func (st *Stream) Write(p []byte) (n int, err error) {
	st.wlock.Lock()
	defer st.wlock.Unlock()
	for n < len(p) {
		k, err := st.s.reserve(st, len(p)-n)
		if err != nil {
			return n, err
		}
		if err := st.send(p[n:n+k], false); err != nil {
			return n, err
		}
		n += k
	}
	return n, nil
}

// send writes one frame, under the eye of the write deadline.
func (st *Stream) send(p []byte, end bool) error {
	st.setWriting(true)
	defer st.setWriting(false)
	return st.s.writeData(st, p, end)
}

func (st *Stream) setWriting(on bool) {
	st.s.mu.Lock()
	st.writing = on
	st.s.mu.Unlock()
}

// writeErrLocked says why nothing can be written; nil if something can.
func (st *Stream) writeErrLocked() error {
	switch {
	case st.closed:
		return net.ErrClosed
	case st.werr != nil:
		return st.werr
	case st.shut:
		return fmt.Errorf("writing after CloseWrite: %w", io.ErrClosedPipe)
	case st.wd.expired:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// CloseWrite tells the peer that no more data comes. Reading goes on for as long
// as the peer sends. A Write that waits ends with an error.
func (st *Stream) CloseWrite() error {
	s := st.s
	s.mu.Lock()
	var err error
	again := st.shut
	switch {
	case st.closed:
		err = net.ErrClosed
	case st.werr != nil:
		err = st.werr
	}
	st.shut = true
	s.writable.Broadcast()
	s.mu.Unlock()
	if err != nil || again {
		return err
	}

	st.wlock.Lock()
	defer st.wlock.Unlock()
	if err := st.send(nil, true); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.sentEnd = true
	st.werr = nil // the peer may have hung up between the write and here: it got all it wanted
	if st.recvEnd {
		s.finish(lingerClean, http2.ErrCodeNo)
	}
	return nil
}

// Close ends the stream. Unless both directions have ended, the peer learns of a
// reset: end with CloseWrite, and read to io.EOF, to close cleanly. Close does not
// wait for the connection below; Session.Close does.
func (st *Stream) Close() error {
	s := st.s
	s.mu.Lock()
	defer s.mu.Unlock()
	st.closed = true
	st.rd.stop()
	st.wd.stop()
	st.buf.drop()
	st.resetLocked(http2.ErrCodeCancel, net.ErrClosed)
	s.readable.Broadcast()
	s.writable.Broadcast()
	return nil
}

func (st *Stream) reset(err error) {
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	st.resetLocked(http2.ErrCodeCancel, err)
}

// resetLocked gives up a stream that has not ended by itself.
func (st *Stream) resetLocked(code http2.ErrCode, err error) {
	if st.s.ending || st.recvEnd && st.sentEnd {
		return
	}
	st.s.pending.resetID, st.s.pending.resetCode = st.id, code
	st.buf.drop()
	st.s.abortLocked(err, http2.ErrCodeNo)
}

// failLocked gives err to whoever reads, writes or waits for the response; a
// direction that has ended keeps its clean end.
func (st *Stream) failLocked(err error) {
	if !st.recvEnd && st.rerr == nil {
		st.rerr = err
	}
	if !st.sentEnd && st.werr == nil {
		st.werr = err
	}
	st.answerLocked()
	st.s.readable.Broadcast()
	st.s.writable.Broadcast()
}

func (st *Stream) answerLocked() {
	if !st.isAnswered {
		st.isAnswered = true
		close(st.answered)
	}
}

// LocalAddr returns the address of the connection below.
func (st *Stream) LocalAddr() net.Addr { return st.s.conn.LocalAddr() }

// RemoteAddr returns the address of the connection below, that is of the peer and
// not of the target.
func (st *Stream) RemoteAddr() net.Addr { return st.s.conn.RemoteAddr() }

// SetDeadline sets both deadlines.
func (st *Stream) SetDeadline(t time.Time) error {
	st.SetReadDeadline(t)
	return st.SetWriteDeadline(t)
}

// SetReadDeadline makes reads fail with os.ErrDeadlineExceeded from t on; the zero
// time means never.
func (st *Stream) SetReadDeadline(t time.Time) error {
	s := st.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.closed {
		return net.ErrClosed
	}
	st.rd.set(&s.mu, t, s.readable.Broadcast)
	return nil
}

// SetWriteDeadline makes writes fail with os.ErrDeadlineExceeded from t on, see
// Write; the zero time means never.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	s := st.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.closed {
		return net.ErrClosed
	}
	st.wd.set(&s.mu, t, func() {
		if st.writing && !s.ending {
			s.deadline = time.Now().Add(frameGrace) // the next write moves it on
			s.conn.SetWriteDeadline(s.deadline)
		}
		s.writable.Broadcast()
	})
	return nil
}

// deadline is a point in time after which waiting is over. The session's mutex
// guards it.
type deadline struct {
	timer   *time.Timer
	expired bool
}

// set arms the deadline; fire runs under mu when it passes, at once if it has.
func (d *deadline) set(mu *sync.Mutex, t time.Time, fire func()) {
	d.stop()
	d.expired = false
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		d.expired = true
		fire()
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		mu.Lock()
		defer mu.Unlock()
		if d.timer == timer {
			d.expired = true
			fire()
		}
	})
	d.timer = timer
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}
