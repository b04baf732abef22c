package xds

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

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
	return rulesState{
		complete: true,
		matched:  deny.fingerprint == fingerprintOf(own.ports),
		rules:    policy.NewRuleset(slices.Concat(deny.rules, allow.rules)),
		door:     own,
	}, nil
}
