// Package relay copies bytes both ways between two connections until both
// directions have ended.
//
// It knows half-close, resets, an idle timeout and cancellation; it knows
// neither TLS nor policy nor where the bytes go. It does not splice: one leg of
// every connection that a sidecar carries is encrypted.
package relay

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// ErrIdle says that no byte moved in either direction for the idle timeout.
var ErrIdle = errors.New("idle timeout")

// CloseWriter is a connection that can end its writing side alone, as
// *net.TCPConn, *net.UnixConn, *tls.Conn and tunnel streams can. One that cannot
// is closed whole when the other side has ended its writing.
//
// Closing a connection that has not ended by itself must look irregular to its
// far end. Tunnel streams do that; of TCP connections, also below TLS, Pipe
// makes the close a reset.
type CloseWriter interface {
	CloseWrite() error
}

// drainLimit bounds what is still done for bytes that are on their way when
// something breaks: how long a far end that takes no more may send nothing, and
// one that is to be reset may take nothing.
const drainLimit = 5 * time.Second

// Pipe copies app → peer and peer → app until both directions have ended. It
// owns both connections and has closed them when it returns; nothing that it
// started is left running. sent counts the bytes written to peer, received those
// written to app.
//
// The end of one direction ends the writing side of the other connection and
// leaves the opposite direction alone. A reset or any other error is passed on
// as a reset, after what was read before it; package crypto/tls, though, takes a
// TLS stream that was cut off between two records for one that has ended. When
// nothing has moved in either direction for idle (and at most a quarter longer)
// both are reset with [ErrIdle]; 0 means never. When ctx is done both are reset
// at once and the error is its cause.
//
// err is nil only if both directions ended regularly.
func Pipe(ctx context.Context, app, peer net.Conn, idle time.Duration) (sent, received int64, err error) {
	p := &pipe{idle: idle}
	p.out = half{pipe: p, name: "app", from: app, to: peer}
	p.in = half{pipe: p, name: "peer", from: peer, to: app}
	p.out.reverse, p.in.reverse = &p.in, &p.out

	stop := context.AfterFunc(ctx, func() { p.abort(context.Cause(ctx)) })
	p.startWatch()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.in.run()
	}()
	p.out.run()
	<-done
	p.settle()
	stop()
	return p.out.count.Load(), p.in.count.Load(), p.finish()
}

// pipe is the state that both directions share.
type pipe struct {
	out, in half
	idle    time.Duration

	mu    sync.Mutex // guards what follows
	over  bool       // both connections are closed or being closed
	err   error      // the first cause of an irregular end
	timer *time.Timer
	seen  int64 // bytes moved when the watch last looked
	quiet int   // looks without movement
}

// looks is how often the watch looks in one idle timeout.
const looks = 4

func (p *pipe) startWatch() {
	if p.idle <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timer = time.AfterFunc(p.interval(), p.look)
}

func (p *pipe) interval() time.Duration { return max(p.idle/looks, time.Millisecond) }

// look runs on the timer. Counting looks without movement spares the copying
// loops a clock reading for every chunk.
func (p *pipe) look() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over {
		return
	}
	moved := p.out.count.Load() + p.in.count.Load()
	if moved != p.seen {
		p.seen, p.quiet = moved, 0
	} else if p.quiet++; p.quiet == looks {
		p.abortLocked(ErrIdle)
		return
	}
	p.timer.Reset(p.interval())
}

// note keeps the first cause of an irregular end.
func (p *pipe) note(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.noteLocked(err)
}

func (p *pipe) noteLocked(err error) {
	if p.err == nil {
		p.err = err
	}
}

// abort resets both connections, which ends both directions.
func (p *pipe) abort(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.abortLocked(err)
}

func (p *pipe) abortLocked(err error) {
	if p.over {
		return
	}
	p.noteLocked(err)
	p.over = true
	reset(p.out.from)
	reset(p.out.to)
}

// settle lets both ends have what was sent to them before an irregular end
// resets them.
func (p *pipe) settle() {
	p.mu.Lock()
	irregular := p.err != nil && !p.over
	p.mu.Unlock()
	if irregular {
		flush(p.out.from)
		flush(p.out.to)
	}
}

// finish runs when both directions have ended.
func (p *pipe) finish() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
	}
	if p.err != nil {
		p.abortLocked(p.err)
		return p.err
	}
	p.over = true
	_ = p.out.from.Close() // both ends are done with it; there is nobody left to tell
	_ = p.out.to.Close()
	return nil
}
