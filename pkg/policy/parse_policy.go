package policy

import (
	"fmt"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v4"
)

// policy parses the spec of a Policy.
func (f *fileReader) policy(name string, p pos, n *yaml.Node) {
	spec, ok := f.object(n, "spec", schema{"to": known, "allow": known, "deny": known})
	if !ok {
		return
	}
	out := Policy{Name: name, Set: f.set.Name, File: f.file, Line: p.line, Col: p.col}
	if tn, ok := spec.need("to"); ok {
		out.To, _ = f.selector(tn, "spec.to")
	}
	an, hasAllow := spec.fields["allow"]
	dn, hasDeny := spec.fields["deny"]
	if !hasAllow && !hasDeny {
		f.fail(at(n), "write \"allow: []\" if nothing shall be allowed", "spec has neither allow nor deny: the file may be half-written")
	}
	if hasAllow {
		out.Allow = f.entries(an, "spec.allow", allowFields)
	}
	if hasDeny {
		out.Deny = f.entries(dn, "spec.deny", denyFields)
	}
	f.set.Policies = append(f.set.Policies, out)
}

func (f *fileReader) entries(n *yaml.Node, what string, fields schema) []Entry {
	items, ok := f.list(n, what)
	if !ok {
		return nil
	}
	out := make([]Entry, 0, len(items))
	for i, item := range items {
		if e, ok := f.entry(item, fmt.Sprintf("%s[%d]", what, i), fields); ok {
			out = append(out, e)
		}
	}
	return out
}

// The fields of a rule. The later ones limit it: without them an allow would
// admit more than was meant, and a deny refuse more, which is the safe side.
var (
	allowFields = ruleFields(
		"leave the whole rule out: this version cannot enforce the field, and without it the rule would allow more",
		"leave the whole rule out: an allow grants, or it does not exist")
	denyFields = ruleFields(
		"remove the field if the rule may deny more than it says: this version cannot enforce it",
		"remove the field if the rule shall block, else leave the whole rule out: this version cannot merely record")
)

func ruleFields(limit, mode string) schema {
	return schema{
		"from": known, "ports": known, "reason": known,
		"http": limit, "grpc": limit, "since": limit, "until": limit, "mode": mode,
	}
}

// entry parses one rule.
func (f *fileReader) entry(n *yaml.Node, what string, fields schema) (Entry, bool) {
	o, ok := f.object(n, what, fields)
	if !ok {
		return Entry{}, false
	}
	e := Entry{pos: at(n)}
	if items, ok := o.list("from"); ok {
		for i, item := range items {
			if s, ok := f.selector(item, fmt.Sprintf("%s.from[%d]", what, i)); ok {
				e.From = append(e.From, s)
			}
		}
	}
	e.Ports = f.portRefs(o)
	if rn, ok := o.fields["reason"]; ok {
		e.Reason = f.reason(rn, what+".reason")
	}
	return e, true
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

// selector reads {workload: …}, {labels: …} or {id: …}.
func (f *fileReader) selector(n *yaml.Node, what string) (Selector, bool) {
	o, ok := f.object(n, what, schema{"workload": known, "labels": known, "id": known,
		"anonymous": "leave the whole selector out, and a rule that has no other: this version admits no anonymous caller"})
	if !ok {
		return Selector{}, false
	}
	s := Selector{pos: at(n)}
	if len(o.fields) != 1 {
		switch {
		case len(o.fields) > 1:
			f.fail(at(n), "", "%s has more than one of workload, labels and id", what)
		case len(n.Content) == 0:
			f.fail(at(n), `everyone in this trust domain is {id: "/**"}`, "%s is an empty selector", what)
		}
		return s, false
	}
	for name, v := range o.fields {
		s.pos = at(v)
		switch name {
		case "workload":
			s.Workload, ok = f.workloadName(v, what+".workload")
		case "labels":
			s.Labels = f.labels(v, what+".labels", nil)
			ok = len(s.Labels) > 0
			if v.Kind == yaml.MappingNode && len(v.Content) == 0 {
				f.fail(at(v), `everyone in this trust domain is {id: "/**"}`, "%s.labels is an empty selector", what)
			}
		case "id":
			s.ID, ok = f.idPattern(v, what+".id")
		}
	}
	return s, ok
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

// policyTest parses the spec of a PolicyTest.
func (f *fileReader) policyTest(name string, p pos, n *yaml.Node) {
	spec, ok := f.object(n, "spec", schema{"cases": known})
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

const laterRequest = "leave the whole case out, or remove the field to ask for the port as a whole"

func (f *fileReader) testCase(n *yaml.Node, what string) (Case, bool) {
	o, ok := f.object(n, what, schema{"from": known, "to": known, "port": known, "expect": known,
		"http": laterRequest, "grpc": laterRequest, "at": "remove it: a rule of this version holds at all times"})
	if !ok {
		return Case{}, false
	}
	c := Case{pos: at(n)}
	var ok1, ok2, ok3 bool
	c.From, c.from, ok1 = f.caseRef(o, "from")
	c.To, c.to, ok2 = f.caseRef(o, "to")
	expect, en, ok3 := o.text("expect")
	switch {
	case !ok3:
	case expect == "allow":
		c.Expect = Allow
	case expect != "deny":
		f.fail(at(en), didYouMean(expect, []string{"allow", "deny"}), "%s: %q is neither allow nor deny", o.path("expect"), shorten(expect))
		ok3 = false
	}
	ok4 := true
	if pn, ok := o.fields["port"]; ok {
		c.Port, ok4 = f.portRef(pn, o.path("port"))
		if c.Port.All {
			f.fail(at(pn), "leave port out", "%s: every port is asked when none is named", o.path("port"))
			ok4 = false
		}
	}
	return c, ok1 && ok2 && ok3 && ok4
}

// caseRef reads a workload's name, or an ID without wildcards.
func (f *fileReader) caseRef(o object, field string) (string, pos, bool) {
	s, n, ok := o.text(field)
	if !ok {
		return "", pos{}, false
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
