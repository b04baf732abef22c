package catalog

import (
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// fridayRoot is what the platform's engineers wrote: a set for billing, bounded by
// its Scope, a guardrail and what must never be.
func fridayRoot() files {
	return with(shop(), "platform.yaml", []byte(`apiVersion: sallyport.dev/v1
kind: Scope
metadata: {name: billing}
spec:
  owners: [oidc-group:billing]
  ids: [/billing/**]
  labels: {team: [billing], env: [dev]}
  evidence: [{kind: kubernetes, namespace: billing}]
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: ledger, labels: {team: finance, env: prod}}
spec:
  attest: [{kind: kubernetes, namespace: finance, serviceAccount: ledger}]
  ports: [{name: http, port: 8080, protocol: http}]
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: ledger}
spec:
  to: {workload: ledger}
  allow: [{from: [{labels: {team: finance}}, {id: /billing/*}], ports: [http]}]
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: wall}
spec:
  to: {labels: {env: prod}}
  deny: [{from: [{labels: {env: dev}}], ports: [all]}]
---
apiVersion: sallyport.dev/v1
kind: Invariant
metadata: {name: dev-never-reaches-prod}
spec: {never: {from: {labels: {env: dev}}, to: {labels: {env: prod}}}}
`))
}

// fridayTeam is billing's own file.
const fridayTeam = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: invoices, labels: {team: billing, env: dev}}
spec:
  id: /billing/invoices
  attest: [{kind: kubernetes, namespace: billing, serviceAccount: invoices}]
  ports: [{name: http, port: 8080, protocol: http}]
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: invoices}
spec:
  to: {workload: invoices}
  allow: [{from: [{workload: orders}], ports: [http]}]
