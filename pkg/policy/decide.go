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
// rules, and it does not allocate, once the destination's index is there: the
// first call for a destination makes it, except that [NewRuleset] does so for a
// sidecar's own.
func (r *Ruleset) Decide(q Request) Decision {
	if r == nil || q.Port == 0 {
		return Decision{}
	}
	d := r.dests[q.Dst.String()]
	if d == nil {
		return r.decision(r.search(q), q.HTTP)
	}
	ix := d.index.Load()
	if ix == nil {
		ix = r.prepare(d)
	}
	return r.decision(ix.find(q.Src.String(), q.Port, q.HTTP), q.HTTP)
}

// decision turns a verdict into words.
func (r *Ruleset) decision(v verdict, request *HTTPRequest) Decision {
	switch {
	case request != nil && v.when != 0 && request.Check() != nil:
		return Decision{}
	case v.deny != 0:
		rule := &r.rules[v.deny-1]
		return Decision{Rule: rule.Ref, Reason: rule.Reason}
	case request == nil && v.undecided():
		return Decision{Effect: Inspect, Would: Inspect}
	case v.allow == 0 && v.door == 0:
		return Decision{}
	}
	d := Decision{Effect: Allow, Would: Allow}
	i := v.allow
	if i == 0 {
		i, d.Would = v.door, Deny
	}
	d.Rule, d.Reason = r.rules[i-1].Ref, r.rules[i-1].Reason
	if v.audit != 0 {
		d.Audited, d.Would = r.rules[v.audit-1].Ref, Deny
	}
	return d
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
func (v verdict) undecided() bool {
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

func (v *verdict) merge(o verdict) {
	v.deny = first(v.deny, o.deny)
	v.audit = first(v.audit, o.audit)
	v.allow = first(v.allow, o.allow)
	v.door = first(v.door, o.door)
	v.when |= o.when
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
	exact map[string]*cell // :: SPIFFE ID, "" for none →
	wild  trie[cell]       // :: pattern →
}

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

// newIndex indexes the rules about a destination.
func (r *Ruleset) newIndex(dst string) *index {
	ix := &index{exact: map[string]*cell{}}
	for _, i := range r.rulesTo(dst) {
		rule := &r.rules[i]
		if rule.Anonymous {
			ix.named("").add(rule, i)
		}
		for _, p := range rule.From {
			if _, exact := p.Exact(); exact {
				ix.named(p.String()).add(rule, i)
			} else if !p.IsZero() {
				ix.wild.add(p.String()).add(rule, i)
			}
		}
	}
	return ix
}

func (ix *index) named(src string) *cell {
	c := ix.exact[src]
	if c == nil {
		c = &cell{}
		ix.exact[src] = c
	}
	return c
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
	v.merge(p.verdict)
	if p.asks != nil && h != nil {
		p.asks.match(h, v)
	}
}

// find gives the verdict on a source, a port, and a request, if any.
func (ix *index) find(src string, port uint16, h *HTTPRequest) verdict {
	var v verdict
	if c := ix.exact[src]; c != nil {
		c.at(port, h, &v)
	}
	if ix.wild.n > 0 {
		ix.wild.match(src, func(c *cell) { c.at(port, h, &v) })
	}
	return v
}
