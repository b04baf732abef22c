package policy

import (
	"fmt"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v4"
)

// policy parses the spec of a Policy.
func (f *fileReader) policy(name string, p pos, n *yaml.Node) {
	spec, ok := f.object(n, "spec", policySpec.known)
	if !ok {
		return
	}
	out := Policy{Name: name, Set: f.set.Name, File: f.file, Line: p.line, Col: p.col}
	if tn, ok := spec.need("to"); ok {
		out.To, _ = f.selector(tn, "spec.to", toForms)
	}
	an, hasAllow := spec.fields["allow"]
	dn, hasDeny := spec.fields["deny"]
	if !hasAllow && !hasDeny {
		f.fail(at(n), "write \"allow: []\" if nothing shall be allowed", "spec has neither allow nor deny: the file may be half-written")
	}
	if hasAllow {
		out.Allow = f.entries(an, "spec.allow", Allow)
	}
	if hasDeny {
		out.Deny = f.entries(dn, "spec.deny", Deny)
	}
	f.set.Policies = append(f.set.Policies, out)
}

func (f *fileReader) entries(n *yaml.Node, what string, effect Effect) []Entry {
	items, ok := f.list(n, what)
	if !ok {
		return nil
	}
	out := make([]Entry, 0, len(items))
	for i, item := range items {
		if e, ok := f.entry(item, fmt.Sprintf("%s[%d]", what, i), effect); ok {
			out = append(out, e)
		}
	}
	return out
}

// reason reads text that is shown to whoever is refused, on one line.
func (f *fileReader) reason(n *yaml.Node, what string) string {
	s, ok := f.text(n, what)
	if !ok {
		return ""
	}
	if len(s) > MaxReason {
		f.fail(at(n), "", "%s is longer than %d bytes", what, MaxReason)
		return ""
	}
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		f.fail(at(n), "", "%s is not one line of printable text", what)
		return ""
	}
	return s
}

// portRefs reads the ports of a rule: [all], or names and numbers.
func (f *fileReader) portRefs(o object) []PortRef {
	n, ok := o.fields["ports"]
	if !ok {
		o.f.fail(at(o.node), "name the ports, or write [all] for every port", "%s is missing", o.path("ports"))
		return nil
	}
	items, ok := f.list(n, o.path("ports"))
	if !ok {
		return nil
	}
	if len(items) == 0 {
		f.fail(at(n), "name the ports, or write [all] for every port", "%s is empty", o.path("ports"))
		return nil
	}
	if len(items) > MaxPorts {
		f.fail(at(n), "split the rule", "%s names more than %d ports", o.path("ports"), MaxPorts)
		return nil
	}
	seen := map[string]int{} // :: name or number → line
	out := make([]PortRef, 0, len(items))
	for i, item := range items {
		ref, ok := f.portRef(item, fmt.Sprintf("%s[%d]", o.path("ports"), i))
		if !ok || !f.unique(item, fmt.Sprintf("port %s", item.Value), seen[item.Value]) {
			continue
		}
		if ref.All && len(items) > 1 {
			f.fail(at(item), "write [all] alone, or only the names", "%s: all stands with other ports", o.path("ports"))
		}
		seen[item.Value] = item.Line
		out = append(out, ref)
	}
	return out
}

// portRef reads a port's name or number, or all.
func (f *fileReader) portRef(n *yaml.Node, what string) (PortRef, bool) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!int" {
		number, ok := f.portNumber(n, what)
		return PortRef{Number: number, pos: at(n)}, ok
	}
	if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
		f.wrongType(n, what, "a port's name or number")
		return PortRef{}, false
	}
	if n.Value == "all" {
		return PortRef{All: true, pos: at(n)}, true
	}
	return PortRef{Name: n.Value, pos: at(n)}, f.portName(n, n.Value, what)
}

func (f *fileReader) workloadName(n *yaml.Node, what string) (string, bool) {
	s, ok := f.text(n, what)
	if ok && !isLabel(s) {
		hint := ""
		if strings.HasPrefix(s, "/") || strings.HasPrefix(s, "spiffe://") {
			hint = fmt.Sprintf("write {id: %s}", shorten(s))
		}
		f.fail(at(n), hint, "%s: %q is not the name of a workload", what, shorten(s))
		return "", false
	}
	return s, ok
}

// idPattern reads "/a/*" (in this trust domain) or "spiffe://td/a/**".
func (f *fileReader) idPattern(n *yaml.Node, what string) (string, bool) {
	s, ok := f.text(n, what)
	switch {
	case !ok:
		return "", false
	case strings.ContainsAny(s, "{}"):
		f.fail(at(n), "write * for the segment, or select by workload or labels", "%s: a template stands in spec.id of a Workload only", what)
		return "", false
	case !strings.HasPrefix(s, "/") && !strings.HasPrefix(s, "spiffe://"):
		f.fail(at(n), "begin it with / (this trust domain) or spiffe://", "%s: %q is not an ID", what, shorten(s))
		return "", false
	}
	if err := checkPattern(s); err != nil {
		f.fail(at(n), "", "%s: %q: %v", what, shorten(s), err)
		return "", false
	}
	return s, true
}
