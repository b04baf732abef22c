package registry

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("shop.example")

func workload(name string, kinds ...string) policy.CompiledWorkload {
	w := policy.CompiledWorkload{Workload: policy.Workload{Name: name}, ID: spiffeid.RequireFromPath(td, "/shop/"+name)}
	for _, k := range kinds {
		w.Attest = append(w.Attest, policy.Attest{Kind: k})
	}
	return w
}

type fixture struct {
	*Registry
	audit *audit.Log
	store store.Store
	now   atomic.Int64 // nanoseconds since 1970
}

func (f *fixture) add(d time.Duration) { f.now.Add(int64(d)) }

func newFixture(t *testing.T) *fixture {
	f := &fixture{store: store.NewMemory()}
	t.Cleanup(func() { f.store.Close() })
	f.now.Store(time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC).UnixNano())
	now := func() time.Time { return time.Unix(0, f.now.Load()) }
	f.audit = audit.New(f.store, now)
	f.Registry = New(Config{Store: f.store, Audit: f.audit, Now: now, RootHash: func() [32]byte { return [32]byte{7} }})
	f.SetWorkloads([]policy.CompiledWorkload{
		workload("payments", attest.KindJoinToken), workload("orders", attest.KindJoinToken), workload("legacy"),
	})
	return f
}

func newKey(t *testing.T) *ecdsa.PublicKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return &k.PublicKey
}

func (f *fixture) token(t *testing.T, name string) Redemption {
	t.Helper()
	c, err := f.CreateToken(t.Context(), TokenRequest{Workload: name, Actor: "alice", Origin: "10.0.0.1:2"})
	require.NoError(t, err)
	tok, err := attest.ParseToken(c.Token)
	require.NoError(t, err)
	return Redemption{TokenID: tok.ID, Secret: tok.Secret[:], Key: newKey(t), Origin: "127.0.0.1:1"}
}

func TestRedeem(t *testing.T) {
	f := newFixture(t)
	inst, err := f.Redeem(t.Context(), f.token(t, "payments"))
	require.NoError(t, err)
	if got, want := inst.ID.String(), "spiffe://shop.example/shop/payments"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); err != nil {
		t.Error(err)
	}
	list, err := f.Instances(t.Context())
	require.NoError(t, err)
	if len(list) != 1 || list[0].Name != inst.Name {
		t.Errorf("got %v, want the one instance", list)
	}
	records, err := f.audit.Recent(t.Context(), 0)
	require.NoError(t, err)
	if len(records) != 2 || records[0].Action != "token.redeem" || records[1].Action != "token.create" || records[1].Actor != "alice" || records[1].Origin != "10.0.0.1:2" {
		t.Errorf("got audit records %+v", records)
	}
}

func TestCreateTokenCarriesRootHashAndExpiry(t *testing.T) {
	f := newFixture(t)
	c, err := f.CreateToken(t.Context(), TokenRequest{Workload: "payments", TTL: time.Hour})
	require.NoError(t, err)
	tok, err := attest.ParseToken(c.Token)
	require.NoError(t, err)
	if tok.RootHash != [32]byte{7} {
		t.Errorf("got root hash %x", tok.RootHash)
	}
	if got := c.Expires.UnixNano() - f.now.Load(); got != int64(time.Hour) {
		t.Errorf("expires in %v, want 1h", time.Duration(got))
	}
	for _, ttl := range []time.Duration{-1, time.Millisecond, MaxTokenTTL + 1} {
		if _, err := f.CreateToken(t.Context(), TokenRequest{Workload: "payments", TTL: ttl}); !errors.Is(err, ErrBadTTL) || !IsRequestError(err) {
			t.Errorf("ttl %v: got %v", ttl, err)
		}
	}
}

func TestTokensAreStoredHashed(t *testing.T) {
	f := newFixture(t)
	red := f.token(t, "payments")
	kvs, _, err := f.store.List(t.Context(), "")
	require.NoError(t, err)
	secret := attest.Token{ID: red.TokenID, Secret: [32]byte(red.Secret)}.Encode()
	secret = strings.Split(secret, ".")[2]
	for _, kv := range kvs {
		if strings.Contains(string(kv.Value), secret) || strings.Contains(string(kv.Value), string(red.Secret)) {
			t.Errorf("%s holds the secret", kv.Key)
		}
	}
}