`

// fridayTricks are the ways in which a team could help itself.
var fridayTricks = map[string]struct{ from, to, text string }{
	"another team's label": {"team: billing", "team: finance", "label team: finance of workload invoices is not within Scope billing"},
	"its env changed":      {"env: dev", "env: prod", "label env: prod of workload invoices is not within Scope billing"},
	"its env dropped":      {"team: billing, env: dev", "team: billing", "workload invoices without label env is not within Scope billing"},
	"a name elsewhere":     {"id: /billing/invoices", "id: /invoices", "id /invoices is not within Scope billing"},
	"another's evidence":   {"namespace: billing, serviceAccount: invoices", "namespace: finance, serviceAccount: ledger", `of workload invoices is not within Scope billing`},
	"evidence of any kind": {"{kind: kubernetes, namespace: billing, serviceAccount: invoices}", "{kind: join-token}", `evidence "join-token" of workload invoices is not within Scope billing`},
	"a rule for another":   {"to: {workload: invoices}", "to: {workload: ledger}", "spec.to of Policy invoices selects ledger (/ledger), which is not within Scope billing"},
	"a rule for everybody": {"to: {workload: invoices}", "to: {id: /**}", "spec.to of Policy invoices, /**, is not within Scope billing"},
	"a door of its own": {"kind: Policy\nmetadata: {name: invoices}\nspec:\n  to: {workload: invoices}\n  allow: [{from: [{workload: orders}], ports: [http]}]\n",
		"kind: Defaults\nmetadata: {name: door}\nspec: {to: {workload: invoices}, audit: {until: 2030-01-01T00:00:00Z}}\n", "Scope billing cannot grant it"},
	"a veto by a test": {"---\n", "---\napiVersion: sallyport.dev/v1\nkind: PolicyTest\nmetadata: {name: pin}\nspec: {cases: [{from: orders, to: payments, expect: allow}]}\n---\n",
		"a case of PolicyTest pin asks about payments (/payments), which is not within Scope billing"},
	"a wider Scope": {"---\n", "---\napiVersion: sallyport.dev/v1\nkind: Scope\nmetadata: {name: billing}\nspec: {ids: [/**]}\n---\n", "Scope billing cannot grant it"},
	"an invariant of the same name": {"---\n", "---\napiVersion: sallyport.dev/v1\nkind: Invariant\nmetadata: {name: dev-never-reaches-prod}\nspec: {never: {from: {id: /a}, to: {id: /b}}}\n---\n",
		"Scope billing cannot grant it"},
}

// On a Friday afternoon a team tries, through apply and through its folder, to give
// itself what its Scope does not grant. Each is refused, the Scope named, and what
// was in force stays.
func TestF7RelabelFriday(t *testing.T) {
	root, team := fridayRoot(), files{"billing.yaml": []byte(fridayTeam)}
	c := newCatalog(t, newStore(t))
	apply(t, c, map[string]map[string][]byte{"": root, "billing": team})
	dir := t.TempDir()
	sub := filepath.Join(dir, "billing")
	write(t, dir, root)
	write(t, sub, team)
	w := follow(t, newStore(t), dir)
	good := func(s State) bool { return s.Rev.N > 0 && len(s.Sets) == 2 && reaches(s, "orders", "payments") }
	w.await(t, "start", good)
	before := w.settled(t).Rev
	for name, trick := range fridayTricks {
		t.Run(name, func(t *testing.T) {
			require.Contains(t, fridayTeam, trick.from)
			edited := files{"billing.yaml": []byte(strings.Replace(fridayTeam, trick.from, trick.to, 1))}
			_, err := c.Apply(t.Context(), Change{Sets: map[string]map[string][]byte{"billing": edited}, Actor: "team"})
			var mistakes policy.Errors
			require.ErrorAs(t, err, &mistakes)
			require.ErrorContains(t, err, trick.text)
			if got := state(t, c); got.Rev != (Rev{1, 1}) {
				t.Errorf("apply: got revision %s, want 1.1 as before", got.Rev)
			}
			if rec := lastRecord(t, c); rec.Actor != "team" || rec.Result != "refused" || !strings.Contains(rec.Detail, trick.text) {
				t.Errorf("got audit record %+v", rec)
			}
			write(t, sub, edited)
			w.awaitProblem(t, trick.text)
			if got := state(t, w.Catalog); got.Rev != before || !good(got) {
				t.Errorf("folder: got revision %s, want %s as before", got.Rev, before)
			}
			write(t, sub, team)
			w.awaitProblem(t, "")
		})
	}
}

// The invariant holds against the root set itself: without the wall the rule for
// billing's IDs would let dev in.
func TestApplyRefusesBrokenInvariant(t *testing.T) {
	c := newCatalog(t, newStore(t))
	root := fridayRoot()
	r := apply(t, c, map[string]map[string][]byte{"": root, "billing": {"billing.yaml": []byte(fridayTeam)}})
	if !strings.Contains(r.Tests, "PASS: 1 invariant holds") {
		t.Errorf("got %q, want the outcome of the proof", r.Tests)
	}
	broken := maps.Clone(root)
	broken["platform.yaml"] = []byte(strings.Replace(string(root["platform.yaml"]), "ports: [all]}]", "ports: [all], mode: audit}]", 1))
	_, err := c.Apply(t.Context(), Change{Sets: map[string]map[string][]byte{"": broken}, Actor: "ann"})
	require.ErrorIs(t, err, ErrInvariants)
	for _, want := range []string{"dev-never-reaches-prod (platform.yaml:33)", "from invoices (spiffe://shop.example/billing/invoices)", "to   ledger", "rule ledger (platform.yaml:22)"} {
		require.ErrorContains(t, err, want)
	}
	if got := state(t, c); got.Rev != (Rev{1, 1}) {
		t.Errorf("got revision %s, want 1.1 as before", got.Rev)
	}
	if rec := lastRecord(t, c); rec.Actor != "ann" || rec.Result != "refused" || !strings.Contains(rec.Detail, "dev-never-reaches-prod") {
		t.Errorf("got audit record %+v", rec)
	}
}
