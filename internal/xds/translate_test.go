package xds

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbacfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

var segments = []string{"a", "b", "a.b", "axb", "A-_9"}

func drawID(t *rapid.T) spiffeid.ID {
	td := rapid.SampledFrom([]string{"a.example", "axexample"}).Draw(t, "td")
	path := rapid.SliceOfN(rapid.SampledFrom(segments), 1, 3).Draw(t, "path")
	return spiffeid.RequireFromString("spiffe://" + td + "/" + strings.Join(path, "/"))
}

func drawPattern(t *rapid.T) identity.Pattern {
	s := strings.Split(drawID(t).String(), "/")
	for i := 3; i < len(s); i++ {
		if rapid.Bool().Draw(t, "star") {
			s[i] = "*"
		}
	}
	if rapid.Bool().Draw(t, "stars") {
		s[len(s)-1] = "**"
	}
	p, err := identity.ParsePattern(strings.Join(s, "/"))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func drawText(t *rapid.T, label string) string {
	return rapid.OneOf(
		rapid.String(),
		rapid.SampledFrom([]string{"", "&n=0000000&set=x", "a=b;c", "100% sure\n", "\xff\x00", "ü+ %2f"}),
	).Draw(t, label)
}

func drawRule(t *rapid.T) policy.Rule {
	return policy.Rule{
		Ref: policy.RuleRef{
			Set: drawText(t, "set"), Policy: drawText(t, "policy"), File: drawText(t, "file"),
			Line: rapid.Int().Draw(t, "line"),
		},
		Effect: rapid.SampledFrom([]policy.Effect{policy.Deny, policy.Allow, policy.Allow}).Draw(t, "effect"),
		From:   rapid.SliceOfN(rapid.Custom(drawPattern), 1, 3).Draw(t, "from"),
		To:     rapid.SliceOfN(rapid.Custom(drawPattern), 1, 3).Draw(t, "to"),
		Ports:  slices.Sorted(slices.Values(rapid.SliceOfNDistinct(rapid.SampledFrom([]uint16{1, 80, 443, 65535}), 0, 3, rapid.ID).Draw(t, "ports"))),
		Reason: drawText(t, "reason"),
		Audit:  rapid.IntRange(0, 3).Draw(t, "audit") == 0,
		Since:  rapid.SampledFrom(windows).Draw(t, "since"),
		Until:  rapid.SampledFrom(windows).Draw(t, "until"),
	}
}

var windows = []time.Time{{}, {}, {}, time.Unix(1e9, 0).UTC(), time.Unix(2e9, 0).UTC(), time.Unix(2e9+1, 0).UTC()}

// What a sidecar reads decides every connection to it as the original does, by
// the same rule and with the same reason; and a plain reading of the resources,
// as Envoy does it, agrees on the verdict.
func TestParseTranslateIsIdentityUnderDecide(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		node := drawID(t)
		rules := policy.NewRuleset(rapid.SliceOfN(rapid.Custom(drawRule), 0, 8).Draw(t, "rules"))
		slice := rules
		if rapid.Bool().Draw(t, "sliced") {
			slice = rules.For(node)
		}
		res, err := Translate(View{Node: node, Rules: slice})
		if err != nil {
			t.Fatal(err)
		}
		got, err := Parse(res)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Translate(got)
		if err != nil {
			t.Fatal(err)
		}
		for typeURL, list := range res.Types {
			for i, r := range list {
				if again.Types[typeURL][i].Version != r.Version {
					t.Fatalf("%s changed by Translate∘Parse", r.Name)
				}
			}
		}
		for _, src := range rapid.SliceOfN(rapid.Custom(drawID), 1, 10).Draw(t, "sources") {
			for _, port := range []uint16{1, 80, 443, 444, 65535} {
				q := policy.Request{Src: src, Dst: node, Port: port}
				want := rules.Decide(q)
				if d := got.Rules.Decide(q); d != want {
					t.Fatalf("%v: got %+v, want %+v", q, d, want)
				}
				for _, at := range []time.Time{time.Unix(0, 0), time.Unix(1e9, 0), time.Unix(2e9, 0), time.Unix(3e9, 0)} {
					if d, want := got.Rules.At(at).Decide(q), rules.At(at).Decide(q); d != want {
						t.Fatalf("%v at %v: got %+v, want %+v", q, at, d, want)
					}
					if envoyAllows(t, res, q) && rules.At(at).Decide(q).Effect != policy.Allow {
						t.Fatalf("%v: Envoy allows what is denied at %v", q, at)
					}
				}
				timeless := !slices.ContainsFunc(rules.Rules(), func(r policy.Rule) bool { return !r.Since.IsZero() || !r.Until.IsZero() })
				if e := envoyAllows(t, res, q); timeless && e != (want.Effect == policy.Allow) {
					t.Fatalf("%v: Envoy allows %v, want %v", q, e, want.Effect)
				}
			}
		}
		elsewhere := policy.Request{Src: drawID(t), Dst: drawID(t), Port: 80}
		if d := got.Rules.Decide(elsewhere); elsewhere.Dst != node && d.Effect != policy.Deny {
			t.Fatalf("rules of %s allow %v", node, elsewhere)
		}
	})
}

