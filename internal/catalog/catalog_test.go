package catalog

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("shop.example")

func newCatalog(t *testing.T, s store.Store) *Catalog {
	t.Helper()
	return New(Config{Store: s, Audit: audit.New(s, time.Now), TrustDomain: td, Now: time.Now, Log: hclog.NewNullLogger()})
}

func newStore(t *testing.T) store.Store {
	t.Helper()
	s := store.NewMemory()
	t.Cleanup(func() { s.Close() })
	return s
}

type files = map[string][]byte

// workload is a resource file that defines one.
func workload(name string) []byte {
	return []byte("apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: " + name + "}\nspec:\n  attest: [{kind: join-token}]\n  ports: [{name: http, port: 8080, protocol: http}]\n")
}

// allow is a resource file that lets from reach to.
func allow(from, to string) []byte {
	return []byte("apiVersion: sallyport.dev/v1\nkind: Policy\nmetadata: {name: " + from + "-" + to + "}\nspec:\n  to: {workload: " + to + "}\n  allow:\n    - {from: [{workload: " + from + "}], ports: [http]}\n")
}

// expect is a resource file that tests whether from reaches to.
func expect(from, to, verdict string) []byte {
	return []byte("apiVersion: sallyport.dev/v1\nkind: PolicyTest\nmetadata: {name: t}\nspec:\n  cases:\n    - {from: " + from + ", to: " + to + ", expect: " + verdict + "}\n")
}

// scope is a resource file that lets the set define workloads of these names, of
// the set's own name if none.
func scope(set string, names ...string) []byte {
	if len(names) == 0 {
		names = []string{set}
	}
	return []byte("apiVersion: sallyport.dev/v1\nkind: Scope\nmetadata: {name: " + set + "}\nspec: {ids: [/" + strings.Join(names, ", /") + "], evidence: [{kind: join-token}]}\n")
}

func shop() files {
	return files{"a.yaml": workload("orders"), "b.yaml": workload("payments"), "p.yaml": allow("orders", "payments")}
}

func with(base files, more ...any) files {
	out := files{}
	for k, v := range base {
		out[k] = v
	}
	for i := 0; i < len(more); i += 2 {
		if content, ok := more[i+1].([]byte); ok {
			out[more[i].(string)] = content
		} else {
			delete(out, more[i].(string))
		}
	}
	return out
}

func apply(t *testing.T, c *Catalog, sets map[string]map[string][]byte) Result {
	t.Helper()
	r, err := c.Apply(t.Context(), Change{Sets: sets, Actor: "ann", Origin: "test"})
	require.NoError(t, err)
	return r
}

// state gives the state in force as a reader gets it.
func state(t *testing.T, c *Catalog) State {
	t.Helper()
	var got State
	enough := errors.New("enough")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	err := c.Watch(ctx, func(s State) error { got = s; return enough })
	require.ErrorIs(t, err, enough)
	return got
}

// reaches reports whether workload from may reach workload to.
func reaches(s State, from, to string) bool {
	src := spiffeid.RequireFromPath(td, "/"+from)
	dst := spiffeid.RequireFromPath(td, "/"+to)
	return s.Rules.Decide(policy.Request{Src: src, Dst: dst, Port: 8080}).Effect == policy.Allow
}

func lastRecord(t *testing.T, c *Catalog) audit.Record {
	t.Helper()
	records, err := c.Audit.Recent(t.Context(), 1)
	require.NoError(t, err)
	if len(records) == 0 {
		return audit.Record{}
	}
	return records[0]
}

func TestEmpty(t *testing.T) {
	c := newCatalog(t, newStore(t))
	s := state(t, c)
	if s.Rev != (Rev{1, 0}) || len(s.Sets) != 0 || reaches(s, "orders", "payments") {
		t.Errorf("got %+v, want revision 1.0 that denies", s)
	}
	h, err := c.History(t.Context(), 0)
	require.NoError(t, err)
	require.Empty(t, h)
}

