package registry

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

const (
	kube = "kubernetes"
	unix = "unix"
)

func attested(name string, attest ...policy.Attest) policy.CompiledWorkload {
	w := workload(name)
	w.Attest, w.File, w.Line = attest, name+".yaml", 3
	return w
}

func pod(namespace, account string) attest.Verified {
	return attest.Verified{
		Kind: kube, Issuer: "prod", Subject: "system:serviceaccount:" + namespace + ":" + account,
		Selectors: attest.Selectors{"namespace": {namespace}, "serviceAccount": {account}},
	}
}

func kubeEntry(namespace, account string) policy.Attest {
	return policy.Attest{Kind: kube, Select: map[string]string{"namespace": namespace, "serviceAccount": account}}
}

// token is evidence that is good once, for an hour.
func (f *fixture) once(v attest.Verified) attest.Verified {
	v.Once, v.Expires = strings.Repeat("ab", 32), time.Unix(0, f.now.Load()).Add(time.Hour)
	return v
}

func kubeFixture(t *testing.T) *fixture {
	f := newFixture(t)
	f.SetWorkloads([]policy.CompiledWorkload{
		attested("payments", kubeEntry("shop", "payments")), attested("orders", kubeEntry("shop", "orders")),
		attested("legacy", policy.Attest{Kind: attest.KindJoinToken}),
	})
	return f
}

