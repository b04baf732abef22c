package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// TestTemplateIsItsWorkloads: a template decides as the workloads would that it
// stands for, each written out with its own ID and labels.
func TestTemplateIsItsWorkloads(t *testing.T) {
	names := []string{"a", "b", "c"}
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.SampledFrom(names)
		selector := rapid.Custom(func(t *rapid.T) string {
			return rapid.SampledFrom([]string{
				"{workload: extra}", "{labels: {app: extra}}", "{labels: {kind: t}}",
				"{labels: {ns: " + name.Draw(t, "ns") + "}}",
				"{labels: {kind: t, ns: " + name.Draw(t, "ns") + "}}",
				"{labels: {ns: " + name.Draw(t, "ns") + ", sa: " + name.Draw(t, "sa") + "}}",
				"{id: /ns/" + name.Draw(t, "ns") + "/sa/" + name.Draw(t, "sa") + "}",
				"{id: /ns/*/sa/" + name.Draw(t, "sa") + "}", "{id: /ns/**}", "{id: /**}",
			}).Draw(t, "selector")
		})
		var policies strings.Builder
		for i := range rapid.IntRange(1, 6).Draw(t, "policies") {
			effect := rapid.SampledFrom([]string{"allow", "allow", "deny"}).Draw(t, "effect")
			ports := rapid.SampledFrom([]string{"[all]", "[http]", "[80]"}).Draw(t, "ports")
			fmt.Fprintf(&policies, "---\napiVersion: sallyport.dev/v1\nkind: Policy\nmetadata: {name: p%d}\nspec: {to: %s, %s: [{from: [%s], ports: %s}]}\n",
				i, selector.Draw(t, "to"), effect, selector.Draw(t, "from"), ports)
		}
		const extra = "---\napiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: extra, labels: {app: extra}}\n" +
			"spec: {ports: [{name: http, port: 80, protocol: http}]}\n"
		const form = "---\napiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: %s, labels: {kind: t, ns: %q, sa: %q}}\n" +
			"spec: {id: %q, attest: [{kind: kubernetes, namespace: %q, serviceAccount: %q}], ports: [{name: http, port: 80, protocol: http}]}\n"
		templated := extra + strings.NewReplacer(", namespace: \"*\", serviceAccount: \"*\"", "").Replace(
			fmt.Sprintf(form, "t", "{namespace}", "{serviceAccount}", "/ns/{namespace}/sa/{serviceAccount}", "*", "*"))
		written := extra
		ids := []spiffeid.ID{spiffeid.RequireFromPath(td, "/extra")}
		for _, ns := range names {
			for _, sa := range names {
				path := "/ns/" + ns + "/sa/" + sa
				written += fmt.Sprintf(form, "t-"+ns+"-"+sa, ns, sa, path, ns, sa)
				ids = append(ids, spiffeid.RequireFromPath(td, path))
			}
		}
		got, want := compileText(t, templated+policies.String()), compileText(t, written+policies.String())
		for _, dst := range ids {
			mine := got.For(dst)
			for _, src := range ids {
				q := Request{Src: src, Dst: dst, Port: 80}
				if g, w := got.Decide(q).Effect, want.Decide(q).Effect; g != w || mine.Decide(q).Effect != w {
					t.Fatalf("%s → %s: %s by the template, %s on the sidecar, %s written out\n%s", src, dst, g, mine.Decide(q).Effect, w, policies.String())
				}
				if got.Opens(src, dst) != want.Opens(src, dst) {
					t.Fatalf("%s → %s: Opens differs", src, dst)
				}
			}
			w, _ := want.Workload(dst)
			g, ok := got.Workload(dst)
			if !ok || fmt.Sprint(g.Labels) != fmt.Sprint(w.Labels) || g.ID != w.ID {
				t.Fatalf("%s: got %v %v, want %v", dst, g.ID, g.Labels, w.Labels)
			}
		}
	})
}

func compileText(t require.TestingT, text string) *Ruleset {
	set, err := ParseFiles("", map[string][]byte{"mesh.yaml": []byte(text)})
	require.NoError(t, err)
	rs, err := Compile(td, []*Set{set})
	require.NoError(t, err)
	return rs
}

func TestResolve(t *testing.T) {
	rs := compileText(t, `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: t}
spec: {id: "/ns/{namespace}/sa/{serviceAccount}", attest: [{kind: kubernetes}]}
`)
	w := rs.Templates()[0]
	one := func(ns, sa string) Selectors {
		return Selectors{"namespace": {ns}, "serviceAccount": {sa}, "podName": {"x"}}
	}
	id, err := w.Resolve(one("shop", "payments"))
	require.NoError(t, err)
	if got, want := id.String(), "spiffe://shop.example/ns/shop/sa/payments"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	for name, s := range map[string]Selectors{
		"missing":   {"namespace": {"shop"}},
		"two":       {"namespace": {"a", "b"}, "serviceAccount": {"x"}},
		"empty":     one("shop", ""),
		"slash":     one("shop", "a/b"),
		"D2 dots":   one("shop", ".."),
		"D2 escape": one("shop", "%2e"),
		"unicode":   one("shop", "ä"),
		"long":      one("shop", strings.Repeat("a", 3000)),
	} {
		if id, err := w.Resolve(s); err == nil {
			t.Errorf("%s: got %s", name, id)
		}
	}
}