// envoyAllows evaluates the two filters as Envoy's documentation of RBAC says.
func envoyAllows(t interface{ Fatal(...any) }, res Resources, q policy.Request) bool {
	ok := true
	for _, r := range res.Types[ExtensionType] {
		ext, filter := &corev3.TypedExtensionConfig{}, &rbacfilterv3.RBAC{}
		if k, _ := rulesNamed(r.Name); k.requests {
			continue
		}
		if proto.Unmarshal(r.Resource.Value, ext) != nil || proto.Unmarshal(ext.TypedConfig.Value, filter) != nil {
			t.Fatal("unreadable rules")
		}
		if err := filter.ValidateAll(); err != nil {
			t.Fatal(err)
		}
		matched := false
		for _, p := range filter.GetRules().GetPolicies() {
			matched = matched || envoyMatches(p, q)
		}
		ok = ok && matched == (filter.GetRules().GetAction() == rbacv3.RBAC_ALLOW)
	}
	return ok
}

func envoyMatches(p *rbacv3.Policy, q policy.Request) bool {
	port := slices.ContainsFunc(p.Permissions, func(m *rbacv3.Permission) bool {
		return m.GetAny() || m.GetDestinationPort() == uint32(q.Port)
	})
	return port && slices.ContainsFunc(p.Principals, func(m *rbacv3.Principal) bool { return envoyIs(m, q.Src) })
}

