package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

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

// rbacResource makes the resource that holds the rules of one effect, for whoever
// reads connections or requests, as its name says. Rules for other destinations than
// node are left out: a rule on the wire has lost its "to" and holds for whoever
// receives it.
func rbacResource(name string, node spiffeid.ID, fingerprint string, rules []policy.Rule) (*Resource, error) {
	k, ok := rulesNamed(name)
	if !ok {
		return nil, fmt.Errorf("encoding rules: no resource is named %s", name)
	}
	var mine []policy.Rule
	for _, r := range rules {
		if r.Effect == k.effect && slices.ContainsFunc(r.To, func(p identity.Pattern) bool { return p.Match(node) }) {
			mine = append(mine, r)
		}
	}
	filter, err := k.filter(fingerprint, mine)
	if err != nil {
		return nil, err
	}
	body, err := packAny(k.typeURL(), filter)
	if err != nil {
		return nil, fmt.Errorf("encoding rules %s: %w", name, err)
	}
	return encode(ExtensionType, name, &corev3.TypedExtensionConfig{Name: name, TypedConfig: body})
}

// rulesKind is what one rules resource holds.
type rulesKind struct {
	effect   policy.Effect
	requests bool // of an HTTP filter, which sees requests
}

func rulesNamed(name string) (rulesKind, bool) {
	switch name {
	case DenyRules:
		return rulesKind{policy.Deny, false}, true
	case AllowRules:
		return rulesKind{policy.Allow, false}, true
	case HTTPDenyRules:
		return rulesKind{policy.Deny, true}, true
	case HTTPAllowRules:
		return rulesKind{policy.Allow, true}, true
	}
	return rulesKind{}, false
}

func (k rulesKind) typeURL() string {
	if k.requests {
		return httpRBACType
	}
	return rbacType
}

func (k rulesKind) filter(fingerprint string, rules []policy.Rule) (proto.Message, error) {
	if k.requests {
		return httpFilter(k.effect, fingerprint, rules)
	}
	return rbacFilter(k.effect, fingerprint, rules)
}

// rbacFilter writes rules, all of one effect, for whoever sees connections only.
func rbacFilter(effect policy.Effect, fingerprint string, rules []policy.Rule) (*rbacfilterv3.RBAC, error) {
	for _, r := range rules {
		if len(r.HTTP) > 0 {
			return nil, fmt.Errorf("encoding rule %s: a connection does not tell what it asks of requests", r.Ref)
		}
	}
	enforced, strict, err := rbacOf(effect, rules)
	if err != nil {
		return nil, err
	}
	return &rbacfilterv3.RBAC{Rules: enforced, ShadowRules: strict, StatPrefix: statPrefix + fingerprint}, nil
}

// rbacOf always gives rules to enforce: Envoy reads their absence as "no
// enforcement", but an empty ALLOW as "deny everything". Where something is only
// audited strict holds what full enforcement would: of denies those in audit mode
// too, of allows those that are no open door.
func rbacOf(effect policy.Effect, rules []policy.Rule) (enforced, strict *rbacv3.RBAC, err error) {
	action := rbacv3.RBAC_DENY
	switch effect {
	case policy.Deny:
	case policy.Allow:
		action = rbacv3.RBAC_ALLOW
	default:
		return nil, nil, fmt.Errorf("encoding rules: effect %d has no wire form", effect)
	}
	empty := func() *rbacv3.RBAC { return &rbacv3.RBAC{Action: action, Policies: map[string]*rbacv3.Policy{}} }
	enforced, shadow := empty(), empty()
	n := 0
	for _, r := range rules {
		principals := principalsOf(r)
		if len(principals) == 0 {
			continue // matches nobody
		}
		key, err := ruleKey(n, r)
		if err != nil {
			return nil, nil, err
		}
		p := &rbacv3.Policy{Permissions: permissionsOf(r), Principals: principals}
		n++
		if !r.Audit || effect == policy.Allow {
			enforced.Policies[key] = p
		}
		if !r.Audit || effect == policy.Deny {
			shadow.Policies[key] = p
		}
		if r.Audit {
			strict = shadow
		}
	}
	return enforced, strict, nil
}

// ruleKey carries what Envoy has no field for: the rule's place in the order,
// where it is written, and its reason. Sorted by key, rules keep their order.
func ruleKey(n int, r policy.Rule) (string, error) {
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
	if r.Anonymous {
		b.WriteString("&anonymous=1")
	}
	if len(r.HTTP) > 0 {
		text, err := httpText(r.HTTP)
		if err != nil {
			return "", fmt.Errorf("encoding rule %s: %w", r.Ref, err)
		}
		b.WriteString("&http=" + url.QueryEscape(text))
	}
	return b.String(), nil
}

// permissionsOf names the ports, and what is asked of requests. Envoy knows no windows of time: an allow that has
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
	var also []*rbacv3.Permission
	if r.Effect == policy.Allow && (!r.Since.IsZero() || !r.Until.IsZero()) {
		also = append(also, onlyOurs())
	}
	if len(r.HTTP) > 0 {
		also = append(also, orOf(conditions(r)))
	}
	if len(also) == 0 {
		return ports
	}
	for i, p := range ports {
		ports[i] = allOf(append([]*rbacv3.Permission{p}, also...))
	}
	return ports
}

// onlyOurs matches nothing in Envoy: what it stands for only our key says.
func onlyOurs() *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_SourcedMetadata{SourcedMetadata: &rbacv3.SourcedMetadata{MetadataMatcher: &matcherv3.MetadataMatcher{
		Filter: metadataKey,
		Path:   []*matcherv3.MetadataMatcher_PathSegment{{Segment: &matcherv3.MetadataMatcher_PathSegment_Key{Key: "onlyOurs"}}},
		Value:  &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_BoolMatch{BoolMatch: true}},
	}}}}
}

func principalsOf(r policy.Rule) []*rbacv3.Principal {
	out := make([]*rbacv3.Principal, 0, len(r.From)+1)
	if r.Anonymous {
		out = append(out, unauthenticated())
	}
	for _, p := range r.From {
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

// unauthenticated is who came without mutual TLS.
func unauthenticated() *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_NotId{NotId: &rbacv3.Principal{
		Identifier: &rbacv3.Principal_Authenticated_{Authenticated: &rbacv3.Principal_Authenticated{}},
	}}}
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
