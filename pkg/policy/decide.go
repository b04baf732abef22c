package policy

import "slices"

// Decide answers q. A deny that matches wins over every allow; of several rules
// with the same effect the first in the order of [Ruleset.Rules] is reported;
// where none matches the zero Decision denies. So does port 0, and a request that
// is not canonical (see [HTTPRequest.Check]) where a rule reads requests.
//
// Without q.HTTP it answers for the connection, and with Inspect where only a
// request can tell. Every window of time counts as open: see [Ruleset.At].
//
// It takes no lock and reads no clock. Its cost does not depend on the number of
// rules but on that of the patterns which match, and it does not allocate, once the
// destination's index is there: the first call for a destination makes it, except
// that [NewRuleset] does so for a sidecar's own.
func (r *Ruleset) Decide(q Request) (d Decision) {
	if r == nil || q.Port == 0 {
		return
	}
	var v verdict
	dest := r.only
	if dest == nil || dest.id != q.Dst.String() {
		dest = r.dests[q.Dst.String()]
	}
	if dest == nil {
		v = r.search(q)
	} else {
		ix := dest.index.Load()
		if ix == nil {
			ix = r.prepare(dest)
		}
		ix.find(q.Src.String(), q.Port, q.HTTP, &v)
	}
	r.put(&v, q.HTTP, &d)
	return
}

// put turns a verdict into words. Decide is called for every request, so neither
// of the two is copied on the way.
func (r *Ruleset) put(v *verdict, request *HTTPRequest, d *Decision) {
	switch {
	case request != nil && v.when != 0 && request.Check() != nil:
		return
	case v.deny != 0:
		rule := &r.rules[v.deny-1]
		d.Rule, d.Reason = rule.Ref, rule.Reason
		return
	case request == nil && v.undecided():
		d.Effect, d.Would = Inspect, Inspect
		return
	case v.allow == 0 && v.door == 0:
		return
	}
	d.Effect, d.Would = Allow, Allow
	i := v.allow
	if i == 0 {
		i, d.Would = v.door, Deny
	}
	rule := &r.rules[i-1]
	d.Rule, d.Reason = rule.Ref, rule.Reason
	if v.audit != 0 {
		d.Audited, d.Would = r.rules[v.audit-1].Ref, Deny
	}
}

// search is Decide for a destination that is no workload and that only patterns
// match: its cost grows with the number of rules.
func (r *Ruleset) search(q Request) verdict {
	var v verdict
	r.wild.match(q.Dst.String(), func(targets *[]int32) {
		for _, t := range *targets {
			for _, i := range r.targets[t].rules {
				rule := &r.rules[i]
				if !rule.from(q.Src) || !rule.port(q.Port) {
					continue
				}
				if len(rule.HTTP) > 0 {
					v.when |= rule.say().bit()
				}
				if len(rule.HTTP) == 0 || q.HTTP != nil && rule.request(q.HTTP) {
					v.add(rule.say(), i)
				}
			}
		}
	})
	return v
}

// say is what a rule does where it matches.
type say uint8

const (
	denies say = iota
	audits     // a deny that only records
	allows
	opens // an allow that full enforcement would not grant
)

func (s say) bit() uint8 { return 1 << s }

func (r *Rule) say() say {
	switch {
	case r.Effect == Deny && r.Audit:
		return audits
	case r.Effect == Deny:
		return denies
	case r.Audit:
		return opens
	}
	return allows
}

// verdict holds, for each say, 1 + the index of the first rule; 0 is none.
type verdict struct {
	deny, audit, allow, door int32

	when uint8 // :: bit of a say → some rule looks at requests
}

// undecided reports whether the answer depends on requests.
func (v *verdict) undecided() bool {
	asks := v.when&allows.bit() != 0 && v.allow == 0
	return asks || v.when&(denies.bit()|audits.bit()) != 0 && (v.allow != 0 || v.door != 0)
}

func (v *verdict) add(s say, rule int32) {
	at := &v.deny
	switch s {
	case audits:
		at = &v.audit
	case allows:
		at = &v.allow
	case opens:
		at = &v.door
	}
	*at = first(*at, rule+1)
}

func (v *verdict) merge(o *verdict) {
	v.deny = first(v.deny, o.deny)
	v.audit = first(v.audit, o.audit)
	v.allow = first(v.allow, o.allow)
	v.door = first(v.door, o.door)
	v.when |= o.when
}

