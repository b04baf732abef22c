package registry

import (
	"context"
	"encoding/hex"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/internal/store/storetest"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// ailingFixture is a fixture on a store in which calls go wrong. The audit log's
// own upkeep goes past it: an issuance does not fail for it.
func ailingFixture(t *testing.T, a *storetest.Ailing) *fixture {
	f := newFixture(t)
	require.NoError(t, f.store.Close())
	f.store, f.audit = a, audit.New(a.Store, f.cfg.Now)
	f.cfg.Store, f.cfg.Audit = f.store, f.audit
	f.Registry = New(f.cfg)
	token := policy.Attest{Kind: attest.KindJoinToken}
	f.SetWorkloads([]policy.CompiledWorkload{
		attested("payments", token, kubeEntry("shop", "payments")), attested("orders", token),
		attested("web", policy.Attest{Kind: unix, Via: []string{"/shop/payments"}, Select: map[string]string{"uid": "1000"}}),
	})
	return f
}

// Whatever the store fails to do, or holds in its place, nobody is told that it
// was done, nothing is granted, and what was refused for it works a moment later.
func TestNothingIsGrantedByAnAilingStore(t *testing.T) {
	ctx := t.Context()
	only := func(_ any, err error) error { return err }
	issued := func(f *fixture) Issuance {
		return Issuance{Action: audit.ActionRenew, Serial: "01", NotAfter: time.Unix(0, f.now.Load()).Add(time.Hour)}
	}
	for name, prepare := range map[string]func(*testing.T, *fixture) func() error{
		"create a token": func(t *testing.T, f *fixture) func() error {
			return func() error { return only(f.CreateToken(ctx, TokenRequest{Workload: "payments"})) }
		},
		"check a token": func(t *testing.T, f *fixture) func() error {
			red := f.token(t, "payments")
			return func() error { return f.CheckToken(ctx, red.TokenID, red.Secret) }
		},
		"redeem": func(t *testing.T, f *fixture) func() error {
			red := f.token(t, "payments")
			return func() error { return only(f.Redeem(ctx, red)) }
		},
		"redeem again": func(t *testing.T, f *fixture) func() error {
			red := f.token(t, "payments")
			require.NoError(t, only(f.Redeem(ctx, red)))
			return func() error { return only(f.Redeem(ctx, red)) }
		},
		"admit what is good once": func(t *testing.T, f *fixture) func() error {
			adm := Admission{Evidence: f.once(pod("shop", "payments")), Key: newKey(t)}
			return func() error { return only(f.Admit(ctx, adm)) }
		},
		"admit it again": func(t *testing.T, f *fixture) func() error {
			adm := Admission{Evidence: f.once(pod("shop", "payments")), Key: newKey(t)}
			require.NoError(t, only(f.Admit(ctx, adm)))
			return func() error { return only(f.Admit(ctx, adm)) }
		},
		"admit by challenge": func(t *testing.T, f *fixture) func() error {
			adm := Admission{Evidence: pod("shop", "payments"), Key: newKey(t)}
			return func() error { return only(f.Admit(ctx, adm)) }
		},
		"vouch": func(t *testing.T, f *fixture) func() error {
			agent := f.enrol(t, "payments")
			return func() error { return only(f.Vouch(ctx, agent, process("1000"))) }
		},
		"entitlement of a process": func(t *testing.T, f *fixture) func() error {
			inst, err := f.Vouch(ctx, f.enrol(t, "payments"), process("1000"))
			require.NoError(t, err)
			require.NoError(t, f.Record(ctx, inst, issued(f)))
			return func() error { return f.Entitled(ctx, inst.ID, inst.Name) }
		},
		"record": func(t *testing.T, f *fixture) func() error {
			inst := f.enrol(t, "payments")
			return func() error { return f.Record(ctx, inst, issued(f)) }
		},
		"record after others": func(t *testing.T, f *fixture) func() error {
			inst := f.enrol(t, "payments")
			require.NoError(t, f.Record(ctx, inst, issued(f)))
			return func() error { return f.Record(ctx, inst, issued(f)) }
		},
		"instances": func(t *testing.T, f *fixture) func() error {
			f.enrol(t, "payments")
			return func() error { return only(f.Instances(ctx)) }
		},
		"revoke": func(t *testing.T, f *fixture) func() error {
			o := f.subject(RevokedID, "spiffe://shop.example/shop/payments")
			return func() error { return only(f.Revoke(ctx, o)) }
		},
		"revoke after others": func(t *testing.T, f *fixture) func() error {
			require.NoError(t, only(f.Revoke(ctx, f.subject(RevokedSerial, "0a"))))
			o := f.subject(RevokedID, "spiffe://shop.example/shop/payments")
			return func() error { return only(f.Revoke(ctx, o)) }
		},
		"unrevoke": func(t *testing.T, f *fixture) func() error {
			o := f.subject(RevokedID, "spiffe://shop.example/shop/payments")
			require.NoError(t, only(f.Revoke(ctx, o)))
			return func() error { return only(f.Unrevoke(ctx, o)) }
		},
		"revoke an issuer": func(t *testing.T, f *fixture) func() error {
			now := time.Unix(0, f.now.Load())
			return func() error { return only(f.RevokeIssuer(ctx, []byte{1}, now, now.Add(time.Hour), Order{})) }
		},
		"revoke removed IDs": func(t *testing.T, f *fixture) func() error {
			f.enrol(t, "payments")
			f.SetWorkloads([]policy.CompiledWorkload{workload("orders")})
			return func() error { return f.ReviseRemoved(ctx) }
		},
		"watch revocations": func(t *testing.T, f *fixture) func() error {
			require.NoError(t, only(f.Revoke(ctx, f.subject(RevokedSerial, "0a"))))
			enough := errors.New("enough")
			return func() error {
				err := f.WatchRevocations(ctx, func(Revocations) error { return enough })
				if errors.Is(err, enough) {
					return nil
				}
				return err
			}
		},
	} {
		for how, garble := range map[string]bool{"fails": false, "garbles": true} {
			if garble && name == "watch revocations" {
				continue // its first look is for the revision only
			}
			t.Run(name+", "+how, func(t *testing.T) {
				storetest.EachCall(t, garble, func(t *testing.T, a *storetest.Ailing) func() error {
					return prepare(t, ailingFixture(t, a))
				})
			})
		}
	}
}

// Forgetting and removing are told only where they happened.
func TestNothingIsForgottenByAnAilingStore(t *testing.T) {
	storetest.EachCall(t, false, func(t *testing.T, a *storetest.Ailing) func() error {
		f := ailingFixture(t, a)
		inst := f.enrol(t, "payments")
		return func() error {
			err := f.Remove(t.Context(), inst.Name, "alice")
			if _, gone := a.Store.Get(t.Context(), instancePrefix+inst.Name); (err == nil) != errors.Is(gone, store.ErrNotFound) {
				t.Errorf("told %v, and asked for it the store says %v", err, gone)
			}
			return err
		}
	})
	storetest.EachCall(t, false, func(t *testing.T, a *storetest.Ailing) func() error {
		f := ailingFixture(t, a)
		f.enrol(t, "payments")
		f.add(2 * instanceIdle)
		return func() error {
			n, err := f.Clean(t.Context())
			if err == nil && n != 2 {
				t.Errorf("forgot %d records, want token and instance", n)
			}
			return err
		}
	})
}

// A watch that fell behind begins again.
func TestWatchRevocationsAfterCompaction(t *testing.T) {
	f := newFixture(t)
	f.cfg.Store = &behind{Store: f.store}
	f.Registry = New(f.cfg)
	enough := errors.New("enough")
	calls := 0
	err := f.WatchRevocations(t.Context(), func(Revocations) error {
		if calls++; calls == 2 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) {
		t.Errorf("got %v", err)
	}
}

// behind is a store whose first watch is too late.
type behind struct {
	store.Store
	watches int
}

func (b *behind) Watch(ctx context.Context, prefix string, rev int64, fn func(int64, []store.Event) error) error {
	if b.watches++; b.watches == 1 {
		return store.ErrCompacted
	}
	return b.Store.Watch(ctx, prefix, rev, fn)
}

// A record that became somebody else's in the meantime takes nothing.
func TestRecordOfAnotherID(t *testing.T) {
	f := newFixture(t)
	inst, other := f.enrol(t, "payments"), f.enrol(t, "orders")
	other.Name = inst.Name
	op, err := put(instancePrefix+inst.Name, other)
	require.NoError(t, err)
	_, err = f.store.Txn(t.Context(), nil, []store.Op{op})
	require.NoError(t, err)
	if err := f.Record(t.Context(), inst, Issuance{Action: audit.ActionRenew, Serial: "01", NotAfter: time.Now()}); !errors.Is(err, ErrUnknownInstance) {
		t.Errorf("got %v", err)
	}
}

// An enrolment key that cannot be read is nobody's.
func TestUnreadableEnrolmentKey(t *testing.T) {
	f := newFixture(t)
	red := f.token(t, "payments")
	inst, err := f.Redeem(t.Context(), red)
	require.NoError(t, err)
	inst.Key = []byte("noise")
	op, err := put(instancePrefix+inst.Name, inst)
	require.NoError(t, err)
	_, err = f.store.Txn(t.Context(), nil, []store.Op{op})
	require.NoError(t, err)
	if _, err := f.Redeem(t.Context(), red); err == nil || IsRequestError(err) {
		t.Errorf("got %v", err)
	}
	if _, err := inst.EnrollmentKey(); err == nil {
		t.Error("noise is a key")
	}
}

// A template never gives an ID that another document has.
func TestD4TemplateReachesIntoNoOthersName(t *testing.T) {
	f := newFixture(t)
	tmpl := attested("cluster", policy.Attest{Kind: kube})
	tmpl.Template, tmpl.Workload.ID, tmpl.ID = true, "/ns/{namespace}/sa/{serviceAccount}", spiffeid.ID{}
	var err error
	tmpl.Pattern, err = identity.ParsePattern("spiffe://shop.example/ns/*/sa/*")
	require.NoError(t, err)
	precious := attested("precious", policy.Attest{Kind: attest.KindJoinToken})
	precious.ID = spiffeid.RequireFromPath(td, "/ns/vault/sa/root")
	f.SetWorkloads([]policy.CompiledWorkload{tmpl, precious})
	if _, id, err := f.Match(pod("shop", "payments"), spiffeid.ID{}); err != nil || id.Path() != "/ns/shop/sa/payments" {
		t.Errorf("got %v, %v", id, err)
	}
	if _, id, err := f.Match(pod("vault", "root"), spiffeid.ID{}); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("got %v, %v", id, err)
	}
}

// A tainted issuer is refused from the earliest moment that anybody named.
func TestRevokeIssuerAgain(t *testing.T) {
	f := newFixture(t)
	now := time.Unix(0, f.now.Load()).UTC()
	for _, step := range []struct{ from, want time.Time }{{now.Add(time.Hour), now.Add(time.Hour)}, {now.Add(2 * time.Hour), now.Add(time.Hour)}, {now, now}} {
		got, err := f.RevokeIssuer(t.Context(), []byte{1}, step.from, now.Add(5*time.Hour), Order{Actor: "alice"})
		require.NoError(t, err)
		if v, ok := got.find(RevokedIssuer, hex.EncodeToString([]byte{1})); !ok || !v.From.Equal(step.want) {
			t.Errorf("from %v: got %+v", step.from, got)
		}
	}
}

// Blocks is what a list of instances shows.
func TestBlocks(t *testing.T) {
	f := newFixture(t)
	inst := f.enrol(t, "payments")
	sibling := f.enrol(t, "payments")
	process := Instance{ID: spiffeid.RequireFromPath(td, "/shop/web"), Name: "x", Via: inst.ID, Agent: inst.Name}
	all, err := f.Revoke(t.Context(), f.subject(RevokedInstance, inst.Name))
	require.NoError(t, err)
	if !all.Blocks(inst) || !all.Blocks(process) || all.Blocks(sibling) {
		t.Errorf("the instance %v, its process %v, its sibling %v; want true, true, false", all.Blocks(inst), all.Blocks(process), all.Blocks(sibling))
	}
	all, err = f.Unrevoke(t.Context(), f.subject(RevokedInstance, inst.Name))
	require.NoError(t, err)
	if all.Blocks(inst) {
		t.Error("blocked although readmitted")
	}
}
