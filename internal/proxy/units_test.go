package proxy

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func TestSplitTarget(t *testing.T) {
	for in, want := range map[string]string{
		"payments:http":                      "payments http",
		"/shop/payments:8080":                "/shop/payments 8080",
		"payments.shop.mesh:http":            "payments.shop.mesh http",
		"spiffe://shop.example/payments:tcp": "spiffe://shop.example/payments tcp",
		"payments":                           "", ":http": "", "payments:": "", "": "", "spiffe://shop.example/payments": "",
	} {
		ref, port, err := SplitTarget(in)
		if got := strings.TrimSpace(ref + " " + port); got != want || (err != nil) != (want == "") {
			t.Errorf("%q: got %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestBalancerPrefersTheLessLoadedOfTwo(t *testing.T) {
	var eps []xds.Endpoint
	for _, a := range []string{"10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1", "10.0.0.4:1"} {
		eps = append(eps, xds.Endpoint{Addr: netip.MustParseAddrPort(a), Ports: []uint16{80}})
	}
	var b balancer
	now := time.Now()
	for range 400 { // nothing is released: the load must stay even
		_, ok := b.pick(eps, 80, nil, now)
		require.True(t, ok)
	}
	for a, l := range b.known {
		if l.live < 90 || l.live > 110 {
			t.Errorf("%s has %d of 400 connections, want about 100", a, l.live)
		}
	}
}

func TestBalancerAvoidsWhatFailed(t *testing.T) {
	a, c := netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:1")
	eps := []xds.Endpoint{{Addr: a, Ports: []uint16{80}}, {Addr: c, Ports: []uint16{80}}, {Addr: netip.MustParseAddrPort("10.0.0.3:1"), Ports: []uint16{81}}}
	var b balancer
	now := time.Now()
	_, ok := b.pick(eps[:1], 80, nil, now)
	require.True(t, ok)
	b.release(a, true, now)
	for range 50 {
		if e, ok := b.pick(eps, 80, nil, now); !ok || e.Addr != c {
			t.Fatalf("got %v, want the one that did not fail", e.Addr)
		}
		b.release(c, false, now)
	}
	if e, ok := b.pick(eps, 80, []netip.AddrPort{c}, now); !ok || e.Addr != a {
		t.Errorf("got %v %v: a failed endpoint is better than none", e.Addr, ok)
	}
	b.release(a, false, now)
	if _, ok := b.pick(eps, 80, []netip.AddrPort{a, c}, now); ok {
		t.Error("an endpoint that does not serve the port was picked")
	}
	later := now.Add(failurePenalty)
	_, _ = b.pick(eps[1:2], 80, nil, later)
	b.release(c, false, later)
	if len(b.known) != 0 {
		t.Errorf("idle endpoints are remembered: %v", b.known)
	}
}

func TestReasonIsToldForDenyRulesOnly(t *testing.T) {
	ref := policy.RuleRef{Policy: "p", File: "f", Line: 1}
	for _, c := range []struct {
		v    verdict
		want string
	}{
		{verdict{Decision: policy.Decision{Rule: ref, Reason: "because"}}, "because"},
		{verdict{Decision: policy.Decision{Reason: "because"}}, ""},
		{verdict{Decision: policy.Decision{Effect: policy.Allow, Rule: ref, Reason: "because"}}, ""},
	} {
		if got := c.v.toldReason(); got != c.want {
			t.Errorf("%+v: got %q, want %q", c.v, got, c.want)
		}
	}
}

func TestNamesUs(t *testing.T) {
	for host, want := range map[string]bool{
		"payments.shop.mesh": true, "10.1.2.3": true, "::1": true,
		"orders.mesh": false, "payments.mesh": false, "": false, "PAYMENTS.shop.mesh": false,
	} {
		if got := namesUs(host, payments); got != want {
			t.Errorf("%q: got %v, want %v", host, got, want)
		}
	}
}

func TestDescribe(t *testing.T) {
	var s Views
	if b, err := json.Marshal(s.Load().Describe()); err != nil || !strings.Contains(string(b), `"rules":null`) {
		t.Errorf("zero view: %s, %v", b, err)
	}
	s.Apply(xds.Update{Kind: xds.Rules, Rev: xds.Revision{Epoch: 1, N: 5}, Ports: []policy.Port{httpPort},
		Rules: policy.NewRuleset([]policy.Rule{{
			Ref: policy.RuleRef{Set: "billing", Policy: "p", File: "billing/p.yaml", Line: 3}, Effect: policy.Allow,
			From: []identity.Pattern{identity.ExactPattern(orders)}, To: []identity.Pattern{identity.ExactPattern(payments)},
		}})})
	b, err := json.Marshal(s.Load().Describe())
	require.NoError(t, err)
	for _, want := range []string{`"rules":"1.5"`, `"rule":"billing/p"`, `"location":"billing/p.yaml:3"`, `"from":["spiffe://shop.example/orders"]`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s is missing in %s", want, b)
		}
	}
}

func FuzzSplitTarget(f *testing.F) {
	f.Add("payments:http")
	f.Add("spiffe://shop.example/payments:8080")
	f.Fuzz(func(t *testing.T, s string) {
		ref, port, err := SplitTarget(s)
		if err == nil && (ref == "" || port == "" || ref+":"+port != s || strings.ContainsAny(port, ":/")) {
			t.Errorf("%q: got %q and %q", s, ref, port)
		}
	})
}

func TestReadHeadIsBounded(t *testing.T) {
	for in, ok := range map[string]bool{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\nbody": true,
		"GET / HTTP/1.0\n\n":                    true,
		"GET / HTTP/1.1\r\n":                    false, // ends early
		strings.Repeat("x", maxHead+8192):       false,
		"":                                      false,
	} {
		if _, err := readHead(strings.NewReader(in)); (err == nil) != ok {
			t.Errorf("%.20q: %v", in, err)
		}
	}
}
