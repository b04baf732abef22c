package insight

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	alsdata "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	als "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	orders   = spiffeid.RequireFromString("spiffe://shop.example/orders")
	payments = spiffeid.RequireFromString("spiffe://shop.example/payments")
	intruder = spiffeid.RequireFromString("spiffe://shop.example/intruder")
)

// record is a flow from src to dst; ids are made of one digit.
func record(digit string, side flow.Side, src, dst spiffeid.ID, e policy.Effect) flow.Flow {
	return flow.Flow{
		Request:  policy.Request{Src: src, Dst: dst, Port: 8080},
		Decision: policy.Decision{Effect: e, Would: e},
		ID:       strings.Repeat(digit, 16), Side: side, Outcome: flow.Closed,
		Start: time.Unix(1e9, 0).UTC(),
	}
}

// serve starts a server that believes the header "peer"; the real one asks the
// client's certificate.
func serve(t *testing.T, c *Collector) als.AccessLogServiceClient {
	t.Helper()
	srv := grpc.NewServer(grpc.StreamInterceptor(func(s any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		md, _ := metadata.FromIncomingContext(ss.Context())
		if v := md.Get("peer"); len(v) == 1 {
			id := spiffeid.RequireFromString(v[0])
			ss = &peerStream{ss, identity.ContextWithPeer(ss.Context(), identity.Peer{ID: id})}
		}
		return h(s, ss)
	}))
	als.RegisterAccessLogServiceServer(srv, c)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error)
	go func() { served <- srv.Serve(ln) }()
	conn, err := grpc.NewClient(ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(); srv.Stop(); <-served })
	return als.NewAccessLogServiceClient(conn)
}

type peerStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *peerStream) Context() context.Context { return s.ctx }

func send(t *testing.T, client als.AccessLogServiceClient, peer string, flows ...flow.Flow) error {
	t.Helper()
	ctx := t.Context()
	if peer != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "peer", peer)
	}
	s, err := client.StreamAccessLogs(ctx)
	require.NoError(t, err)
	var entries []*alsdata.TCPAccessLogEntry
	for _, f := range flows {
		entries = append(entries, flow.ToALS(f))
	}
	_ = s.Send(&als.StreamAccessLogsMessage{LogEntries: &als.StreamAccessLogsMessage_TcpLogs{
		TcpLogs: &als.StreamAccessLogsMessage_TCPAccessLogEntries{LogEntry: entries},
	}}) // its error is the status that CloseAndRecv gives
	_, err = s.CloseAndRecv()
	return err
}

func newCollector(keep int) (*Collector, *prometheus.Registry) {
	reg := prometheus.NewRegistry()
	return New(Config{Keep: keep, Registry: reg, Log: hclog.NewNullLogger()}), reg
}

