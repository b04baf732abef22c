package policy

import (
	"fmt"
	"maps"
	"slices"
)

// invariant checks what v names. Its labels and IDs may be those of nobody yet: it
// is about whoever could exist. A label key that nothing knows is a mistake, as no
// such invariant could ever be broken.
func (c *compiler) invariant(s *Set, v Invariant) {
	for _, sel := range [2]Selector{v.From, v.To} {
		switch {
		case c.errs.full():
			return
		case sel.Workload != "":
			c.selectWorkloads(s, v.File, sel)
		case sel.ID != "":
			c.pattern(s, v.File, sel)
		case sel.External != "":
			if _, ok := c.abroad[(External{Name: sel.External}).ID(c.td).String()]; !ok {
				c.errs.add(s.mistake(&c.errs, v.File, sel.pos, c.suggestExternal(sel.External), fmt.Sprintf("unknown External %q", sel.External)))
			}
		}
		for _, key := range slices.Sorted(maps.Keys(sel.Labels)) {
			if known := c.labelKeys(); !slices.Contains(known, key) {
				c.errs.add(s.mistake(&c.errs, v.File, sel.pos, didYouMean(key, known), fmt.Sprintf("no workload has a label %s, and no Scope grants one", key)))
			}
		}
	}
}

// labelKeys lists the keys that workloads have or Scopes grant.
func (c *compiler) labelKeys() []string {
	keys := map[string]bool{}
	for _, w := range c.workloads[:c.realN] {
		for k := range w.Labels {
			keys[k] = true
		}
	}
	for _, sc := range c.scopes {
		for k := range sc.Labels {
			keys[k] = true
		}
	}
	return slices.Sorted(maps.Keys(keys))
}
