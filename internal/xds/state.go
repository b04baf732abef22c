package xds

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"

	rbacfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// The functions here put parsed resources, by name, together into the state of
// a kind. The names have been checked.

func bundlesOf(secrets map[string]any) identity.Bundles {
	out := make(identity.Bundles, len(secrets))
	of := func(name string) *spiffebundle.Bundle {
		td := spiffeid.RequireTrustDomainFromString(name)
		if out[td] == nil {
			out[td] = spiffebundle.New(td)
		}
		return out[td]
	}
	for name, v := range secrets {
		switch keys := v.(type) {
		case []*x509.Certificate:
			of(name).SetX509Authorities(keys)
		case map[string]crypto.PublicKey:
			of(strings.TrimPrefix(name, jwtPrefix)).SetJWTAuthorities(keys)
		}
	}
	return out
}

// servicesOf leaves out a service of which one half has not arrived: it would
// look as if nothing served it.
func servicesOf(clusters, assignments map[string]any) map[spiffeid.ID]Service {
	out := make(map[spiffeid.ID]Service, len(clusters))
	for name, c := range clusters {
		eps, ok := assignments[name].([]Endpoint)
		if !ok {
			continue
		}
		s := c.(Service)
		s.Endpoints = eps
		out[s.ID] = s
	}
	return out
}

// rulesState is what a node lets in. The zero value is incomplete.
type rulesState struct {
	complete bool // ports and both rules resources are there
	matched  bool // and the rules were made for these very ports
	rules    *policy.Ruleset
	door     door
}

// rulesOf fails where the two rules resources were made for different ports.
func rulesOf(node spiffeid.ID, listeners, extensions map[string]any) (rulesState, error) {
	own, ok1 := listeners[node.String()].(door)
	deny, ok2 := extensions[DenyRules].(rbacRules)
	allow, ok3 := extensions[AllowRules].(rbacRules)
	switch {
	case !ok1 || !ok2 || !ok3:
		return rulesState{}, nil
	case deny.fingerprint != allow.fingerprint:
		return rulesState{}, fmt.Errorf("parsing rules: %s and %s were made for different ports", DenyRules, AllowRules)
	}
	rules, err := fullRules(deny, allow, extensions)
	if err != nil {
		return rulesState{}, err
	}
	return rulesState{
		complete: true,
		matched:  deny.fingerprint == fingerprintOf(own.ports),
		rules:    rules,
		door:     own,
	}, nil
}

// fullRules are those of requests where they are there. Then the others must be
// what is left of them for connections.
func fullRules(deny, allow rbacRules, extensions map[string]any) (*policy.Ruleset, error) {
	narrow := policy.NewRuleset(slices.Concat(deny.rules, allow.rules))
	httpDeny, ok1 := extensions[HTTPDenyRules].(rbacRules)
	httpAllow, ok2 := extensions[HTTPAllowRules].(rbacRules)
	switch {
	case !ok1 && !ok2:
		return narrow, nil
	case !ok1 || !ok2 || httpDeny.fingerprint != deny.fingerprint || httpAllow.fingerprint != deny.fingerprint:
		return nil, fmt.Errorf("parsing rules: %s and %s do not belong together, or to the other rules", HTTPDenyRules, HTTPAllowRules)
	}
	full := policy.NewRuleset(slices.Concat(httpDeny.rules, httpAllow.rules))
	want, _ := full.ForLevel(policy.LevelWindows)
	if !sameRules(want, narrow) {
		return nil, fmt.Errorf("parsing rules: %s and %s are not what is left of the rules about requests", DenyRules, AllowRules)
	}
	return full, nil
}

// sameRules compares what two rulesets look like on the wire.
func sameRules(a, b *policy.Ruleset) bool {
	for _, effect := range []policy.Effect{policy.Deny, policy.Allow} {
		of := func(r *policy.Ruleset) *rbacfilterv3.RBAC {
			var list []policy.Rule
			for _, rule := range r.Rules() {
				if rule.Effect == effect {
					list = append(list, rule)
				}
			}
			f, err := rbacFilter(effect, "", list)
			if err != nil {
				return nil
			}
			return f
		}
		if x, y := of(a), of(b); x == nil || y == nil || !proto.Equal(x, y) {
			return false
		}
	}
	return true
}