func TestApply(t *testing.T) {
	s := newStore(t)
	c := newCatalog(t, s)
	r := apply(t, c, map[string]map[string][]byte{"": shop()})
	if r.Epoch != 1 || r.N != 1 || r.Unchanged || !strings.Contains(r.Diff, "orders") {
		t.Errorf("got %+v, want revision 1.1 and a diff that names orders", r)
	}
	if rec := lastRecord(t, c); rec.Actor != "ann" || rec.Origin != "test" || rec.Result != "applied 1.1" || rec.Subject != "root" || rec.Detail != r.Diff || rec.Action != "policy.apply" {
		t.Errorf("got audit record %+v", rec)
	}
	if got := state(t, c); !reaches(got, "orders", "payments") || reaches(got, "payments", "orders") || got.Rev != (Rev{1, 1}) {
		t.Errorf("got %+v, want orders to reach payments at 1.1", got.Rev)
	}
	if r := apply(t, c, map[string]map[string][]byte{"": shop()}); !r.Unchanged || r.N != 1 {
		t.Errorf("the same again: got %+v, want it unchanged", r)
	}
	r, err := c.Apply(t.Context(), Change{Sets: map[string]map[string][]byte{"": with(shop(), "p.yaml", nil)}, DryRun: true})
	require.NoError(t, err)
	if r.N != 1 || !strings.Contains(r.Diff, "- p.yaml") {
		t.Errorf("dry run: got %+v, want revision 1 and the lost file", r)
	}
	// A second process on the same store sees the same.
	if got := state(t, newCatalog(t, s)); !reaches(got, "orders", "payments") || got.Rev != (Rev{1, 1}) {
		t.Errorf("from the store: got %+v, want orders to reach payments", got.Rev)
	}
	apply(t, c, map[string]map[string][]byte{"": with(shop(), "s.yaml", scope("billing", "invoices")), "billing": {"w.yaml": workload("invoices")}})
	files, err := c.Files(t.Context(), Rev{1, 2})
	require.NoError(t, err)
	if len(files) != 2 || len(files[""]) != 4 || len(files["billing"]) != 1 {
		t.Errorf("got sets %v, want both", files)
	}
}

