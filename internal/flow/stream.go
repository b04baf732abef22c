package flow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	alsdata "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	als "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
)

// StreamConfig says how a [Stream] batches. Zero values take the defaults.
type StreamConfig struct {
	Node     string        // SPIFFE ID of the sidecar, for the collector's logs only
	Queue    int           // records held while the control plane is away; default 16384
	Batch    int           // records per message; default 200
	Interval time.Duration // longest wait before a message is sent; default 100 ms
}

// Stream sends records to a collector over Envoy's access-log service (gRPC,
// v3). It survives the connection: records wait in a bounded queue until the
// next Run; what does not fit is dropped and counted. Delivery is at most once:
// the service knows no acknowledgement, so a batch in flight when a connection
// breaks is lost without being counted.
type Stream struct {
	cfg     StreamConfig
	queue   chan Flow
	dropped atomic.Uint64
	pending []*alsdata.TCPAccessLogEntry // owned by Run: a batch not yet sent
}

// NewStream returns a stream that sends nothing until Run.
func NewStream(cfg StreamConfig) *Stream {
	if cfg.Queue <= 0 {
		cfg.Queue = 16384
	}
	if cfg.Batch <= 0 {
		cfg.Batch = 200
	}
	if cfg.Interval <= 0 {
		cfg.Interval = 100 * time.Millisecond
	}
	return &Stream{cfg: cfg, queue: make(chan Flow, cfg.Queue)}
}

// Record implements [Sink].
func (s *Stream) Record(f Flow) {
	select {
	case s.queue <- f:
	default:
		s.dropped.Add(1)
	}
}

// Dropped counts records that found the queue full.
func (s *Stream) Dropped() uint64 { return s.dropped.Load() }

// Run sends over conn until the stream ends, with its error, or ctx ends; then
// it sends what is queued, for at most a second. At most one Run at a time.
func (s *Stream) Run(ctx context.Context, conn grpc.ClientConnInterface) error {
	// The call outlives ctx for the last batch.
	callCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	// Even a collector that reads nothing holds up a stop for a second at most.
	defer context.AfterFunc(ctx, func() { time.AfterFunc(time.Second, cancel) })()
	call, err := als.NewAccessLogServiceClient(conn).StreamAccessLogs(callCtx)
	if err != nil {
		return fmt.Errorf("opening flow stream: %w", err)
	}
	first := &als.StreamAccessLogsMessage{Identifier: &als.StreamAccessLogsMessage_Identifier{
		Node: &corev3.Node{Id: s.cfg.Node}, LogName: "flows",
	}}
	// The server answers only by ending the call, so one receive waits for that.
	ended := make(chan error, 1)
	go func() { ended <- call.RecvMsg(new(als.StreamAccessLogsResponse)) }()
	if err := call.Send(first); err != nil {
		return fmt.Errorf("opening flow stream: %w", endErr(err, ended, cancel))
	}
	for {
		if over, err := s.fill(ctx, ended); over {
			return fmt.Errorf("flow stream ended: %w", err)
		}
		if ctx.Err() != nil {
			return s.finish(call, ended, cancel)
		}
		if err := s.send(call); err != nil {
			return fmt.Errorf("sending flows: %w", endErr(err, ended, cancel))
		}
	}
}

// fill waits for a first record and then collects until the batch is full, the
// interval is over, ctx ends or the call does (over, with its error).
func (s *Stream) fill(ctx context.Context, ended <-chan error) (over bool, err error) {
	var timer <-chan time.Time
	if len(s.pending) > 0 {
		return false, nil
	}
	for len(s.pending) < s.cfg.Batch {
		select {
		case f := <-s.queue:
			s.pending = append(s.pending, ToALS(f))
			if timer == nil {
				t := time.NewTimer(s.cfg.Interval)
				defer t.Stop()
				timer = t.C
			}
		case <-timer:
			return false, nil
		case <-ctx.Done():
			return false, nil
		case err := <-ended:
			return true, err
		}
	}
	return false, nil
}

// send hands the pending batch to the call and forgets it when that worked.
func (s *Stream) send(call als.AccessLogService_StreamAccessLogsClient) error {
	if len(s.pending) == 0 {
		return nil
	}
	err := call.Send(&als.StreamAccessLogsMessage{LogEntries: &als.StreamAccessLogsMessage_TcpLogs{
		TcpLogs: &als.StreamAccessLogsMessage_TCPAccessLogEntries{LogEntry: s.pending},
	}})
	if err == nil {
		s.pending = nil
	}
	return err
}

// finish sends what is left and waits until the collector has taken it.
func (s *Stream) finish(call als.AccessLogService_StreamAccessLogsClient, ended <-chan error, cancel func()) error {
	for {
		for len(s.pending) < s.cfg.Batch && len(s.queue) > 0 {
			s.pending = append(s.pending, ToALS(<-s.queue))
		}
		if len(s.pending) == 0 {
			break
		}
		if err := s.send(call); err != nil {
			return fmt.Errorf("sending last flows: %w", endErr(err, ended, cancel))
		}
	}
	if err := call.CloseSend(); err != nil {
		cancel()
	}
	if err := <-ended; err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("sending last flows: %w", err)
	}
	return nil
}

// endErr ends the call after a send met err and waits for its receiver. The
// io.EOF that a send gives on a dead call is replaced by the call's status.
func endErr(err error, ended <-chan error, cancel func()) error {
	if errors.Is(err, io.EOF) {
		if status := <-ended; status != nil {
			return status
		}
		return io.ErrUnexpectedEOF
	}
	cancel()
	<-ended
	return err
}
