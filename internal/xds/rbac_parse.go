package xds

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	rbacfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// parsePatternRegex reads what patternRegex wrote and nothing else.
func parsePatternRegex(regex string) (identity.Pattern, error) {
	s := regex
	if rest, ok := strings.CutSuffix(s, "/"+someSegments); ok {
		s = rest + "/**"
	}
	s = strings.ReplaceAll(s, "/"+oneSegment, "/*")
	s = strings.ReplaceAll(s, `\.`, ".")
	p, err := identity.ParsePattern(s)
	if err != nil || patternRegex(p) != regex {
		return identity.Pattern{}, fmt.Errorf("regular expression %.100q is not a SPIFFE ID pattern", regex)
	}
	return p, nil
}

// parseRBAC reads one rules resource for node. It is strict: the resource must
// be exactly what the rules read from it translate to, so nothing can be in it
// that was not understood.
func parseRBAC(node spiffeid.ID, ext *corev3.TypedExtensionConfig) (rbacRules, error) {
	k, ok := rulesNamed(ext.GetName())
	if !ok {
		return rbacRules{}, fmt.Errorf("extension %.100q is none of %s, %s, %s, %s", ext.GetName(), DenyRules, AllowRules, HTTPDenyRules, HTTPAllowRules)
	}
	if len(ext.ProtoReflect().GetUnknown()) > 0 || len(ext.GetTypedConfig().ProtoReflect().GetUnknown()) > 0 {
		return rbacRules{}, errors.New("unknown fields beside the rules")
	}
	filter, err := k.unpack(ext.GetTypedConfig())
	if err != nil {
		return rbacRules{}, err
	}
	out := rbacRules{}
	if out.fingerprint, err = parseFingerprint(filter.stat); err != nil {
		return rbacRules{}, err
	}
	policies := maps.Clone(filter.rules.GetPolicies())
	if policies == nil {
		policies = map[string]*rbacv3.Policy{}
	}
	maps.Copy(policies, filter.shadow.GetPolicies())
	delete(policies, guardKey) // compared below
	if out.rules, err = parseRules(node, k.effect, policies); err != nil {
		return rbacRules{}, err
	}
	want, err := k.filter(out.fingerprint, out.rules)
	if err != nil {
		return rbacRules{}, err
	}
	if !proto.Equal(filter.message, want) {
		return rbacRules{}, errors.New("the rules hold something that this version does not understand")
	}
	return out, nil
}

// filterForm is either kind of RBAC filter.
type filterForm struct {
	message       proto.Message
	rules, shadow *rbacv3.RBAC
	stat          string
}

func (k rulesKind) unpack(config *anypb.Any) (filterForm, error) {
	if k.requests {
		m := &httprbacv3.RBAC{}
		err := unpackAny(config, httpRBACType, m)
		return filterForm{m, m.GetRules(), m.GetShadowRules(), m.GetRulesStatPrefix()}, err
	}
	m := &rbacfilterv3.RBAC{}
	err := unpackAny(config, rbacType, m)
	return filterForm{m, m.GetRules(), m.GetShadowRules(), m.GetStatPrefix()}, err
}

func parseRules(node spiffeid.ID, effect policy.Effect, policies map[string]*rbacv3.Policy) ([]policy.Rule, error) {
	out := make([]policy.Rule, 0, len(policies))
	for _, key := range sortedKeys(policies) {
		r, err := parseRuleKey(key)
		if err != nil {
			return nil, err
		}
		r.Effect, r.To = effect, []identity.Pattern{identity.ExactPattern(node)}
		if r.Ports, err = parsePermissions(policies[key].GetPermissions()); err != nil {
			return nil, fmt.Errorf("rule %s: %w", r.Ref, err)
		}
		principals := policies[key].GetPrincipals()
		if r.Anonymous && len(principals) > 0 {
			principals = principals[1:] // the whole is compared later
		}
		if r.From, err = parsePrincipals(principals, r.Anonymous); err != nil {
			return nil, fmt.Errorf("rule %s: %w", r.Ref, err)
		}
		out = append(out, r)
	}
	return out, nil
}

// parseRuleKey reads a key without judging its form: parseRBAC compares the
// whole resource with what it should have been.
func parseRuleKey(key string) (policy.Rule, error) {
	v, err := url.ParseQuery(key)
	if err != nil {
		return policy.Rule{}, fmt.Errorf("rule name %.100q: %w", key, err)
	}
	line, err := strconv.Atoi(v.Get("line"))
	if err != nil {
		return policy.Rule{}, fmt.Errorf("rule name %.100q: no line number", key)
	}
	r := policy.Rule{
		Ref:    policy.RuleRef{Set: v.Get("set"), Policy: v.Get("policy"), File: v.Get("file"), Line: line},
		Reason: v.Get("reason"), Audit: v.Get("audit") == "1", Anonymous: v.Get("anonymous") == "1",
	}
	for name, at := range map[string]*time.Time{"since": &r.Since, "until": &r.Until} {
		if !v.Has(name) {
			continue
		}
		seconds, err := strconv.ParseInt(v.Get(name), 10, 64)
		if err != nil {
			return policy.Rule{}, fmt.Errorf("rule name %.100q: %s is no time", key, name)
		}
		*at = time.Unix(seconds, 0).UTC()
	}
	if v.Has("http") {
		if r.HTTP, err = parseHTTPText(v.Get("http")); err != nil {
			return policy.Rule{}, fmt.Errorf("rule name %.100q: what it asks of requests: %w", key, err)
		}
	}
	return r, nil
}

// parsePermissions returns nil for "any"; it never does so for a list that it
// could not read.
func parsePermissions(in []*rbacv3.Permission) ([]uint16, error) {
	if len(in) == 1 && in[0].GetAny() {
		return nil, nil
	}
	var out []uint16
	for _, p := range in {
		if and := p.GetAndRules().GetRules(); len(and) > 1 { // and something else; the whole is compared later
			p = and[0]
		}
		if len(in) == 1 && p.GetAny() {
			return nil, nil
		}
		port, ok := p.GetRule().(*rbacv3.Permission_DestinationPort)
		if !ok || port.DestinationPort > 65535 {
			return nil, errors.New("a permission is neither a port nor, alone, any")
		}
		out = append(out, uint16(port.DestinationPort))
	}
	if len(out) == 0 {
		return nil, errors.New("no permission")
	}
	return out, nil
}

func parsePrincipals(in []*rbacv3.Principal, mayBeNone bool) ([]identity.Pattern, error) {
	var out []identity.Pattern
	for _, p := range in {
		var pattern identity.Pattern
		var err error
		switch m := p.GetAuthenticated().GetPrincipalName().GetMatchPattern().(type) {
		case *matcherv3.StringMatcher_Exact:
			var id spiffeid.ID
			if id, err = parseID(m.Exact); err == nil {
				pattern = identity.ExactPattern(id)
			}
		case *matcherv3.StringMatcher_SafeRegex:
			pattern, err = parsePatternRegex(m.SafeRegex.GetRegex())
		default:
			err = errors.New("a principal is neither a SPIFFE ID nor a pattern")
		}
		if err != nil {
			return nil, err
		}
		out = append(out, pattern)
	}
	if len(out) == 0 && !mayBeNone {
		return nil, errors.New("no principal")
	}
	return out, nil
}
