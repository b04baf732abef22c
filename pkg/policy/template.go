package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v4"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// A templated Workload stands for as many identities as its evidence can fill
// in: id /ns/{namespace}/sa/{serviceAccount}. Each variable is a selector and
// fills one whole segment, so that an ID alone says what the labels are.

// MaxTemplates is how many templates there may be in all sets.
const MaxTemplates = 1000

// variable gives the name in "{name}".
func variable(s string) (string, bool) {
	name, ok := strings.CutPrefix(s, "{")
	if !ok {
		return "", false
	}
	name, ok = strings.CutSuffix(name, "}")
	return name, ok && name != "" && !strings.ContainsAny(name, "{}")
}

// templateID checks the text of a templated id.
func (f *fileReader) templateID(n *yaml.Node, id string) string {
	seen := map[string]bool{}
	for i, seg := range strings.Split(strings.TrimPrefix(id, "/"), "/") {
		name, isVar := variable(seg)
		var err error
		if !isVar {
			err = spiffeid.ValidatePathSegment(seg)
		}
		switch {
		case !strings.HasPrefix(id, "/"):
			f.fail(at(n), fmt.Sprintf("write %q", "/"+shorten(id)), "spec.id %q does not begin with a slash", shorten(id))
		case isVar && i == 0:
			f.fail(at(n), "begin with a literal segment, as in /ns/{namespace}", "spec.id %q could be any ID", shorten(id))
		case isVar && seen[name]:
			f.fail(at(n), "", "spec.id %q has {%s} twice", shorten(id), name)
		case !isVar && strings.ContainsAny(seg, "{}"):
			f.fail(at(n), "", "spec.id: segment %q: a variable stands for a whole segment, as in /ns/{namespace}", shorten(seg))
		case err != nil:
			f.fail(at(n), "", "spec.id %q: %v", shorten(id), err)
		default:
			seen[name] = seen[name] || isVar
			continue
		}
		return ""
	}
	return id
}

// checkTemplate holds the parts of a Workload together: each variable of the id
// is a selector that all its evidence has, and labels use no others.
func (f *fileReader) checkTemplate(w Workload, labels map[string]*yaml.Node) {
	vars := w.variables()
	for key, n := range labels {
		name, _ := variable(w.Labels[key])
		if !slices.Contains(vars, name) && w.ID != "" {
			f.fail(at(n), "use it in spec.id too, or write the value", "metadata.labels.%s: {%s} is no segment of spec.id, so an ID would not tell the label", key, name)
		}
	}
	for _, a := range w.Attest {
		form, _ := formOf(a.Kind)
		for _, name := range vars {
			if !form.has(name) {
				f.fail(a.pos, hintSelectors(a.Kind, form), "evidence of kind %s has no selector %q, which spec.id asks for", a.Kind, name)
			}
		}
		for _, key := range form.required {
			if w.ID != "" && a.Select[key] == "" && !slices.Contains(vars, key) {
				f.fail(a.pos, fmt.Sprintf("write it, or {%s} in spec.id", key), "evidence of kind %s: %s is missing", a.Kind, key)
			}
		}
	}
	if len(vars) > 0 && len(w.Attest) == 0 && w.ID != "" {
		f.fail(w.id, "add the evidence whose selectors fill it in", "spec.id is a template, and spec.attest is empty")
	}
}

func hintSelectors(kind string, form form) string {
	if kind == JoinToken {
		return "a join token is made for one workload: leave it to workloads without template"
	}
	all := slices.Clone(form.selectors)
	if form.claims {
		all = append(all, claimPrefix+"NAME")
	}
	return "it has: " + strings.Join(all, ", ")
}

// variables lists the variables of the id, in order.
func (w Workload) variables() []string {
	var out []string
	for _, seg := range strings.Split(w.ID, "/") {
		if name, ok := variable(seg); ok {
			out = append(out, name)
		}
	}
	return out
}

// decidable reports whether an ID alone decides what the variables are, and can
// never be one of Sallyport's own. Of a file, that was checked when it was parsed.
func (w Workload) decidable() bool {
	vars := w.variables()
	for _, v := range w.Labels {
		if name, ok := variable(v); ok && !slices.Contains(vars, name) {
			return false
		}
	}
	path, ok := strings.CutPrefix(w.ID, "/")
	first, _, _ := strings.Cut(path, "/")
	if !ok || strings.Contains(path, "*") || strings.Contains(first, "{") {
		return false
	}
	slices.Sort(vars)
	return len(slices.Compact(vars)) == len(w.variables())
}

// templatePattern gives the pattern of the IDs that w may have.
func (w Workload) templatePattern(td spiffeid.TrustDomain) (identity.Pattern, error) {
	segs := strings.Split(w.ID, "/")
	for i, seg := range segs {
		if _, ok := variable(seg); ok {
			segs[i] = "*"
		}
	}
	return identity.ParsePattern(td.IDString() + strings.Join(segs, "/"))
}

// Resolve gives the ID that evidence with these selectors has as w, which
// matches it. Of a template every variable must have exactly one value that can
// be a segment of a SPIFFE ID (SPIFFE-ID section 2.2).
func (w CompiledWorkload) Resolve(s Selectors) (spiffeid.ID, error) {
	if !w.Template {
		return w.ID, nil
	}
	segs := strings.Split(w.Workload.ID, "/")[1:]
	for i, seg := range segs {
		name, ok := variable(seg)
		if !ok {
			continue
		}
		values := s[name]
		if len(values) != 1 {
			return spiffeid.ID{}, fmt.Errorf("workload %s: {%s} of its id needs one value, and the evidence has %d", w.Name, name, len(values))
		}
		segs[i] = values[0]
	}
	id, err := spiffeid.FromSegments(w.Pattern.TrustDomain(), segs...)
	if err == nil && len(id.String()) > identity.MaxIDLength {
		err = fmt.Errorf("longer than %d bytes", identity.MaxIDLength)
	}
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("workload %s: filling its id from the evidence: %w", w.Name, err)
	}
	return id, nil
}