func TestRefused(t *testing.T) {
	root := func(f files) Change { return Change{Sets: map[string]map[string][]byte{"": f}} }
	tests := map[string]struct {
		change Change
		want   error  // one of these
		text   string // and part of what people read
	}{
		"unknown field":   {root(with(shop(), "x.yaml", []byte("apiVersion: sallyport.dev/v1\nkind: Policy\nmetadata: {name: x}\nspec: {too: {}}\n"))), nil, "x.yaml:4:"},
		"no newline":      {root(with(shop(), "x.yaml", []byte("# cut off"))), nil, "x.yaml:1:"},
		"not a file name": {root(with(shop(), "../x.yaml", workload("x"))), nil, "not the name of a resource file"},
		"bad set name":    {Change{Sets: map[string]map[string][]byte{"Billing!": shop()}}, nil, "DNS label"},
		"two sets":        {Change{Sets: map[string]map[string][]byte{"two": {"a.yaml": workload("orders")}}}, nil, "two/a.yaml:3:"},
		"failing test":    {root(with(shop(), "s.yaml", scope("other", "more"), "t.yaml", expect("orders", "payments", "deny"))), ErrTests, "t.yaml:"},
		"last workload":   {root(files{"c.yaml": []byte("# nothing\n")}), ErrLastWorkload, "the root set: the edit takes the last Workload of a set; bring a Workload back"},
		"all files":       {root(files{}), ErrLastWorkload, "bring a Workload back"},
		"unknown set":     {Change{Remove: []string{"billing"}}, ErrNoSet, "sets: root, other"},
		"root set":        {Change{Remove: []string{"", "other"}}, nil, "the root set cannot be removed"},
		"too much":        {root(with(shop(), "x.yaml", make([]byte, policy.MaxTreeSize))), ErrTooLarge, "bytes"},
		"a big file":      {root(with(shop(), "x.yaml", []byte(strings.Repeat("#\n", policy.MaxFileSize/2+1)))), nil, "x.yaml"},
	}
	c := newCatalog(t, newStore(t))
	apply(t, c, map[string]map[string][]byte{"": with(shop(), "s.yaml", scope("other", "more")), "other": {"w.yaml": workload("more"), "p.yaml": allow("payments", "more")}})
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			test.change.Actor = name
			_, err := c.Apply(t.Context(), test.change)
			if err == nil || !strings.Contains(err.Error(), test.text) {
				t.Fatalf("got %v, want an error with %q", err, test.text)
			}
			var mistakes policy.Errors
			if test.want == nil && !errors.As(err, &mistakes) || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("got %T, want %v or policy.Errors", err, test.want)
			}
			if rec := lastRecord(t, c); rec.Actor != name || rec.Result != "refused" || !strings.Contains(rec.Detail, test.text) {
				t.Errorf("got audit record %+v, want a refusal with %q", rec, test.text)
			}
			if got := state(t, c); got.Rev != (Rev{1, 1}) || !reaches(got, "orders", "payments") {
				t.Errorf("got revision %s, want 1.1 as before", got.Rev)
			}
		})
	}
	_, err := c.Apply(t.Context(), Change{Sets: map[string]map[string][]byte{"": files{}}, Actor: "dry", DryRun: true})
	require.ErrorIs(t, err, ErrLastWorkload)
	if rec := lastRecord(t, c); rec.Actor == "dry" {
		t.Errorf("a dry run left record %+v", rec)
	}
}

func TestRefusedWhenEmpty(t *testing.T) {
	c := newCatalog(t, newStore(t))
	for name, f := range map[string]files{"no files": {}, "no workload": {"c.yaml": []byte("# nothing\n")}} {
		_, err := c.Apply(t.Context(), Change{Sets: map[string]map[string][]byte{"": f}})
		if !errors.Is(err, policy.ErrNoWorkload) {
			t.Errorf("%s: got %v, want ErrNoWorkload", name, err)
		}
	}
}

func TestRemoveSet(t *testing.T) {
	c := newCatalog(t, newStore(t))
	apply(t, c, map[string]map[string][]byte{"": {"s.yaml": scope("shop", "orders", "payments"), "b.yaml": scope("billing", "invoices")},
		"shop": shop(), "billing": {"w.yaml": workload("invoices")}})
	_, err := c.Apply(t.Context(), Change{Remove: []string{"billing"}, Actor: "ann"})
	require.NoError(t, err)
	if rec := lastRecord(t, c); rec.Action != "policy.remove" || rec.Subject != "billing" {
		t.Errorf("got audit record %+v, want the removal of billing", rec)
	}
	apply(t, c, map[string]map[string][]byte{"notes": {"c.yaml": []byte("# nothing\n")}})
	for _, remove := range [][]string{{"shop"}, {"shop", "notes"}} {
		_, err = c.Apply(t.Context(), Change{Remove: remove, Actor: "bob"})
		if !errors.Is(err, policy.ErrNoWorkload) || !strings.Contains(err.Error(), "would leave no Workload in any set") {
			t.Errorf("removing %q: got %v, want ErrNoWorkload", remove, err)
		}
		if rec := lastRecord(t, c); rec.Actor != "bob" || rec.Result != "refused" {
			t.Errorf("got audit record %+v, want a refusal", rec)
		}
	}
	if got := state(t, c); got.Rev.N != 3 || !reaches(got, "orders", "payments") {
		t.Errorf("got %s, want 1.3 as before", got.Rev)
	}
}

