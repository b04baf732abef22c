package xds

import (
	"context"
	"crypto/x509"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// until takes updates until one of the kind satisfies ok.
func (s *sidecar) until(t *testing.T, kind Kind, ok func(Update) bool) {
	t.Helper()
	for {
		if u := s.next(t); u.Kind == kind && ok(u) {
			return
		}
	}
}

// A workload that is removed loses what it had, also where patterns still match
// its ID; it gets it back when it returns.
func TestRemovedWorkloadGetsEmptyView(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	m.rules = []policy.Rule{allow(t, "all", "spiffe://shop.example/**", "spiffe://shop.example/**")}
	h.SetSnapshot(m.snapshot())
	byWildcard, byName := newSidecar("/orders"), newSidecar("/orders", id("/payments"))
	for _, s := range []*sidecar{byWildcard, byName} {
		s.start(t, h)
		got := s.view(t)
		require.Equal(t, policy.Allow, got[Rules].Rules.Decide(ask("/front", "/orders", 8080)).Effect)
		require.NotEmpty(t, got[Endpoints].Services)
	}
	h.waitAcked(t, m.rev)
	require.False(t, h.Nodes()[0].Unknown)

	full := m.services
	m.services = []Service{full[0], full[2]}
	h.SetSnapshot(m.next())
	fresh := newSidecar("/orders", id("/payments")) // and one that comes only now
	fresh.start(t, h)
	for _, s := range []*sidecar{byWildcard, byName, fresh} {
		missing := map[Kind]bool{Endpoints: true, Rules: true}
		for len(missing) > 0 {
			u := s.next(t)
			if u.Kind == Endpoints && len(u.Services) == 0 {
				delete(missing, Endpoints)
			}
			if u.Kind == Rules && len(u.Rules.Rules()) == 0 && len(u.Ports) == 0 {
				require.Equal(t, policy.Decision{}, u.Rules.Decide(ask("/front", "/orders", 8080)))
				delete(missing, Rules)
			}
		}
	}
	h.waitNodes(t, 3)
	acked, nacks := h.waitAcked(t, m.rev)
	require.Empty(t, nacks)
	require.Len(t, acked, 3)
	for _, n := range acked {
		require.True(t, n.Unknown)
	}

	m.roots = append(m.roots, root(t, "two")) // trust goes on
	h.SetSnapshot(m.next())
	byName.until(t, Bundles, func(u Update) bool { return len(u.Bundles[shop].X509Authorities()) == 2 })

	m.services = full
	h.SetSnapshot(m.next())
	byName.until(t, Rules, func(u Update) bool { return len(u.Ports) == 1 && len(u.Rules.Rules()) == 1 })
	h.waitAcked(t, m.rev)
	require.False(t, h.Nodes()[0].Unknown)
}

// The same rules, another set of workloads: what was cut for the one must not
// serve the other.
func TestSliceFollowsWorkloads(t *testing.T) {
	m := shopMesh(t)
	m.plain = true
	rules := policy.NewRuleset([]policy.Rule{allow(t, "all", "spiffe://shop.example/**", "spiffe://shop.example/**")})
	m.services = []Service{{ID: id("/orders")}} // no ports: only the workload itself makes a difference
	var p *prepared
	for i, want := range []int{1, 0, 1} {
		snap := m.snapshot()
		snap.Rules = rules
		if want == 0 {
			delete(snap.Services, id("/orders"))
		}
		p = prepare(snap, p, nil)
		got, err := parseResource(id("/orders"), ExtensionType, p.slice(sliceKey{id: id("/orders"), level: policy.CurrentLevel}).resources[ExtensionType][0])
		require.NoError(t, err)
		if n := len(got.(rbacRules).rules); n != want {
			t.Errorf("step %d: got %d rules, want %d", i, n, want)
		}
	}
}

func TestStatusKeepsCertificateExpiry(t *testing.T) {
	expires := time.Now().Add(time.Hour)
	h := serve(t, ServerConfig{}, &x509.Certificate{NotAfter: expires})
	h.SetSnapshot(shopMesh(t).snapshot())
	s := newSidecar("/orders")
	s.start(t, h)
	s.view(t)
	acked, _ := h.waitAcked(t, Revision{1, 1})
	require.Len(t, acked, 1)
	if got := acked[0].SVIDExpires; !got.Equal(expires) {
		t.Errorf("got %v, want %v", got, expires)
	}
}

func proves(instance string) func(identity.Peer) string {
	return func(identity.Peer) string { return instance }
}

// F8: an instance is proved like an identity.
func TestF8InstanceClaims(t *testing.T) {
	for _, c := range []struct {
		proved, claimed string
		want            codes.Code
	}{
		{"i", "i", codes.OK},
		{"i", "j", codes.PermissionDenied},
		{"", "i", codes.PermissionDenied},
	} {
		h := serve(t, ServerConfig{InstanceOf: proves(c.proved)}, nil)
		h.SetSnapshot(shopMesh(t).snapshot())
		r := h.raw(t, id("/front"))
		r.send(&request{Node: node(c.claimed), TypeUrl: SecretType})
		if _, err := r.ads.Recv(); status.Code(err) != c.want {
			t.Errorf("proved %q, claimed %q: got %v, want %v", c.proved, c.claimed, err, c.want)
		}
	}
}

// F9: one instance cannot take the streams of its siblings, and what it left
// behind does not lock it out.
func TestF9StreamsOfInstance(t *testing.T) {
	h := serve(t, ServerConfig{InstanceOf: func(p identity.Peer) string { return p.ID.Path()[1:] }}, nil)
	h.raw(t, id("/orders"))
	h.waitNodes(t, 1)
	var streams []*raw
	for i := range maxSiblings {
		streams = append(streams, h.raw(t, id("/front")))
		h.waitNodes(t, i+2)
	}
	for _, oldest := range streams[:2] {
		h.raw(t, id("/front"))
		if err := oldest.end(); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("oldest stream: got %v, want ResourceExhausted", err)
		}
		h.waitNodes(t, maxSiblings+1)
	}
	got := map[spiffeid.ID]int{}
	for _, n := range h.Nodes() {
		got[n.ID]++
	}
	require.Equal(t, map[spiffeid.ID]int{id("/orders"): 1, id("/front"): maxSiblings}, got)
	h.Close()
	require.Empty(t, h.proved)
}

