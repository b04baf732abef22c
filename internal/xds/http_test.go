package xds

import (
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

var (
	paths        = []string{"/", "/a", "/a/", "/a/b", "/a.b", "/a.b/c", "/%C3%BC", "/axb"}
	pathPatterns = []string{"/", "/a", "/a/", "/a/*", "/*/b", "/**", "/a.b/**", "/*", "/%C3%BC"}
	badPaths     = []string{"", "a", "//", "/a//b", "/./a", "/a/..", "/a%2fb", "/a%2Fb", "/%61", "/a;b", "/%25", "/%00", "/a\\b", "/%C3", "/ü"}
	hosts        = []string{"a.example", "axexample", "10.0.0.1", "[::1]"}
	values       = []string{"x", "y z", "a,x", "x.y"}
)

func drawMatch(t *rapid.T) policy.HTTPMatch {
	some := func(from []string, label string) []string {
		if rapid.Bool().Draw(t, "any "+label) {
			return nil
		}
		return rapid.SliceOfN(rapid.SampledFrom(from), 1, 2).Draw(t, label)
	}
	m := policy.HTTPMatch{Methods: some([]string{"GET", "POST"}, "methods"), Paths: some(pathPatterns, "paths"), Hosts: some(hosts, "hosts")}
	if rapid.IntRange(0, 2).Draw(t, "header") == 0 {
		h := policy.HeaderMatch{Name: "X-Role", Present: rapid.Bool().Draw(t, "present")}
		if !h.Present {
			h.Equals = rapid.SampledFrom(values).Draw(t, "equals")
		}
		m.Headers = []policy.HeaderMatch{h}
	}
	if rapid.IntRange(0, 4).Draw(t, "claim") == 0 {
		m.Claims = []policy.ClaimMatch{{Issuer: "corp", Claim: "groups", Value: "ops"}}
	}
	return m
}

func drawFullRule(t *rapid.T) policy.Rule {
	r := drawRule(t)
	r.Anonymous = rapid.IntRange(0, 3).Draw(t, "anonymous") == 0
	if rapid.Bool().Draw(t, "about requests") {
		r.HTTP = rapid.SliceOfN(rapid.Custom(drawMatch), 1, 2).Draw(t, "http")
	}
	return r
}

func drawRequest(t *rapid.T) *policy.HTTPRequest {
	h := &policy.HTTPRequest{
		Method: rapid.SampledFrom([]string{"GET", "POST", "GET", "get"}).Draw(t, "method"),
		Path:   rapid.SampledFrom(slices.Concat(paths, paths, badPaths)).Draw(t, "path"),
		Host:   rapid.SampledFrom(slices.Concat(hosts, hosts, []string{"A.example", "a.example."})).Draw(t, "host"),
		Header: map[string][]string{},
	}
	if lines := rapid.SliceOfN(rapid.SampledFrom(values), 0, 2).Draw(t, "lines"); len(lines) > 0 {
		h.Header["X-Role"] = lines
	}
	if rapid.Bool().Draw(t, "claims") {
		h.Claims = map[string]map[string][]string{"corp": {"groups": {"ops"}}}
	}
	return h
}

// With every field of the language, what a node that reads requests receives decides
// every request as the original does; and a stock Envoy, which knows neither our
// keys nor our clock, lets through nothing that is denied, by either pair of filters.
func TestF9EnvoyReadsRequestsNoWider(t *testing.T) {
	allowed := 0
	rapid.Check(t, func(t *rapid.T) {
		node := drawID(t)
		sources := append(rapid.SliceOfN(rapid.Custom(drawID), 1, 6).Draw(t, "sources"), spiffeid.ID{})
		drawn := rapid.SliceOfN(rapid.Custom(drawFullRule), 0, 8).Draw(t, "rules")
		if rapid.Bool().Draw(t, "somebody is allowed") { // or hardly anybody ever is
			drawn = append(drawn, policy.Rule{Effect: policy.Allow, From: []identity.Pattern{identity.ExactPattern(sources[0])}, To: []identity.Pattern{identity.ExactPattern(node)}})
		}
		rules := policy.NewRuleset(drawn)
		res, err := Translate(View{Node: node, Rules: rules, Level: policy.LevelRequests})
		if err != nil {
			t.Fatal(err)
		}
		got, err := Parse(res)
		if err != nil {
			t.Fatal(err)
		}
		for _, src := range sources {
			for _, port := range []uint16{1, 80, 444} {
				q := policy.Request{Src: src, Dst: node, Port: port, HTTP: drawRequest(t)}
				conn := q
				conn.HTTP = nil
				for _, at := range []time.Time{time.Unix(0, 0), time.Unix(1e9, 0), time.Unix(2e9, 0), time.Unix(3e9, 0)} {
					for _, q := range []policy.Request{q, conn} {
						if d, want := got.Rules.At(at).Decide(q), rules.At(at).Decide(q); d != want {
							t.Fatalf("%+v (%+v) at %v: got %+v, want %+v", q, q.HTTP, at, d, want)
						}
					}
					if envoyAllows(t, res, conn) && rules.At(at).Decide(q).Effect == policy.Deny && q.HTTP.Check() == nil {
						t.Fatalf("%+v (%+v) at %v: Envoy lets the connection pass on which this is denied", q, q.HTTP, at)
					}
					if !envoyAllowsRequest(t, res, q) {
						continue
					}
					allowed++
					if d := rules.At(at).Decide(q); d.Effect != policy.Allow {
						t.Fatalf("%+v (%+v) at %v: Envoy allows what is denied: %+v", q, q.HTTP, at, d)
					}
				}
			}
		}
	})
	if allowed == 0 {
		t.Error("nothing was allowed: nothing was tested")
	}
}

// envoyAllowsRequest evaluates the two HTTP filters as Envoy's documentation says.
func envoyAllowsRequest(t interface{ Fatal(...any) }, res Resources, q policy.Request) bool {
	ok := true
	for _, r := range res.Types[ExtensionType] {
		ext, filter := &corev3.TypedExtensionConfig{}, &httprbacv3.RBAC{}
		if k, _ := rulesNamed(r.Name); !k.requests {
			continue
		}
		if proto.Unmarshal(r.Resource.Value, ext) != nil || proto.Unmarshal(ext.TypedConfig.Value, filter) != nil {
			t.Fatal("unreadable rules")
		}
		ok = ok && filterPasses(t, filter, q)
	}
	return ok
}

// filterPasses evaluates one HTTP filter.
func filterPasses(t interface{ Fatal(...any) }, filter *httprbacv3.RBAC, q policy.Request) bool {
	if err := filter.ValidateAll(); err != nil {
		t.Fatal(err)
	}
	matched := false
	for _, p := range filter.GetRules().GetPolicies() {
		matched = matched || slices.ContainsFunc(p.Permissions, func(m *rbacv3.Permission) bool { return envoyPermits(m, q) }) &&
			slices.ContainsFunc(p.Principals, func(m *rbacv3.Principal) bool { return envoyIs(m, q.Src) })
	}
	return matched == (filter.GetRules().GetAction() == rbacv3.RBAC_ALLOW)
}

func envoyIs(m *rbacv3.Principal, src spiffeid.ID) bool {
	switch m := m.Identifier.(type) {
	case *rbacv3.Principal_Any:
		return true
	case *rbacv3.Principal_NotId:
		return !envoyIs(m.NotId, src)
	case *rbacv3.Principal_Authenticated_:
		return !src.IsZero() && (m.Authenticated.PrincipalName == nil || envoyText(m.Authenticated.PrincipalName, src.String()))
	}
	return false
}

func envoyText(m *matcherv3.StringMatcher, s string) bool {
	if re := m.GetSafeRegex().GetRegex(); re != "" {
		return regexp.MustCompile(`\A(?:` + re + `)\z`).MatchString(s)
	}
	return m.GetExact() == s
}

func envoyPermits(m *rbacv3.Permission, q policy.Request) bool {
	permits := func(m *rbacv3.Permission) bool { return envoyPermits(m, q) }
	switch m := m.Rule.(type) {
	case *rbacv3.Permission_Any:
		return true
	case *rbacv3.Permission_DestinationPort:
		return m.DestinationPort == uint32(q.Port)
	case *rbacv3.Permission_NotRule:
		return !permits(m.NotRule)
	case *rbacv3.Permission_OrRules:
		return slices.ContainsFunc(m.OrRules.Rules, permits)
	case *rbacv3.Permission_AndRules:
		return !slices.ContainsFunc(m.AndRules.Rules, func(m *rbacv3.Permission) bool { return !permits(m) })
	case *rbacv3.Permission_UrlPath:
		return envoyText(m.UrlPath.GetPath(), q.HTTP.Path)
	case *rbacv3.Permission_Header:
		value, ok := "", false
		switch name := m.Header.Name; name {
		case ":method":
			value, ok = q.HTTP.Method, true
		case ":authority":
			value, ok = q.HTTP.Host+":8080", true
		default:
			lines := q.HTTP.Header[strings.ReplaceAll(name, "x-role", "X-Role")]
			value, ok = strings.Join(lines, ","), len(lines) > 0
		}
		return ok && (m.Header.GetPresentMatch() || envoyText(m.Header.GetStringMatch(), value))
	}
	return false // metadata that nothing sets
}

// The guard's regular expression accepts the very paths that are canonical.
func TestCanonicalPathRegex(t *testing.T) {
	re := regexp.MustCompile(`\A(?:` + canonicalPath + `)\z`)
	pieces := slices.Concat(paths, badPaths, []string{
		"/", ".", "..", "...", "%20", "%2E", "%2F", "%7F", "%7B", "%C2", "%A0", "%E0", "%ED", "%F0", "%F4", "%90", "%80", "%8F", "%9F", "%BF", "%EF", "~", ":", "x",
	})
	rapid.Check(t, func(t *rapid.T) {
		path := strings.Join(rapid.SliceOfN(rapid.SampledFrom(pieces), 0, 6).Draw(t, "pieces"), "")
		if want := policy.CheckPath(path) == nil; re.MatchString(path) != want {
			t.Fatalf("%q: the regular expression says %v, the evaluator %v", path, !want, want)
		}
	})
	for b := range 256 { // every encoded byte, alone
		path := "/%" + strings.ToUpper(string("0123456789abcdef"[b>>4])+string("0123456789abcdef"[b&15]))
		if want := policy.CheckPath(path) == nil; re.MatchString(path) != want {
			t.Errorf("%q: want %v", path, want)
		}
	}
}

// Nothing may be in the rules about requests that was not understood.
func TestParseRequestRulesIsStrict(t *testing.T) {
	r := allow(t, "p", "spiffe://shop.example/*/x", "spiffe://shop.example/a", 80)
	r.HTTP = []policy.HTTPMatch{{Methods: []string{"GET"}, Paths: []string{"/a/*"}}}
	deny := r
	deny.Effect = policy.Deny
	view := View{Node: id("/a"), Rules: policy.NewRuleset([]policy.Rule{r, deny}), Level: policy.LevelRequests}
	change := func(name string, fn func(*httprbacv3.RBAC)) Resources {
		res, err := Translate(view)
		require.NoError(t, err)
		for i, r := range res.Types[ExtensionType] {
			if r.Name != name {
				continue
			}
			ext, filter := &corev3.TypedExtensionConfig{}, &httprbacv3.RBAC{}
			require.NoError(t, proto.Unmarshal(r.Resource.Value, ext))
			require.NoError(t, proto.Unmarshal(ext.TypedConfig.Value, filter))
			fn(filter)
			ext.TypedConfig, err = packAny(httpRBACType, filter)
			require.NoError(t, err)
			res.Types[ExtensionType][i], err = encode(ExtensionType, name, ext)
			require.NoError(t, err)
		}
		return res
	}
	_, err := Parse(change(HTTPAllowRules, func(*httprbacv3.RBAC) {}))
	require.NoError(t, err, "unchanged")
	first := func(f *httprbacv3.RBAC) *rbacv3.Policy {
		for key, p := range f.Rules.Policies {
			if key != guardKey {
				return p
			}
		}
		return nil
	}
	for name, res := range map[string]Resources{
		"no guard": change(HTTPDenyRules, func(f *httprbacv3.RBAC) { delete(f.Rules.Policies, guardKey) }),
		"another guard": change(HTTPDenyRules, func(f *httprbacv3.RBAC) {
			f.Rules.Policies[guardKey].Permissions = f.Rules.Policies[guardKey].Permissions[1:]
		}),
		"guard in allows": change(HTTPAllowRules, func(f *httprbacv3.RBAC) { f.Rules.Policies[guardKey] = guard() }),
		"wider than its key": change(HTTPAllowRules, func(f *httprbacv3.RBAC) {
			and := first(f).Permissions[0].GetAndRules()
			and.Rules[1] = &rbacv3.Permission{Rule: &rbacv3.Permission_Any{Any: true}}
		}),
		"a rule more than connections know": change(HTTPDenyRules, func(f *httprbacv3.RBAC) {
			for key := range f.Rules.Policies {
				if key != guardKey {
					delete(f.Rules.Policies, key)
				}
			}
		}),
		"another stat prefix": change(HTTPAllowRules, func(f *httprbacv3.RBAC) { f.RulesStatPrefix = "" }),
		"shadow stat prefix":  change(HTTPAllowRules, func(f *httprbacv3.RBAC) { f.ShadowRulesStatPrefix = "x" }),
	} {
		if v, err := Parse(res); err == nil || v.Rules != nil {
			t.Errorf("%s: got a view, want an error", name)
		}
	}
	half := change("", nil)
	half.Types[ExtensionType] = half.Types[ExtensionType][:3]
	if _, err := Parse(half); err == nil {
		t.Error("half of the rules about requests: got a view, want an error")
	}
}

// What Envoy has no words for: an allow never matches there, a deny at least where
// it should.
func TestEnvoyNarrowsWhatItCannotSay(t *testing.T) {
	header := func(equals string) policy.HTTPMatch {
		return policy.HTTPMatch{Headers: []policy.HeaderMatch{{Name: "X-Role", Equals: equals}}}
	}
	claim := policy.HTTPMatch{Claims: []policy.ClaimMatch{{Issuer: "corp", Claim: "groups", Value: "ops"}}}
	for name, c := range map[string]struct {
		effect  policy.Effect
		match   policy.HTTPMatch
		lines   []string
		matches bool
	}{
		"allow by one line":         {policy.Allow, header("x"), []string{"x"}, true},
		"allow, two lines":          {policy.Allow, header("x"), []string{"x", "x"}, false},
		"allow, comma":              {policy.Allow, header("a,x"), []string{"a", "x"}, false},
		"allow, member":             {policy.Allow, header("x"), []string{"a, x"}, false},
		"allow by a claim":          {policy.Allow, claim, nil, false},
		"deny by a claim":           {policy.Deny, claim, nil, true},
		"deny by one line":          {policy.Deny, header("x"), []string{"x"}, true},
		"deny by a line of several": {policy.Deny, header("x"), []string{"a", "x", "b"}, true},
		"deny by a member":          {policy.Deny, header("x"), []string{"a ,\tx , b"}, true},
		"deny, a part of a member":  {policy.Deny, header("x"), []string{"xx, x y"}, false},
	} {
		r := allow(t, "p", "spiffe://shop.example/b", "spiffe://shop.example/a", 80)
		r.Effect, r.HTTP = c.effect, []policy.HTTPMatch{c.match}
		rules := []policy.Rule{r}
		if c.effect == policy.Deny {
			rules = append(rules, allow(t, "all", "spiffe://shop.example/b", "spiffe://shop.example/a", 80))
		}
		res, err := Translate(View{Node: id("/a"), Rules: policy.NewRuleset(rules), Level: policy.LevelRequests})
		require.NoError(t, err, name)
		q := policy.Request{Src: id("/b"), Dst: id("/a"), Port: 80, HTTP: &policy.HTTPRequest{
			Method: "GET", Path: "/", Host: "a.example", Header: map[string][]string{"X-Role": c.lines},
		}}
		if got := envoyAllowsRequest(t, res, q); got != (c.matches == (c.effect == policy.Allow)) {
			t.Errorf("%s: Envoy allows: %v", name, got)
		}
	}
}
