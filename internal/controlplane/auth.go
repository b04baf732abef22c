package controlplane

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os/user"
	"slices"
	"strconv"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/peercred"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// anonymousMethod reports whether an RPC may be called without an SVID.
// Everything else on the network port needs one: a method that is added later
// is closed until it is listed here.
func anonymousMethod(full string) bool {
	return full == sallyportv1.Enrollment_Enroll_FullMethodName
}

// orphanMethod reports whether an RPC is open to an SVID whose workload is no
// more. ADS is: there it learns that everything is denied now.
func orphanMethod(full string) bool {
	return full == discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResources_FullMethodName ||
		full == discoveryv3.AggregatedDiscoveryService_StreamAggregatedResources_FullMethodName
}

// authenticator decides who may call what on the network port.
type authenticator struct {
	trustDomain spiffeid.TrustDomain

	member  func(identity.Peer) error                // nil: its workload exists
	revoked func(p identity.Peer, orphan bool) error // nil: its SVID is not refused; orphan as in orphanMethod
	now     func() time.Time

	mu      sync.Mutex
	streams map[*authenticatedStream]struct{} // guarded by mu; those that end with their workload
}

// authenticate puts the caller that mTLS proved into the context. TLS has
// verified the certificate already; this reads the result.
func (a *authenticator) authenticate(ctx context.Context, method string) (context.Context, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "no transport information")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "TLS is required")
	}
	if len(info.State.PeerCertificates) == 0 {
		if anonymousMethod(method) {
			return ctx, nil
		}
		return nil, status.Errorf(codes.Unauthenticated, "%s needs an SVID; enrol first", method)
	}
	caller, err := identity.PeerOf(info.State)
	if err != nil {
		return nil, status.Errorf(codes.Unauthenticated, "reading the caller's identity: %v", err)
	}
	if a.now().After(caller.Leaf.NotAfter) { // the connection may be older than that
		return nil, errExpired()
	}
	if td := caller.ID.TrustDomain(); td != a.trustDomain { // federation is for workloads
		return nil, status.Errorf(codes.PermissionDenied, "%s is of another trust domain than %s", caller.ID, a.trustDomain.Name())
	}
	if identity.Reserved(caller.ID) {
		return nil, status.Errorf(codes.PermissionDenied, "%s is not a workload", caller.ID)
	}
	if err := a.admit(caller, method); err != nil {
		return nil, err
	}
	return identity.ContextWithPeer(ctx, caller), nil
}

// admit is nil if the caller may use the RPC. An SVID that is revoked is as good
// as none; whoever enrols does so by evidence.
func (a *authenticator) admit(caller identity.Peer, method string) error {
	if anonymousMethod(method) {
		return nil
	}
	if err := a.revoked(caller, orphanMethod(method)); err != nil {
		return status.Errorf(codes.Unauthenticated, "%v", err)
	}
	if orphanMethod(method) {
		return nil
	}
	return a.member(caller)
}

func (a *authenticator) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, err := a.authenticate(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return next(ctx, req)
}

// stream ends a stream with the SVID that opened it, and with the caller's
// workload, whatever its handler waits for: a handler that is blocked in Recv is
// released by the stream's end.
func (a *authenticator) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, err := a.authenticate(ss.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	caller, ok := identity.PeerFromContext(ctx)
	s := &authenticatedStream{ServerStream: ss, ctx: ctx, caller: caller, method: info.FullMethod, orphaned: make(chan error, 1)}
	if !ok {
		return next(srv, s)
	}
	a.add(s)
	defer a.remove(s)
	expired := time.NewTimer(caller.Leaf.NotAfter.Sub(a.now()))
	defer expired.Stop()
	done := make(chan error, 1)
	go func() { done <- next(srv, s) }()
	select {
	case err := <-done:
		return err
	case err := <-s.orphaned:
		return err
	case <-expired.C:
		return errExpired()
	}
}

func (a *authenticator) add(s *authenticatedStream) {
	a.mu.Lock()
	if a.streams == nil {
		a.streams = map[*authenticatedStream]struct{}{}
	}
	a.streams[s] = struct{}{}
	a.mu.Unlock()
	a.check(s) // the workload may have gone since the caller was looked up
}

func (a *authenticator) remove(s *authenticatedStream) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.streams, s)
}

// recheck ends the streams of workloads that are no more, and of revoked SVIDs.
func (a *authenticator) recheck() {
	a.mu.Lock()
	all := slices.Collect(maps.Keys(a.streams))
	a.mu.Unlock()
	for _, s := range all {
		a.check(s)
	}
}

func (a *authenticator) check(s *authenticatedStream) {
	if err := a.admit(s.caller, s.method); err != nil {
		select {
		case s.orphaned <- err:
		default: // told already
		}
	}
}

func errExpired() error {
	return status.Error(codes.Unauthenticated, "the SVID of this connection has expired; reconnect with the new one")
}

type authenticatedStream struct {
	grpc.ServerStream
	ctx      context.Context // the stream's, with the caller in it
	caller   identity.Peer
	method   string
	orphaned chan error // one slot: why the stream ends with the caller's workload or SVID
}

// Context returns the stream's context with the caller in it.
func (s *authenticatedStream) Context() context.Context { return s.ctx }

func serverCredentials(cfg identity.TLSConfig) credentials.TransportCredentials {
	cfg.OptionalClient = true
	cfg.NextProtos = []string{"h2"}
	return credentials.NewTLS(identity.ServerTLS(cfg))
}

// localCredentials identifies callers of the admin socket by SO_PEERCRED. The
// socket's mode already keeps others out; this says who it was, for the audit.
type localCredentials struct{}

// operator is who is on the other end of the admin socket.
type operator struct {
	credentials.CommonAuthInfo
	cred peercred.Cred
}

// AuthType implements credentials.AuthInfo.
func (operator) AuthType() string { return "unix" }

// ServerHandshake implements credentials.TransportCredentials.
func (localCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("admin API on %s: not a unix socket", c.LocalAddr().Network())
	}
	cred, err := peercred.Unix(u)
	if err != nil {
		return nil, nil, err
	}
	return c, operator{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, cred}, nil
}

// ClientHandshake implements credentials.TransportCredentials; servers only.
func (localCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, fmt.Errorf("admin credentials serve servers only")
}

// Info implements credentials.TransportCredentials.
func (localCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone implements credentials.TransportCredentials.
func (c localCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials.
func (localCredentials) OverrideServerName(string) error { return nil }

// caller names the operator for audit records: who, and from where.
func caller(ctx context.Context) (actor, origin string) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "unknown", "unknown"
	}
	op, ok := p.AuthInfo.(operator)
	if !ok {
		return "unknown", p.Addr.String()
	}
	uid := strconv.FormatUint(uint64(op.cred.UID), 10)
	actor = "uid " + uid
	if u, err := user.LookupId(uid); err == nil {
		actor = u.Username + " (uid " + uid + ")"
	}
	return actor, fmt.Sprintf("admin socket, pid %d", op.cred.PID)
}