func TestParseTranslateKeepsView(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.example")
	want := View{
		Node: id("/shop/payments"), Rev: Revision{3, 42}, Revocations: envelope(t, shop, 7),
		MaxStale: policy.MaxStale{After: 90 * time.Minute, Refuse: true},
		Ports:    []policy.Port{{Name: "http", Number: 8080, Protocol: policy.HTTP}, {Name: "admin", Number: 1, Protocol: policy.TCP, Direct: 9443}},
		Services: []Service{
			{ID: spiffeid.RequireFromPath(other, "/shop/c"), MeshName: "c.shop.other.mesh"},
			{ID: id("/a"), Ports: []policy.Port{{Name: "g", Number: 65535, Protocol: policy.GRPC}}, Endpoints: []Endpoint{
				{Instance: "i1", Addr: netip.MustParseAddrPort("10.0.0.1:15008"), Ports: []uint16{65535}},
				{Instance: "i2", Addr: netip.MustParseAddrPort("[2001:db8::1]:15008"), Direct: true},
			}},
			{ID: id("/b")},
		},
		Bundles: identity.Bundles{shop: spiffebundle.FromX509Authorities(shop, []*x509.Certificate{root(t, "one"), root(t, "two")}), other: spiffebundle.FromX509Authorities(other, []*x509.Certificate{root(t, "three")})},
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	require.NoError(t, want.Bundles[shop].AddJWTAuthority("kid", key.Public()))
	res, err := Translate(want)
	require.NoError(t, err)
	got, err := Parse(res)
	require.NoError(t, err)
	require.NotNil(t, got.Rules)
	got.Rules = nil
	require.Equal(t, want, got)
	for typeURL, list := range res.Types {
		for _, r := range list {
			m := newMessage(typeURL)
			require.NoError(t, proto.Unmarshal(r.Resource.Value, m))
			if v, ok := m.(interface{ ValidateAll() error }); ok {
				require.NoError(t, v.ValidateAll(), "Envoy refuses %s", r.Name)
			}
		}
	}
}

func TestMeshNameIsBounded(t *testing.T) {
	s := Service{ID: id("/a"), MeshName: strings.Repeat("a", maxMeshName)}
	c, err := clusterResource(s)
	require.NoError(t, err)
	got, err := parseResource(id("/x"), ClusterType, c)
	require.NoError(t, err)
	require.Equal(t, s.MeshName, got.(Service).MeshName)
	s.MeshName += "a"
	_, err = clusterResource(s)
	require.ErrorContains(t, err, "254 bytes")
}

func TestTranslateRefuses(t *testing.T) {
	ok := Endpoint{Instance: "i", Addr: netip.MustParseAddrPort("127.0.0.1:1")}
	for name, v := range map[string]View{
		"no node":         {},
		"port twice":      {Node: id("/a"), Ports: []policy.Port{{Name: "x", Number: 1, Protocol: "tcp"}, {Name: "y", Number: 1, Protocol: "tcp"}}},
		"direct twice":    {Node: id("/a"), Ports: []policy.Port{{Name: "x", Number: 1, Protocol: "tcp", Direct: 9}, {Name: "y", Number: 2, Protocol: "tcp", Direct: 9}}},
		"port 0":          {Node: id("/a"), Ports: []policy.Port{{Name: "x", Protocol: "tcp"}}},
		"protocol":        {Node: id("/a"), Ports: []policy.Port{{Name: "x", Number: 1, Protocol: "sctp"}}},
		"empty bundle":    {Node: id("/a"), Bundles: identity.Bundles{shop: spiffebundle.FromX509Authorities(shop, nil)}},
		"no address":      {Node: id("/a"), Services: []Service{{ID: id("/b"), Endpoints: []Endpoint{{Instance: "i"}}}}},
		"no instance":     {Node: id("/a"), Services: []Service{{ID: id("/b"), Endpoints: []Endpoint{{Addr: ok.Addr}}}}},
		"nameless target": {Node: id("/a"), Services: []Service{{Endpoints: []Endpoint{ok}}}},
	} {
		if res, err := Translate(v); err == nil {
			t.Errorf("%s: got %d types, want an error", name, len(res.Types))
		}
	}
	if _, err := rbacFilter(7, "", nil); err == nil {
		t.Error("rules of an unknown effect: got no error")
	}
}

func TestEmptyViewDeniesEverything(t *testing.T) {
	for name, rules := range map[string]*policy.Ruleset{"nil": nil, "empty": policy.NewRuleset(nil)} {
		res, err := Translate(View{Node: id("/a"), Rules: rules})
		require.NoError(t, err, name)
		require.Len(t, res.Types[ExtensionType], 2, name)
		q := policy.Request{Src: id("/b"), Dst: id("/a"), Port: 80}
		if envoyAllows(t, res, q) {
			t.Errorf("%s: Envoy allows %v", name, q)
		}
		got, err := Parse(res)
		require.NoError(t, err, name)
		if d := got.Rules.Decide(q); d != (policy.Decision{}) {
			t.Errorf("%s: got %+v, want the zero decision", name, d)
		}
	}
}

// rewrite changes the RBAC filter inside a rules resource.
func rewrite(t testing.TB, r *Resource, change func(*rbacfilterv3.RBAC)) *Resource {
	ext, filter := &corev3.TypedExtensionConfig{}, &rbacfilterv3.RBAC{}
	require.NoError(t, proto.Unmarshal(r.Resource.Value, ext))
	require.NoError(t, proto.Unmarshal(ext.TypedConfig.Value, filter))
	change(filter)
	body, err := packAny(rbacType, filter)
	require.NoError(t, err)
	ext.TypedConfig = body
	out, err := encode(ExtensionType, r.Name, ext)
	require.NoError(t, err)
	return out
}

func onlyPolicy(f *rbacfilterv3.RBAC) *rbacv3.Policy {
	for _, p := range f.Rules.Policies {
		return p
	}
	return nil
}

// Whatever Parse does not understand in rules is an error, even where ignoring
// it looks harmless.
func TestParseRulesIsStrict(t *testing.T) {
	rules := policy.NewRuleset([]policy.Rule{allow(t, "p", "spiffe://shop.example/*/x", "spiffe://shop.example/a", 80)})
	any := &rbacv3.Permission{Rule: &rbacv3.Permission_Any{Any: true}}
	name := func(m *matcherv3.StringMatcher) *rbacv3.Principal {
		return &rbacv3.Principal{Identifier: &rbacv3.Principal_Authenticated_{Authenticated: &rbacv3.Principal_Authenticated{PrincipalName: m}}}
	}
	regex := func(s string) *rbacv3.Principal {
		return name(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: s}}})
	}
	principal := func(p ...*rbacv3.Principal) func(*rbacfilterv3.RBAC) {
		return func(f *rbacfilterv3.RBAC) { onlyPolicy(f).Principals = p }
	}
	permission := func(p ...*rbacv3.Permission) func(*rbacfilterv3.RBAC) {
		return func(f *rbacfilterv3.RBAC) { onlyPolicy(f).Permissions = p }
	}
	rename := func(key string) func(*rbacfilterv3.RBAC) {
		return func(f *rbacfilterv3.RBAC) { f.Rules.Policies = map[string]*rbacv3.Policy{key: onlyPolicy(f)} }
	}
	cases := map[string]func(*rbacfilterv3.RBAC){
		"no rules means no enforcement": func(f *rbacfilterv3.RBAC) { f.Rules = nil },
		"other action":                  func(f *rbacfilterv3.RBAC) { f.Rules.Action = rbacv3.RBAC_DENY },
		"log action":                    func(f *rbacfilterv3.RBAC) { f.Rules.Action = rbacv3.RBAC_LOG },
		"shadow rules":                  func(f *rbacfilterv3.RBAC) { f.ShadowRules = &rbacv3.RBAC{} },
		"enforcement type":              func(f *rbacfilterv3.RBAC) { f.EnforcementType = rbacfilterv3.RBAC_CONTINUOUS },
		"unknown field":                 func(f *rbacfilterv3.RBAC) { f.ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 1}) },
		"unknown field deep down":       func(f *rbacfilterv3.RBAC) { onlyPolicy(f).ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 1}) },
		"no stat prefix":                func(f *rbacfilterv3.RBAC) { f.StatPrefix = "" },
		"fingerprint":                   func(f *rbacfilterv3.RBAC) { f.StatPrefix = "inbound.00000000000000" },
		"no principal":                  principal(),
		"empty principal":               principal(&rbacv3.Principal{}),
		"anybody authenticated":         principal(name(nil)),
		"any":                           principal(&rbacv3.Principal{Identifier: &rbacv3.Principal_Any{Any: true}}),
		"prefix":                        principal(name(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: "spiffe://"}})),
		"ignore case":                   principal(name(&matcherv3.StringMatcher{IgnoreCase: true, MatchPattern: &matcherv3.StringMatcher_Exact{Exact: "spiffe://shop.example/a"}})),
		"no ID":                         principal(name(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: "spiffe://shop.example/*"}})),
		"unanchored regex":              principal(regex(`spiffe://shop\.example/.*`)),
		"regex with a bare dot":         principal(regex(`spiffe://shop.example/` + oneSegment)),
		"exact ID as a regex":           principal(regex(`spiffe://shop\.example/a`)),
		"regex that was a pattern":      principal(regex(`spiffe://shop\.example/*/x`)),
		"no permission":                 permission(),
		"any: false":                    permission(&rbacv3.Permission{Rule: &rbacv3.Permission_Any{}}),
		"any beside a port":             permission(any, &rbacv3.Permission{Rule: &rbacv3.Permission_DestinationPort{DestinationPort: 1}}),
		"not":                           permission(&rbacv3.Permission{Rule: &rbacv3.Permission_NotRule{NotRule: any}}),
		"port out of range":             permission(&rbacv3.Permission{Rule: &rbacv3.Permission_DestinationPort{DestinationPort: 65536 + 80}}),
		"port range":                    permission(&rbacv3.Permission{Rule: &rbacv3.Permission_DestinationPortRange{}}),
		"name that is no query":         rename("p"),
		"name with another field":       rename("n=0000000&set=&policy=p&file=p.yaml&line=7&reason=&until=2026"),
		"name without place":            rename("set=&policy=p&file=p.yaml&line=7&reason="),
		"second place":                  rename("n=0000001&set=&policy=p&file=p.yaml&line=7&reason="),
	}
	res, err := Translate(View{Node: id("/a"), Rules: rules})
	require.NoError(t, err)
	good := res.Types[ExtensionType][0]
	require.Equal(t, AllowRules, good.Name)
	_, err = parseResource(id("/a"), ExtensionType, rewrite(t, good, func(*rbacfilterv3.RBAC) {}))
	require.NoError(t, err, "the unchanged resource")
	for name, change := range cases {
		res.Types[ExtensionType][0] = rewrite(t, good, change)
		v, err := Parse(res)
		if err == nil {
			t.Errorf("%s: got a view, want an error", name)
		}
		if v.Rules != nil {
			t.Errorf("%s: got rules beside an error", name)
		}
	}
}

