package policy

import (
	"fmt"
	"net/http"
	"strings"

	"go.yaml.in/yaml/v4"
)

// policyTest parses the spec of a PolicyTest.
func (f *fileReader) policyTest(name string, p pos, n *yaml.Node) {
	spec, ok := f.object(n, "spec", policyTestSpec.known)
	if !ok {
		return
	}
	out := PolicyTest{Name: name, Set: f.set.Name, File: f.file, Line: p.line, Col: p.col}
	items, _ := spec.list("cases")
	for i, item := range items {
		if c, ok := f.testCase(item, fmt.Sprintf("spec.cases[%d]", i)); ok {
			out.Cases = append(out.Cases, c)
		}
	}
	f.set.Tests = append(f.set.Tests, out)
}

func (f *fileReader) testCase(n *yaml.Node, what string) (Case, bool) {
	o, ok := f.object(n, what, caseShape.known)
	if !ok {
		return Case{}, false
	}
	before := f.errs.count()
	c := Case{pos: at(n)}
	c.From, c.from = f.caseFrom(o)
	c.To, c.to, _ = f.caseRef(o, "to")
	expect, en, ok := o.text("expect")
	switch {
	case !ok:
	case expect == "allow":
		c.Expect = Allow
	case expect != "deny":
		f.fail(at(en), didYouMean(expect, []string{"allow", "deny"}), "%s: %q is neither allow nor deny", o.path("expect"), shorten(expect))
	}
	if pn, ok := o.fields["port"]; ok {
		c.Port, _ = f.portRef(pn, o.path("port"))
		if c.Port.All {
			f.fail(at(pn), "leave port out", "%s: every port is asked when none is named", o.path("port"))
		}
	}
	c.At, _ = f.optionalTime(o, "at")
	f.caseRequest(o, &c)
	return c, f.errs.count() == before
}

// caseFrom reads a reference, or {anonymous: true}, which gives "".
func (f *fileReader) caseFrom(o object) (string, pos) {
	n, ok := o.need("from")
	if !ok {
		return "", pos{}
	}
	if n.Kind == yaml.MappingNode {
		_, _ = f.selector(n, o.path("from"), nobody.names())
		return "", at(n)
	}
	s, p, _ := f.caseRef(o, "from")
	return s, p
}

// caseRef reads a workload's name, an ID without wildcards, or external:NAME.
func (f *fileReader) caseRef(o object, field string) (string, pos, bool) {
	s, n, ok := o.text(field)
	if !ok {
		return "", pos{}, false
	}
	if name, external := strings.CutPrefix(s, "external:"); external && field == "to" && isLabel(name) {
		return s, at(n), true
	}
	if strings.HasPrefix(s, "/") || strings.HasPrefix(s, "spiffe://") {
		if _, ok := f.idPattern(n, o.path(field)); !ok {
			return "", pos{}, false
		}
		if strings.Contains(s, "*") {
			f.fail(at(n), "name one identity", "%s: %q has a wildcard", o.path(field), shorten(s))
			return "", pos{}, false
		}
		return s, at(n), true
	}
	_, ok = f.workloadName(n, o.path(field))
	return s, at(n), ok
}

// caseRequest reads http: METHOD PATH, or a mapping, or grpc: SERVICE/METHOD.
func (f *fileReader) caseRequest(o object, c *Case) {
	hn, hasHTTP := o.fields["http"]
	gn, hasGRPC := o.fields["grpc"]
	switch {
	case hasHTTP && hasGRPC:
		f.fail(at(gn), "write two cases", "%s has both http and grpc", o.what)
	case hasGRPC:
		c.http, c.grpc = at(gn), true
		if s, ok := f.text(gn, o.path("grpc")); ok {
			service, method, _ := strings.Cut(s, "/")
			if !isProtoName(service, true) || !isProtoName(method, false) {
				f.fail(at(gn), "write it as in shop.v1.Payments/Charge", "%s: %q is not a gRPC method", o.path("grpc"), shorten(s))
			}
			c.HTTP = &HTTPRequest{Method: http.MethodPost, Path: "/" + s}
		}
	case hasHTTP && hn.Kind == yaml.MappingNode:
		c.http, c.HTTP = at(hn), f.request(hn, o.path("http"))
	case hasHTTP:
		c.http = at(hn)
		if s, ok := f.text(hn, o.path("http")); ok {
			method, path, both := strings.Cut(s, " ")
			c.HTTP = &HTTPRequest{Method: method, Path: path}
			if !both || c.HTTP.Check() != nil && !strings.HasPrefix(path, "/") {
				f.fail(at(hn), "write it as in POST /v1/charges", "%s: %q is not a method and a path", o.path("http"), shorten(s))
			}
		}
	}
}

// request reads {method, path, host, headers, claims}. A request that is not
// canonical may be asked about: it is refused.
func (f *fileReader) request(n *yaml.Node, what string) *HTTPRequest {
	o, ok := f.object(n, what, callRequest.known)
	if !ok {
		return nil
	}
	h := &HTTPRequest{Header: map[string][]string{}}
	h.Method, _, _ = o.text("method")
	h.Path, _, _ = o.text("path")
	if hn, ok := o.fields["host"]; ok {
		h.Host, _ = f.text(hn, o.path("host"))
	}
	if hn, ok := o.fields["headers"]; ok {
		f.textMap(hn, o.path("headers"), func(k, v string) {
			k = http.CanonicalHeaderKey(k)
			h.Header[k] = append(h.Header[k], v)
		})
	}
	cn, ok := o.fields["claims"]
	if !ok {
		return h
	}
	if cn.Kind != yaml.MappingNode {
		f.wrongType(cn, o.path("claims"), "a mapping from issuer to claims")
		return h
	}
	h.Claims = map[string]map[string][]string{}
	for i := 0; i+1 < len(cn.Content); i += 2 {
		issuer, claims := cn.Content[i].Value, map[string][]string{}
		f.textMap(cn.Content[i+1], o.path("claims")+"."+shorten(issuer), func(k, v string) { claims[k] = append(claims[k], v) })
		h.Claims[issuer] = claims
	}
	return h
}

// textMap reads a mapping from text to text, or to lists of it.
func (f *fileReader) textMap(n *yaml.Node, what string, each func(k, v string)) {
	if n.Kind != yaml.MappingNode {
		f.wrongType(n, what, "a mapping")
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, ok := f.text(n.Content[i], "a key of "+what)
		values := []*yaml.Node{n.Content[i+1]}
		if values[0].Kind == yaml.SequenceNode {
			values = values[0].Content
		}
		for _, vn := range values {
			if v, good := f.text(vn, what+"."+shorten(key)); ok && good {
				each(key, v)
			}
		}
	}
}
