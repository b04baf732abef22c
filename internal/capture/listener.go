package capture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sallyport-mesh/sallyport/internal/peercred"
)

// DefaultMaxConns is the number of connections that a Listener holds at once
// unless told otherwise.
const DefaultMaxConns = 10_000

// Config describes a Listener.
type Config struct {
	Key       string   // configuration key, named in errors: "outbound[0].listen"
	Listen    string   // "127.0.0.1:9001", "[::1]:9001" or "unix:/path"
	AllowUIDs []uint32 // who may connect; empty: nobody

	// Remote makes it the listener of callers on the network, who prove who
	// they are by TLS: any TCP address, no users. AllowUIDs must be empty.
	Remote bool

	MaxConns int // connections at once, more wait in the kernel's queue; 0: DefaultMaxConns
	Log      hclog.Logger
}

// Listener accepts connections from allowed users only.
type Listener struct {
	cfg     Config
	net     net.Listener
	close   func() error  // closes net, once; later callers wait and see the same result
	closed  atomic.Bool   // set before close is called
	slots   chan struct{} // one element for each connection held or awaited
	refused atomic.Uint64
	log     limitedLog
}

// Listen opens the door. The error is one line that names the configuration key
// and what to do.
func Listen(cfg Config) (*Listener, error) {
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = DefaultMaxConns
	}
	l := &Listener{cfg: cfg, slots: make(chan struct{}, cfg.MaxConns), log: limitedLog{log: cfg.Log}}
	if cfg.Remote && len(cfg.AllowUIDs) > 0 {
		return nil, fmt.Errorf("%s: users cannot be told apart over the network", cfg.Key)
	}
	n, closing, err := open(cfg)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cfg.Key, err)
	}
	l.net, l.close = n, sync.OnceValue(closing)
	return l, nil
}

// Addr returns the address that is listened on.
func (l *Listener) Addr() net.Addr { return l.net.Addr() }

// Refused returns how many connections were closed at the door because of who
// opened them.
func (l *Listener) Refused() uint64 { return l.refused.Load() }

// Close ends accepting and leaves the connections that were accepted alone.
// Serve returns when their handlers have.
func (l *Listener) Close() error {
	l.closed.Store(true)
	return l.close()
}

// Serve accepts connections and runs handler for each in a goroutine of its own;
// the handler owns the connection. It returns nil after Close or when ctx, which
// the handlers see, is done, and always after every handler has returned. It may
// be called once. The listener is closed then.
func (l *Listener) Serve(ctx context.Context, handler func(context.Context, net.Conn)) error {
	var handlers sync.WaitGroup
	defer handlers.Wait()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	defer func() { _ = l.Close() }() // ended otherwise: the error that ended it matters more

	var wait backoff
	for {
		select {
		case l.slots <- struct{}{}: // reserved first, so that what we accept we can serve
		case <-ctx.Done():
			return nil
		}
		c, err := l.net.Accept()
		if err != nil {
			<-l.slots
			if l.closed.Load() || errors.Is(err, net.ErrClosed) {
				return nil
			}
			if !temporary(err) {
				return fmt.Errorf("%s: accepting connections: %w", l.cfg.Key, err)
			}
			l.log.warn("cannot accept connections, trying again", "key", l.cfg.Key, "error", err)
			wait.pause(ctx)
			continue
		}
		wait.reset()
		handlers.Go(func() {
			defer func() { <-l.slots }()
			l.admit(ctx, c, handler)
		})
	}
}

// admit hands c on if its opener may speak with our identity.
func (l *Listener) admit(ctx context.Context, c net.Conn, handler func(context.Context, net.Conn)) {
	if !l.cfg.Remote {
		uid, err := peercred.UID(c)
		if err == nil && !slices.Contains(l.cfg.AllowUIDs, uid) {
			err = fmt.Errorf("uid %d is not allowed", uid)
		}
		if err != nil {
			l.refused.Add(1)
			l.log.warn("local connection refused", "key", l.cfg.Key, "error", err)
			_ = c.Close()
			return
		}
	}
	handler(ctx, c)
}

// temporary reports whether accepting may work again later: the process or the
// machine is out of something, or the one connection went wrong.
func temporary(err error) bool {
	for _, e := range []syscall.Errno{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
		syscall.ECONNABORTED, syscall.EPROTO, syscall.EPERM, syscall.ETIMEDOUT,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// backoff waits between attempts to accept: 5 ms, doubling to 250 ms, so that
// service resumes within a second of the shortage's end.
type backoff struct{ next time.Duration }

func (b *backoff) reset() { b.next = 0 }

func (b *backoff) pause(ctx context.Context) {
	b.next = min(max(2*b.next, 5*time.Millisecond), 250*time.Millisecond)
	t := time.NewTimer(b.next)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// limitedLog writes at most one line a second and counts what it left out, so
// that nobody can fill the log by knocking.
type limitedLog struct {
	log hclog.Logger

	mu         sync.Mutex // guards what follows
	last       time.Time
	suppressed int
}

func (l *limitedLog) warn(msg string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if now.Sub(l.last) < time.Second {
		l.suppressed++
		return
	}
	l.log.Warn(msg, append(args, "suppressed", l.suppressed)...)
	l.last, l.suppressed = now, 0
}