func TestParseListenerIsStrict(t *testing.T) {
	res, err := Translate(View{Node: id("/a"), Ports: []policy.Port{{Name: "x", Number: 80, Protocol: policy.TCP}}})
	require.NoError(t, err)
	good := res.Types[ListenerType][0]
	for name, change := range map[string]func(*listenerv3.Listener){
		"another port":      func(l *listenerv3.Listener) { l.FilterChains[0].FilterChainMatch.DestinationPort.Value = 81 }, // rules were made for 80
		"port out of range": func(l *listenerv3.Listener) { l.FilterChains[0].FilterChainMatch.DestinationPort.Value += 65536 },
		"a filter less":     func(l *listenerv3.Listener) { l.FilterChains[0].Filters = l.FilterChains[0].Filters[1:] },
		"a filter more": func(l *listenerv3.Listener) {
			l.FilterChains[0].Filters = append(l.FilterChains[0].Filters, &listenerv3.Filter{})
		},
		"default chain": func(l *listenerv3.Listener) { l.DefaultFilterChain = &listenerv3.FilterChain{} },
		"another name":  func(l *listenerv3.Listener) { l.Name = id("/b").String() },
	} {
		l := &listenerv3.Listener{}
		require.NoError(t, proto.Unmarshal(good.Resource.Value, l))
		change(l)
		r, err := encode(ListenerType, good.Name, l)
		require.NoError(t, err)
		res.Types[ListenerType] = []*Resource{r}
		if _, err := Parse(res); err == nil {
			t.Errorf("%s: got a view, want an error", name)
		}
	}
}

