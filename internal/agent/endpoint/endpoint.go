// Package endpoint serves identities to the workloads of this machine: the SPIFFE
// Workload API, X.509 and JWT profiles, and Envoy's SDS v3, on a unix socket
// (SPIFFE Workload Endpoint).
//
// It knows neither how an identity is obtained nor who is entitled to which: it
// finds out who calls, once for each connection, and asks a [Holder]. TCP is not
// offered, because there nobody can tell who calls.
package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/sallyport-mesh/sallyport/internal/peercred"
	"github.com/sallyport-mesh/sallyport/internal/socket"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Limits of one endpoint. A caller beyond them is turned away; the others notice
// nothing.
const (
	maxConns       = 4096     // connections in all
	maxConnsOfUser = 1024     // of one uid
	maxConnsOfPID  = 64       // of one process
	maxStreams     = 32       // RPCs in progress on one connection
	maxRequest     = 64 << 10 // bytes of a request
	maxHeader      = 16 << 10 // bytes of a request's metadata
	prefaceLimit   = 5 * time.Second
	idleLimit      = 10 * time.Minute // without any RPC
	requestLimit   = 15 * time.Second // of an RPC that is no stream
	stopLimit      = 2 * time.Second  // for clients to take note of a stop
	socketMode     = 0o666            // whoever connects is judged by who he is
	smallBuffer    = 4 << 10
	leastPing      = 10 * time.Second
)

// Caller is the process at the other end of a connection, as the kernel knew it
// when it connected.
type Caller struct {
	peercred.Cred
	pinned *pinned
}

// Process looks the caller up, once for each connection, and afterwards only makes
// sure that it is still there: what is found out of it never becomes another
// process's. The Process belongs to the connection. After [peercred.ErrBusy] it may
// be asked for again.
func (c Caller) Process(ctx context.Context) (*peercred.Process, error) { return c.pinned.get(ctx) }

// Errors of a [Holder] that callers are told by a status code of their own. All
// others are Unavailable, which clients take as an invitation to try again.
var (
	// ErrDenied says that the caller has no identity: PermissionDenied.
	ErrDenied = errors.New("no identity is registered for this process")
	// ErrStarting says that nobody can have an identity yet: Unavailable.
	ErrStarting = errors.New("starting: no identity yet")
)

// Holding is what a caller holds at one moment. It is never changed.
type Holding struct {
	// SVIDs are at least one, the first being the default, with keys.
	SVIDs []*x509svid.SVID
	// Bundles is what to trust, of every trust domain, the own one included.
	Bundles identity.Bundles
}

// Holder knows who is entitled to which identities, and obtains them.
type Holder interface {
	// Hold returns what the caller holds, to be followed until ctx ends. It does
	// not wait for the network.
	Hold(ctx context.Context, c Caller) (*Feed, error)
	// JWT issues a JWT-SVID of id, which the caller holds, in compact form.
	JWT(ctx context.Context, c Caller, id spiffeid.ID, audience []string) (string, error)
}

// Config configures a [Server].
type Config struct {
	Path   string       // of the socket; its file gets mode 0666
	Holder Holder       // required
	Log    hclog.Logger // nil: discard

	// CheckJWT may refuse a JWT-SVID that is valid, because what was issued to its
	// subject until then was revoked; nil refuses none.
	CheckJWT func(subject spiffeid.ID, issued time.Time) error
}

// Server is one endpoint.
type Server struct {
	log      hclog.Logger
	holder   Holder
	checkJWT func(subject spiffeid.ID, issued time.Time) error // nil: none is refused
	listener *listener
	close    func() error
	grpc     *grpc.Server
	stopping chan struct{} // closed when Serve begins to stop
}

// New listens on cfg.Path; see [socket.Listen] for what is replaced and refused.
func New(cfg Config) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	l, closing, err := socket.Listen(cfg.Path, os.FileMode(socketMode))
	if err != nil {
		return nil, err
	}
	s := &Server{
		log: cfg.Log, holder: cfg.Holder, checkJWT: cfg.CheckJWT,
		listener: newListener(l, cfg.Log), close: closing, stopping: make(chan struct{}),
	}
	s.grpc = grpc.NewServer(
		grpc.Creds(kernelCredentials{}),
		grpc.UnaryInterceptor(checkUnary), grpc.StreamInterceptor(checkStream),
		grpc.MaxConcurrentStreams(maxStreams), grpc.MaxRecvMsgSize(maxRequest), grpc.MaxHeaderListSize(maxHeader),
		grpc.ConnectionTimeout(prefaceLimit),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleLimit}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: leastPing, PermitWithoutStream: true}),
		grpc.ReadBufferSize(smallBuffer), grpc.WriteBufferSize(smallBuffer),
	)
	workload.RegisterSpiffeWorkloadAPIServer(s.grpc, &workloadAPI{server: s})
	secretv3.RegisterSecretDiscoveryServiceServer(s.grpc, &discovery{server: s})
	reflection.Register(s.grpc)
	return s, nil
}

// Addr is the socket's address.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Serve answers callers until ctx ends, which its streams are told as
// Unavailable, and closes the endpoint. Call it once.
func (s *Server) Serve(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- s.grpc.Serve(s.listener) }()
	select {
	case err := <-done:
		return errors.Join(fmt.Errorf("serving the Workload API: %w", err), s.close())
	case <-ctx.Done():
	}
	close(s.stopping)
	err := s.close() // no new connections, and no file that leads nowhere
	hard := time.AfterFunc(stopLimit, s.grpc.Stop)
	s.grpc.GracefulStop()
	hard.Stop()
	<-done // what ends a Serve that was told to stop is no news
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	return err
}

// Close ends an endpoint that was never served.
func (s *Server) Close() error {
	s.grpc.Stop()
	return s.close()
}
