package tunnel

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Session is one end of a connection. Two goroutines serve it: the reader takes
// in every frame, whatever the app does, and never writes; the flusher sends
// control frames. Apps send their DATA themselves.
//
// Lock order: wmu before mu. mu is never held across I/O.
type Session struct {
	conn   net.Conn
	server bool
	cfg    Config
	fr     *http2.Framer // reads: reader goroutine; writes (into out): wmu
	br     *bufio.Reader // reader goroutine
	dec    *hpack.Decoder
	inbox  [Kinds]incomingMessage // reader goroutine
	accept chan *Incoming         // server: cap 1, the one request
	ready  chan struct{}          // closed once the peer's preface is in
	wake   chan struct{}          // cap 1: the flusher has something to do
	done   chan struct{}          // closed when both goroutines have ended and conn is closed

	wmu sync.Mutex     // held while bytes go to conn
	enc *hpack.Encoder // wmu; writes to hdr
	hdr bytes.Buffer   // wmu: an encoded header block
	out bytes.Buffer   // wmu: frames of the next write

	mu          sync.Mutex
	readable    sync.Cond       // data, end or error for Stream.Read
	writable    sync.Cond       // window, end or error for Stream.Write
	st          *Stream         // the one stream; nil before it opens
	maxID       uint32          // server: highest stream id seen, also of streams not looked at
	pending     control         // what the flusher has to send
	outbox      [Kinds]outgoing // and messages
	granted     inflow          // connection window for the peer
	allowed     outflow         // connection window for us
	peerInitial int64           // peer's INITIAL_WINDOW_SIZE
	peerFrame   int             // peer's MAX_FRAME_SIZE, at most maxPayload
	budget      budget
	reading     bool      // the peer's preface is in
	goingAway   bool      // no further stream, by our word or the peer's
	saidGoAway  bool      // our GOAWAY is out or pending
	ending      bool      // nothing but the end of the connection is left to do
	broken      bool      // a write failed: nothing can be sent any more
	err         error     // why the session ended; nil after a clean end
	deadline    time.Time // write deadline of conn
}

// Client starts a session on a connection that this side dialled. It takes over
// conn and closes it in the end, also where it returns an error. It does not wait
// for the peer; Open does.
func Client(ctx context.Context, conn net.Conn, cfg Config) (*Session, error) {
	return start(ctx, conn, cfg, false)
}

// Server starts a session on an accepted connection and waits for the client's
// preface, until ctx ends or Config.HandshakeTimeout has passed. It takes over conn
// and closes it in the end, also where it returns an error.
func Server(ctx context.Context, conn net.Conn, cfg Config) (*Session, error) {
	s, err := start(ctx, conn, cfg, true)
	if err != nil {
		return nil, err
	}
	select {
	case <-s.ready:
		return s, nil
	case <-s.done:
		return nil, fmt.Errorf("waiting for the client's preface: %w", s.cause())
	case <-ctx.Done():
		s.Close()
		return nil, fmt.Errorf("waiting for the client's preface: %w", ctx.Err())
	}
}

func start(ctx context.Context, conn net.Conn, cfg Config, server bool) (*Session, error) {
	cfg, err := cfg.withDefaults()
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("starting tunnel session: %w", err)
	}
	s := &Session{
		conn: conn, server: server, cfg: cfg,
		br:     bufio.NewReaderSize(conn, 1<<10), // headers only: payloads pass it by
		dec:    hpack.NewDecoder(4096, nil),
		accept: make(chan *Incoming, 1),
		ready:  make(chan struct{}),
		wake:   make(chan struct{}, 1),
		done:   make(chan struct{}),

		granted: newInflow(cfg.Window), allowed: initialWindow,
		peerInitial: initialWindow, peerFrame: maxPayload,
	}
	s.readable.L, s.writable.L = &s.mu, &s.mu
	s.fr = http2.NewFramer(&s.out, s.br)
	s.fr.SetMaxReadFrameSize(maxFrame)
	s.enc = hpack.NewEncoder(&s.hdr)
	s.enc.SetMaxDynamicTableSize(0) // no state to keep, whatever table the peer has
	s.pending.preface = true
	if len(cfg.Messages.Hello) > 0 {
		s.outbox[0].next = cfg.Messages.Hello
	}
	conn.SetReadDeadline(time.Now().Add(cfg.HandshakeTimeout))
	s.kick()
	go s.run()
	return s, nil
}