func TestRedeemRefuses(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(*testing.T, *fixture, *Redemption)
		want  error
	}{
		{"unknown token", func(t *testing.T, f *fixture, r *Redemption) { r.TokenID = strings.Repeat("A", 22) }, ErrUnknownToken},
		{"id that is a path", func(t *testing.T, f *fixture, r *Redemption) { r.TokenID = "../instances/x" }, ErrUnknownToken},
		{"wrong secret", func(t *testing.T, f *fixture, r *Redemption) { r.Secret = make([]byte, 32) }, ErrUnknownToken},
		{"no secret", func(t *testing.T, f *fixture, r *Redemption) { r.Secret = nil }, ErrUnknownToken},
		{"expired", func(t *testing.T, f *fixture, r *Redemption) { f.add(DefaultTokenTTL) }, ErrTokenExpired},
		{"expired and wrong secret", func(t *testing.T, f *fixture, r *Redemption) { f.add(DefaultTokenTTL); r.Secret = make([]byte, 32) }, ErrUnknownToken},
		{"used", func(t *testing.T, f *fixture, r *Redemption) {
			_, err := f.Redeem(t.Context(), *r)
			require.NoError(t, err)
			r.Key = newKey(t)
		}, ErrTokenUsed},
		{"used and expired", func(t *testing.T, f *fixture, r *Redemption) {
			_, err := f.Redeem(t.Context(), *r)
			require.NoError(t, err)
			r.Key = newKey(t)
			f.add(time.Hour)
		}, ErrTokenUsed},
		{"used by a removed instance", func(t *testing.T, f *fixture, r *Redemption) {
			inst, err := f.Redeem(t.Context(), *r)
			require.NoError(t, err)
			require.NoError(t, f.Remove(t.Context(), inst.Name, "alice"))
		}, ErrTokenUsed},
		{"workload gone", func(t *testing.T, f *fixture, r *Redemption) {
			f.SetWorkloads([]policy.CompiledWorkload{workload("orders", attest.KindJoinToken)})
		}, ErrUnknownWorkload},
		{"evidence no longer listed", func(t *testing.T, f *fixture, r *Redemption) {
			f.SetWorkloads([]policy.CompiledWorkload{workload("payments", "kubernetes")})
		}, ErrNotAttested},
		{"starting", func(t *testing.T, f *fixture, r *Redemption) { f.Registry = New(f.cfg) }, ErrNotReady},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t)
			red := f.token(t, "payments")
			c.spoil(t, f, &red)
			if _, err := f.Redeem(t.Context(), red); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestCreateTokenRefuses(t *testing.T) {
	f := newFixture(t)
	if _, err := f.CreateToken(t.Context(), TokenRequest{Workload: "nobody"}); !errors.Is(err, ErrUnknownWorkload) || !IsRequestError(err) {
		t.Errorf("got %v", err)
	}
	if _, err := f.CreateToken(t.Context(), TokenRequest{Workload: "legacy"}); !errors.Is(err, ErrNotAttested) || !IsRequestError(err) {
		t.Errorf("got %v", err)
	}
	if _, err := New(f.cfg).CreateToken(t.Context(), TokenRequest{Workload: "payments"}); !errors.Is(err, ErrNotReady) || !IsRequestError(err) {
		t.Errorf("got %v", err)
	}
	require.NoError(t, f.store.Close())
	if _, err := f.CreateToken(t.Context(), TokenRequest{Workload: "payments"}); err == nil || IsRequestError(err) {
		t.Errorf("store closed: got %v, which is no fault of the request", err)
	}
}

// A sidecar that never got its answer asks again with the same key and becomes
// the same instance, even after the token has expired; the workload must still
// exist.
func TestRedeemAgainWithTheSameKey(t *testing.T) {
	f := newFixture(t)
	red := f.token(t, "payments")
	first, err := f.Redeem(t.Context(), red)
	require.NoError(t, err)
	f.add(time.Hour)
	again, err := f.Redeem(t.Context(), red)
	require.NoError(t, err)
	if again.Name != first.Name {
		t.Errorf("got instance %s, want %s", again.Name, first.Name)
	}
	f.SetWorkloads(nil)
	if _, err := f.Redeem(t.Context(), red); !errors.Is(err, ErrUnknownWorkload) {
		t.Errorf("got %v", err)
	}
}

// A token refused because its workload is gone works when the workload is back.
func TestRefusedTokenIsNotSpent(t *testing.T) {
	f := newFixture(t)
	red := f.token(t, "payments")
	f.SetWorkloads(nil)
	_, err := f.Redeem(t.Context(), red)
	require.ErrorIs(t, err, ErrUnknownWorkload)
	f.SetWorkloads([]policy.CompiledWorkload{workload("payments", attest.KindJoinToken)})
	if _, err := f.Redeem(t.Context(), red); err != nil {
		t.Error(err)
	}
}

