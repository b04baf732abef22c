// Package insight collects the flow records of every sidecar and answers what
// operators ask of them: what happens right now, and what became of one
// decision.
//
// A sidecar can only report its own connections: who reports is proved by its
// certificate. Nothing is stored; the newest records are kept in memory, and a
// sidecar that floods the collector pushes out its own records first.
package insight

import (
	"context"
	"errors"
	"fmt"
	"io"

	als "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Config holds a collector's surroundings.
type Config struct {
	Keep     int                   // records kept in memory, in 64 MiB at most; default 100,000, some 600 bytes each
	Registry prometheus.Registerer // nil: metrics are kept but not exposed
	Log      hclog.Logger
}

// Filter selects records. Zero fields match everything.
type Filter struct {
	Src, Dst spiffeid.ID
	Side     flow.Side      // Inbound gives each connection once
	Verdict  *policy.Effect // nil: all, and those about which nothing was decided
}

// Match reports whether f passes the filter.
func (x Filter) Match(f *flow.Flow) bool {
	return (x.Src.IsZero() || f.Src == x.Src) &&
		(x.Dst.IsZero() || f.Dst == x.Dst) &&
		(x.Side == "" || f.Side == x.Side) &&
		(x.Verdict == nil || f.Verdict() == x.Verdict.String())
}

// Collector is the server side of Envoy's access-log service (v3). Register it
// on a grpc server whose interceptors put the caller into the context with
// [identity.ContextWithPeer].
type Collector struct {
	als.UnimplementedAccessLogServiceServer
	ring     *flow.Ring
	doors    doors
	log      hclog.Logger
	received *prometheus.CounterVec
	rejected *prometheus.CounterVec
}

// Why a record was rejected: the values of the metric's label.
const (
	malformed = "malformed" // not a flow record
	foreign   = "foreign"   // the reporter is not the end it reports for
)

// New returns an empty collector.
func New(cfg Config) *Collector {
	if cfg.Keep <= 0 {
		cfg.Keep = 100_000
	}
	c := &Collector{ring: flow.NewRing(cfg.Keep), log: cfg.Log}
	f := promauto.With(cfg.Registry)
	c.received = f.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyport_flows_received_total", Help: "Flow records taken from sidecars.",
	}, []string{"side", "verdict"})
	c.rejected = f.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyport_flows_rejected_total", Help: "Flow records refused: malformed, or not the reporter's own.",
	}, []string{"reason"})
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sallyport_flows_held", Help: "Flow records held in memory.",
	}, func() float64 { return float64(c.ring.Len()) })
	return c
}

// StreamAccessLogs takes one sidecar's records until it closes the stream. A
// record that is not its own, or not a flow, is counted and left out; the
// stream goes on.
func (c *Collector) StreamAccessLogs(stream als.AccessLogService_StreamAccessLogsServer) error {
	peer, ok := identity.PeerFromContext(stream.Context())
	if !ok {
		return status.Error(codes.Unauthenticated, "flow records need a client certificate")
	}
	rejected := false
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&als.StreamAccessLogsResponse{})
		}
		if err != nil {
			return err
		}
		if err := c.take(peer.ID, msg); err != nil && !rejected {
			rejected = true // one line per stream, the counter knows the rest
			c.log.Warn("flow record rejected", "reporter", flow.Text(peer.ID.String()), "error", flow.Text(err.Error()))
		}
	}
}

// take records what msg holds and returns the last rejection.
func (c *Collector) take(reporter spiffeid.ID, msg *als.StreamAccessLogsMessage) error {
	var last error
	if n := len(msg.GetHttpLogs().GetLogEntry()); n > 0 {
		c.rejected.WithLabelValues(malformed).Add(float64(n))
		last = fmt.Errorf("HTTP entries are not understood")
	}
	for _, e := range msg.GetTcpLogs().GetLogEntry() {
		f, err := flow.FromALS(e)
		if err != nil {
			c.rejected.WithLabelValues(malformed).Inc()
			last = err
			continue
		}
		own := f.Src
		if f.Side == flow.Inbound {
			own = f.Dst
		}
		if own != reporter {
			c.rejected.WithLabelValues(foreign).Inc()
			last = fmt.Errorf("%s record of %s", f.Side, own)
			continue
		}
		f.Reporter = reporter.String()
		c.received.WithLabelValues(string(f.Side), f.Verdict()).Inc()
		c.ring.Record(f)
		c.doors.note(&f)
	}
	return last
}

// Flows calls fn with the newest limit held records that match (all if limit <=
// 0), oldest first, and, with follow, with each one as it arrives, until ctx
// ends or fn returns an error. dropped counts records that this caller missed
// because it was too slow.
func (c *Collector) Flows(ctx context.Context, x Filter, limit int, follow bool, fn func(f flow.Flow, dropped uint64) error) error {
	if follow {
		if limit <= 0 {
			limit = -1
		}
		return c.ring.Follow(ctx, limit, x.Match, fn)
	}
	for _, f := range c.ring.Newest(limit, x.Match) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fn(f, 0); err != nil {
			return err
		}
	}
	return nil
}

// Find returns the record of a decision, if it is still held: the destination's,
// which names the rule, or else the caller's. The oldest wins, for whoever has
// been told a decision's id may send more records with it.
func (c *Collector) Find(id string) (flow.Flow, bool) {
	if f, ok := c.ring.Find(func(f *flow.Flow) bool {
		return f.ID == id && f.Side == flow.Inbound && f.Dst.String() == f.Reporter
	}); ok {
		return f, true
	}
	return c.ring.Find(func(f *flow.Flow) bool { return f.ID == id && f.Side == flow.Outbound })
}
