package policy

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestProveCorners has what random sets seldom come to.
func TestProveCorners(t *testing.T) {
	const workloads = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: one, labels: {x: "1", y: "1"}}
spec: {ports: [{name: p, port: 80, protocol: grpc}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: two, labels: {x: "2", y: "2"}}
spec: {ports: [{name: p, port: 80, protocol: grpc}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: mixed, labels: {x: "1", y: "2"}}
spec: {}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: mixed2, labels: {x: "2", y: "1"}}
spec: {}
`
	doc := func(kind, name, spec string) string {
		return "---\napiVersion: sallyport.dev/v1\nkind: " + kind + "\nmetadata: {name: " + name + "}\nspec: " + spec + "\n"
	}
	policy := func(spec string) string { return doc("Policy", "p", spec) }
	never := func(from, to string) string { return doc("Invariant", "v", "{never: {from: "+from+", to: "+to+"}}") }
	long := "/" + strings.Repeat("a", 2048-len(td.IDString())-len("/")-len("/x"))
	for name, c := range map[string]struct {
		files string
		want  string // in the proof; "" where the invariant holds
	}{
		"a value of a Scope that another team's policy excludes": {
			doc("Scope", "s", `{ids: [/s/**], labels: {y: ["3", "1"]}}`) +
				policy(`{to: {workload: one}, allow: [{from: [{id: /s/*}], ports: [p]}], deny: [{from: [{labels: {y: "1", x: "1"}}], ports: [all]}]}`) +
				never("{id: /s/**}", "{workload: one}"), "labels y: 1"},
		"a value of a Scope that no deny names": {
			doc("Scope", "s", `{ids: [/s/**], labels: {y: ["1", "2"]}}`) +
				policy(`{to: {workload: one}, allow: [{from: [{id: /s/*}], ports: [p]}], deny: [{from: [{labels: {y: "1"}}], ports: [all]}]}`) +
				never("{id: /s/**}", "{workload: one}"), "labels y: 2"},
		"every value of a Scope is denied": {
			doc("Scope", "s", `{ids: [/s/**], labels: {y: ["1", "2"]}}`) +
				policy(`{to: {workload: one}, allow: [{from: [{id: /s/*}], ports: [p]}], deny: [{from: [{labels: {y: "1"}}, {labels: {y: "2"}}], ports: [all]}]}`) +
				never("{id: /s/**}", "{workload: one}"), ""},
		"two keys, of which either lets it pass": {
			doc("Scope", "s", `{ids: [/s/**], labels: {x: ["1", "2"], y: ["1", "2"]}}`) +
				policy(`{to: {workload: one}, allow: [{from: [{id: /s/*}], ports: [p]}], deny: [{from: [{labels: {x: "1", y: "1"}}, {labels: {x: "1", y: "2"}}, {labels: {x: "2", y: "1"}}], ports: [all]}]}`) +
				never("{id: /s/**}", "{workload: one}"), "labels x: 2, y: 2"},
		"a port by number that nobody named": {
			policy(`{to: {labels: {x: "1"}}, allow: [{from: [{workload: two}], ports: [80]}], deny: [{from: [{workload: two}], ports: [p]}]}`) +
				never("{workload: two}", `{labels: {x: "1"}}`), "any-port (80)"},
		"a port by name with another number": {
			policy(`{to: {labels: {x: "1"}}, allow: [{from: [{workload: two}], ports: [p]}], deny: [{from: [{workload: two}], ports: [80]}]}`) +
				never("{workload: two}", `{labels: {x: "1"}}`), "p (65535)"},
		"one ID with the labels of both ends": {
			policy(`{to: {labels: {y: "1"}}, allow: [{from: [{labels: {x: "2"}}], ports: [p]}]}`) +
				never("{id: /c}", "{id: /c}"), "spiffe://shop.example/c with labels x: 2, y: 1"},
		"one ID cannot have two values of a label": {
			policy(`{to: {labels: {x: "1"}}, allow: [{from: [{labels: {x: "2"}}], ports: [p]}]}`) +
				never("{id: /c}", "{id: /c}"), ""},
		"one ID with both, of which one is denied": {
			policy(`{to: {labels: {y: "1"}}, allow: [{from: [{labels: {x: "2"}}], ports: [p]}], deny: [{from: [{labels: {x: "2", y: "1"}}], ports: [all]}]}`) +
				never("{id: /c}", "{id: /c}"), ""},
		"an ID of ten segments": {
			policy(`{to: {workload: one}, allow: [{from: [{id: /**}], ports: [p]}], deny: [{from: [{id: /*}, {id: /*/*}, {id: /*/*/*}], ports: [all]}]}`) +
				never("{id: /**}", "{workload: one}"), "spiffe://shop.example/any-caller/any-caller/any-caller/any-caller"},
		"a method that is called like others": {
			policy(`{to: {workload: one}, allow: [{from: [{workload: two}], ports: [p]}], deny: [{from: [{workload: two}], ports: [p], http: [{methods: [OTHER]}, {hosts: [other.invalid]}, {headers: [{name: x-a, equals: other}]}]}]}`) +
				never("{workload: two}", "{workload: one}"), "rule p"},
		"an ID as long as one can be": {
			policy(`{to: {workload: one}, allow: [{from: [{id: `+long+`/*}], ports: [p]}]}`) + never("{id: "+long+"/*}", "{workload: one}"), "rule p"},
		"no other ID in a Scope, nor any label": {
			doc("Scope", "s", `{ids: [/s/**], labels: {y: ["1"]}}`) +
				policy(`{to: {workload: one}, allow: [{from: [{id: /s/**}], ports: [p]}]}`) + never(`{labels: {y: "2"}}`, "{workload: one}"), ""},
		"evidence that fixes what fills a template in": {
			doc("Workload", "k", `{id: "/ns/{namespace}/{serviceAccount}", attest: [{kind: kubernetes, namespace: shop}]}`) +
				policy(`{to: {workload: one}, allow: [{from: [{id: /ns/dev/*}], ports: [p]}]}`) + never("{workload: k}", "{workload: one}"), ""},
		"a deny of the whole connection, and many kinds of request": {
			policy(`{to: {workload: one}, allow: [{from: [{id: /**}], ports: [p], http: [{headers: [{name: x-a, equals: a}]}, {headers: [{name: x-a, equals: b}]}, {headers: [{name: x-a, equals: c}]}, {headers: [{name: x-a, equals: d}]}, {headers: [{name: x-a, equals: e}]}]}], deny: [{from: [{labels: {x: "2"}}], ports: [all]}]}`) +
				never(`{labels: {x: "2"}}`, "{workload: one}"), ""},
		"a template's own labels": {
			doc("Workload", "t", `{id: "/t/{user}", attest: [{kind: unix, via: [/agents/a], path: /x}]}`) +
				policy(`{to: {workload: one}, allow: [{from: [{id: /t/*}], ports: [p]}]}`) +
				never(`{labels: {x: "1"}}`, "{workload: one}"), ""},
		"an External that nobody defined": {
			policy(`{to: {id: /external/*}, allow: [{from: [{workload: one}], ports: [all]}], deny: [{from: [{workload: one}], ports: [http, grpc]}]}`) +
				doc("External", "bank", "{host: bank.example, port: 443, protocol: http, tls: true}") + doc("External", "mail", "{host: mail.example, port: 443, protocol: grpc, tls: true}") +
				never("{workload: one}", "{id: /external/*}"), "port tcp (65535)"},
		"no Sallyport's own ID is a destination": {
			policy(`{to: {id: /sallyport/*}, allow: [{from: [{workload: one}], ports: [all]}]}`) + never("{workload: one}", "{id: /sallyport/*}"), ""},
		"Sallyport's own ID as a source": {
			policy(`{to: {workload: one}, allow: [{from: [{id: /sallyport/*}], ports: [p]}]}`) + never("{id: /sallyport/**}", "{workload: one}"), "/sallyport/any-caller"},
		"IDs of another mesh have no labels": {
			doc("TrustDomain", "partner", `{trustDomain: partner.example, bundleEndpoint: {url: "https://partner.example/bundle", profile: https_web}}`) +
				policy(`{to: {workload: one}, allow: [{from: [{id: "spiffe://partner.example/**"}], ports: [p]}]}`) +
				never(`{labels: {x: "1"}}`, "{workload: one}"), ""},
		"IDs of another mesh": {
			doc("TrustDomain", "partner", `{trustDomain: partner.example, bundleEndpoint: {url: "https://partner.example/bundle", profile: https_web}}`) +
				policy(`{to: {workload: one}, allow: [{from: [{id: "spiffe://partner.example/**"}], ports: [p]}], deny: [{from: [{id: "spiffe://partner.example/a"}], ports: [all]}]}`) +
				never(`{id: "spiffe://partner.example/**"}`, `{labels: {x: "1"}}`), "spiffe://partner.example/any-caller"},
	} {
		t.Run(name, func(t *testing.T) {
			set, err := ParseFiles("", map[string][]byte{"a.yaml": []byte(workloads + c.files)})
			require.NoError(t, err)
			sets := []*Set{set, {Name: "s"}}
			if strings.HasPrefix(name, "a value of a Scope that another") {
				set.Scopes = append(set.Scopes, Scope{Name: "other", IDs: []ScopeID{{ID: "/o/*"}}, Labels: map[string][]string{"y": {"3"}}})
				sets = append(sets, &Set{
					Name: "other", Policies: []Policy{{Name: "o", Set: "other", To: Selector{Labels: map[string]string{"y": "3"}}}},
					Workloads: []Workload{{Name: "o", Set: "other", ID: "/o/o", Labels: map[string]string{"y": "3"}}},
				})
			}
			rs, err := Compile(td, sets)
			require.NoError(t, err)
			proof := Prove(rs, sets)
			if got := proof.String(); c.want == "" && proof.Failed() || c.want != "" && !strings.Contains(got, c.want) {
				t.Errorf("got\n%s\nwant %q", got, c.want)
			}
			for _, x := range proof.Breaches {
				if x.From.ID.Path() == "/sallyport/any-caller" {
					continue // nobody can define it: it is issued to Sallyport itself
				}
				if problem := confirm(sets, x); problem != "" {
					t.Errorf("a breach that is none: %s\n%s", problem, x)
				}
			}
		})
	}
}
