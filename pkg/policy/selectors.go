package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// destinations is what a `to` means.
type destinations struct {
	text      string           // the selector, for the memo
	workloads []int            // the matching ones, ascending
	pattern   identity.Pattern // set where `to` is an id: it also covers workloads yet to come
}

// selectTo resolves the `to` of p. Selecting nothing is a mistake, except by a
// pattern: a guardrail may be there before what it guards.
func (c *compiler) selectTo(s *Set, p Policy) (destinations, bool) {
	sel := p.To
	d := destinations{text: sel.key()}
	if sel.External != "" {
		i, ok := c.abroad[(External{Name: sel.External}).ID(c.td).String()]
		if !ok {
			c.errs.add(s.mistake(&c.errs, p.File, sel.pos, c.suggestExternal(sel.External), fmt.Sprintf("unknown External %q", sel.External)))
			return d, false
		}
		d.workloads = []int{i}
		return d, true
	}
	if sel.ID == "" {
		var ok bool
		d.workloads, ok = c.selectWorkloads(s, p.File, sel)
		return d, ok
	}
	pattern, ok := c.pattern(s, p.File, sel)
	if !ok {
		return d, false
	}
	if pattern.TrustDomain() != c.td {
		d.workloads = c.selectForeign(s, p, pattern)
		return d, len(d.workloads) > 0
	}
	d.pattern = pattern
	if id, exact := pattern.Exact(); exact {
		i, known := c.byID[id.String()]
		if ts := c.matchTemplates(pattern); !known && len(ts) == 1 {
			i, known = ts[0], true
		}
		if xs := c.selectExternals(pattern); !known && len(xs) == 1 {
			i, known = xs[0], true
		}
		if !known {
			c.errs.add(s.mistake(&c.errs, p.File, sel.pos, c.suggestID(id.Path()), fmt.Sprintf("no workload has the ID %s", shorten(sel.ID))))
			return d, false
		}
		d.workloads = []int{i}
		return d, true
	}
	for i, w := range c.workloads[:c.exactN] {
		if pattern.Match(w.ID) {
			d.workloads = append(d.workloads, i)
		}
	}
	d.workloads = append(d.workloads, c.matchTemplates(pattern)...)
	d.workloads = append(d.workloads, c.selectExternals(pattern)...)
	return d, true
}

// selectFrom resolves the sources of one entry. Equal lists share one slice:
// a thousand rules that admit the same label cost one list of IDs.
func (c *compiler) selectFrom(s *Set, p Policy, e Entry) ([]identity.Pattern, bool) {
	keys := make([]string, len(e.From))
	for i, sel := range e.From {
		keys[i] = sel.key()
	}
	key := strings.Join(keys, "\x00")
	if from, ok := c.from[key]; ok {
		return from, true
	}
	var out []identity.Pattern
	ok := true
	for _, sel := range e.From {
		if sel.Anonymous {
			continue // a field of the rule
		}
		if sel.ID != "" {
			pattern, good := c.pattern(s, p.File, sel)
			out, ok = append(out, pattern), ok && good
			continue
		}
		workloads, good := c.selectWorkloads(s, p.File, sel)
		ok = ok && good
		for _, i := range workloads {
			out = append(out, c.workloads[i].pattern())
		}
	}
	if !ok {
		return nil, false
	}
	out = sortPatterns(out)
	c.from[key] = out
	return out, true
}

// selectWorkloads gives the workloads that a name or labels select, ascending.
func (c *compiler) selectWorkloads(s *Set, file string, sel Selector) ([]int, bool) {
	if sel.Workload != "" {
		i, ok := c.byName[sel.Workload]
		if !ok {
			c.errs.add(s.mistake(&c.errs, file, sel.pos, c.suggestWorkload(sel.Workload), fmt.Sprintf("unknown workload %q", sel.Workload)))
			return nil, false
		}
		return []int{i}, true
	}
	var out []int
	for n, key := range slices.Sorted(maps.Keys(sel.Labels)) {
		has := c.byLabel[[2]string{key, sel.Labels[key]}]
		if n == 0 {
			out = has
			continue
		}
		out = slices.DeleteFunc(slices.Clone(out), func(i int) bool {
			_, in := slices.BinarySearch(has, i)
			return !in
		})
	}
	out = append(slices.Clone(out), c.selectTemplates(sel.Labels)...)
	if len(out) == 0 {
		c.errs.add(s.mistake(&c.errs, file, sel.pos, c.suggestLabel(sel), fmt.Sprintf("no workload has the labels %s", sel.labelText())))
		return nil, false
	}
	return out, true
}

// pattern gives the full pattern of an id selector.
func (c *compiler) pattern(s *Set, file string, sel Selector) (identity.Pattern, bool) {
	full := sel.ID
	if strings.HasPrefix(full, "/") {
		full = c.td.IDString() + full
	}
	p, err := identity.ParsePattern(full)
	if err != nil {
		c.errs.add(s.mistake(&c.errs, file, sel.pos, "", err.Error()))
		return p, false
	}
	return p, c.knownDomain(s, file, sel, p)
}

// sortPatterns orders patterns by text and drops repetitions.
func sortPatterns(ps []identity.Pattern) []identity.Pattern {
	slices.SortFunc(ps, func(a, b identity.Pattern) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(ps)
}

// key is one text per meaning.
func (s Selector) key() string {
	switch {
	case s.Workload != "":
		return "w:" + s.Workload
	case s.ID != "":
		return "i:" + s.ID
	case s.External != "":
		return "x:" + s.External
	case s.Anonymous:
		return "a:"
	}
	return "l:" + s.labelText()
}

// labelText gives "app: x, env: y", ordered by key.
func (s Selector) labelText() string {
	out := make([]string, 0, len(s.Labels))
	for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
		out = append(out, k+": "+s.Labels[k])
	}
	return strings.Join(out, ", ")
}

// suggestWorkload suggests a workload's name. Hints are not worth computing for
// mistakes that nobody will see.
func (c *compiler) suggestWorkload(name string) string {
	if _, known := c.byName[name]; known || c.errs.full() {
		return ""
	}
	return didYouMean(name, slices.Sorted(maps.Keys(c.byName)))
}

func (c *compiler) suggestID(path string) string {
	if c.errs.full() {
		return ""
	}
	paths := make([]string, len(c.workloads))
	for i, w := range c.workloads {
		paths[i] = w.Workload.ID
	}
	return didYouMean(path, paths)
}

// suggestLabel suggests a replacement for the first label that no workload has.
func (c *compiler) suggestLabel(sel Selector) string {
	if c.errs.full() {
		return ""
	}
	for _, k := range slices.Sorted(maps.Keys(sel.Labels)) {
		v := sel.Labels[k]
		if len(c.byLabel[[2]string{k, v}]) > 0 {
			continue
		}
		known := make([]string, 0, len(c.byLabel))
		for kv := range c.byLabel {
			known = append(known, kv[0]+": "+kv[1])
		}
		slices.Sort(known)
		return didYouMean(k+": "+v, known)
	}
	return "each label exists, but not on one workload together"
}
