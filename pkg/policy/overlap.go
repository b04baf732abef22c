package policy

import (
	"fmt"
	"slices"
	"strings"
)

// Limits of the evidence in all sets. They bound the search for evidence that two
// workloads share.
const (
	MaxAttest = 200_000 // entries, one with several via counted for each
	MaxForms  = 200     // combinations of kind and selectors
)

// proof is an entry of a workload, for one of its agents.
type proof struct {
	w int // index of workloads
	a Attest
}

// checkEvidence completes the entries of all workloads and reports pairs of
// workloads that one piece of evidence could prove. Of a selector with several
// values, different ones count as apart: whoever really has both is refused when
// it enrols.
func (c *compiler) checkEvidence() {
	count := 0
	for i := range c.workloads {
		w := &c.workloads[i]
		w.Attest = slices.Clone(w.Attest)
		for n := range w.Attest {
			w.Attest[n].td = c.td
			count += max(1, len(w.Attest[n].Via))
		}
	}
	if count > MaxAttest {
		c.errs.add(&Error{Msg: fmt.Sprintf("more than %d attest entries in all sets, each counted once per via", MaxAttest)})
		return
	}
	forms := map[string][]proof{} // :: kind, and which selectors are there →
	for i, w := range c.workloads {
		for _, a := range w.Attest {
			if a.Kind == JoinToken {
				continue
			}
			for _, one := range a.each() {
				forms[one.shape()] = append(forms[one.shape()], proof{i, one})
			}
		}
	}
	if len(forms) > MaxForms {
		c.errs.add(&Error{Msg: fmt.Sprintf("attest entries of more than %d forms", MaxForms), Hint: "ask for the same selectors where the kind is the same"})
		return
	}
	c.checkForms(forms)
}

// checkForms compares entries by the selectors that they name, so that the cost
// does not grow with the square of their number.
func (c *compiler) checkForms(forms map[string][]proof) {
	order := make([]string, 0, len(forms))
	for key := range forms {
		order = append(order, key)
	}
	slices.Sort(order)
	told := map[[2]int]bool{} // :: workloads, the lower index first
	for n, first := range order {
		for _, second := range order[n:] {
			if forms[first][0].a.Kind == forms[second][0].a.Kind {
				c.overlaps(forms[first], forms[second], told)
			}
			if c.errs.full() {
				return
			}
		}
	}
}

// overlaps reports entries of xs and ys that agree on all that both name.
func (c *compiler) overlaps(xs, ys []proof, told map[[2]int]bool) {
	common := commonKeys(xs[0].a, ys[0].a)
	seen := map[string][]proof{} // :: values of the common keys → the first, and the first of another workload
	for _, p := range xs {
		v := p.a.values(common)
		if had := seen[v]; len(had) == 0 || len(had) == 1 && had[0].w != p.w {
			seen[v] = append(had, p)
		}
	}
	for _, p := range ys {
		for _, o := range seen[p.a.values(common)] {
			pair := [2]int{min(o.w, p.w), max(o.w, p.w)}
			if o.w == p.w || told[pair] || c.errs.full() {
				continue
			}
			told[pair] = true
			c.ambiguous(o, p)
		}
	}
}

// ambiguous reports two workloads that the same evidence could prove, at the
// later entry.
func (c *compiler) ambiguous(first, later proof) {
	if c.comparePlaces(first, later) > 0 {
		first, later = later, first
	}
	a, b := &c.workloads[first.w], &c.workloads[later.w]
	s := c.setOf(b.Set)
	c.errs.add(s.mistake(&c.errs, b.File, later.a.pos,
		fmt.Sprintf("workload %s at %s:%d; give one of them a selector in which they differ", a.Name, a.File, a.Line),
		fmt.Sprintf("the same evidence could prove two workloads, %s and %s", a.Name, b.Name)))
}

func (c *compiler) comparePlaces(a, b proof) int {
	if d := strings.Compare(c.workloads[a.w].File, c.workloads[b.w].File); d != 0 {
		return d
	}
	if d := a.a.line - b.a.line; d != 0 {
		return d
	}
	return a.a.col - b.a.col
}

// each splits an entry that several agents may vouch for.
func (a Attest) each() []Attest {
	if len(a.Via) < 2 {
		return []Attest{a}
	}
	out := make([]Attest, len(a.Via))
	for i := range a.Via {
		out[i] = a
		out[i].Via = a.Via[i : i+1]
	}
	return out
}

// shape says which things an entry names, whatever their values.
func (a Attest) shape() string {
	return a.Kind + "\x00" + strings.Join(a.named(), "\x00")
}

// The names of Issuer and Via among selectors; no selector has a blank in it.
const (
	issuerKey = " issuer"
	viaKey    = " via"
)

// named lists what an entry names.
func (a Attest) named() []string {
	out := a.keys()
	if a.Issuer != "" { // else any that may be configured
		out = append(out, issuerKey)
	}
	if len(a.Via) > 0 {
		out = append(out, viaKey)
	}
	return out
}

func commonKeys(a, b Attest) []string {
	other := b.named()
	return slices.DeleteFunc(a.named(), func(k string) bool { return !slices.Contains(other, k) })
}

// values joins what an entry says under some keys.
func (a Attest) values(keys []string) string {
	var b strings.Builder
	for _, k := range keys {
		v := a.Select[k]
		switch k {
		case issuerKey:
			v = a.Issuer
		case viaKey:
			v = a.Via[0]
		}
		fmt.Fprintf(&b, "%d:%s", len(v), v)
	}
	return b.String()
}

func (c *compiler) setOf(name string) *Set {
	for _, s := range c.sets {
		if s.Name == name {
			return s
		}
	}
	return c.sets[0] // every workload is of a set
}