// F9: names count whether they are wanted, said to be held, or dropped.
func TestF9NamesAreBounded(t *testing.T) {
	h := serve(t, ServerConfig{MaxSubscriptions: 600}, nil)
	h.SetSnapshot(shopMesh(t).snapshot())
	many := func(from, n int) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprintf("spiffe://shop.example/%d", from+i))
		}
		return out
	}
	r := h.raw(t, id("/front"))
	r.send(&request{Node: node("i"), TypeUrl: ClusterType})
	r.recv()           // never answered, so nothing that follows is settled
	for i := range 5 { // dropping what was never held costs nothing
		r.send(&request{TypeUrl: ClusterType, ResourceNamesUnsubscribe: many(i*500, 500)})
	}
	r.send(&request{TypeUrl: SecretType})
	require.Equal(t, SecretType, r.recv().TypeUrl)
	for i := range 2 { // dropping what was asked for is answered, so it counts
		_ = r.ads.Send(&request{TypeUrl: ClusterType, ResourceNamesSubscribe: many(i*500, 500)})
		_ = r.ads.Send(&request{TypeUrl: ClusterType, ResourceNamesUnsubscribe: many(i*500, 500)}) // the stream may have ended
	}
	if err := r.end(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("names dropped: got %v, want ResourceExhausted", err)
	}

	r = h.raw(t, id("/front"))
	long := &request{Node: node("i"), TypeUrl: ClusterType}
	for i := range 600 {
		long.ResourceNamesSubscribe = append(long.ResourceNamesSubscribe, id(longPath(i)).String())
	}
	r.send(long)
	if err := r.end(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("long names: got %v, want ResourceExhausted", err)
	}
}