func TestParseViewRefuses(t *testing.T) {
	parts := func(change func(map[string][]*Resource)) Resources {
		res, err := Translate(View{Node: id("/a"), Services: []Service{service("/b", "i")}})
		require.NoError(t, err)
		change(res.Types)
		return res
	}
	for name, res := range map[string]Resources{
		"nothing":         {},
		"no listener":     parts(func(m map[string][]*Resource) { delete(m, ListenerType) }),
		"no denies":       parts(func(m map[string][]*Resource) { m[ExtensionType] = m[ExtensionType][:1] }),
		"no allows":       parts(func(m map[string][]*Resource) { m[ExtensionType] = m[ExtensionType][1:] }),
		"denies twice":    parts(func(m map[string][]*Resource) { m[ExtensionType] = append(m[ExtensionType], m[ExtensionType][1]) }),
		"unknown type":    parts(func(m map[string][]*Resource) { m["x"] = m[ListenerType] }),
		"type mixed up":   parts(func(m map[string][]*Resource) { m[ClusterType] = m[EndpointType] }),
		"renamed cluster": parts(func(m map[string][]*Resource) { m[ClusterType][0].Name = id("/c").String() }),
		"another's SAN": parts(func(m map[string][]*Resource) {
			c := &clusterv3.Cluster{}
			require.NoError(t, proto.Unmarshal(m[ClusterType][0].Resource.Value, c))
			c.Name = id("/c").String()
			r, err := encode(ClusterType, c.Name, c)
			require.NoError(t, err)
			m[ClusterType] = []*Resource{r}
		}),
		"nil resource": parts(func(m map[string][]*Resource) { m[ClusterType][0] = nil }),
		"nil body":     parts(func(m map[string][]*Resource) { m[ClusterType][0].Resource = nil }),
	} {
		if _, err := Parse(res); err == nil {
			t.Errorf("%s: got a view, want an error", name)
		}
	}
}

