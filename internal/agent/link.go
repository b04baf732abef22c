package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	// bufferSize replaces gRPC's 32 KiB per direction: a sidecar exchanges small
	// messages with the control plane.
	bufferSize     = 4 << 10
	maxReconnect   = 5 * time.Second
	connectTimeout = 10 * time.Second
)

// keepAlive notices a control plane that vanished from the network in about 15
// seconds.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 3 * time.Second, Count: 3}

// link is one way of connecting to the control plane.
type link struct {
	addr string
	tls  *tls.Config
	last atomic.Pointer[error] // why the last attempt to connect failed
}

// bundlesOnly presents no SVID: enrolling needs none, and an expired one would
// be refused.
type bundlesOnly struct{ x509bundle.Source }

func (bundlesOnly) GetX509SVID() (*x509svid.SVID, error) { return nil, identity.ErrNoIdentity }

// identified presents the present SVID; the server must be the control plane.
func (a *Agent) identified() *link {
	return a.newLink(identity.TLSConfig{Source: &a.live}, a.ID().TrustDomain())
}

// anonymous presents nothing; the server must be the control plane, by the
// bundle that is known.
func (a *Agent) anonymous(td spiffeid.TrustDomain) *link {
	return a.newLink(identity.TLSConfig{Source: bundlesOnly{&a.live}, OptionalClient: true}, td)
}

// newLink expects the control plane of td; of none, whoever calls has to verify.
func (a *Agent) newLink(cfg identity.TLSConfig, td spiffeid.TrustDomain) *link {
	cfg.Now, cfg.Check = a.cfg.Now, a.cfg.Check
	var want identity.Pattern
	if !td.IsZero() {
		want = identity.ExactPattern(controlPlaneID(td))
	}
	return newLink(a.cfg.ControlPlane, cfg, want)
}

func newLink(addr string, cfg identity.TLSConfig, want identity.Pattern) *link {
	cfg.NextProtos = []string{"h2"}
	l := &link{addr: addr, tls: identity.ClientTLS(cfg, want)}
	verify := l.tls.VerifyConnection
	l.tls.VerifyConnection = func(s tls.ConnectionState) error {
		if err := verify(s); err != nil {
			return untrusted{err}
		}
		return nil
	}
	return l
}

func controlPlaneID(td spiffeid.TrustDomain) spiffeid.ID {
	id, err := spiffeid.FromPath(td, identity.ControlPlanePath)
	if err != nil { // a constant path
		panic(err)
	}
	return id
}

// Dial connects to the control plane with the present SVID, over mTLS, and waits
// until the connection stands or ctx ends. Should it break, gRPC makes the next
// one with the SVID of that moment. The caller closes it.
func (a *Agent) Dial(ctx context.Context) (*grpc.ClientConn, error) {
	if a.remaining() <= 0 {
		return nil, fmt.Errorf("connecting to the control plane: %w", identity.ErrNoIdentity)
	}
	return a.identified().dial(ctx)
}

// dial connects and waits until the connection stands.
func (l *link) dial(ctx context.Context) (*grpc.ClientConn, error) {
	conn, err := l.open()
	if err != nil {
		return nil, err
	}
	if err := l.await(ctx, conn); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// with opens a connection, lets do use it, closes it, and explains what failed.
func (l *link) with(ctx context.Context, do func(*grpc.ClientConn) error) error {
	conn, err := l.open()
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := l.await(ctx, conn); err != nil {
		return err
	}
	return l.explain(do(conn))
}

func (l *link) open() (*grpc.ClientConn, error) {
	dialer := net.Dialer{Timeout: connectTimeout, KeepAliveConfig: keepAlive}
	conn, err := grpc.NewClient("passthrough:///"+l.addr,
		grpc.WithTransportCredentials(&handshaker{credentials.NewTLS(l.tls), l}),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, "tcp", addr)
			return c, l.note(err)
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: firstBackoff, Multiplier: 2, Jitter: 0.3, MaxDelay: maxReconnect},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithReadBufferSize(bufferSize), grpc.WithWriteBufferSize(bufferSize),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, fmt.Errorf("connecting to the control plane at %s: %w", l.addr, err)
	}
	return conn, nil
}

// await waits until conn stands; the first failure is the answer.
func (l *link) await(ctx context.Context, conn *grpc.ClientConn) error {
	conn.Connect()
	for {
		switch s := conn.GetState(); s {
		case connectivity.Ready:
			return nil
		case connectivity.TransientFailure, connectivity.Shutdown:
			return l.failure(refusal{errors.New("it ended the connection right after the handshake"), codes.Unavailable})
		default:
			if !conn.WaitForStateChange(ctx, s) {
				return l.failure(ctx.Err())
			}
		}
	}
}

func (l *link) note(err error) error {
	if err == nil {
		l.last.Store(nil)
	} else {
		l.last.Store(&err)
	}
	return err
}

// failure says why there is no connection, from what was noted while connecting.
func (l *link) failure(otherwise error) error {
	cause := otherwise
	if p := l.last.Load(); p != nil {
		cause = *p
	}
	if u, ok := errors.AsType[untrusted](cause); ok {
		return permanent(fmt.Errorf("not trusting the control plane at %s: %w", l.addr, u.error))
	}
	if errno, ok := errors.AsType[syscall.Errno](cause); ok {
		cause = errno // "connection refused" rather than three prefixes
	}
	return unreachable{addr: l.addr, cause: cause}
}

// untrusted marks what our own verification of the server said.
type untrusted struct{ error }

// handshaker notes why TLS handshakes fail; gRPC itself would tell only in text.
type handshaker struct {
	credentials.TransportCredentials
	link *link
}

// ClientHandshake implements credentials.TransportCredentials.
func (h *handshaker) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := h.TransportCredentials.ClientHandshake(ctx, authority, raw)
	return conn, info, h.link.note(err)
}

// Clone implements credentials.TransportCredentials.
func (h *handshaker) Clone() credentials.TransportCredentials {
	return &handshaker{h.TransportCredentials.Clone(), h.link}
}
