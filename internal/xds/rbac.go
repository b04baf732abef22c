package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbacfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// One ID segment, and one or more, as RE2 sees them. Envoy matches a safe_regex
// against the whole string.
const (
	oneSegment   = `[a-zA-Z0-9._-]+`
	someSegments = `[a-zA-Z0-9._-]+(?:/[a-zA-Z0-9._-]+)*`
)

const statPrefix = "inbound."

// rbacRules is what one of the two rules resources says.
type rbacRules struct {
	fingerprint string // of the ports that the rules were made for
	rules       []policy.Rule
}

// rbacResource makes the resource that holds the rules of one effect. Rules for
// other destinations than node are left out: a rule on the wire has lost its
// "to" and holds for whoever receives it.
func rbacResource(name string, effect policy.Effect, node spiffeid.ID, fingerprint string, rules []policy.Rule) (*Resource, error) {
	var mine []policy.Rule
	for _, r := range rules {
		if r.Effect == effect && slices.ContainsFunc(r.To, func(p identity.Pattern) bool { return p.Match(node) }) {
			mine = append(mine, r)
		}
	}
	filter, err := rbacFilter(effect, fingerprint, mine)
	if err != nil {
		return nil, err
	}
	body, err := packAny(rbacType, filter)
	if err != nil {
		return nil, fmt.Errorf("encoding rules %s: %w", name, err)
	}
	return encode(ExtensionType, name, &corev3.TypedExtensionConfig{Name: name, TypedConfig: body})
}

// rbacFilter always sets Rules: Envoy reads their absence as "no enforcement",
// but an empty ALLOW as "deny everything". Where something is only audited the
// shadow rules hold the strict set: of denies those in audit mode too, of allows
// those that are no open door.
func rbacFilter(effect policy.Effect, fingerprint string, rules []policy.Rule) (*rbacfilterv3.RBAC, error) {
	action := rbacv3.RBAC_DENY
	switch effect {
	case policy.Deny:
	case policy.Allow:
		action = rbacv3.RBAC_ALLOW
	default:
		return nil, fmt.Errorf("encoding rules: effect %d has no wire form", effect)
	}
	empty := func() *rbacv3.RBAC { return &rbacv3.RBAC{Action: action, Policies: map[string]*rbacv3.Policy{}} }
	out, strict := &rbacfilterv3.RBAC{Rules: empty(), StatPrefix: statPrefix + fingerprint}, empty()
	n := 0
	for _, r := range rules {
		if len(r.HTTP) > 0 || r.Anonymous {
			return nil, fmt.Errorf("encoding rule %s: no sidecar understands its conditions", r.Ref)
		}
		principals := principalsOf(r.From)
		if len(principals) == 0 {
			continue // matches nobody
		}
		key, p := ruleKey(n, r), &rbacv3.Policy{Permissions: permissionsOf(r), Principals: principals}
		n++
		if !r.Audit || effect == policy.Allow {
			out.Rules.Policies[key] = p
		}
		if !r.Audit || effect == policy.Deny {
			strict.Policies[key] = p
		}
		if r.Audit {
			out.ShadowRules = strict
		}
	}
	return out, nil
}

// ruleKey carries what Envoy has no field for: the rule's place in the order,
// where it is written, and its reason. Sorted by key, rules keep their order.
func ruleKey(n int, r policy.Rule) string {
	var b strings.Builder
	fmt.Fprintf(&b, "n=%07d", n)
	for _, f := range [][2]string{
		{"set", r.Ref.Set}, {"policy", r.Ref.Policy}, {"file", r.Ref.File},
		{"line", strconv.Itoa(r.Ref.Line)}, {"reason", r.Reason},
	} {
		b.WriteString("&" + f[0] + "=" + url.QueryEscape(f[1]))
	}
	if r.Audit {
		b.WriteString("&audit=1")
	}
	if !r.Since.IsZero() {
		fmt.Fprintf(&b, "&since=%d", r.Since.Unix())
	}
	if !r.Until.IsZero() {
		fmt.Fprintf(&b, "&until=%d", r.Until.Unix())
	}
	return b.String()
}

// permissionsOf names the ports. Envoy knows no windows of time: an allow that has
// one also asks for metadata that nothing sets, so that whoever does not understand
// our key never reads it as wider than it is; a deny holds there at all times.
func permissionsOf(r policy.Rule) []*rbacv3.Permission {
	ports := []*rbacv3.Permission{{Rule: &rbacv3.Permission_Any{Any: true}}}
	if len(r.Ports) > 0 {
		ports = ports[:0]
		for _, p := range slices.Compact(slices.Sorted(slices.Values(r.Ports))) {
			ports = append(ports, &rbacv3.Permission{Rule: &rbacv3.Permission_DestinationPort{DestinationPort: uint32(p)}})
		}
	}
	if r.Effect == policy.Deny || r.Since.IsZero() && r.Until.IsZero() {
		return ports
	}
	for i, p := range ports {
		ports[i] = &rbacv3.Permission{Rule: &rbacv3.Permission_AndRules{AndRules: &rbacv3.Permission_Set{Rules: []*rbacv3.Permission{p, inWindow()}}}}
	}
	return ports
}

