package policy

import (
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"
)

// The forms that a selector can have in a place.
var (
	fromForms = fromSelector.names()
	toForms   = toSelector.names()
)

// selector reads a mapping with exactly one of forms.
func (f *fileReader) selector(n *yaml.Node, what string, forms []string) (Selector, bool) {
	fields := schema{}
	for _, form := range forms {
		fields[form] = known
	}
	o, ok := f.object(n, what, fields)
	if !ok {
		return Selector{}, false
	}
	s := Selector{pos: at(n)}
	if len(o.fields) != 1 {
		switch {
		case len(o.fields) > 1:
			f.fail(at(n), "", "%s has more than one of %s", what, strings.Join(slices.Sorted(maps.Keys(o.fields)), ", "))
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
		case "external":
			if s.External, ok = f.text(v, what+".external"); ok && !isLabel(s.External) {
				f.fail(at(v), "", "%s.external: %q is not the name of an External", what, shorten(s.External))
				ok = false
			}
		case "anonymous":
			if s.Anonymous, ok = f.truth(v, what+".anonymous"); ok && !s.Anonymous {
				f.fail(at(v), "leave the selector out", "%s.anonymous: false selects nobody", what)
				ok = false
			}
		}
	}
	return s, ok
}