func TestPatternRegex(t *testing.T) {
	for _, s := range []string{
		"spiffe://shop.example/a", "spiffe://shop.example/*", "spiffe://shop.example/**",
		"spiffe://shop.example/a.b/*/*/c-d/**", "spiffe://shop.example",
	} {
		got, err := parsePatternRegex(patternRegex(pattern(t, s)))
		if err != nil || got != pattern(t, s) {
			t.Errorf("%s: got %s, %v", s, got, err)
		}
	}
	for _, regex := range []string{
		"", "*", `spiffe://shop\.example/*`, `spiffe://shop\.example/**`, `spiffe://shop.example/a`, `spiffe://shop\.example/a|b`,
		`spiffe://shop\.example/` + someSegments + `/a`, `spiffe://shop\.example/a` + oneSegment, oneSegment,
	} {
		if got, err := parsePatternRegex(regex); err == nil {
			t.Errorf("%s: got %s, want an error", regex, got)
		}
	}
}

// No bytes in place of any resource make Parse panic, or give rules beside an
// error, or a cluster that stands for another identity.
func FuzzParse(f *testing.F) {
	res, err := Translate(View{
		Node: id("/a"), Ports: []policy.Port{{Name: "x", Number: 80, Protocol: policy.TCP}},
		Rules:    policy.NewRuleset([]policy.Rule{allow(f, "p", "spiffe://shop.example/*/x/**", "spiffe://shop.example/a", 80)}),
		Services: []Service{service("/b", "i")},
		Bundles:  identity.Bundles{shop: spiffebundle.FromX509Authorities(shop, []*x509.Certificate{root(f, "one")})},
	})
	require.NoError(f, err)
	for i, typeURL := range wireTypes() {
		for _, r := range res.Types[typeURL] {
			f.Add(uint8(i), r.Name, r.Resource.Value)
		}
	}
	f.Fuzz(func(t *testing.T, kind uint8, name string, body []byte) {
		typeURL := wireTypes()[int(kind)%len(wireTypes())]
		in := Resources{Types: map[string][]*Resource{}}
		for u, list := range res.Types {
			in.Types[u] = slices.Clone(list)
		}
		r := proto.Clone(in.Types[typeURL][0]).(*Resource)
		r.Name, r.Resource.Value = name, body
		in.Types[typeURL][0] = r
		v, err := Parse(in)
		switch {
		case err != nil && (v.Rules != nil || v.Services != nil || v.Bundles != nil || v.Revocations != nil):
			t.Fatalf("got a view beside %v", err)
		case err != nil:
			return
		case v.Node != id("/a"):
			if typeURL != ListenerType {
				t.Fatalf("node is %s", v.Node)
			}
			return
		}
		again, err := Translate(v)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if typeURL == ListenerType || typeURL == ExtensionType {
			if _, err := Parse(again); err != nil {
				t.Fatalf("what was written cannot be read: %v", err)
			}
		}
	})
}

func BenchmarkTranslateRules(b *testing.B) {
	var rules []policy.Rule
	for i := range 1000 {
		rules = append(rules, allow(b, fmt.Sprintf("p%d", i), fmt.Sprintf("spiffe://shop.example/w%d", i), "spiffe://shop.example/a", 80))
	}
	rs := policy.NewRuleset(rules)
	for b.Loop() {
		if _, err := ownResources(id("/a"), door{ports: nil}, rs, policy.CurrentLevel); err != nil {
			b.Fatal(err)
		}
	}
}