// run owns the session: it reads, waits for the flusher and closes conn.
func (s *Session) run() {
	flushed := make(chan struct{})
	go func() {
		defer close(flushed)
		s.flushLoop()
	}()
	s.end(s.readLoop())
	<-flushed
	s.conn.Close()
	close(s.done)
}

// end turns what stopped the reader into the end of the session.
func (s *Session) end(err error) {
	s.mu.Lock()
	over, broken := s.ending, s.broken
	s.mu.Unlock()
	var v *violation
	switch {
	case over: // closed, reset, refused or complete: what the peer does changes nothing
	case broken:
		s.abort(s.cause(), http2.ErrCodeNo)
	case errors.As(err, &v):
		s.punish(v)
		s.drain()
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.abort(errSilent, http2.ErrCodeNo)
	default:
		s.abort(lost(err), http2.ErrCodeNo)
	}
}

// punish ends the session for a violation: by RST_STREAM and a GOAWAY without
// blame where the stream alone was wrong, else by GOAWAY with the code.
func (s *Session) punish(v *violation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	code := v.code
	if v.stream != 0 {
		s.pending.resetID, s.pending.resetCode = v.stream, v.code
		code = http2.ErrCodeNo
	}
	s.abortLocked(v, code)
}

// drain discards what an offender still sends until it hangs up, so that our
// GOAWAY is not destroyed by a TCP reset: closing a socket with unread data does
// that. Time and amount are bounded.
func (s *Session) drain() {
	io.CopyN(io.Discard, s.br, int64(s.cfg.Window)+chunkSize)
}

// finish begins the end of the session after a complete exchange: what we sent is
// on its way, what the peer sent is in the buffer. The connection below is shut for
// writing and closed once the peer has done the same: closing it at once would make
// TCP answer the peer's last control frames with a reset, which destroys data that
// the peer has not yet taken. Callers hold mu.
func (s *Session) finish(linger time.Duration, code http2.ErrCode) {
	if s.ending {
		return
	}
	s.ending, s.goingAway = true, true
	if code != http2.ErrCodeNo || !s.saidGoAway {
		s.saidGoAway, s.pending.goAway, s.pending.goAwayCode = true, true, code
	}
	s.conn.SetDeadline(time.Now().Add(linger))
	s.readable.Broadcast()
	s.writable.Broadcast()
	s.kick()
}

// abort ends the session with an error for everyone who waits.
func (s *Session) abort(err error, code http2.ErrCode) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.abortLocked(err, code)
}

func (s *Session) abortLocked(err error, code http2.ErrCode) {
	if s.ending {
		return
	}
	if s.err == nil {
		s.err = err
	}
	if st := s.st; st != nil {
		st.failLocked(err)
	}
	s.finish(lingerAbort, code)
}

// breakLocked records that a write failed: nothing can be sent any more. What the
// peer sent before it went away may still come in, so the reader goes on a little
// and has the last word on reads.
func (s *Session) breakLocked(err error) {
	if s.broken {
		return
	}
	s.broken = true
	if !s.ending {
		s.err = err
		if st := s.st; st != nil && st.werr == nil {
			st.werr = err
		}
		s.conn.SetReadDeadline(time.Now().Add(lingerAbort))
	}
	s.writable.Broadcast()
	s.kick()
}

// setReadDeadline does nothing once the end of the session has set its own.
func (s *Session) setReadDeadline(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ending && !s.broken {
		s.conn.SetReadDeadline(t)
	}
}

// kick wakes the flusher.
func (s *Session) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *Session) cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return net.ErrClosed
}

// Done is closed when the session has ended and its connection is closed.
func (s *Session) Done() <-chan struct{} { return s.done }

// GoAway tells the peer that no further stream is welcome. One that is open goes
// on; without one the session ends.
func (s *Session) GoAway() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.st == nil {
		s.abortLocked(net.ErrClosed, http2.ErrCodeNo)
		return
	}
	s.goAwayLocked()
}

func (s *Session) goAwayLocked() {
	if !s.saidGoAway {
		s.goingAway, s.saidGoAway, s.pending.goAway = true, true, true
		s.kick()
	}
}

// Close resets a stream that has not ended in both directions, and waits until the
// connection below is closed: a round trip as a rule, 5 s at most.
func (s *Session) Close() error {
	s.mu.Lock()
	if st := s.st; st != nil {
		st.resetLocked(http2.ErrCodeCancel, net.ErrClosed)
	}
	s.abortLocked(net.ErrClosed, http2.ErrCodeNo)
	s.mu.Unlock()
	<-s.done
	return nil
}