// at gives what w is for one of its IDs: with that ID, and labels filled in.
func (w CompiledWorkload) at(id spiffeid.ID) CompiledWorkload {
	if !w.Template {
		return w
	}
	values := map[string]string{} // :: variable → segment
	got := strings.Split(id.Path(), "/")
	for i, seg := range strings.Split(w.Workload.ID, "/") {
		if name, ok := variable(seg); ok && i < len(got) {
			values[name] = got[i]
		}
	}
	labels := make(map[string]string, len(w.Labels))
	for k, v := range w.Labels {
		if name, ok := variable(v); ok {
			v = values[name]
		}
		labels[k] = v
	}
	w.ID, w.Labels = id, labels
	return w
}

// narrow gives the IDs of w's pattern that have a label; false if none can.
func (w CompiledWorkload) narrow(pattern identity.Pattern, key, value string) (identity.Pattern, bool) {
	have, ok := w.Labels[key]
	if !ok {
		return pattern, false
	}
	name, isVar := variable(have)
	if !isVar {
		return pattern, have == value
	}
	if spiffeid.ValidatePathSegment(value) != nil {
		return pattern, false
	}
	v := parseVector(pattern.String())
	for i, seg := range strings.Split(w.Workload.ID, "/")[1:] {
		if n, ok := variable(seg); ok && n == name {
			if v.segs[i] != "*" && v.segs[i] != value {
				return pattern, false
			}
			v.segs = slices.Clone(v.segs)
			v.segs[i] = value
		}
	}
	p, err := identity.ParsePattern(v.String())
	return p, err == nil
}

// intersect gives the IDs that a template's pattern and another one both match.
func intersect(template, other identity.Pattern) (identity.Pattern, bool) {
	t := parseVector(template.String())
	o, ok := parseVector(other.String()).ofLength(len(t.segs))
	if !ok {
		return identity.Pattern{}, false
	}
	both, ok := t.meet(o)
	if !ok {
		return identity.Pattern{}, false
	}
	p, err := identity.ParsePattern(both.String())
	return p, err == nil
}

// pattern gives the IDs that w has.
func (w CompiledWorkload) pattern() identity.Pattern {
	if w.Template {
		return w.Pattern
	}
	return identity.ExactPattern(w.ID)
}

// addTemplates gives every templated workload its pattern. A template must not
// give anybody the ID of another workload.
func (c *compiler) addTemplates() {
	for _, s := range c.sets {
		for _, w := range s.Workloads {
			if w.ID == "" || len(w.variables()) == 0 {
				continue
			}
			p, err := w.templatePattern(c.td)
			if err != nil || !w.decidable() {
				c.errs.add(s.mistake(&c.errs, w.File, w.id, "", fmt.Sprintf("id %q is no template, or does not tell the labels", shorten(w.ID))))
				continue
			}
			if strings.HasPrefix(w.ID, reservedPrefix) {
				c.errs.add(s.mistake(&c.errs, w.File, w.id, "choose another id", fmt.Sprintf("id %s is reserved for Sallyport itself", w.ID)))
				continue
			}
			if len(c.workloads) == c.exactN+MaxTemplates {
				c.errs.add(s.mistake(&c.errs, w.File, w.id, "", fmt.Sprintf("more than %d templates in all sets", MaxTemplates)))
				return
			}
			for _, o := range c.workloads {
				if _, both := intersect(p, o.pattern()); o.Template && both || p.Match(o.ID) {
					c.errs.add(s.mistake(&c.errs, w.File, w.id, "give one of them another id",
						fmt.Sprintf("the template %s can be the id of workload %s of %s, at %s:%d", w.ID, o.Name, c.setOf(o.Set).title(), o.File, o.Line)))
				}
			}
			c.workloads = append(c.workloads, CompiledWorkload{Workload: w, Template: true, Pattern: p})
		}
	}
}

// reservedPrefix is where Sallyport's own IDs lie: see identity.Reserved.
const reservedPrefix = "/sallyport/"

// narrowed gives the index of a workload that is i's template with fewer IDs. It
// lies behind the real ones, for this compilation only.
func (c *compiler) narrowed(i int, p identity.Pattern) int {
	w := c.workloads[i]
	if w.Pattern == p {
		return i
	}
	w.Pattern = p
	key := fmt.Sprintf("%d %s", i, p)
	if n, ok := c.narrow[key]; ok {
		return n
	}
	c.workloads = append(c.workloads, w)
	c.narrow[key] = len(c.workloads) - 1
	return len(c.workloads) - 1
}

// selectTemplates gives the templates that have all labels, narrowed to the IDs
// that do.
func (c *compiler) selectTemplates(labels map[string]string) []int {
	var out []int
	for i := c.exactN; i < c.realN; i++ {
		w := c.workloads[i]
		p, ok := w.Pattern, true
		for k, v := range labels {
			if p, ok = w.narrow(p, k, v); !ok {
				break
			}
		}
		if ok {
			out = append(out, c.narrowed(i, p))
		}
	}
	return out
}

// matchTemplates gives the templates that share IDs with a pattern, narrowed to
// those.
func (c *compiler) matchTemplates(pattern identity.Pattern) []int {
	var out []int
	for i := c.exactN; i < c.realN; i++ {
		if p, ok := intersect(c.workloads[i].Pattern, pattern); ok {
			out = append(out, c.narrowed(i, p))
		}
	}
	return out
}
