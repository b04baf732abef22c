package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// half is one direction. Its own goroutine runs it.
type half struct {
	pipe     *pipe
	reverse  *half
	name     string // of from
	from, to net.Conn
	count    atomic.Int64 // bytes written to to
	stopped  atomic.Bool  // to takes no more

	wmu     sync.Mutex // held while writing and until the outcome is known
	severed bool       // under wmu: a write met a reset, not merely the end of a finished reader
}

// run copies until from ends or something breaks.
func (h *half) run() {
	rerr, werr := h.copy()
	if rerr == nil && werr == nil {
		werr = h.closeWrite()
	}
	switch {
	case werr != nil:
		h.stop(werr)
	case rerr != nil:
		flush(h.to)
		h.pipe.abort(fmt.Errorf("reading from %s: %w", h.name, rerr))
	}
}

// copy moves bytes until an end or an error. At most one of the errors is set;
// neither means a regular end.
func (h *half) copy() (rerr, werr error) {
	buf := take(0)
	defer func() { buf.give() }()
	for {
		if h.reverse.stopped.Load() {
			_ = h.from.SetReadDeadline(time.Now().Add(drainLimit)) // a closed connection ends the loop just as well
		}
		n, err := h.from.Read(*buf.data)
		if n > 0 {
			if werr := h.write((*buf.data)[:n]); werr != nil {
				return nil, werr
			}
		}
		switch {
		case err == io.EOF && h.wasReset():
			return syscall.ECONNRESET, nil
		case err == io.EOF:
			return nil, nil
		case err != nil:
			return err, nil
		}
		buf = buf.fit(n)
	}
}

func (h *half) write(b []byte) error {
	h.wmu.Lock()
	defer h.wmu.Unlock()
	n, err := h.to.Write(b)
	h.count.Add(int64(n))
	// EPIPE says that the far end had ended its own writing before the reset.
	h.severed = err != nil && !errors.Is(err, syscall.EPIPE)
	return err
}

// wasReset reports whether the end of from is what a reset has left. The kernel
// reports a reset once only, to the writer if that one comes first; the reader
// then sees what looks like a regular end.
func (h *half) wasReset() bool {
	if !isClosed(h.from) {
		return false // and the writer may be waiting for room
	}
	h.reverse.wmu.Lock()
	defer h.reverse.wmu.Unlock()
	return h.reverse.severed
}

// closeWrite tells the far end that from has ended. A TLS connection gives the
// alert that says so five seconds and breaks; a slow reader may need longer to
// make room for it, so wait for that room first.
func (h *half) closeWrite() error {
	if err := waitWritable(h.to); err != nil {
		return err
	}
	if c, ok := h.to.(CloseWriter); ok {
		return c.CloseWrite()
	}
	return h.to.Close()
}

// stop handles a far end that takes no more. What it had sent before may still
// be unread, so the reverse direction goes on until it has delivered that.
func (h *half) stop(err error) {
	h.pipe.note(fmt.Errorf("writing to %s: %w", h.reverse.name, err))
	h.stopped.Store(true)
	_ = h.to.SetReadDeadline(time.Now().Add(drainLimit)) // for a reader that waits already
}
