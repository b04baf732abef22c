package bench

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

const trustDomain = "spiffe://shop.example"

// newSallyport makes what a sidecar has.
func newSallyport(kind Kind, rules []Rule) (Prepare, error) {
	self, err := spiffeid.FromString(trustDomain + "/shop/payments")
	if err != nil {
		return nil, err
	}
	to := []identity.Pattern{identity.ExactPattern(self)}
	compiled := make([]policy.Rule, len(rules))
	for i, r := range rules {
		from, err := identity.ParsePattern(trustDomain + r.From)
		if err != nil {
			return nil, err
		}
		c := policy.Rule{
			Ref:    policy.RuleRef{Policy: "p", File: "f.yaml", Line: i + 1},
			Effect: policy.Allow, From: []identity.Pattern{from}, To: to,
			Reason: fmt.Sprintf("rule %d", i),
		}
		if r.Deny {
			c.Effect = policy.Deny
		}
		if kind == Connection {
			c.Ports = []uint16{r.Port}
		} else {
			c.HTTP = []policy.HTTPMatch{{Methods: []string{r.Method}, Paths: []string{r.Path}}}
		}
		compiled[i] = c
	}
	rs := policy.NewRuleset(compiled)
	return func(q Question) func() (bool, error) {
		asked := policy.Request{Src: spiffeid.RequireFromString(trustDomain + q.From), Dst: self, Port: q.Port}
		if kind == HTTP {
			asked.Port, asked.HTTP = 8080, &policy.HTTPRequest{Method: q.Method, Path: q.Path, Host: "payments.shop"}
		}
		return func() (bool, error) { return rs.Decide(asked).Effect == policy.Allow, nil }
	}, nil
}
