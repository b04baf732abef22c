package policy

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
)

// Limits of one rule. They bound what a request costs.
const (
	MaxMatches = 64 // entries under http or grpc
	MaxValues  = 64 // methods, paths, hosts, headers or claims of one entry
)

// entry parses one rule.
func (f *fileReader) entry(n *yaml.Node, what string, effect Effect) (Entry, bool) {
	fields := denyShape.known
	if effect == Allow {
		fields = allowShape.known
	}
	o, ok := f.object(n, what, fields)
	if !ok {
		return Entry{}, false
	}
	e := Entry{pos: at(n)}
	if items, ok := o.list("from"); ok {
		for i, item := range items {
			if s, ok := f.selector(item, fmt.Sprintf("%s.from[%d]", what, i), fromForms); ok {
				e.From = append(e.From, s)
			}
		}
	}
	e.Ports = f.portRefs(o)
	if rn, ok := o.fields["reason"]; ok {
		e.Reason = f.reason(rn, what+".reason")
	}
	e.Since, e.Until = f.window(o)
	if un, ok := o.fields["until"]; ok {
		e.until = at(un)
	}
	f.requests(o, &e)
	if mn, ok := o.fields["mode"]; ok {
		if mode, ok := f.text(mn, o.path("mode")); ok && mode != "audit" {
			f.fail(at(mn), "write audit to record only, or remove the field to refuse", "%s: %q is not a mode", o.path("mode"), shorten(mode))
		}
		e.Audit = true
	}
	return e, true
}

// window reads since and until.
func (f *fileReader) window(o object) (since, until time.Time) {
	since, _ = f.optionalTime(o, "since")
	until, ok := f.optionalTime(o, "until")
	if ok && !since.IsZero() && !until.After(since) {
		f.fail(at(o.fields["until"]), "", "%s is not after since: the rule would never hold", o.path("until"))
	}
	return since, until
}

// optionalTime reads a field that may be left out; false when it was or is wrong.
func (f *fileReader) optionalTime(o object, field string) (time.Time, bool) {
	n, ok := o.fields[field]
	if !ok {
		return time.Time{}, false
	}
	return f.time(n, o.path(field))
}

// time reads RFC 3339 in whole seconds.
func (f *fileReader) time(n *yaml.Node, what string) (time.Time, bool) {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!timestamp" && n.Tag != "!!str" {
		f.wrongType(n, what, "a time")
		return time.Time{}, false
	}
	t, err := time.Parse(time.RFC3339, n.Value)
	switch {
	case err != nil:
		f.fail(at(n), "write it as in 2026-12-31T00:00:00Z", "%s: %q is not a time of RFC 3339 with a zone", what, shorten(n.Value))
	case t.Nanosecond() != 0:
		f.fail(at(n), "", "%s: %s is not in whole seconds", what, n.Value)
	case t.Year() < 2000:
		f.fail(at(n), "", "%s: %s is before the year 2000", what, n.Value)
	default:
		return t.UTC(), true
	}
	return time.Time{}, false
}

// truth reads true or false.
func (f *fileReader) truth(n *yaml.Node, what string) (bool, bool) {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" {
		f.wrongType(n, what, "true or false")
		return false, false
	}
	return strings.EqualFold(n.Value, "true"), true
}

// requests reads http, grpc and when into e.HTTP.
func (f *fileReader) requests(o object, e *Entry) {
	hn, hasHTTP := o.fields["http"]
	gn, hasGRPC := o.fields["grpc"]
	switch {
	case hasHTTP && hasGRPC:
		f.fail(at(gn), "write two rules", "%s has both http and grpc", o.what)
		return
	case hasHTTP:
		e.http, e.matches = at(hn), places(hn)
		e.HTTP = f.matches(hn, o.path("http"), f.httpMatch)
	case hasGRPC:
		e.http, e.matches, e.GRPC = at(gn), places(gn), true
		e.HTTP = f.matches(gn, o.path("grpc"), f.grpcMatch)
	}
	wn, hasWhen := o.fields["when"]
	if !hasWhen {
		return
	}
	e.when = at(wn)
	claims := f.endUser(wn, o.path("when"))
	if !hasHTTP && !hasGRPC {
		e.http, e.HTTP = at(wn), []HTTPMatch{{}}
	}
	for i := range e.HTTP {
		e.HTTP[i].Claims = claims
	}
}