// inWindow matches where our key's window of time is open, which Envoy never finds.
func inWindow() *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Metadata{Metadata: &matcherv3.MetadataMatcher{
		Filter: metadataKey,
		Path:   []*matcherv3.MetadataMatcher_PathSegment{{Segment: &matcherv3.MetadataMatcher_PathSegment_Key{Key: "inWindow"}}},
		Value:  &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_BoolMatch{BoolMatch: true}},
	}}}
}

func principalsOf(from []identity.Pattern) []*rbacv3.Principal {
	out := make([]*rbacv3.Principal, 0, len(from))
	for _, p := range from {
		if p.IsZero() {
			continue // matches nobody
		}
		name := &matcherv3.StringMatcher{}
		if id, ok := p.Exact(); ok {
			name.MatchPattern = &matcherv3.StringMatcher_Exact{Exact: id.String()}
		} else {
			name.MatchPattern = &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: patternRegex(p)}}
		}
		out = append(out, &rbacv3.Principal{Identifier: &rbacv3.Principal_Authenticated_{
			Authenticated: &rbacv3.Principal_Authenticated{PrincipalName: name},
		}})
	}
	return out
}

// patternRegex writes a pattern as a regular expression of the same meaning.
// Outside wildcards a pattern holds only [a-zA-Z0-9._:/-], of which "." alone
// needs an escape.
func patternRegex(p identity.Pattern) string {
	segments := strings.Split(p.String(), "/")
	for i, s := range segments {
		switch s {
		case "*":
			segments[i] = oneSegment
		case "**":
			segments[i] = someSegments
		default:
			segments[i] = strings.ReplaceAll(s, ".", `\.`)
		}
	}
	return strings.Join(segments, "/")
}

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
	var effect policy.Effect
	switch ext.GetName() {
	case DenyRules:
		effect = policy.Deny
	case AllowRules:
		effect = policy.Allow
	default:
		return rbacRules{}, fmt.Errorf("extension %.100q is none of %s, %s", ext.GetName(), DenyRules, AllowRules)
	}
	if len(ext.ProtoReflect().GetUnknown()) > 0 || len(ext.GetTypedConfig().ProtoReflect().GetUnknown()) > 0 {
		return rbacRules{}, errors.New("unknown fields beside the rules")
	}
	filter := &rbacfilterv3.RBAC{}
	if err := unpackAny(ext.GetTypedConfig(), rbacType, filter); err != nil {
		return rbacRules{}, err
	}
	out := rbacRules{}
	var err error
	if out.fingerprint, err = parseFingerprint(filter.GetStatPrefix()); err != nil {
		return rbacRules{}, err
	}
	policies := maps.Clone(filter.GetRules().GetPolicies())
	if policies == nil {
		policies = map[string]*rbacv3.Policy{}
	}
	maps.Copy(policies, filter.GetShadowRules().GetPolicies())
	if out.rules, err = parseRules(node, effect, policies); err != nil {
		return rbacRules{}, err
	}
	want, err := rbacFilter(effect, out.fingerprint, out.rules)
	if err != nil {
		return rbacRules{}, err
	}
	if !proto.Equal(filter, want) {
		return rbacRules{}, errors.New("the rules hold something that this version does not understand")
	}
	return out, nil
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
		if r.From, err = parsePrincipals(policies[key].GetPrincipals()); err != nil {
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
		Reason: v.Get("reason"), Audit: v.Get("audit") == "1",
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
		if and := p.GetAndRules().GetRules(); len(and) == 2 { // a window of time; the whole is compared later
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

func parsePrincipals(in []*rbacv3.Principal) ([]identity.Pattern, error) {
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
	if len(out) == 0 {
		return nil, errors.New("no principal")
	}
	return out, nil
}

// fingerprintOf names a list of declared ports. Rules carry the fingerprint of
// the ports they were made for, and a node takes both together or neither: a
// new port must not be served for one moment under rules that do not know it.
func fingerprintOf(ports []policy.Port) string {
	h := sha256.New()
	for _, p := range ports {
		fmt.Fprintf(h, "%q %d %q\n", p.Name, p.Number, p.Protocol)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func parseFingerprint(stat string) (string, error) {
	f, ok := strings.CutPrefix(stat, statPrefix)
	if b, err := hex.DecodeString(f); !ok || err != nil || len(b) != 8 || hex.EncodeToString(b) != f {
		return "", fmt.Errorf("stat_prefix %.100q: want %sFINGERPRINT", stat, statPrefix)
	}
	return f, nil
}