func TestMatch(t *testing.T) {
	f := kubeFixture(t)
	tmpl := attested("cluster", policy.Attest{Kind: "oidc", Select: map[string]string{"claims.aud": "x"}})
	tmpl.Template, tmpl.Workload.ID, tmpl.ID = true, "/ns/{namespace}/sa/{serviceAccount}", spiffeid.ID{}
	var err error
	tmpl.Pattern, err = identity.ParsePattern("spiffe://shop.example/ns/*/sa/*")
	require.NoError(t, err)
	list := []policy.CompiledWorkload{
		attested("payments", kubeEntry("shop", "payments")), attested("orders", kubeEntry("shop", "orders"), kubeEntry("shop", "orders2")),
		attested("twin-a", policy.Attest{Kind: "x509pop", Select: map[string]string{"dns": "a"}}),
		attested("twin-b", policy.Attest{Kind: "x509pop", Select: map[string]string{"dns": "b"}}),
		tmpl,
	}
	f.SetWorkloads(list)
	cert := func(names ...string) attest.Verified {
		return attest.Verified{Kind: "x509pop", Selectors: attest.Selectors{"dns": names}}
	}
	templated := func(namespace ...string) attest.Verified {
		return attest.Verified{Kind: "oidc", Selectors: attest.Selectors{"claims.aud": {"x"}, "namespace": namespace, "serviceAccount": {"web"}}}
	}
	for _, c := range []struct {
		name string
		v    attest.Verified
		want string // ID's path, or part of the error
		err  error
	}{
		{"one", pod("shop", "payments"), "/shop/payments", nil},
		{"second entry", pod("shop", "orders2"), "/shop/orders", nil},
		{"nobody", pod("shop", "intruder"), "it is kubernetes of prod: system:serviceaccount:shop:intruder", ErrNoMatch},
		{"kind that nobody admits", attest.Verified{Kind: "unix"}, "unix", ErrNoMatch},
		{"one of two names", cert("a", "c"), "/shop/twin-a", nil},
		{"two workloads", cert("b", "a"), "twin-a (twin-a.yaml:3) and twin-b (twin-b.yaml:3)", ErrAmbiguous},
		{"template", templated("blue"), "/ns/blue/sa/web", nil},
		{"template, two values", templated("blue", "green"), "oidc", ErrNoMatch},
		{"template, no value", templated(), "oidc", ErrNoMatch},
		{"template, a value that is a path", templated("a/b"), "", errAny},
		{"template, a value that climbs", templated(".."), "oidc", ErrNoMatch},
	} {
		w, id, err := f.Match(c.v, spiffeid.ID{})
		switch {
		case c.err == nil && (err != nil || id.Path() != c.want):
			t.Errorf("%s: got %v, %v, want %s", c.name, id, err, c.want)
		case c.err == errAny && err == nil, c.err != nil && c.err != errAny && (!errors.Is(err, c.err) || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: got %v, %v, want %v with %q", c.name, w, err, c.err, c.want)
		}
		if err != nil && !IsRequestError(err) {
			t.Errorf("%s: no request error: %v", c.name, err)
		}
	}
}

var errAny = errors.New("any")

// A stranger learns nothing of what workloads ask for; the operator does.
func TestNoMatchTellsTheBearerOnlyOfItself(t *testing.T) {
	f := kubeFixture(t)
	_, _, err := f.Match(pod("shop", "payment"), spiffeid.ID{})
	none, ok := errors.AsType[*NoMatchError](err)
	if !ok || strings.Contains(err.Error(), "payments") || strings.Contains(err.Error(), "orders") {
		t.Errorf("got %v", err)
	}
	if near := none.Nearest(); !strings.Contains(near, "orders (orders.yaml:3)") || !strings.Contains(near, "serviceAccount") {
		t.Errorf("got nearest %q", near)
	}
}

// Evidence of a second cluster must not prove what an unnamed issuer may.
func TestD4UnnamedIssuerMeansTheOnlyOne(t *testing.T) {
	f := kubeFixture(t)
	f.cfg.Issuers = map[string]int{kube: 2}
	f.SetWorkloads([]policy.CompiledWorkload{
		attested("payments", kubeEntry("shop", "payments")),
		attested("orders", policy.Attest{Kind: kube, Issuer: "prod", Select: map[string]string{"serviceAccount": "orders"}}),
	})
	if _, _, err := f.Match(pod("shop", "payments"), spiffeid.ID{}); !errors.Is(err, ErrNoMatch) {
		t.Errorf("unnamed: got %v", err)
	}
	if _, _, err := f.Match(pod("shop", "orders"), spiffeid.ID{}); err != nil {
		t.Errorf("named: got %v", err)
	}
	other := pod("shop", "orders")
	other.Issuer = "test"
	if _, _, err := f.Match(other, spiffeid.ID{}); !errors.Is(err, ErrNoMatch) {
		t.Errorf("another: got %v", err)
	}
}

func TestExplainPutsTheNearestFirst(t *testing.T) {
	f := kubeFixture(t)
	near, err := f.Explain(pod("shop", "orders"), spiffeid.ID{})
	require.NoError(t, err)
	if len(near) != 2 || !near[0].Matches || near[0].ID.Path() != "/shop/orders" || near[1].Matches || !strings.Contains(near[1].Missed, "serviceAccount") {
		t.Errorf("got %+v", near)
	}
	f.SetWorkloads([]policy.CompiledWorkload{
		attested("a-far", kubeEntry("elsewhere", "other")), attested("b-near", kubeEntry("shop", "other")),
	})
	near, err = f.Explain(pod("shop", "orders"), spiffeid.ID{})
	require.NoError(t, err)
	if len(near) != 2 || near[0].Workload.Name != "b-near" {
		t.Errorf("got %+v", near)
	}
}

func TestAdmit(t *testing.T) {
	f := kubeFixture(t)
	inst, err := f.Admit(t.Context(), Admission{Evidence: f.once(pod("shop", "payments")), Key: newKey(t), Origin: "127.0.0.1:1"})
	require.NoError(t, err)
	if inst.ID.Path() != "/shop/payments" {
		t.Errorf("got %s", inst.ID)
	}
	require.NoError(t, f.Entitled(t.Context(), inst.ID, inst.Name))
	stored, err := f.Instance(t.Context(), inst.Name)
	require.NoError(t, err)
	if stored.Kind != kube || stored.Issuer != "prod" || stored.Origin != "127.0.0.1:1" || stored.Selectors["namespace"][0] != "shop" || stored.rev != inst.rev {
		t.Errorf("got %+v", stored)
	}
	for _, kind := range []string{attest.KindJoinToken, unix} {
		if _, err := f.Admit(t.Context(), Admission{Evidence: attest.Verified{Kind: kind}, Key: newKey(t)}); err == nil || errors.Is(err, ErrNoMatch) {
			t.Errorf("%s was admitted by itself: %v", kind, err)
		}
	}
}

// crowd is a store in which nobody has read the evidence's record before all have.
type crowd struct {
	store.Store
	waiting sync.WaitGroup
	late    atomic.Int32 // reads that are not part of the crowd any more
	size    int32
}

func (c *crowd) Get(ctx context.Context, key string) (store.KV, error) {
	kv, err := c.Store.Get(ctx, key)
	if strings.HasPrefix(key, oncePrefix) && c.late.Add(1) <= c.size {
		c.waiting.Done()
		c.waiting.Wait()
	}
	return kv, err
}

func TestD3ExactlyOneOf1000ParallelAdmissionsWins(t *testing.T) {
	f := kubeFixture(t)
	keys := make([]*ecdsa.PublicKey, 1000)
	for i := range keys {
		keys[i] = newKey(t)
	}
	all := &crowd{Store: f.store, size: int32(len(keys))}
	all.waiting.Add(len(keys))
	f.cfg.Store = all
	v := f.once(pod("shop", "payments"))
	var won atomic.Int32
	var wg sync.WaitGroup
	for _, key := range keys {
		wg.Go(func() {
			if _, err := f.Admit(t.Context(), Admission{Evidence: v, Key: key}); err == nil {
				won.Add(1)
			} else if !errors.Is(err, ErrEvidenceUsed) {
				t.Errorf("a loser is told: %v", err)
			}
		})
	}
	wg.Wait()
	list, err := f.Instances(t.Context())
	require.NoError(t, err)
	if won.Load() != 1 || len(list) != 1 {
		t.Errorf("%d winners and %d instances, want one", won.Load(), len(list))
	}
}

// The winner's key may ask again and becomes the same instance, nobody else may,
// and there is no moment at which the token is good again.
func TestD3EvidenceIsNeverGoodTwice(t *testing.T) {
	f := kubeFixture(t)
	v, key := f.once(pod("shop", "payments")), newKey(t)
	first, err := f.Admit(t.Context(), Admission{Evidence: v, Key: key})
	require.NoError(t, err)
	again, err := f.Admit(t.Context(), Admission{Evidence: v, Key: key})
	require.NoError(t, err)
	if again.Name != first.Name {
		t.Errorf("got instance %s, want %s", again.Name, first.Name)
	}
	for range 24 {
		if _, err := f.Admit(t.Context(), Admission{Evidence: v, Key: newKey(t)}); err == nil {
			t.Fatal("good again")
		}
		f.add(5 * time.Minute)
		_, err := f.Clean(t.Context())
		require.NoError(t, err)
	}
	if kvs, _, err := f.store.List(t.Context(), oncePrefix); err != nil || len(kvs) != 0 {
		t.Errorf("remembered for ever: %v, %v", kvs, err)
	}
	if _, err := f.Admit(t.Context(), Admission{Evidence: v, Key: key}); !errors.Is(err, attest.ErrBadEvidence) {
		t.Errorf("expired, same key: got %v", err)
	}
}

func TestRemovedInstanceIsNotAdmittedAgain(t *testing.T) {
	f := kubeFixture(t)
	v, key := f.once(pod("shop", "payments")), newKey(t)
	inst, err := f.Admit(t.Context(), Admission{Evidence: v, Key: key})
	require.NoError(t, err)
	require.NoError(t, f.Remove(t.Context(), inst.Name, "alice"))
	if _, err := f.Admit(t.Context(), Admission{Evidence: v, Key: key}); !errors.Is(err, ErrEvidenceUsed) {
		t.Errorf("got %v", err)
	}
}

func TestRefusedEvidenceIsNotSpent(t *testing.T) {
	f := kubeFixture(t)
	v := f.once(pod("shop", "late"))
	_, err := f.Admit(t.Context(), Admission{Evidence: v, Key: newKey(t)})
	require.ErrorIs(t, err, ErrNoMatch)
	f.SetWorkloads([]policy.CompiledWorkload{attested("late", kubeEntry("shop", "late"))})
	if _, err := f.Admit(t.Context(), Admission{Evidence: v, Key: newKey(t)}); err != nil {
		t.Error(err)
	}
}

// A certificate may be shown any number of times: the same key is the same
// instance, another is another.
func TestAdmitByChallenge(t *testing.T) {
	f := kubeFixture(t)
	v, key := pod("shop", "payments"), newKey(t)
	names := map[string]bool{}
	for _, k := range []*ecdsa.PublicKey{key, key, newKey(t)} {
		inst, err := f.Admit(t.Context(), Admission{Evidence: v, Key: k})
		require.NoError(t, err)
		names[inst.Name] = true
	}
	if len(names) != 2 {
		t.Errorf("got instances %v, want two", names)
	}
}

func TestEntitledAsksForTheRecordedEvidence(t *testing.T) {
	f := kubeFixture(t)
	inst, err := f.Admit(t.Context(), Admission{Evidence: f.once(pod("shop", "payments")), Key: newKey(t)})
	require.NoError(t, err)
	for name, entry := range map[string]policy.Attest{
		"another kind":     {Kind: attest.KindJoinToken},
		"another selector": kubeEntry("shop", "payments2"),
		"another issuer":   {Kind: kube, Issuer: "test", Select: map[string]string{"namespace": "shop"}},
	} {
		f.SetWorkloads([]policy.CompiledWorkload{attested("payments", entry)})
		if err := f.Entitled(t.Context(), inst.ID, inst.Name); !errors.Is(err, ErrNotAttested) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	f.SetWorkloads([]policy.CompiledWorkload{attested("payments", kubeEntry("other", "x"), kubeEntry("shop", "payments"))})
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); err != nil {
		t.Errorf("admitted again: got %v", err)
	}
}

func TestInstancesOfOldAreJoinTokens(t *testing.T) {
	f := newFixture(t)
	inst, err := f.Redeem(t.Context(), f.token(t, "payments"))
	require.NoError(t, err)
	old := inst
	old.Kind, old.Subject = "", ""
	op, err := put(instancePrefix+inst.Name, old)
	require.NoError(t, err)
	_, err = f.store.Txn(t.Context(), nil, []store.Op{op})
	require.NoError(t, err)
	if got, err := f.Entitlement(t.Context(), inst.ID, inst.Name); err != nil || got.Kind != attest.KindJoinToken {
		t.Errorf("got %+v, %v", got, err)
	}
}

func process(uid string) attest.Verified {
	return attest.Verified{Kind: unix, Subject: "uid " + uid, Selectors: attest.Selectors{"uid": {uid}}}
}

// agentFixture has two agents; web and batch name the first, db the second.
func agentFixture(t *testing.T) (f *fixture, one, two Instance) {
	f = newFixture(t)
	token := policy.Attest{Kind: attest.KindJoinToken}
	via := func(agent, uid string) policy.Attest {
		return policy.Attest{Kind: unix, Via: []string{"/shop/" + agent}, Select: map[string]string{"uid": uid}}
	}
	f.SetWorkloads([]policy.CompiledWorkload{
		attested("agent-1", token), attested("agent-2", token),
		attested("web", via("agent-1", "1000")), attested("db", via("agent-2", "2000")), attested("payments", kubeEntry("shop", "payments")),
	})
	var err error
	one, err = f.Redeem(t.Context(), f.token(t, "agent-1"))
	require.NoError(t, err)
	two, err = f.Redeem(t.Context(), f.token(t, "agent-2"))
	require.NoError(t, err)
	return f, one, two
}

func TestD4AgentVouchesOnlyForWorkloadsThatNameIt(t *testing.T) {
	f, one, two := agentFixture(t)
	inst, err := f.Vouch(t.Context(), one, process("1000"))
	require.NoError(t, err)
	if inst.ID.Path() != "/shop/web" || inst.Via != one.ID || inst.Agent != one.Name {
		t.Errorf("got %+v", inst)
	}
	for name, c := range map[string]struct {
		agent Instance
		v     attest.Verified
	}{
		"workload of another agent": {one, process("2000")},
		"other agent":               {two, process("1000")},
		"unknown process":           {one, process("0")},
		"another kind":              {one, pod("shop", "payments")},
		"a join token":              {one, attest.Verified{Kind: attest.KindJoinToken}},
	} {
		if got, err := f.Vouch(t.Context(), c.agent, c.v); !errors.Is(err, ErrNoMatch) && c.v.Kind == unix || err == nil {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
	}
	if _, err := f.Vouch(t.Context(), inst, process("1000")); !errors.Is(err, ErrVouched) {
		t.Errorf("a process that vouches: got %v", err)
	}
}

func TestVouchedInstanceLivesWithItsAgent(t *testing.T) {
	f, one, _ := agentFixture(t)
	inst, err := f.Vouch(t.Context(), one, process("1000"))
	require.NoError(t, err)
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); !errors.Is(err, ErrUnknownInstance) {
		t.Errorf("nothing was issued to it yet: got %v", err)
	}
	issued := Issuance{Action: audit.ActionRenew, Serial: "01", NotAfter: time.Unix(0, f.now.Load()).Add(time.Hour)}
	require.NoError(t, f.Record(t.Context(), inst, issued))
	require.NoError(t, f.Entitled(t.Context(), inst.ID, inst.Name))
	again, err := f.Vouch(t.Context(), one, process("1000"))
	require.NoError(t, err)
	if again.Name != inst.Name || again.Serial != "01" {
		t.Errorf("got %+v, want the instance that is recorded", again)
	}
	if _, err := inst.EnrollmentKey(); !errors.Is(err, ErrVouched) {
		t.Errorf("it can enrol by itself: %v", err)
	}
	require.NoError(t, f.Remove(t.Context(), one.Name, "alice"))
	if err := f.Entitled(t.Context(), inst.ID, inst.Name); !errors.Is(err, ErrUnknownInstance) {
		t.Errorf("agent gone: got %v", err)
	}
}

func TestRecord(t *testing.T) {
	f := kubeFixture(t)
	inst, err := f.Admit(t.Context(), Admission{Evidence: f.once(pod("shop", "payments")), Key: newKey(t)})
	require.NoError(t, err)
	now := time.Unix(0, f.now.Load()).UTC()
	for _, is := range []Issuance{
		{Action: audit.ActionIssue, Actor: "me", Origin: "127.0.0.1:2", Serial: "aa", NotAfter: now.Add(24 * time.Hour), Detail: "by kubernetes", Result: "serial aa"},
		{Action: audit.ActionRenew, Serial: "bb", NotAfter: now.Add(time.Hour)}, // for an app: shorter
		{Action: audit.ActionJWT},
	} {
		require.NoError(t, f.Record(t.Context(), inst, is)) // the same, old revision: read again
	}
	got, err := f.Instance(t.Context(), inst.Name)
	require.NoError(t, err)
	if got.Serial != "aa" || !got.NotAfter.Equal(now.Add(24*time.Hour)) {
		t.Errorf("got %+v, want the certificate that lives longest", got)
	}
	records, err := f.audit.Recent(t.Context(), 1)
	require.NoError(t, err)
	if records[0].Action != audit.ActionIssue || records[0].Subject != inst.ID.String() || records[0].Result != "serial aa" || records[0].Origin != "127.0.0.1:2" {
		t.Errorf("got %+v", records)
	}
	if renewals, err := f.audit.Renewals(t.Context(), 0); err != nil || len(renewals) != 2 {
		t.Errorf("got %+v, %v", renewals, err)
	}
	require.NoError(t, f.Remove(t.Context(), inst.Name, "alice"))
	if err := f.Record(t.Context(), inst, Issuance{Action: audit.ActionRenew}); !errors.Is(err, ErrUnknownInstance) {
		t.Errorf("removed: got %v", err)
	}
}

// A host starts, and all processes of a workload ask at once.
func TestRecordManyProcessesAtOnce(t *testing.T) {
	f, one, _ := agentFixture(t)
	var wg sync.WaitGroup
	for range 300 {
		wg.Go(func() {
			inst, err := f.Vouch(t.Context(), one, process("1000"))
			if err == nil {
				err = f.Record(t.Context(), inst, Issuance{Action: audit.ActionRenew, Serial: "01"})
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if all, err := f.audit.Renewals(t.Context(), 0); err != nil || len(all) != 300 {
		t.Errorf("got %d records, %v, want 300", len(all), err)
	}
}

func TestCleanForgetsWhatPlatformsStartAnew(t *testing.T) {
	f, one, _ := agentFixture(t)
	inst, err := f.Vouch(t.Context(), one, process("1000"))
	require.NoError(t, err)
	require.NoError(t, f.Record(t.Context(), inst, Issuance{Action: audit.ActionRenew, Serial: "01", NotAfter: time.Unix(0, f.now.Load()).Add(72 * time.Hour)}))
	for _, step := range []struct {
		after time.Duration
		want  int
	}{
		{vouchedIdle + time.Hour, 2}, // the join tokens; its certificate lives
		{48 * time.Hour, 1},
		{instanceIdle - 80*time.Hour, 0}, // the agents came by join token
		{10 * time.Hour, 2},
	} {
		f.add(step.after)
		got, err := f.Clean(t.Context())
		require.NoError(t, err)
		if got != step.want {
			t.Errorf("after %v: forgot %d, want %d", step.after, got, step.want)
		}
	}
}

// Before the first policy is in force nothing is decided, and nothing goes wrong.
func TestNothingBeforeTheWorkloads(t *testing.T) {
	f := newFixture(t)
	f.Registry = New(Config{Store: f.store, Audit: f.audit, Now: time.Now, RootHash: func() [32]byte { return [32]byte{7} }})
	v := attest.Verified{Kind: policy.Kubernetes}
	if _, _, err := f.Match(v, spiffeid.ID{}); !errors.Is(err, ErrNotReady) {
		t.Errorf("Match: %v", err)
	}
	if _, err := f.Explain(v, spiffeid.ID{}); !errors.Is(err, ErrNotReady) {
		t.Errorf("Explain: %v", err)
	}
	if err := f.ReviseRemoved(t.Context()); !errors.Is(err, ErrNotReady) {
		t.Errorf("ReviseRemoved: %v", err)
	}
	if f.defined(spiffeid.RequireFromString("spiffe://test.example/a")) {
		t.Error("an ID has a Workload")
	}
}

// An agent's word is about processes, and is no other evidence.
func TestD4AgentGivesNoOtherEvidence(t *testing.T) {
	f := newFixture(t)
	for _, kind := range []string{policy.Kubernetes, policy.OIDC, policy.X509Pop, policy.JoinToken, ""} {
		if _, err := f.Vouch(t.Context(), Instance{Name: "agent"}, attest.Verified{Kind: kind}); err == nil || !strings.Contains(err.Error(), "not for an agent to give") {
			t.Errorf("%q: got %v", kind, err)
		}
	}
}

// The list of what is refused is bounded; an order beyond it changes nothing.
func TestTooManyRevocations(t *testing.T) {
	f := newFixture(t)
	o := Order{Actor: "alice"}
	for n := range maxRevocations + 1 {
		o.Subjects = append(o.Subjects, Subject{Kind: RevokedID, Name: fmt.Sprintf("spiffe://test.example/%d", n)})
	}
	if _, err := f.Revoke(t.Context(), o); !errors.Is(err, ErrTooManyRevocations) {
		t.Errorf("got %v", err)
	}
	if all, err := f.Revocations(t.Context()); err != nil || len(all.All) > 0 {
		t.Errorf("%d are revoked, %v", len(all.All), err)
	}
}
