package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"
)

// grantedEvidence is where a Scope lists evidence.
const grantedEvidence = "spec.evidence"

// Limits of one Scope.
const (
	maxScopeIDs    = 100
	maxScopeValues = 1000 // of one label
	maxOwners      = 100
)

// scope parses the spec of a Scope.
func (f *fileReader) scope(name string, p pos, n *yaml.Node) {
	spec, ok := f.object(n, "spec", scopeSpec.known)
	if !f.rootOnly("Scope", p) || !ok {
		return
	}
	s := Scope{Name: name, File: f.file, Line: p.line, Col: p.col}
	if on, ok := spec.fields["owners"]; ok {
		s.Owners = f.owners(on)
	}
	items, _ := spec.list("ids")
	if len(items) > maxScopeIDs {
		f.fail(at(spec.fields["ids"]), "", "spec.ids has more than %d patterns", maxScopeIDs)
		return
	}
	for i, item := range items {
		if id, ok := f.idPattern(item, fmt.Sprintf("spec.ids[%d]", i)); ok {
			s.IDs = append(s.IDs, ScopeID{id, at(item)})
		}
	}
	if ln, ok := spec.fields["labels"]; ok {
		s.Labels = f.granted(ln)
	}
	if en, ok := spec.fields["evidence"]; ok {
		s.Evidence = f.attest(en, grantedEvidence)
	}
	f.set.Scopes = append(f.set.Scopes, s)
}

// owners reads who may change a set.
func (f *fileReader) owners(n *yaml.Node) []string {
	items, ok := f.list(n, "spec.owners")
	if !ok {
		return nil
	}
	if len(items) > maxOwners {
		f.fail(at(n), "", "spec.owners has more than %d entries", maxOwners)
		return nil
	}
	var out []string
	for i, item := range items {
		what := fmt.Sprintf("spec.owners[%d]", i)
		s, ok := f.text(item, what)
		kind, who, _ := strings.Cut(s, ":")
		switch {
		case !ok:
		case kind != "oidc-group" && kind != "oidc-subject" || who == "" || len(s) > maxSelector:
			f.fail(at(item), "", "%s: %q is not an owner; want oidc-group:NAME or oidc-subject:NAME", what, shorten(s))
		case slices.Contains(out, s):
			f.fail(at(item), "", "%s: %s is there twice", what, shorten(s))
		default:
			out = append(out, s)
		}
	}
	return out
}

// granted reads a mapping of label keys to the values that a set may use.
func (f *fileReader) granted(n *yaml.Node) map[string][]string {
	if n.Kind != yaml.MappingNode {
		f.wrongType(n, "spec.labels", "a mapping")
		return nil
	}
	if len(n.Content) > 2*maxLabels {
		f.fail(at(n), "", "spec.labels has more than %d labels", maxLabels)
		return nil
	}
	out := map[string][]string{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, ok := f.text(n.Content[i], "a key of spec.labels")
		if !ok {
			continue
		}
		if _, dup := out[key]; dup {
			f.fail(at(n.Content[i]), "", "duplicate key %q", shorten(key))
		} else if !isLabelText(key) {
			f.fail(at(n.Content[i]), "", "label key %q: %s", shorten(key), labelText)
		}
		out[key] = f.grantedValues(n.Content[i+1], "spec.labels."+shorten(key))
	}
	return out
}

func (f *fileReader) grantedValues(n *yaml.Node, what string) []string {
	items, ok := f.list(n, what)
	if !ok {
		return nil
	}
	if len(items) == 0 {
		f.fail(at(n), "list the values, or leave the key out", "%s is empty", what)
	}
	if len(items) > maxScopeValues {
		f.fail(at(n), "", "%s has more than %d values", what, maxScopeValues)
		return nil
	}
	values := map[string]bool{}
	for i, item := range items {
		v, ok := f.text(item, fmt.Sprintf("%s[%d]", what, i))
		if ok && !isLabelText(v) {
			f.fail(at(item), "", "label value %q: %s", shorten(v), labelText)
		}
		values[v] = true
	}
	return slices.Sorted(maps.Keys(values))
}

// invariant parses the spec of an Invariant.
func (f *fileReader) invariant(name string, p pos, n *yaml.Node) {
	spec, ok := f.object(n, "spec", invariantSpec.known)
	if !f.rootOnly("Invariant", p) || !ok {
		return
	}
	nn, ok := spec.need("never")
	if !ok {
		return
	}
	never, ok := f.object(nn, "spec.never", neverShape.known)
	if !ok {
		return
	}
	v := Invariant{Name: name, File: f.file, Line: p.line, Col: p.col}
	if fn, ok := never.need("from"); ok {
		v.From, _ = f.selector(fn, "spec.never.from", fromForms)
	}
	if tn, ok := never.need("to"); ok {
		v.To, _ = f.selector(tn, "spec.never.to", toForms)
	}
	f.set.Invariants = append(f.set.Invariants, v)
}
