package endpoint

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/internal/peercred"
)

// listener accepts unix connections and finds out who calls, before anything is
// read. Connections beyond the limits are closed.
type listener struct {
	*net.UnixListener
	log       hclog.Logger
	inspector peercred.Inspector

	mu    sync.Mutex
	total int            // guarded by mu
	users map[uint32]int // guarded by mu; :: uid → connections
	procs map[int32]int  // guarded by mu; :: pid → connections
	full  bool           // guarded by mu; somebody was turned away since there was room for all
}

func newListener(l *net.UnixListener, log hclog.Logger) *listener {
	return &listener{UnixListener: l, log: log, users: map[uint32]int{}, procs: map[int32]int{}}
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		cred, err := peercred.Unix(c)
		if err != nil {
			l.log.Debug("closing a connection whose caller is unknown", "error", err)
			_ = c.Close() // nobody is there
			continue
		}
		if !l.enter(cred) {
			_ = c.Close() // turned away
			continue
		}
		return l.admitted(c, cred), nil
	}
}

// admitted makes the connection of a caller who was let in.
func (l *listener) admitted(c *net.UnixConn, cred peercred.Cred) *conn {
	p := &pinned{look: func(ctx context.Context) (*peercred.Process, error) { return l.inspector.Conn(ctx, c) }}
	return &conn{UnixConn: c, caller: Caller{cred, p}, leave: sync.OnceFunc(func() {
		p.close()
		l.leave(cred)
	})}
}

// pinned is the process of one connection. Looking it up may take a while, since
// its executable is hashed: it waits until somebody needs it, and who else needs it
// on this connection waits too.
type pinned struct {
	look func(context.Context) (*peercred.Process, error)

	mu      sync.Mutex
	looked  bool              // guarded by mu
	closed  bool              // guarded by mu
	process *peercred.Process // guarded by mu; nil: not looked up, or err
	err     error             // guarded by mu
}

func (p *pinned) get(ctx context.Context) (*peercred.Process, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, net.ErrClosed
	}
	if !p.looked {
		p.process, p.err = p.look(ctx)
		p.looked = !errors.Is(p.err, peercred.ErrBusy)
	}
	if p.err != nil {
		return nil, p.err
	}
	return p.process, p.process.Alive()
}

func (p *pinned) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.process != nil && p.err == nil {
		p.process.Close()
	}
}

func (l *listener) enter(c peercred.Cred) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A process of a PID namespace that is not ours to see has pid 0.
	if l.total >= maxConns || l.users[c.UID] >= maxConnsOfUser || c.PID != 0 && l.procs[c.PID] >= maxConnsOfPID {
		if !l.full {
			l.log.Warn("too many connections to the Workload API; turning callers away", "uid", c.UID, "pid", c.PID, "connections", l.total)
		}
		l.full = true
		return false
	}
	l.total++
	l.users[c.UID]++
	l.procs[c.PID]++
	return true
}

func (l *listener) leave(c peercred.Cred) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.users[c.UID]--; l.users[c.UID] == 0 {
		delete(l.users, c.UID)
	}
	if l.procs[c.PID]--; l.procs[c.PID] == 0 {
		delete(l.procs, c.PID)
	}
	l.full = false
}

// conn is a connection and who made it.
type conn struct {
	*net.UnixConn
	caller Caller
	leave  func()
}

// Close implements net.Conn.
func (c *conn) Close() error {
	defer c.leave()
	return c.UnixConn.Close()
}

// kernelCredentials are what the kernel says of the caller: no handshake, no TLS
// (SPIFFE Workload Endpoint 3.1 and 5).
type kernelCredentials struct{}

// callerInfo carries the caller to the RPCs of its connection.
type callerInfo struct {
	credentials.CommonAuthInfo
	caller Caller
}

// AuthType implements credentials.AuthInfo.
func (callerInfo) AuthType() string { return "peercred" }

// ServerHandshake implements credentials.TransportCredentials.
func (kernelCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, errors.New("not a unix connection")
	}
	return c, callerInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, c.caller}, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (kernelCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("for servers only")
}

// Info implements credentials.TransportCredentials.
func (kernelCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

// Clone implements credentials.TransportCredentials.
func (k kernelCredentials) Clone() credentials.TransportCredentials { return k }

// OverrideServerName implements credentials.TransportCredentials.
func (kernelCredentials) OverrideServerName(string) error { return nil }

func callerOf(ctx context.Context) (Caller, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(callerInfo); ok {
			return info.caller, nil
		}
	}
	return Caller{}, status.Error(codes.Unauthenticated, "the caller is unknown")
}

const (
	workloadMethods = "/SpiffeWorkloadAPI/"
	securityHeader  = "workload.spiffe.io"
)

// checkHeader demands the metadata that a request forged through a workload (by a
// server that it was tricked into calling) would lack (SPIFFE Workload Endpoint
// 6). SDS and reflection know no such header.
func checkHeader(ctx context.Context, method string) error {
	if !strings.HasPrefix(method, workloadMethods) {
		return nil
	}
	if v := metadata.ValueFromIncomingContext(ctx, securityHeader); len(v) != 1 || v[0] != "true" {
		return status.Error(codes.InvalidArgument, "metadata workload.spiffe.io: true is missing")
	}
	return nil
}

func checkUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := checkHeader(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	return next(ctx, req)
}

func checkStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := checkHeader(ss.Context(), info.FullMethod); err != nil {
		return err
	}
	return next(srv, ss)
}
