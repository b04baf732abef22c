package xds

import (
	"encoding/json"
	"errors"
	"reflect"
	"regexp"
	"strings"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// guardKey names the policy that refuses requests which are not canonical. Every
// resource of denies of HTTP has it.
const guardKey = "canonical"

// The canonical form of [policy.HTTPRequest.Check] as RE2 sees it, in parts: an
// encoded character, any, one of a segment's beginning, a segment that is neither
// "." nor "..".
const (
	encodedTail = `%[89AB][0-9A-F]`
	encodedChar = `%2[02]|%3[CE]|%5[BDE]|%60|%7[BCD]` +
		`|%(?:C[2-9A-F]|D[0-9A-F])` + encodedTail +
		`|%E0%[AB][0-9A-F]` + encodedTail + `|%ED%[89][0-9A-F]` + encodedTail + `|%E[1-9A-CEF]` + encodedTail + encodedTail +
		`|%F0%[9AB][0-9A-F]` + encodedTail + encodedTail + `|%F4%8[0-9A-F]` + encodedTail + encodedTail + `|%F[1-3]` + encodedTail + encodedTail + encodedTail
	undotted = `(?:[A-Za-z0-9_~!$&'()*+,=:@-]|` + encodedChar + `)`
	anyChar  = `(?:[A-Za-z0-9._~!$&'()*+,=:@-]|` + encodedChar + `)`
	segment  = `(?:\.{0,2}` + undotted + anyChar + `*|\.{3}` + anyChar + `*)`

	canonicalPath   = `/|(?:/` + segment + `)+/?`
	canonicalMethod = `[A-Z0-9_-]+`
	canonicalHost   = `(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[a-z0-9.:]+\])` + anyPort
	anyPort         = `(?::[0-9]{1,5})?`
)

// onePathSegment needs not be stricter: what is not canonical the guard refuses.
const onePathSegment = `[^/]+`

// guard denies what more than one reader could understand differently.
func guard() *rbacv3.Policy {
	not := func(p *rbacv3.Permission) *rbacv3.Permission {
		return &rbacv3.Permission{Rule: &rbacv3.Permission_NotRule{NotRule: p}}
	}
	return &rbacv3.Policy{
		Permissions: []*rbacv3.Permission{
			not(urlPath(matchRegex(canonicalPath))),
			not(header(":method", matchRegex(canonicalMethod))),
			not(header(":authority", matchRegex(canonicalHost))),
		},
		Principals: []*rbacv3.Principal{{Identifier: &rbacv3.Principal_Any{Any: true}}},
	}
}

// httpFilter writes rules, all of one effect, for whoever reads requests.
func httpFilter(effect policy.Effect, fingerprint string, rules []policy.Rule) (*httprbacv3.RBAC, error) {
	enforced, strict, err := rbacOf(effect, rules)
	if err != nil {
		return nil, err
	}
	if effect == policy.Deny {
		enforced.Policies[guardKey] = guard()
		if strict != nil {
			strict.Policies[guardKey] = guard()
		}
	}
	return &httprbacv3.RBAC{
		Rules: enforced, ShadowRules: strict,
		RulesStatPrefix: statPrefix + fingerprint,
	}, nil
}

// conditions says which requests a rule is about: one permission for each match of
// which any will do. What Envoy has no words for, an allow never matches there, and
// a deny always.
func conditions(r policy.Rule) []*rbacv3.Permission {
	out := make([]*rbacv3.Permission, 0, len(r.HTTP))
	for _, m := range r.HTTP {
		var all []*rbacv3.Permission
		if len(m.Methods) > 0 {
			all = append(all, anyOf(m.Methods, func(s string) *rbacv3.Permission { return header(":method", matchExact(s)) }))
		}
		if len(m.Paths) > 0 {
			all = append(all, anyOf(m.Paths, func(s string) *rbacv3.Permission { return urlPath(matchPath(s)) }))
		}
		if len(m.Hosts) > 0 {
			all = append(all, anyOf(m.Hosts, func(s string) *rbacv3.Permission {
				return header(":authority", matchRegex(regexp.QuoteMeta(s)+anyPort))
			}))
		}
		for _, h := range m.Headers {
			all = append(all, headerCondition(h, r.Effect))
		}
		if len(m.Claims) > 0 && r.Effect == policy.Allow {
			all = append(all, onlyOurs())
		}
		if len(all) == 0 {
			all = []*rbacv3.Permission{{Rule: &rbacv3.Permission_Any{Any: true}}}
		}
		out = append(out, allOf(all))
	}
	return out
}

// headerCondition matches the header's lines as Envoy sees them: joined by commas.
// An allow asks for one line of that value, so it can have no comma.
func headerCondition(h policy.HeaderMatch, effect policy.Effect) *rbacv3.Permission {
	name := strings.ToLower(h.Name)
	switch {
	case h.Present:
		return &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: &routev3.HeaderMatcher{
			Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_PresentMatch{PresentMatch: true},
		}}}
	case effect == policy.Deny:
		return header(name, matchRegex(`(?s:.*,)?[ \t]*`+regexp.QuoteMeta(h.Equals)+`[ \t]*(?s:,.*)?`))
	case strings.Contains(h.Equals, ",") || h.Equals == "":
		return onlyOurs()
	}
	return header(name, matchExact(h.Equals))
}

func anyOf(values []string, of func(string) *rbacv3.Permission) *rbacv3.Permission {
	list := make([]*rbacv3.Permission, len(values))
	for i, v := range values {
		list[i] = of(v)
	}
	return orOf(list)
}

func orOf(list []*rbacv3.Permission) *rbacv3.Permission {
	if len(list) == 1 {
		return list[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_OrRules{OrRules: &rbacv3.Permission_Set{Rules: list}}}
}

func allOf(list []*rbacv3.Permission) *rbacv3.Permission {
	if len(list) == 1 {
		return list[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_AndRules{AndRules: &rbacv3.Permission_Set{Rules: list}}}
}

func urlPath(m *matcherv3.StringMatcher) *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{Rule: &matcherv3.PathMatcher_Path{Path: m}}}}
}

func header(name string, m *matcherv3.StringMatcher) *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: &routev3.HeaderMatcher{
		Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: m},
	}}}
}

func matchExact(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s}}
}

func matchRegex(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: s}}}
}

// matchPath writes a pattern of [policy.MatchPath] for canonical paths.
func matchPath(pattern string) *matcherv3.StringMatcher {
	if !strings.Contains(pattern, "*") {
		return matchExact(pattern)
	}
	segments := strings.Split(pattern, "/")
	for i, s := range segments {
		switch s {
		case "*":
			segments[i] = onePathSegment
		case "**":
			segments[i] = onePathSegment + `(?:/` + onePathSegment + `)*`
		default:
			segments[i] = regexp.QuoteMeta(s)
		}
	}
	return matchRegex(strings.Join(segments, "/"))
}

// httpText is what a rule asks of requests, for its key: Envoy's matchers say the
// same as far as they can, and who reads strictly holds one against the other.
func httpText(matches []policy.HTTPMatch) (string, error) {
	b, err := json.Marshal(matches)
	if err != nil {
		return "", err
	}
	if again, err := parseHTTPText(string(b)); err != nil || !reflect.DeepEqual(again, matches) {
		return "", errors.New("what it asks of requests is no text")
	}
	return string(b), nil
}

func parseHTTPText(s string) ([]policy.HTTPMatch, error) {
	var out []policy.HTTPMatch
	d := json.NewDecoder(strings.NewReader(s))
	d.DisallowUnknownFields()
	if err := d.Decode(&out); err != nil {
		return nil, err
	}
	return out, nil
}
