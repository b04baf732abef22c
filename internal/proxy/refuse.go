package proxy

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// unreachable is v where the app could not be reached.
func unreachable(v verdict) verdict {
	return verdict{status: http.StatusServiceUnavailable, portName: v.portName, revision: v.revision, told: "the app cannot be reached"}
}

// refuseDirect tells a caller without sidecar that it is refused, as far as the
// port's protocol has words for it, and closes the connection.
func refuseDirect(ctx context.Context, conn net.Conn, p policy.Protocol, id string, v verdict) {
	switch p {
	case policy.HTTP:
		r := rejection{Status: v.status, Error: "refused by policy", DecisionID: id, Reason: v.toldReason()}
		if v.status >= http.StatusInternalServerError {
			r.Error = "destination unreachable"
		}
		if r.write(ctx, conn) == nil {
			return
		}
	case policy.GRPC:
		refuseGRPC(ctx, conn, id, v)
	}
	_ = conn.Close() // it is given up
}

// Codes of gRPC (its status codes, not to be linked for three numbers).
const (
	grpcUnavailable      = 14
	grpcPermissionDenied = 7
)

// refuseGRPC answers each call that comes within lingerLimit, and returns when the
// connection has ended. A client that were only hung up on would wait longer and
// longer before it came again, also once it is allowed.
func refuseGRPC(ctx context.Context, conn net.Conn, id string, v verdict) {
	code, message := grpcPermissionDenied, "refused by policy"
	if v.status >= http.StatusInternalServerError {
		code, message = grpcUnavailable, "destination unreachable"
	}
	message += " (decision " + id + ")"
	if reason := v.toldReason(); reason != "" {
		message += ": " + reason
	}
	ctx, cancel := context.WithTimeout(ctx, lingerLimit)
	defer cancel()
	ended := make(chan struct{})
	srv := &http.Server{
		HTTP2:          &http.HTTP2Config{MaxConcurrentStreams: 16, MaxDecoderHeaderTableSize: 4 << 10},
		MaxHeaderBytes: maxHead / 2, ReadHeaderTimeout: lingerLimit, ErrorLog: log.New(io.Discard, "", 0),
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateClosed {
				cancel()
				close(ended)
			}
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Grpc-Status", strconv.Itoa(code))
			w.Header().Set("Grpc-Message", grpcMessage(message))
			w.Header()["Date"] = nil
			w.WriteHeader(http.StatusOK)
		}),
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	l := &oneConn{conn: conn, done: ctx.Done()}
	_ = srv.Serve(l)   // it ends with the connection, or with ctx …
	_ = srv.Close()    // … and then nothing of it goes on
	if l.conn != nil { // ctx was over before it was taken
		_ = conn.Close()
		return
	}
	<-ended
}

// oneConn is a listener with one connection in it.
type oneConn struct {
	conn net.Conn // owned by Accept's only caller; nil once taken
	done <-chan struct{}
}

// Accept implements net.Listener.
func (l *oneConn) Accept() (net.Conn, error) {
	if c := l.conn; c != nil {
		l.conn = nil
		return c, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

// Close implements net.Listener.
func (l *oneConn) Close() error { return nil }

// Addr implements net.Listener.
func (l *oneConn) Addr() net.Addr { return &net.TCPAddr{} }

// grpcMessage encodes a status message as gRPC over HTTP/2 has it.
func grpcMessage(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
