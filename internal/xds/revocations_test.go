package xds

import (
	"context"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// envelope is list number n of td, with a signature that nobody checks here.
func envelope(t testing.TB, td spiffeid.TrustDomain, n int64) []byte {
	list, err := proto.Marshal(&sallyportv1.RevocationList{TrustDomain: td.Name(), Number: n})
	require.NoError(t, err)
	out, err := proto.Marshal(&sallyportv1.SignedRevocationList{List: list, Signature: []byte("s")})
	require.NoError(t, err)
	return out
}

// now is a context in which nothing is waited for.
func now() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// A list goes out by itself, whatever else there is, once, and who waits for it
// learns who has it.
func TestRevocationsTravelAlone(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	h.SetSnapshot(m.snapshot())
	s := newSidecar("/orders")
	stop, _ := s.start(t, h)
	s.view(t)
	h.waitAcked(t, m.rev)
	require.Empty(t, h.WaitRevocations(now()), "there is no list yet")

	snap := m.snapshot()
	snap.Revocations = envelope(t, shop, 1)
	h.SetSnapshot(snap)
	u := s.next(t)
	require.Equal(t, Update{Kind: Revocations, Rev: m.rev, Revocations: snap.Revocations}, u)
	require.Empty(t, h.WaitRevocations(t.Context()))

	stop()
	h.waitNodes(t, 0)
	s.start(t, h)
	h.waitNodes(t, 1)
	require.Empty(t, h.WaitRevocations(t.Context()))
	s.quiet(t) // it is held already

	next := m.next()
	next.Revocations = []byte("broken") // an error of ours: the last good form stays
	h.SetSnapshot(next)
	h.waitAcked(t, m.rev)
	s.quiet(t)

	h.SetSnapshot(m.next()) // withdrawn: that is told, and whoever has it may keep it
	require.Equal(t, Update{Kind: Revocations, Rev: m.rev}, s.next(t))
}

// A list that a node refuses holds back nothing else, and nothing that it refuses
// holds back the list.
func TestRefusedListHoldsNothingBack(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	first := m.snapshot()
	first.Revocations = envelope(t, shop, 1)
	h.SetSnapshot(first)
	s := newSidecar("/orders")
	bad := envelope(t, shop, 2)
	s.refuse = func(u Update) error {
		if string(u.Revocations) == string(bad) || u.Kind == Rules && u.Rev.N > 2 {
			return errors.New("not this one")
		}
		return nil
	}
	s.start(t, h)
	got := map[Kind]bool{}
	for range 4 {
		got[s.next(t).Kind] = true
	}
	require.Len(t, got, 4)

	m.rules = append(m.rules, allow(t, "more", "spiffe://shop.example/more", "spiffe://shop.example/orders"))
	snap := m.next()
	snap.Revocations = bad
	h.SetSnapshot(snap)
	require.Equal(t, policy.Allow, s.next(t).Rules.Decide(ask("/more", "/orders", 1)).Effect)
	_, nacks := h.waitAcked(t, m.rev)
	require.Len(t, nacks, 1)
	require.Equal(t, "SignedRevocationList: not this one", nacks[0].Nack)
	missing := h.WaitRevocations(now())
	require.Len(t, missing, 1)
	require.Equal(t, id("/orders"), missing[0].ID)

	m.rules = m.rules[:1]
	snap = m.next()
	snap.Revocations = envelope(t, shop, 3)
	h.SetSnapshot(snap)
	require.Equal(t, snap.Revocations, s.next(t).Revocations)
	require.Empty(t, h.WaitRevocations(t.Context()), "although it refuses the rules")
}

// A sidecar that does not know of the list acknowledges all the rest, and counts
// as one that does not have it.
func TestSidecarWithoutRevocations(t *testing.T) {
	h := serve(t, ServerConfig{}, nil)
	m := shopMesh(t)
	snap := m.snapshot()
	snap.Revocations = envelope(t, shop, 1)
	h.SetSnapshot(snap)
	r := h.raw(t, id("/orders"))
	who := node("i")
	for _, typeURL := range wireTypes() {
		if typeURL == RevocationType {
			continue
		}
		r.send(&request{Node: who, TypeUrl: typeURL})
		who = nil
		resp := r.recv()
		require.Equal(t, typeURL, resp.TypeUrl)
		r.send(&request{TypeUrl: typeURL, ResponseNonce: resp.Nonce})
	}
	acked, nacks := h.waitAcked(t, m.rev)
	require.Len(t, acked, 1)
	require.Empty(t, nacks)
	require.Len(t, h.WaitRevocations(now()), 1)
}

func TestForeignListRefused(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.example")
	foreign, err := revocationResource(envelope(t, other, 1))
	require.NoError(t, err)
	renamed := proto.CloneOf(foreign)
	renamed.Name = shop.IDString()
	misnamed, err := revocationResource(envelope(t, shop, 1))
	require.NoError(t, err)
	misnamed.Name = other.IDString()
	secret, err := secretResource(shop, []*x509.Certificate{root(t, "one")})
	require.NoError(t, err)
	secret.Name = shop.IDString()
	for name, r := range map[string]*Resource{"foreign": foreign, "renamed": renamed, "misnamed": misnamed, "a secret": secret} {
		if got, err := deliver(t, newSidecar("/orders").Client, RevocationType, "1.1", nil, r); err == nil || len(got) > 0 {
			t.Errorf("%s: got %d updates and %v, want an error", name, len(got), err)
		}
	}
	if _, err := Translate(View{Node: id("/orders"), Revocations: envelope(t, other, 1)}); err == nil {
		t.Error("a foreign list has a wire form")
	}
}

// What a Workload says of stale lists reaches its own sidecar, with its listener.
func TestMaxStaleReachesTheNode(t *testing.T) {
	for text, want := range map[string]policy.MaxStale{
		"":                                     {},
		"maxStale: {after: 1h, then: hold}":    {After: time.Hour},
		"maxStale: {after: 90s, then: refuse}": {After: 90 * time.Second, Refuse: true},
	} {
		set, err := policy.ParseFiles("", map[string][]byte{"a.yaml": []byte(
			"apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: orders}\nspec:\n  attest: [{kind: join-token}]\n  " + text + "\n")})
		require.NoError(t, err)
		rules, err := policy.Compile(shop, []*policy.Set{set})
		require.NoError(t, err)
		h := serve(t, ServerConfig{}, nil)
		m := shopMesh(t)
		m.rules, m.services = nil, []Service{{ID: id("/orders")}}
		snap := m.snapshot()
		snap.Rules = rules
		h.SetSnapshot(snap)
		s := newSidecar("/orders")
		s.start(t, h)
		if got := s.view(t)[Rules].MaxStale; got != want {
			t.Errorf("%q: got %+v, want %+v", text, got, want)
		}
	}
}