// A name dropped while the wildcard covers it is sent again, also before the
// node has acknowledged it.
func TestRawUnsubscribeUnderWildcard(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	h.SetSnapshot(shopMesh(t).snapshot())
	orders, none := id("/orders").String(), id("/none").String()
	r := h.raw(t, id("/front"))
	r.send(&request{Node: node("i"), TypeUrl: ClusterType, ResourceNamesSubscribe: []string{"*", none}})
	for range 2 {
		resp := r.recv()
		require.Equal(t, []string{orders}, names(resp))
		require.Equal(t, []string{none}, resp.RemovedResources)
		r.send(&request{TypeUrl: ClusterType, ResourceNamesUnsubscribe: []string{orders, none}})
		r.send(&request{TypeUrl: ClusterType, ResponseNonce: resp.Nonce})
		resp = r.recv()
		require.Equal(t, []string{orders}, names(resp))
		require.Equal(t, []string{none}, resp.RemovedResources)
		r.send(&request{TypeUrl: ClusterType, ResponseNonce: resp.Nonce, ResourceNamesUnsubscribe: []string{orders}, ResourceNamesSubscribe: []string{none}})
	}
}

// A stream that asks for some types only does not hold up who waits for all
// nodes; what it refuses is still told.
func TestLateStreamIsNotPending(t *testing.T) {
	h := serve(t, ServerConfig{SubscribeTimeout: 50 * time.Millisecond}, nil)
	h.SetSnapshot(shopMesh(t).snapshot())
	s := newSidecar("/orders")
	s.start(t, h)
	s.view(t)
	h.raw(t, id("/front")) // asks for nothing
	r := h.raw(t, id("/payments"))
	r.send(&request{Node: node("i"), TypeUrl: ClusterType})
	r.recv() // and does not answer
	h.waitNodes(t, 3)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	acked, pending, nacks := h.WaitAcked(ctx, Revision{1, 1})
	require.NoError(t, ctx.Err())
	require.Len(t, acked, 1)
	require.Empty(t, pending)
	require.Empty(t, nacks)

	// One that has asked for everything is waited for, however old it is.
	for _, typeURL := range wireTypes() {
		r.send(&request{TypeUrl: typeURL})
	}
	require.Eventually(t, func() bool {
		done, cancel := context.WithCancel(t.Context())
		cancel()
		_, pending, _ := h.WaitAcked(done, Revision{1, 1})
		return len(pending) == 1
	}, patience, time.Millisecond)
}

// F9: what a node says in a refusal cannot draw on the operator's terminal.
func TestF9RefusalTextIsPrintable(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	h.SetSnapshot(shopMesh(t).snapshot())
	r := h.raw(t, id("/orders"))
	r.send(&request{Node: node("i"), TypeUrl: ListenerType})
	resp := r.recv()
	r.send(&request{TypeUrl: ListenerType, ResponseNonce: resp.Nonce, ErrorDetail: &rpcstatus.Status{Message: "bad\x1b[2J port\r\n\u202eür"}})
	r.barrier(SecretType)
	if got, want := h.Nodes()[0].Nack, "Listener: bad?[2J port???ür"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, c := range []struct {
		in   string
		n    int
		want string
	}{{"a\xff\xfeb", 9, "a?b"}, {"aü", 2, "a?"}, {"\x00\u0085", 9, "??"}, {"xxx", 2, "xx"}, {"x", 0, ""}} {
		if got := clip(c.in, c.n); got != c.want {
			t.Errorf("clip(%q, %d): got %q, want %q", c.in, c.n, got, c.want)
		}
	}
}