func TestRollback(t *testing.T) {
	c := newCatalog(t, newStore(t))
	apply(t, c, map[string]map[string][]byte{"": shop()})
	apply(t, c, map[string]map[string][]byte{"": with(shop(), "p.yaml", nil, "s.yaml", scope("billing", "invoices")), "billing": {"w.yaml": workload("invoices")}})
	if reaches(state(t, c), "orders", "payments") {
		t.Error("orders reaches payments without a policy")
	}
	r, err := c.Rollback(t.Context(), Rev{1, 1}, "bob", "console")
	require.NoError(t, err)
	if r.N != 3 || !reaches(state(t, c), "orders", "payments") || len(state(t, c).Sets) != 1 {
		t.Errorf("got %+v, want revision 3 like the first", r)
	}
	if rec := lastRecord(t, c); rec.Actor != "bob" || rec.Origin != "console" || rec.Action != "policy.rollback" || rec.Result != "applied 1.3" {
		t.Errorf("got audit record %+v", rec)
	}
	r, err = c.Rollback(t.Context(), Rev{1, 1}, "bob", "console")
	require.NoError(t, err)
	if !r.Unchanged || r.N != 3 {
		t.Errorf("again: got %+v, want it unchanged", r)
	}
	_, err = c.Rollback(t.Context(), Rev{1, 9}, "bob", "console")
	require.ErrorIs(t, err, ErrNoRevision)
	h, err := c.History(t.Context(), 2)
	require.NoError(t, err)
	if len(h) != 2 || !h[0].Current || h[1].Current || h[0].Summary != "rollback to 1.1: added p.yaml; removed s.yaml, billing/w.yaml" || h[0].Actor != "bob" {
		t.Errorf("got history %+v", h)
	}
}

func TestDiff(t *testing.T) {
	c := newCatalog(t, newStore(t))
	before := shop()
	before["c.yaml"] = []byte("# one\n# two\n# three\n")
	apply(t, c, map[string]map[string][]byte{"": before})
	r := apply(t, c, map[string]map[string][]byte{"": with(before, "c.yaml", []byte("# one\n# 2\n# three\n"), "d.yaml", []byte("# new\n"), "p.yaml", nil)})
	want := "~ c.yaml from line 2: 1 lines out, 1 in\n    - # two\n    + # 2\n+ d.yaml (new, 1 lines)\n- p.yaml (removed, 7 lines)\n"
	if !strings.HasPrefix(r.Diff, want) || !strings.Contains(r.Diff, "orders") {
		t.Errorf("got\n%s\nwant it to begin with\n%s", r.Diff, want)
	}
}

// TestParallelApply has twenty operators and two control planes on one store;
// each change lands.
func TestParallelApply(t *testing.T) {
	s := newStore(t)
	planes := []*Catalog{newCatalog(t, s), newCatalog(t, s)}
	root := shop()
	for i := range 20 {
		root[fmt.Sprintf("s%d.yaml", i)] = scope(fmt.Sprintf("s%d", i))
	}
	apply(t, planes[0], map[string]map[string][]byte{"": root})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			set := fmt.Sprintf("s%d", i)
			_, err := planes[i%2].Apply(t.Context(), Change{Sets: map[string]map[string][]byte{set: {"w.yaml": workload(set)}}})
			if err != nil {
				t.Errorf("%s: %v", set, err)
			}
		})
	}
	wg.Wait()
	for _, c := range planes {
		if got := state(t, c); got.Rev != (Rev{1, 21}) || len(got.Sets) != 21 || !reaches(got, "orders", "payments") {
			t.Errorf("got revision %s with %d sets, want 1.21 with 21", got.Rev, len(got.Sets))
		}
	}
	records, err := planes[0].Audit.Recent(t.Context(), 0)
	require.NoError(t, err)
	if len(records) != 21 {
		t.Errorf("got %d audit records, want 21", len(records))
	}
}