// first gives the smaller of two rules, where 0 is none. It does not branch: one
// less than 0 is the largest number.
func first(a, b int32) int32 { return int32(min(uint32(a)-1, uint32(b)-1) + 1) }

// index finds the verdict on a source and a port for one destination. Its size
// is that of the From lists of the rules about the destination.
type index struct {
	exact map[string]*source // :: SPIFFE ID, "" for none →
	wild  trie[cell]         // :: pattern →
}

// source is an ID that some rule names.
type source struct {
	cell         // what the rules that name it say
	met  []*cell // what the patterns that match it say; nil where many do …
	many bool    // … and each decision looks for them
}

// maxMet is how many patterns an index remembers for one source.
const maxMet = 16

// cell is what the rules that name one source, or one pattern, say.
type cell struct {
	all   part // the rules for every port
	ports []portPart
}

// part is what some rules say about connections, and about requests.
type part struct {
	verdict
	asks *requests // nil: nothing
}

type portPart struct {
	port uint16 // ascending in a cell
	part
}

// prepare makes the index of d. Two callers may do so at once; both results are
// equal.
func (r *Ruleset) prepare(d *destination) *index {
	ix := r.newIndex(d.id)
	d.index.Store(ix)
	return ix
}

// newIndex indexes the rules about a destination. What is said about one source is
// made at one time, so that it lies together in memory.
func (r *Ruleset) newIndex(dst string) *index {
	named := map[string][]int32{} // :: SPIFFE ID, "" for none → indexes of rules
	wild := map[string][]int32{}  // :: pattern → indexes of rules
	for _, i := range r.rulesTo(dst) {
		rule := &r.rules[i]
		if rule.Anonymous {
			named[""] = append(named[""], i)
		}
		for _, p := range rule.From {
			if _, exact := p.Exact(); exact {
				named[p.String()] = append(named[p.String()], i)
			} else if !p.IsZero() {
				wild[p.String()] = append(wild[p.String()], i)
			}
		}
	}
	ix := &index{exact: make(map[string]*source, len(named))}
	for pattern, rules := range wild {
		ix.wild.add(pattern).addAll(r, rules)
	}
	for src, rules := range named {
		s := &source{}
		s.addAll(r, rules)
		ix.wild.match(src, s.meet)
		ix.exact[src] = s
	}
	return ix
}

func (c *cell) addAll(r *Ruleset, rules []int32) {
	for _, i := range rules {
		c.add(&r.rules[i], i)
	}
}

// meet remembers what a pattern says that matches the source.
func (s *source) meet(c *cell) {
	if s.many || len(s.met) == maxMet {
		s.met, s.many = nil, true
		return
	}
	s.met = append(s.met, c)
}

func (c *cell) add(rule *Rule, i int32) {
	if len(rule.Ports) == 0 {
		c.all.add(rule, i)
		return
	}
	for _, port := range rule.Ports {
		n, ok := c.search(port)
		if !ok {
			c.ports = slices.Insert(c.ports, n, portPart{port: port})
		}
		c.ports[n].add(rule, i)
	}
}

func (p *part) add(rule *Rule, i int32) {
	if len(rule.HTTP) == 0 {
		p.verdict.add(rule.say(), i)
		return
	}
	if p.asks == nil {
		p.asks = &requests{}
	}
	p.when |= rule.say().bit()
	p.asks.add(rule, i)
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

// at merges into v what is said about a port, and about a request, if any.
func (c *cell) at(port uint16, h *HTTPRequest, v *verdict) {
	c.all.tell(h, v)
	if n, ok := c.search(port); ok {
		c.ports[n].tell(h, v)
	}
}

func (p *part) tell(h *HTTPRequest, v *verdict) {
	v.merge(&p.verdict)
	if p.asks != nil && h != nil {
		p.asks.match(h, v)
	}
}

// find merges into v what is said about a source, a port, and a request, if any.
func (ix *index) find(src string, port uint16, h *HTTPRequest, v *verdict) {
	if s := ix.exact[src]; s != nil {
		s.at(port, h, v)
		for _, c := range s.met {
			c.at(port, h, v)
		}
		if !s.many {
			return
		}
	}
	ix.wild.match(src, func(c *cell) { c.at(port, h, v) })
}

// verdict gives what find does, away from the path of decisions.
func (ix *index) verdict(src string, port uint16, h *HTTPRequest) verdict {
	var v verdict
	ix.find(src, port, h, &v)
	return v
}