func TestOnlyOwnRecordsAreTaken(t *testing.T) {
	c, reg := newCollector(0)
	client := serve(t, c)
	in := record("1", flow.Inbound, orders, payments, policy.Allow)
	out := record("2", flow.Outbound, payments, orders, policy.Allow)
	require.NoError(t, send(t, client, payments.String(), in, out,
		record("3", flow.Inbound, payments, orders, policy.Allow),     // the other end's
		record("4", flow.Outbound, orders, payments, policy.Allow),    // the caller's
		record("5", flow.Inbound, intruder, orders, policy.Allow),     // of two strangers
		flow.Flow{ID: "broken", Side: flow.Inbound, Outcome: "other"}, // no flow
	))
	in.Reporter, out.Reporter = payments.String(), payments.String()
	var got []flow.Flow
	require.NoError(t, c.Flows(t.Context(), Filter{}, 0, false, func(f flow.Flow, _ uint64) error {
		got = append(got, f)
		return nil
	}))
	if len(got) != 2 || got[0] != in || got[1] != out {
		t.Errorf("got %+v\nwant %+v", got, []flow.Flow{in, out})
	}
	for name, want := range map[string]float64{
		"sallyport_flows_rejected_total/foreign": 3, "sallyport_flows_rejected_total/malformed": 1, "sallyport_flows_held": 2,
	} {
		if got := metric(t, reg, name); got != want {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
}

// metric gives the value of NAME or NAME/LABEL-VALUE.
func metric(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	name, label, _ := strings.Cut(name, "/")
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (label == "" || m.GetLabel()[0].GetValue() == label) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return 0
}

func TestAnonymousReporterIsRefused(t *testing.T) {
	c, _ := newCollector(0)
	err := send(t, serve(t, c), "", record("1", flow.Inbound, orders, payments, policy.Allow))
	if status.Code(err) != codes.Unauthenticated {
		t.Errorf("got %v, want Unauthenticated", err)
	}
	if _, ok := c.Find(strings.Repeat("1", 16)); ok {
		t.Error("the record was taken")
	}
}

func TestFindPrefersTheDestination(t *testing.T) {
	c, _ := newCollector(0)
	client := serve(t, c)
	in := record("7", flow.Inbound, orders, payments, policy.Deny)
	in.Rule = policy.RuleRef{Policy: "guard", File: "p.yaml", Line: 3}
	require.NoError(t, send(t, client, payments.String(), in))
	require.NoError(t, send(t, client, orders.String(), record("7", flow.Outbound, orders, payments, policy.Deny),
		record("8", flow.Outbound, orders, payments, policy.Deny)))
	if f, ok := c.Find(in.ID); !ok || f.Side != flow.Inbound || f.Rule != in.Rule {
		t.Errorf("got %+v %v, want the destination's record", f, ok)
	}
	if f, ok := c.Find(strings.Repeat("8", 16)); !ok || f.Side != flow.Outbound {
		t.Errorf("got %+v %v, want the caller's record", f, ok)
	}
	if _, ok := c.Find(strings.Repeat("9", 16)); ok {
		t.Error("found a decision nobody made")
	}
}

func TestAForgedRecordDoesNotReplaceTheDecision(t *testing.T) {
	c, _ := newCollector(50)
	client := serve(t, c)
	// The intruder knows the decision's id: it was told it with the refusal.
	decided := record("a", flow.Inbound, intruder, payments, policy.Deny)
	require.NoError(t, send(t, client, payments.String(), decided))
	require.NoError(t, send(t, client, intruder.String(), record("a", flow.Inbound, orders, intruder, policy.Allow)))
	flood := make([]flow.Flow, 500)
	for i := range flood {
		flood[i] = record("b", flow.Inbound, orders, intruder, policy.Allow)
	}
	require.NoError(t, send(t, client, intruder.String(), flood...))
	decided.Reporter = payments.String()
	if f, ok := c.Find(decided.ID); !ok || f != decided {
		t.Errorf("got %+v %v, want what payments decided", f, ok)
	}
}

func TestALogLineIsBounded(t *testing.T) {
	var log strings.Builder
	c := New(Config{Log: hclog.New(&hclog.LoggerOptions{Output: &log})})
	long := spiffeid.RequireFromString("spiffe://shop.example/" + strings.Repeat("a", 1<<20))
	require.NoError(t, send(t, serve(t, c), payments.String(), record("1", flow.Inbound, long, payments, policy.Allow)))
	if log.Len() == 0 || log.Len() > 600 || c.ring.Len() != 0 {
		t.Errorf("got %d records and a log line of %d bytes: %.600s", c.ring.Len(), log.Len(), log.String())
	}
}

func TestAFailedConnectionIsNoRefusal(t *testing.T) {
	c, reg := newCollector(0)
	failed := record("1", flow.Outbound, orders, payments, policy.Deny)
	failed.Outcome = flow.Failed
	require.NoError(t, send(t, serve(t, c), orders.String(), failed))
	for _, e := range []policy.Effect{policy.Deny, policy.Allow} {
		if (Filter{Verdict: &e}).Match(&failed) {
			t.Errorf("%v matches", e)
		}
	}
	if !(Filter{}).Match(&failed) {
		t.Error("it must match without a filter")
	}
	families, err := reg.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() == "sallyport_flows_received_total" && f.GetMetric()[0].GetLabel()[1].GetValue() != "none" {
			t.Errorf("got %v, want verdict none", f.GetMetric())
		}
	}
}

func TestFlowsFilterAndFollow(t *testing.T) {
	c, _ := newCollector(3)
	client := serve(t, c)
	for _, digit := range []string{"1", "2", "3", "4"} { // 1 is pushed out
		require.NoError(t, send(t, client, payments.String(), record(digit, flow.Inbound, orders, payments, policy.Allow)))
	}
	deny := policy.Deny
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan string, 10)
	done := make(chan error)
	go func() {
		done <- c.Flows(ctx, Filter{Src: intruder, Verdict: &deny}, 0, true, func(f flow.Flow, _ uint64) error {
			got <- f.ID[:1]
			return nil
		})
	}()
	require.NoError(t, send(t, client, payments.String(),
		record("5", flow.Inbound, orders, payments, policy.Deny),
		record("6", flow.Inbound, intruder, payments, policy.Allow),
		record("7", flow.Inbound, intruder, payments, policy.Deny)))
	select {
	case id := <-got:
		if id != "7" {
			t.Errorf("got record %s, want 7", id)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("nothing came")
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	var held string
	require.NoError(t, c.Flows(t.Context(), Filter{Dst: payments, Side: flow.Inbound}, 2, false, func(f flow.Flow, _ uint64) error {
		held += f.ID[:1]
		return nil
	}))
	if held != "67" {
		t.Errorf("got %s, want the newest two: 67", held)
	}
}