// TestSameSetMeanwhile shows that a change is not merged over somebody else's
// change of the same set.
func TestSameSetMeanwhile(t *testing.T) {
	s := newStore(t)
	other := newCatalog(t, s)
	between := &hooked{Store: s}
	c := newCatalog(t, between)
	root := with(shop(), "s.yaml", scope("billing", "xbilling"))
	apply(t, c, map[string]map[string][]byte{"": root})
	for set, want := range map[string]error{"": ErrConflict, "billing": nil} {
		between.beforeTxn = func([]store.Op) {
			between.beforeTxn = nil
			theirs := files{"a.yaml": workload("x" + set), "c.yaml": []byte("# " + set + "\n")}
			if set == "" {
				theirs["s.yaml"] = root["s.yaml"]
			}
			apply(t, other, map[string]map[string][]byte{set: theirs})
		}
		_, err := c.Apply(t.Context(), Change{Sets: map[string]map[string][]byte{"": with(root, "d.yaml", []byte("# "+set+"\n"))}})
		if !errors.Is(err, want) {
			t.Errorf("while set %q changed: got %v, want %v", set, err, want)
		}
	}
}

// hooked calls beforeTxn before each transaction.
type hooked struct {
	store.Store
	beforeTxn func([]store.Op)
}

func (h *hooked) Txn(ctx context.Context, cmps []store.Cmp, ops []store.Op) (int64, error) {
	if h.beforeTxn != nil {
		h.beforeTxn(ops)
	}
	return h.Store.Txn(ctx, cmps, ops)
}

func TestWatch(t *testing.T) {
	s := newStore(t)
	writer, reader := newCatalog(t, s), newCatalog(t, s)
	got := make(chan State, 10)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- reader.Watch(ctx, func(s State) error { got <- s; return nil })
	}()
	if s := <-got; s.Rev.N != 0 {
		t.Errorf("got %s first, want 1.0", s.Rev)
	}
	apply(t, writer, map[string]map[string][]byte{"": shop()})
	if s := <-got; s.Rev.N != 1 || !reaches(s, "orders", "payments") {
		t.Errorf("got %s, want 1.1 in force", s.Rev)
	}
	apply(t, writer, map[string]map[string][]byte{"": with(shop(), "p.yaml", nil)})
	if s := <-got; s.Rev.N != 2 || reaches(s, "orders", "payments") {
		t.Errorf("got %s, want 1.2 in force", s.Rev)
	}
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
}

// TestUnusableRevision shows that a revision written by another version neither
// takes force nor the control plane down, and that a good one follows it.
func TestUnusableRevision(t *testing.T) {
	s := newStore(t)
	old := newCatalog(t, s)
	apply(t, old, map[string]map[string][]byte{"": shop()})
	b, err := old.readBase(t.Context())
	require.NoError(t, err)
	future := &loaded{files: files{"a.yaml": []byte("apiVersion: sallyport.dev/v9\n")}}
	future.sum = digest(future.files)
	e := entry{Rev: Rev{1, 2}, Sets: map[string]string{"": future.sum}}
	require.NoError(t, old.commit(t.Context(), b, e, map[string]*loaded{"": future}, store.Op{Key: "audit/x", Value: []byte("{}")}))

	c := newCatalog(t, s)
	got := make(chan State, 10)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- c.Watch(ctx, func(s State) error { got <- s; return nil })
	}()
	require.Eventually(t, func() bool { return strings.Contains(c.Problem(), "1.2 cannot be used") }, 5*time.Second, time.Millisecond)
	apply(t, newCatalog(t, s), map[string]map[string][]byte{"": shop()})
	if s := <-got; s.Rev.N != 3 || !reaches(s, "orders", "payments") {
		t.Errorf("got %s, want 1.3 in force", s.Rev)
	}
	if p := c.Problem(); p != "" {
		t.Errorf("got problem %q, want none", p)
	}
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
}
