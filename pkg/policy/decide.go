package policy

import "slices"

// Decide answers q. A deny that matches wins over every allow; of several rules
// with the same effect the first in the order of [Ruleset.Rules] is reported;
// where none matches the zero Decision denies. So does port 0.
//
// It takes no lock and reads no clock. Its cost does not depend on the number of
// rules, and it does not allocate, once the destination's index is there: the
// first call for a destination makes it, except that [NewRuleset] does so for a
// sidecar's own.
func (r *Ruleset) Decide(q Request) Decision {
	if r == nil || q.Port == 0 {
		return Decision{}
	}
	dst := q.Dst.String()
	d := r.dests[dst]
	if d == nil {
		return r.decision(r.search(q))
	}
	ix := d.index.Load()
	if ix == nil {
		ix = r.prepare(d)
	}
	return r.decision(ix.find(q.Src.String(), q.Port))
}

// decision turns a verdict into words.
func (r *Ruleset) decision(v verdict) Decision {
	i := v.deny
	if i == 0 {
		i = v.allow
	}
	if i == 0 {
		return Decision{}
	}
	rule := &r.rules[i-1]
	return Decision{Effect: rule.Effect, Would: rule.Effect, Rule: rule.Ref, Reason: rule.Reason}
}

// search is Decide for a destination that is no workload and that only patterns
// match: its cost grows with the number of rules.
func (r *Ruleset) search(q Request) verdict {
	var v verdict
	r.wild.match(q.Dst.String(), func(targets *[]int32) {
		for _, t := range *targets {
			for _, i := range r.targets[t].rules {
				if rule := &r.rules[i]; rule.from(q.Src) && rule.port(q.Port) {
					v.add(rule.Effect, i)
				}
			}
		}
	})
	return v
}

// verdict holds, for each effect, 1 + the index of the first rule; 0 is none.
type verdict struct{ deny, allow int32 }

func (v *verdict) add(e Effect, rule int32) { v.merge(one(e, rule)) }

func one(e Effect, rule int32) verdict {
	if e == Allow {
		return verdict{allow: rule + 1}
	}
	return verdict{deny: rule + 1}
}

func (v *verdict) merge(o verdict) {
	v.deny = first(v.deny, o.deny)
	v.allow = first(v.allow, o.allow)
}

// first gives the smaller of two rules, where 0 is none.
func first(a, b int32) int32 {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// index finds the verdict on a source and a port for one destination. Its size
// is that of the From lists of the rules about the destination.
type index struct {
	exact map[string]*cell // :: SPIFFE ID →
	wild  trie[cell]       // :: pattern →
}

// cell is what the rules that name one source, or one pattern, say.
type cell struct {
	all   verdict // the rules for every port
	ports []portVerdict
}

type portVerdict struct {
	port uint16 // ascending in a cell
	verdict
}

// prepare makes the index of d. Two callers may do so at once; both results are
// equal.
func (r *Ruleset) prepare(d *destination) *index {
	ix := r.newIndex(d.id)
	d.index.Store(ix)
	return ix
}

// newIndex indexes the rules about a destination.
func (r *Ruleset) newIndex(dst string) *index {
	ix := &index{exact: map[string]*cell{}}
	for _, i := range r.rulesTo(dst) {
		rule := &r.rules[i]
		for _, p := range rule.From {
			if p.IsZero() {
				continue
			}
			_, exact := p.Exact()
			var c *cell
			if !exact {
				c = ix.wild.add(p.String())
			} else if c = ix.exact[p.String()]; c == nil {
				c = &cell{}
				ix.exact[p.String()] = c
			}
			c.add(rule, i)
		}
	}
	return ix
}

func (c *cell) add(rule *Rule, i int32) {
	if len(rule.Ports) == 0 {
		c.all.add(rule.Effect, i)
		return
	}
	for _, port := range rule.Ports {
		n, ok := c.search(port)
		if !ok {
			c.ports = slices.Insert(c.ports, n, portVerdict{port: port})
		}
		c.ports[n].add(rule.Effect, i)
	}
}

// search gives the place of port in c.ports. It is written out because it is on
// the path of every decision.
func (c *cell) search(port uint16) (int, bool) {
	lo, hi := 0, len(c.ports)
	for lo < hi {
		mid := (lo + hi) / 2
		if c.ports[mid].port < port {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo, lo < len(c.ports) && c.ports[lo].port == port
}

// at gives the verdict for a port.
func (c *cell) at(port uint16) verdict {
	v := c.all
	if n, ok := c.search(port); ok {
		v.merge(c.ports[n].verdict)
	}
	return v
}

// find gives the verdict on a source and a port.
func (ix *index) find(src string, port uint16) verdict {
	var v verdict
	if c := ix.exact[src]; c != nil {
		v = c.at(port)
	}
	if ix.wild.n > 0 {
		ix.wild.match(src, func(c *cell) { v.merge(c.at(port)) })
	}
	return v
}
