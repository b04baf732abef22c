package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v4"
)

const (
	maxAttest   = 32   // entries of one workload
	maxSelector = 1024 // bytes of one selector's value
)

// attest reads a list of evidence, as proves a workload.
func (f *fileReader) attest(n *yaml.Node, list string) []Attest {
	items, ok := f.list(n, list)
	if !ok {
		return nil
	}
	if len(items) > maxAttest {
		f.fail(at(n), "", "%s has more than %d entries", list, maxAttest)
		return nil
	}
	var out []Attest
	for i, item := range items {
		what := fmt.Sprintf("%s[%d]", list, i)
		kind, kn, ok := f.attestKind(item, what)
		if !ok {
			continue
		}
		form, known := formOf(kind)
		if !known {
			hint := didYouMean(kind, kindsOfEvidence())
			if hint == "" {
				hint = "supported: " + strings.Join(kindsOfEvidence(), ", ")
			}
			f.fail(at(kn), hint, "attest kind %q is not supported by this version", shorten(kind))
			continue
		}
		a, ok := f.attestEntry(item, what, kind, form, list == grantedEvidence)
		if !ok {
			continue
		}
		if slices.ContainsFunc(out, func(o Attest) bool { return o.String() == a.String() }) {
			f.fail(at(kn), "", "duplicate attest entry %q", a.String())
			continue
		}
		out = append(out, a)
	}
	return out
}

// attestKind reads the kind before the other fields, which depend on it.
func (f *fileReader) attestKind(n *yaml.Node, what string) (string, *yaml.Node, bool) {
	if n.Kind != yaml.MappingNode {
		f.wrongType(n, what, "a mapping")
		return "", nil, false
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == "kind" {
			kind, ok := f.text(n.Content[i+1], what+".kind")
			return kind, n.Content[i+1], ok
		}
	}
	f.fail(at(n), "", "%s.kind is missing", what)
	return "", nil, false
}

// attestEntry reads an entry of a Workload, or, with grant, of a Scope, where an
// issuer or an agent may be all that is asked for.
func (f *fileReader) attestEntry(n *yaml.Node, what, kind string, form form, grant bool) (Attest, bool) {
	before := f.errs.count()
	entry, _ := evidenceEntry.of(kind)
	o, ok := f.object(n, what, entry.known)
	if !ok {
		return Attest{}, false
	}
	a := Attest{Kind: kind, pos: at(n)}
	for _, k := range form.selectors {
		if vn, there := o.fields[k]; there {
			f.evidenceValue(&a, k, vn, o.path(k))
		}
	}
	if in, there := o.fields[form.issuer]; there && form.issuer != "" {
		if name, ok := f.text(in, o.path(form.issuer)); ok {
			if !isLabel(name) {
				f.fail(at(in), "", "%s: %q is not a lower-case DNS label; it names an entry of attest in the control plane's configuration", o.path(form.issuer), shorten(name))
			}
			a.Issuer = name
		}
	}
	if form.via {
		a.Via = f.via(o)
	}
	if _, has := o.fields["claims"]; form.claims && (has || !grant) {
		f.claims(&a, o)
	}
	bounded := len(a.Select) > 0 || kind == JoinToken || len(form.required) > 0 || grant && (a.Issuer != "" || len(a.Via) > 0)
	if f.errs.count() == before && !bounded {
		f.fail(at(n), "fields: "+strings.Join(append(slices.Clone(form.selectors), "claims")[:max(len(form.selectors), 1)], ", "), "%s would accept any evidence of kind %s; name at least one selector", what, kind)
	}
	return a, f.errs.count() == before
}

// evidenceValue reads the value of one selector. Numbers are what people write for ids of users.
func (f *fileReader) evidenceValue(a *Attest, key string, n *yaml.Node, what string) {
	value := n.Value
	if n.Kind != yaml.ScalarNode || n.Tag != "!!str" && n.Tag != "!!int" && n.Tag != "!!bool" {
		f.wrongType(n, what, "text")
		return
	}
	switch {
	case value == "":
		f.fail(at(n), "leave the field out, or write a value", "%s is empty", what)
	case len(value) > maxSelector:
		f.fail(at(n), "", "%s is longer than %d bytes", what, maxSelector)
	case strings.ContainsAny(value, "{}"):
		f.fail(at(n), "leave the field out, and write {"+key+"} in spec.id", "%s: a template stands in spec.id and labels only", what)
	case value == "*":
		f.fail(at(n), "leave the field out to accept any value", "%s: there are no wildcards in selectors", what)
	case (key == "fingerprint" || key == "issuerFingerprint" || key == "sha256") && !isHash(value):
		f.fail(at(n), "", "%s: want 64 lower-case hex digits, a SHA-256", what)
	case (key == "uid" || key == "gid") && strings.Trim(value, "0123456789") != "":
		f.fail(at(n), "write the number; a name goes into user or group", "%s: %q is not a number", what, shorten(value))
	default:
		if a.Select == nil {
			a.Select = map[string]string{}
		}
		a.Select[key] = value
	}
}

func isHash(s string) bool { return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" }

// via reads the agents whose word about a process counts.
func (f *fileReader) via(o object) []string {
	items, ok := o.list("via")
	if !ok {
		return nil
	}
	var out []string
	for i, item := range items {
		what := fmt.Sprintf("%s[%d]", o.path("via"), i)
		path, ok := f.text(item, what)
		if !ok {
			continue
		}
		switch err := spiffeid.ValidatePath(path); {
		case strings.Contains(path, "*"):
			f.fail(at(item), "write each agent's ID", "%s: an agent is named exactly, without wildcard", what)
		case !strings.HasPrefix(path, "/") || path == "/" || err != nil:
			f.fail(at(item), "", "%s: %q is not the path of a SPIFFE ID, as in /agents/host1", what, shorten(path))
		case slices.Contains(out, path):
			f.fail(at(item), "", "%s: %s is there twice", what, path)
		default:
			out = append(out, path)
		}
	}
	return out
}

// claims reads the claims that a token must carry. A dot leads into an object.
func (f *fileReader) claims(a *Attest, o object) {
	n, ok := o.need("claims")
	if !ok {
		return
	}
	if n.Kind != yaml.MappingNode {
		f.wrongType(n, o.path("claims"), "a mapping")
		return
	}
	if len(n.Content) == 0 {
		f.fail(at(n), "name the claims that tell workloads apart, as sub", "%s is empty: it would accept any token", o.path("claims"))
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		name, ok := f.text(n.Content[i], "a key of "+o.path("claims"))
		if !ok {
			continue
		}
		key := claimPrefix + name
		switch _, twice := a.Select[key]; {
		case twice:
			f.fail(at(n.Content[i]), "", "duplicate key %q", shorten(name))
		case name == "" || len(name) > 128 || strings.ContainsAny(name, " \t{}"):
			f.fail(at(n.Content[i]), "", "%s: %q is not the name of a claim", o.path("claims"), shorten(name))
		case name == "iss" || name == "aud" || name == "exp" || name == "iat" || name == "nbf":
			f.fail(at(n.Content[i]), "", "%s.%s is checked by the control plane's configuration; name claims that tell workloads apart, as sub", o.path("claims"), name)
		default:
			f.evidenceValue(a, key, n.Content[i+1], o.path("claims")+"."+name)
		}
	}
}