// matches reads the entries of http or grpc. What is wrong was reported; the result
// is never empty, as that would mean every connection.
func (f *fileReader) matches(n *yaml.Node, what string, read func(*yaml.Node, string) HTTPMatch) []HTTPMatch {
	items, ok := f.list(n, what)
	switch {
	case ok && len(items) == 0:
		f.fail(at(n), "leave it out for every request", "%s is empty", what)
	case len(items) > MaxMatches:
		f.fail(at(n), "split the rule", "%s has more than %d entries", what, MaxMatches)
	}
	if len(items) == 0 || len(items) > MaxMatches {
		return []HTTPMatch{{}}
	}
	out := make([]HTTPMatch, len(items))
	for i, item := range items {
		out[i] = read(item, fmt.Sprintf("%s[%d]", what, i))
	}
	return out
}

func (f *fileReader) httpMatch(n *yaml.Node, what string) HTTPMatch {
	o, ok := f.object(n, what, httpShape.known)
	if !ok {
		return HTTPMatch{}
	}
	if len(n.Content) == 0 {
		f.fail(at(n), "leave http out for every request", "%s is empty", what)
	}
	m := HTTPMatch{
		Methods: f.values(o, "methods", f.method),
		Paths:   f.values(o, "paths", f.pathPattern),
		Hosts:   f.values(o, "hosts", f.host),
	}
	hn, ok := o.fields["headers"]
	if !ok {
		return m
	}
	items, _ := o.list("headers")
	if len(items) > MaxValues {
		f.fail(at(hn), "", "%s has more than %d entries", o.path("headers"), MaxValues)
		return m
	}
	for i, item := range items {
		m.Headers = append(m.Headers, f.headerMatch(item, fmt.Sprintf("%s[%d]", o.path("headers"), i)))
	}
	return m
}