func TestAttestMatch(t *testing.T) {
	agent := spiffeid.RequireFromPath(td, "/agents/one")
	shop := Attest{Kind: Kubernetes, Issuer: "prod", Select: map[string]string{"namespace": "shop", "serviceAccount": "payments"}}
	host := Attest{Kind: Unix, Via: []string{"/agents/one"}, Select: map[string]string{"uid": "1000", "group": "docker"}}
	anyCA := Attest{Kind: X509Pop, Select: map[string]string{"dns": "a"}}
	rs := compileText(t, `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: w}
spec: {attest: [{kind: unix, via: [/agents/one], uid: 1000}]}
`)
	compiled := rs.Workloads()[0].Attest[0]
	for name, c := range map[string]struct {
		a            Attest
		kind, issuer string
		via          spiffeid.ID
		s            Selectors
		missed       string // "": it matches
	}{
		"match":        {shop, Kubernetes, "prod", spiffeid.ID{}, Selectors{"namespace": {"shop"}, "serviceAccount": {"payments"}, "node": {"n"}}, ""},
		"value":        {shop, Kubernetes, "prod", spiffeid.ID{}, Selectors{"namespace": {"dev"}, "serviceAccount": {"payments"}}, "namespace: want shop, got dev"},
		"absent":       {shop, Kubernetes, "prod", spiffeid.ID{}, Selectors{"namespace": {"shop"}}, "serviceAccount: want payments, got none"},
		"other issuer": {shop, Kubernetes, "test", spiffeid.ID{}, Selectors{"namespace": {"shop"}, "serviceAccount": {"payments"}}, "issuer: want prod, got test"},
		"other kind":   {shop, OIDC, "prod", spiffeid.ID{}, nil, "kind: want kubernetes, got oidc"},
		"process":      {host, Unix, "", agent, Selectors{"uid": {"1000"}, "group": {"users", "docker"}}, ""},
		"D4 no agent":  {host, Unix, "", spiffeid.ID{}, Selectors{"uid": {"1000"}, "group": {"docker"}}, "via: want /agents/one, got none"},
		"D4 not named": {host, Unix, "", spiffeid.RequireFromPath(td, "/agents/two"), Selectors{"uid": {"1000"}, "group": {"docker"}}, "via: want /agents/one, got /agents/two"},
		"D4 foreign":   {compiled, Unix, "", spiffeid.RequireFromString("spiffe://partner.example/agents/one"), Selectors{"uid": {"1000"}}, "via: want an agent of shop.example, got spiffe://partner.example/agents/one"},
		"D4 compiled":  {compiled, Unix, "", agent, Selectors{"uid": {"1000"}}, ""},
		"D4 vouched":   {shop, Kubernetes, "prod", agent, Selectors{"namespace": {"shop"}, "serviceAccount": {"payments"}}, "via: want none, got spiffe://shop.example/agents/one"},
		"only issuer":  {anyCA, X509Pop, "", spiffeid.ID{}, Selectors{"dns": {"b", "a"}}, ""},
		"D3 second CA": {anyCA, X509Pop, "factory", spiffeid.ID{}, Selectors{"dns": {"a"}}, "issuer: want none, got factory"},
		"hostile":      {anyCA, X509Pop, "", spiffeid.ID{}, Selectors{"dns": {"\x1b[2J", "a, b", "c"}}, `dns: want a, got "\x1b[2J", "a, b", c`},
		"many":         {anyCA, X509Pop, "", spiffeid.ID{}, Selectors{"dns": {"1", "2", "3", "4", "5", "6", "7"}}, "dns: want a, got 1, 2, 3, 4, 5, 2 more"},
		"token":        {Attest{Kind: JoinToken}, JoinToken, "", spiffeid.ID{}, nil, "kind: a join token names its workload by itself"},
		"zero":         {Attest{}, "", "", spiffeid.ID{}, nil, "kind: want none, got none"},
		"unknown kind": {Attest{Kind: "tpm"}, "tpm", "", spiffeid.ID{}, nil, "kind: want tpm, got tpm"},
		"group":        {host, Unix, "", agent, Selectors{"uid": {"1000"}, "group": {"users"}}, "group: want docker, got users"},
	} {
		ok, missed := c.a.Match(c.kind, c.issuer, c.via, c.s)
		if ok != (c.missed == "") || missed != c.missed {
			t.Errorf("%s: got %v, %q; want %q", name, ok, missed, c.missed)
		}
	}
}

// TestManyAttestedWorkloads: the search for evidence that two workloads share does
// not compare each with each.
func TestManyAttestedWorkloads(t *testing.T) {
	var b strings.Builder
	for i := range 3000 {
		fmt.Fprintf(&b, "---\napiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: w%d}\n"+
			"spec: {attest: [{kind: kubernetes, namespace: n, serviceAccount: w%[1]d}]}\n", i)
	}
	fmt.Fprint(&b, "---\napiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: last}\n"+
		"spec: {attest: [{kind: kubernetes, namespace: n, serviceAccount: w7, podName: x}]}\n")
	set, err := ParseFiles("", map[string][]byte{"mesh.yaml": []byte(b.String())})
	require.NoError(t, err)
	_, err = Compile(td, []*Set{set})
	var all Errors
	if !errors.As(err, &all) || len(all) != 1 || !strings.Contains(all[0].Msg, "w7 and last") && !strings.Contains(all[0].Msg, "last and w7") {
		t.Errorf("got %v", err)
	}
}
