package policy

import (
	"net/http"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// oneRule has everything allowed but what the matches of a deny name.
func oneRule(effect Effect, matches ...HTTPMatch) *Ruleset {
	everyone := []identity.Pattern{pattern("/**")}
	to := []identity.Pattern{pattern("/shop/payments")}
	rules := []Rule{{Ref: RuleRef{Policy: "p", File: "f.yaml", Line: 1}, Effect: effect, From: everyone, To: to, HTTP: matches}}
	if effect == Deny {
		rules = append(rules, Rule{Ref: RuleRef{Policy: "p", File: "f.yaml", Line: 2}, Effect: Allow, From: everyone, To: to})
	}
	return NewRuleset(rules)
}

func effectOf(rs *Ruleset, h HTTPRequest) Effect {
	return rs.Decide(Request{Src: id("/shop/orders"), Dst: id("/shop/payments"), Port: 8080, HTTP: &h}).Effect
}

// paths that a rule shall never be asked about: two readers could disagree.
func refusedPaths(t *testing.T, paths ...string) {
	t.Helper()
	deny := oneRule(Deny, HTTPMatch{Paths: []string{"/private/**"}})
	allow := oneRule(Allow, HTTPMatch{Paths: []string{"/**", "/"}})
	for _, p := range paths {
		h := HTTPRequest{Method: "GET", Path: p}
		if h.Check() == nil {
			t.Errorf("%q counts as canonical", p)
		}
		if effectOf(deny, h) != Deny {
			t.Errorf("%q is allowed past a deny", p)
		}
		if effectOf(allow, h) != Deny {
			t.Errorf("%q is allowed", p)
		}
	}
	for _, p := range []string{"/", "/info", "/info/", "/a-b_c.d~e/%20/%C3%A9", "/...", "/a.b", "/.a", "/a..", "/x(1)!$&'*+,=:@"} {
		if effectOf(deny, HTTPRequest{Method: "GET", Path: p}) != Allow {
			t.Errorf("%q is refused: nothing was tested", p)
		}
	}
}

func TestA1DotSegments(t *testing.T) {
	refusedPaths(t, "/info/../private", "/./private", "/info/.", "/info/..", "/..", "/.", "/../", "/info/./../private/")
}

func TestA2Encodings(t *testing.T) {
	refusedPaths(t, "//a", "/a//b", "//", "/%2fprivate", "/info%2F..%2Fprivate", "/info%5cprivate", `/info\private`, "/%252fprivate", "/%2e%2e/private",
		"/%2E", "/%00", "/a%00", "/%70rivate", "/private%3bx", "/private;x", "/%C0%AFprivate", "/%ED%A0%80", "/%F5%80%80%80", "/%C3", "/%C3%28", "/%E2%82",
		"/%", "/%4", "/%zz", "/a%2", "/é", "/a b", "/a\tb", "/%7f", "/%0d%0a", "/a|b", "/%2a", "/%c3%a9", "", "private", "http://x/private", "*",
		"/"+strings.Repeat("a", MaxPath))
}

func TestA3Fragment(t *testing.T) {
	refusedPaths(t, "/info#/../private", "/private#x", "/%23", "/info?x", "/%3f")
}

func TestA6RepeatedHeader(t *testing.T) {
	match := HTTPMatch{Headers: []HeaderMatch{{Name: "X-Team", Equals: "red"}}}
	deny, allow := oneRule(Deny, match), oneRule(Allow, match)
	for _, c := range []struct {
		lines       []string
		deny, allow Effect
	}{
		{nil, Allow, Deny},
		{[]string{"red"}, Deny, Allow},
		{[]string{"red", "blue"}, Deny, Deny},
		{[]string{"blue", "red"}, Deny, Deny},
		{[]string{"red", "red"}, Deny, Deny},
		{[]string{"red,blue"}, Deny, Deny},
		{[]string{"blue, red"}, Deny, Deny},
		{[]string{"blue ,\tred "}, Deny, Deny},
		{[]string{" red"}, Deny, Deny},
		{[]string{"blue"}, Allow, Deny},
		{[]string{"Red"}, Allow, Deny},
		{[]string{"redder", "x,bred"}, Allow, Deny},
		{[]string{""}, Allow, Deny},
	} {
		h := HTTPRequest{Method: "GET", Path: "/", Header: map[string][]string{"X-Team": c.lines}}
		if len(c.lines) == 0 {
			h.Header = nil
		}
		if got := effectOf(deny, h); got != c.deny {
			t.Errorf("a deny of %q: got %s", c.lines, got)
		}
		if got := effectOf(allow, h); got != c.allow {
			t.Errorf("an allow of %q: got %s", c.lines, got)
		}
	}
}

func TestA7Casing(t *testing.T) {
	set, err := ParseFiles("", map[string][]byte{"a.yaml": []byte(`apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: payments}
spec: {id: /shop/payments, ports: [{name: http, port: 8080, protocol: http}]}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: p}
spec:
  to: {workload: payments}
  allow: [{from: [{id: /**}], ports: [http]}]
  deny: [{from: [{id: /**}], ports: [http], http: [{methods: [POST], headers: [{name: x-TEAM, present: true}]}]}]
`)})
	if err != nil {
		t.Fatal(err)
	}
	rs, err := Compile(td, []*Set{set})
	if err != nil {
		t.Fatal(err)
	}
	header := http.Header{}
	header.Set("X-team", "red")
	if effectOf(rs, HTTPRequest{Method: "POST", Path: "/", Header: header}) != Deny {
		t.Error("the casing of a header's name counts")
	}
	for _, m := range []string{"post", "Post", "POST ", ""} {
		if effectOf(rs, HTTPRequest{Method: m, Path: "/", Header: header}) != Deny {
			t.Errorf("method %q slips past a deny of POST", m)
		}
	}
	if effectOf(rs, HTTPRequest{Method: "GET", Path: "/", Header: header}) != Allow {
		t.Error("GET is refused: nothing was tested")
	}
}

func TestA9ExactBytes(t *testing.T) {
	rs := oneRule(Allow, HTTPMatch{Paths: []string{"/v1/a.b", "/x/*/y", "/z/**"}, Hosts: []string{"a.example"}})
	for p, want := range map[string]Effect{
		"/v1/a.b": Allow, "/v1/aXb": Deny, "/v1/a.b/": Deny, "/v1/a.b/c": Deny, "/V1/a.b": Deny, "/p/v1/a.b": Deny,
		"/x/1/y": Allow, "/x//y": Deny, "/x/y": Deny, "/x/1/2/y": Deny, "/x/1/yy": Deny,
		"/z": Deny, "/z/": Deny, "/z/a": Allow, "/z/a/b": Allow, "/z/a/": Deny, "/zz/a": Deny,
	} {
		if got := effectOf(rs, HTTPRequest{Method: "GET", Path: p, Host: "a.example"}); got != want {
			t.Errorf("%s: got %s", p, got)
		}
	}
	if effectOf(rs, HTTPRequest{Method: "GET", Path: "/z/a", Host: "aXexample"}) != Deny {
		t.Error("a dot of a host matches any byte")
	}
	ids := NewRuleset([]Rule{{Effect: Allow, From: []identity.Pattern{pattern("/a.b")}, To: []identity.Pattern{pattern("/shop/payments")}}})
	if ids.Decide(Request{Src: id("/aXb"), Dst: id("/shop/payments"), Port: 1}).Effect != Deny {
		t.Error("a dot of an ID matches any byte")
	}
}

func TestA10Host(t *testing.T) {
	deny := oneRule(Deny, HTTPMatch{Hosts: []string{"admin.example"}})
	for _, host := range []string{"admin.example", "Admin.example", "admin.example.", "admin.example:80", "admin..example", ".admin.example", "admin.example ", "user@admin.example", "admin.example/x", "[::1", "[]"} {
		if effectOf(deny, HTTPRequest{Method: "GET", Path: "/", Host: host}) != Deny {
			t.Errorf("host %q slips past a deny", host)
		}
	}
	for _, host := range []string{"shop.example", "192.0.2.1", "[2001:db8::1]", ""} {
		if effectOf(deny, HTTPRequest{Method: "GET", Path: "/", Host: host}) != Allow {
			t.Errorf("host %q is refused: nothing was tested", host)
		}
	}
}

// F1: nothing is allowed by nothing.
func TestF1NothingAllows(t *testing.T) {
	q := Request{Src: id("/shop/orders"), Dst: id("/shop/payments"), Port: 8080}
	none := []Rule{{Effect: Deny, From: []identity.Pattern{pattern("/other")}, To: []identity.Pattern{pattern("/**")}}}
	for name, rs := range map[string]*Ruleset{
		"nil": nil, "empty": NewRuleset(nil), "deny only": NewRuleset(none), "audited deny only": NewRuleset([]Rule{{Effect: Deny, Audit: true, From: []identity.Pattern{pattern("/**")}, To: []identity.Pattern{pattern("/**")}}}),
		"no source":      NewRuleset([]Rule{{Effect: Allow, To: []identity.Pattern{pattern("/**")}}}),
		"no destination": NewRuleset([]Rule{{Effect: Allow, From: []identity.Pattern{pattern("/**")}}}),
		"last rule gone": oneRule(Allow).At(epoch).For(id("/shop/other")),
	} {
		for _, h := range []*HTTPRequest{nil, {Method: "GET", Path: "/"}} {
			q.HTTP = h
			if got := rs.Decide(q); got != (Decision{}) {
				t.Errorf("%s: got %+v", name, got)
			}
		}
	}
}

// F3: who has no identity is let in by no rule that does not say so, and is none
// of those that a deny leaves out.
func TestF3NoIdentity(t *testing.T) {
	to := []identity.Pattern{pattern("/shop/payments")}
	allow := Rule{Effect: Allow, From: []identity.Pattern{pattern("/**")}, To: to}
	deny := Rule{Effect: Deny, From: []identity.Pattern{pattern("/shop/orders")}, To: to}
	q := Request{Src: spiffeid.ID{}, Dst: id("/shop/payments"), Port: 8080}
	if got := NewRuleset([]Rule{allow, deny}).Decide(q); got.Effect != Deny {
		t.Errorf("got %+v", got)
	}
	allow.Anonymous = true
	if got := NewRuleset([]Rule{allow, deny}).Decide(q); got.Effect != Allow {
		t.Errorf("named, and refused: %+v", got)
	}
	deny.Anonymous = true
	if got := NewRuleset([]Rule{allow, deny}).Decide(q); got.Effect != Deny {
		t.Errorf("denied, and let in: %+v", got)
	}
}

// A path is canonical exactly if it is the only way to write what it says.
func FuzzCheckPath(f *testing.F) {
	for _, s := range []string{"/", "/a/b", "/%C3%A9", "/%2f", "/a//b", "/../x", "/%e2%82%ac", "/a;b", "/%F0%9F%98%80", "/%ED%A0%80"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, path string) {
		if got, want := CheckPath(path) == nil, canonical(HTTPRequest{Method: "GET", Path: path}); got != want {
			t.Errorf("%q: canonical %v, want %v (%v)", path, got, want, CheckPath(path))
		}
	})
}

// The trie and the plain matcher agree with matching by segments.
func FuzzMatchPath(f *testing.F) {
	f.Add("/a/*", "/a/b")
	f.Add("/a/**", "/a/b/")
	f.Add("/", "/")
	f.Add("/*/", "/a/")
	f.Fuzz(func(t *testing.T, pattern, path string) {
		if CheckPathPattern(pattern) != nil || CheckPath(path) != nil {
			return
		}
		want := segmentsMatch(strings.Split(pattern, "/")[1:], strings.Split(path, "/")[1:])
		if got := MatchPath(pattern, path); got != want {
			t.Errorf("MatchPath(%q, %q): got %v", pattern, path, got)
		}
		if got := effectOf(oneRule(Allow, HTTPMatch{Paths: []string{pattern}}), HTTPRequest{Method: "GET", Path: path}) == Allow; got != want {
			t.Errorf("an allow of %q, asked about %q: got %v", pattern, path, got)
		}
	})
}