// values reads a list of text, which is sorted then.
func (f *fileReader) values(o object, field string, check func(n *yaml.Node, s, what string) bool) []string {
	n, ok := o.fields[field]
	if !ok {
		return nil
	}
	items, _ := o.list(field)
	if len(items) > MaxValues {
		f.fail(at(n), "", "%s has more than %d entries", o.path(field), MaxValues)
		return nil
	}
	var out []string
	for i, item := range items {
		what := fmt.Sprintf("%s[%d]", o.path(field), i)
		if s, ok := f.text(item, what); ok && check(item, s, what) {
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// method reads a token of RFC 9110 section 9.1, in upper case as all registered
// ones are.
func (f *fileReader) method(n *yaml.Node, s, what string) bool {
	probe := HTTPRequest{Method: s, Path: "/"}
	if probe.Check() == nil {
		return true
	}
	hint := ""
	if upper := (HTTPRequest{Method: strings.ToUpper(s), Path: "/"}); upper.Check() == nil {
		hint = fmt.Sprintf("did you mean %q?", strings.ToUpper(s))
	}
	f.fail(at(n), hint, "%s: %q is not a method in upper case", what, shorten(s))
	return false
}

func (f *fileReader) pathPattern(n *yaml.Node, s, what string) bool {
	if err := CheckPathPattern(s); err != nil {
		f.fail(at(n), "", "%s: %q could never match: %v", what, shorten(s), err)
		return false
	}
	return true
}

func (f *fileReader) host(n *yaml.Node, s, what string) bool {
	if s == "" || !canonicalHost(s) {
		hint := ""
		if lower := strings.ToLower(strings.TrimSuffix(s, ".")); lower != "" && lower != s && canonicalHost(lower) {
			hint = fmt.Sprintf("did you mean %q?", lower)
		}
		f.fail(at(n), hint, "%s: %q is not a host name or address in lower case, without port and wildcard", what, shorten(s))
		return false
	}
	return true
}

func (f *fileReader) headerMatch(n *yaml.Node, what string) HeaderMatch {
	o, ok := f.object(n, what, headerShape.known)
	if !ok {
		return HeaderMatch{}
	}
	var m HeaderMatch
	name, nn, ok := o.text("name")
	if ok && (name == "" || !only(strings.ToLower(name), "-_") || strings.EqualFold(name, "host")) {
		f.fail(at(nn), "", "%s: %q is not the name of a header; the host is asked for by hosts", o.path("name"), shorten(name))
	}
	m.Name = http.CanonicalHeaderKey(name)
	en, hasEquals := o.fields["equals"]
	pn, hasPresent := o.fields["present"]
	if hasEquals == hasPresent {
		f.fail(at(n), "", "%s: want one of equals and present", what)
		return m
	}
	if hasEquals {
		m.Equals, ok = f.text(en, o.path("equals"))
		if ok && (m.Equals == "" || strings.Trim(m.Equals, " \t") != m.Equals || strings.ContainsFunc(m.Equals, func(r rune) bool { return r < ' ' || r > '~' || r == ',' })) {
			f.fail(at(en), "", "%s: %q is not printable ASCII without commas and outer spaces", o.path("equals"), shorten(m.Equals))
		}
		return m
	}
	if m.Present, ok = f.truth(pn, o.path("present")); ok && !m.Present {
		f.fail(at(pn), "", "%s: false is not supported; allow by what a request has, not by what it lacks", o.path("present"))
	}
	return m
}

// grpcMatch reads {service: …, methods: […]}: POST /SERVICE/METHOD on the wire.
func (f *fileReader) grpcMatch(n *yaml.Node, what string) HTTPMatch {
	o, ok := f.object(n, what, grpcShape.known)
	if !ok {
		return HTTPMatch{}
	}
	m := HTTPMatch{Methods: []string{http.MethodPost}, Paths: []string{"/**"}}
	service, sn, ok := o.text("service")
	if ok && !isProtoName(service, true) {
		f.fail(at(sn), "write it in full, as in shop.v1.Payments", "%s: %q is not the name of a gRPC service", o.path("service"), shorten(service))
		ok = false
	}
	methods := f.values(o, "methods", func(n *yaml.Node, s, what string) bool {
		if isProtoName(s, false) {
			return true
		}
		f.fail(at(n), "", "%s: %q is not the name of a gRPC method", what, shorten(s))
		return false
	})
	if !ok {
		return m
	}
	m.Paths = []string{"/" + service + "/*"}
	if len(methods) > 0 {
		m.Paths = nil
	}
	for _, method := range methods {
		m.Paths = append(m.Paths, "/"+service+"/"+method)
	}
	return m
}

// isProtoName accepts an identifier of protobuf, dotted where full.
func isProtoName(s string, full bool) bool {
	parts := []string{s}
	if full {
		parts = strings.Split(s, ".")
	}
	for _, p := range parts {
		if p == "" || !only(strings.ToLower(p), "_") || p[0] >= '0' && p[0] <= '9' {
			return false
		}
	}
	return len(s) <= 512
}

// endUser reads when: {issuer: NAME, claims: {CLAIM: VALUE}}.
func (f *fileReader) endUser(n *yaml.Node, what string) []ClaimMatch {
	o, ok := f.object(n, what, whenShape.known)
	if !ok {
		return nil
	}
	issuer, in, ok := o.text("issuer")
	if ok && !isLabel(issuer) {
		f.fail(at(in), "", "%s: %q is not the name of a TokenIssuer", o.path("issuer"), shorten(issuer))
	}
	cn, ok := o.need("claims")
	if !ok {
		return nil
	}
	if cn.Kind != yaml.MappingNode {
		f.wrongType(cn, o.path("claims"), "a mapping")
		return nil
	}
	if len(cn.Content) == 0 || len(cn.Content) > 2*MaxValues {
		f.fail(at(cn), "", "%s: want 1 to %d claims", o.path("claims"), MaxValues)
		return nil
	}
	seen := map[string]bool{}
	var out []ClaimMatch
	for i := 0; i+1 < len(cn.Content); i += 2 {
		claim, ok1 := f.text(cn.Content[i], "a key of "+o.path("claims"))
		value, ok2 := f.text(cn.Content[i+1], o.path("claims")+"."+shorten(claim))
		switch {
		case !ok1 || !ok2:
		case claim == "" || value == "":
			f.fail(at(cn.Content[i]), "", "%s: an empty claim or value", o.path("claims"))
		case seen[claim]:
			f.fail(at(cn.Content[i]), "", "duplicate key %q", claim)
		default:
			seen[claim] = true
			out = append(out, ClaimMatch{Issuer: issuer, Claim: claim, Value: value})
		}
	}
	slices.SortFunc(out, func(a, b ClaimMatch) int { return strings.Compare(a.Claim, b.Claim) })
	return out
}