func TestD3ExactlyOneOf1000ParallelRedemptionsWins(t *testing.T) {
	f := newFixture(t)
	red := f.token(t, "payments")
	keys := make([]*ecdsa.PublicKey, 1000)
	for i := range keys {
		keys[i] = newKey(t)
	}
	start := make(chan struct{})
	var won atomic.Int32
	var wg sync.WaitGroup
	for _, key := range keys {
		wg.Go(func() {
			r := red
			r.Key = key
			<-start
			if _, err := f.Redeem(t.Context(), r); err == nil {
				won.Add(1)
			} else if !errors.Is(err, ErrTokenUsed) {
				t.Errorf("a loser is told: %v", err)
			}
		})
	}
	close(start)
	wg.Wait()
	list, err := f.Instances(t.Context())
	require.NoError(t, err)
	if won.Load() != 1 || len(list) != 1 {
		t.Errorf("%d winners and %d instances, want one", won.Load(), len(list))
	}
}

func TestD4EntitledRefuses(t *testing.T) {
	f := newFixture(t)
	inst, err := f.Redeem(t.Context(), f.token(t, "payments"))
	require.NoError(t, err)
	orders := spiffeid.RequireFromPath(td, "/shop/orders")
	for name, err := range map[string]error{
		"another workload's ID": f.Entitled(t.Context(), orders, inst.Name),
		"unknown instance":      f.Entitled(t.Context(), inst.ID, "00000000000000000000"),
		"no instance":           f.Entitled(t.Context(), inst.ID, ""),
		"a path":                f.Entitled(t.Context(), inst.ID, "../tokens/x"),
	} {
		if !errors.Is(err, ErrUnknownInstance) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	f.SetWorkloads([]policy.CompiledWorkload{workload("orders", attest.KindJoinToken)})
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); !errors.Is(err, ErrUnknownWorkload) {
		t.Errorf("workload gone: got %v", err)
	}
	f.SetWorkloads([]policy.CompiledWorkload{workload("payments", attest.KindJoinToken)})
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); err != nil {
		t.Errorf("workload back: got %v", err)
	}
	require.NoError(t, f.Remove(t.Context(), inst.Name, "alice"))
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); !errors.Is(err, ErrUnknownInstance) {
		t.Errorf("removed: got %v", err)
	}
}

func TestClean(t *testing.T) {
	f := newFixture(t)
	red := f.token(t, "payments")
	inst, err := f.Redeem(t.Context(), red)
	require.NoError(t, err)
	for i := range 2 * maxClean {
		op, err := put(fmt.Sprintf("%sold%04d", tokenPrefix, i), tokenRecord{ID: inst.ID, Expires: time.Unix(0, f.now.Load())})
		require.NoError(t, err)
		_, err = f.store.Txn(t.Context(), nil, []store.Op{op})
		require.NoError(t, err)
	}
	for _, step := range []struct {
		after time.Duration
		want  int
	}{
		{tokenGrace, 0},
		{time.Hour, maxClean},
		{0, maxClean},
		{0, 1}, // the redeemed token
		{0, 0},
		{instanceIdle, 1},
	} {
		f.add(step.after)
		got, err := f.Clean(t.Context())
		require.NoError(t, err)
		if got != step.want {
			t.Errorf("after %v: forgot %d, want %d", step.after, got, step.want)
		}
	}
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); !errors.Is(err, ErrUnknownInstance) {
		t.Errorf("got %v", err)
	}
}

// What a client calls itself reaches logs quoted and short.
func TestErrorsQuoteNames(t *testing.T) {
	f := newFixture(t)
	_, err := f.Instance(t.Context(), "x\n[ERROR] forged "+strings.Repeat("x", 500))
	if !errors.Is(err, ErrUnknownInstance) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 200 {
		t.Errorf("got %v", err)
	}
}

// An instance to which something is issued is never forgotten.
func TestRecordKeepsAnInstanceAlive(t *testing.T) {
	f := newFixture(t)
	inst, err := f.Redeem(t.Context(), f.token(t, "payments"))
	require.NoError(t, err)
	for i := range 100 {
		f.add(48 * time.Hour)
		inst, err = f.Entitlement(t.Context(), inst.ID, inst.Name)
		require.NoError(t, err)
		require.NoError(t, f.Record(t.Context(), inst, Issuance{Action: audit.ActionRenew, Serial: fmt.Sprint(i)}))
		_, err := f.Clean(t.Context())
		require.NoError(t, err)
	}
}
