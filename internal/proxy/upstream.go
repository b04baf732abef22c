package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/tunnel"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Limits of opening a connection to another workload.
const (
	openLimit    = 10 * time.Second // over all tries
	attemptLimit = 4 * time.Second  // TCP, TLS and the other end's answer
	maxTries     = 3                // different endpoints
)

// upstream is an open stream to an endpoint: one of a tunnel or, to an instance
// without sidecar, the TLS connection itself.
type upstream struct {
	stream   net.Conn
	decision string // the id that the other end gave; "" if it gave none
	addr     netip.AddrPort
	proof    *proof
	end      func() // waits for the end of what is below the stream
}

// open connects to an endpoint of d. One that cannot be reached, or says 503, is
// followed by another; a refusal is final, as every endpoint has the same policy.
func (o *Outbound) open(ctx context.Context, d destination) (*upstream, error) {
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	var tried []netip.AddrPort
	var last error
	for len(tried) < maxTries && ctx.Err() == nil {
		e, ok := o.balancer.pick(d.service.Endpoints, d.Port, tried, o.cfg.Now())
		if !ok {
			break
		}
		tried = append(tried, e.Addr)
		up, err := o.attempt(ctx, d, e)
		if err == nil {
			o.balancer.worked(e.Addr)
			return up, nil
		}
		var no *tunnel.Refused
		final := errors.As(err, &no) && no.Status < 500
		o.balancer.release(e.Addr, !final, o.cfg.Now())
		if final {
			return nil, err
		}
		last = fmt.Errorf("endpoint %s: %w", e.Addr, err)
	}
	switch {
	case last == nil:
		return nil, d.notServed()
	case len(tried) > 1:
		return nil, fmt.Errorf("%d endpoints tried, last: %w", len(tried), last)
	}
	return nil, last
}

// attempt tries one endpoint.
func (o *Outbound) attempt(ctx context.Context, d destination, e xds.Endpoint) (*upstream, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptLimit)
	defer cancel()
	raw, err := dialer(attemptLimit).DialContext(ctx, "tcp", e.Addr.String())
	if err != nil {
		return nil, err
	}
	trust := o.cfg.Views.Load().trust
	cfg := identity.ClientTLS(
		identity.TLSConfig{Source: o.cfg.Source, Check: o.cfg.Book.Check, Now: o.cfg.Now, NextProtos: []string{alpn}},
		identity.ExactPattern(d.Dst))
	if e.Direct {
		cfg = directTLS(cfg, d.port.Protocol)
	}
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("authenticating: %w", err)
	}
	server, err := identity.PeerOf(conn.ConnectionState())
	if err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("authenticating: %w", err)
	}
	proved := &proof{server, o.cfg.Now(), trust}
	if e.Direct {
		return &upstream{stream: conn, addr: e.Addr, proof: proved, end: func() {}}, nil
	}
	neighbour := o.cfg.Neighbours.join(d.Dst)
	session, err := tunnel.Client(ctx, conn, tunnel.Config{Messages: neighbour.messages()})
	if err != nil {
		return nil, err
	}
	neighbour.start(session)
	host, ok := identity.MeshName(d.Dst)
	if !ok {
		host = e.Addr.Addr().String()
	}
	stream, err := session.Open(ctx, tunnel.Target{Host: host, Port: d.Port})
	if err != nil {
		_ = session.Close() // always nil; it waits for the connection's end
		neighbour.leave()
		return nil, err
	}
	return &upstream{stream: stream, decision: stream.DecisionID(), addr: e.Addr, proof: proved, end: func() {
		_ = session.Close() // always nil
		neighbour.leave()
	}}, nil
}

// close waits for the end of the connection below up's stream.
func (o *Outbound) close(up *upstream) {
	up.end()
	o.balancer.release(up.addr, false, o.cfg.Now())
}
