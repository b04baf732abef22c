package policy

import (
	"maps"
	"slices"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// maxMeets bounds how many pairs of a template and a pattern are compared.
const maxMeets = 4 << 20

// templates compares what is said about the IDs of templates: about a witness of
// each region that the rules cut out of them.
func (c *comparison) templates() {
	whole := map[string]vector{} // :: pattern → its vector
	for _, r := range []*Ruleset{c.before, c.after} {
		for _, w := range r.Templates() {
			whole[w.Pattern.String()] = parseVector(w.Pattern.String())
		}
	}
	if len(whole) == 0 {
		return
	}
	parts, ok := c.parts(whole)
	regions, all := cutRegions(parts)
	if !ok || !all {
		c.diff.inexact = append(c.diff.inexact, "templated workloads")
	}
	for _, atom := range regions.atoms {
		if id := atom.witness(); !c.own(id) {
			c.destination(id, c.title(atom.String()))
		}
	}
}

// parts gives the templates and the parts of them that rules have as their To;
// false when there are too many to look for.
func (c *comparison) parts(whole map[string]vector) ([]string, bool) {
	parts, wild := map[string]struct{}{}, map[string]struct{}{}
	for p := range whole {
		parts[p] = struct{}{}
	}
	for _, r := range []*Ruleset{c.before, c.after} {
		if r == nil {
			continue
		}
		for _, t := range r.targets {
			for _, p := range t.to {
				if _, one := p.Exact(); !one && !p.IsZero() {
					wild[p.String()] = struct{}{}
				} else if c.ofTemplate(p) {
					parts[p.String()] = struct{}{}
				}
			}
		}
	}
	if len(wild)*len(whole) > maxMeets {
		return slices.Sorted(maps.Keys(parts)), false
	}
	for p := range wild {
		v := parseVector(p)
		for _, t := range whole {
			if part, ok := v.ofLength(len(t.segs)); ok {
				if both, ok := part.meet(t); ok {
					parts[both.String()] = struct{}{}
				}
			}
		}
	}
	return slices.Sorted(maps.Keys(parts)), true
}

// ofTemplate reports whether an ID belongs to a template, before or after.
func (c *comparison) ofTemplate(p identity.Pattern) bool {
	id := p.String()
	_, was := c.before.templateIndex(id)
	_, is := c.after.templateIndex(id)
	return was || is
}

// own reports whether a workload without template has the ID, before or after:
// it is compared by itself.
func (c *comparison) own(id string) bool {
	_, was := c.before.workloadIndex(id)
	_, is := c.after.workloadIndex(id)
	return was || is
}
