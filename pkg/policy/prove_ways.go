package policy

import (
	"slices"
	"time"
)

// same gives those who could exist, have the ID of a party, and are picked by all
// four selectors.
func (p *prover) same(q question, at *Party) []*Party {
	from, ok1 := p.labels(q.from, q.neverFrom)
	to, ok2 := p.labels(q.to, q.neverTo)
	labels, ok3 := p.labels(chooser{Selector: Selector{Labels: from}}, chooser{Selector: Selector{Labels: to}})
	if !ok1 || !ok2 || !ok3 || !p.free(at.ID, labels, asSource) || !p.free(at.ID, labels, asDestination) {
		return nil
	}
	choices := []map[string]string{labels}
	if scope := p.scopeOf(at.ID); scope != "" {
		choices = p.granted(scope, labels, asBoth)
	}
	var out []*Party
	for _, l := range choices {
		if both := (&Party{ID: at.ID, Labels: l, exact: true}); p.beside(both) {
			out = append(out, both)
		}
	}
	return out
}

// portsOf gives the ports of a destination that a rule names. Somebody who could
// exist declares for each what matches the fewest other rules.
func (p *prover) portsOf(d *Party, c *clause) []Port {
	var out []Port
	if d.Exists {
		for _, port := range d.ports {
			if c.names(port) {
				out = append(out, port)
			}
		}
		return out
	}
	for _, r := range c.entry.Ports {
		port := Port{Name: p.port, Number: p.number, Protocol: GRPC, Plaintext: time.Unix(1<<33, 0).UTC()} // suits every rule
		switch {
		case r.All:
		case r.Name != "":
			port.Name = r.Name
		default:
			port.Number = r.Number
		}
		if !isExternal(d.ID) || d.ID.TrustDomain() != p.c.td {
			out = append(out, port)
			continue
		}
		for _, protocol := range []Protocol{TCP, HTTP, GRPC} { // its only port is called by its protocol
			port.Name, port.Protocol = string(protocol), protocol
			if c.names(port) && p.enforceable(d, port) {
				out = append(out, port)
			}
		}
	}
	return out
}

// enforceable reports whether no rule makes such a port of an External a mistake.
func (p *prover) enforceable(d *Party, port Port) bool {
	for _, c := range slices.Concat(p.opens, p.denies, p.audits) {
		if len(c.entry.HTTP) == 0 || !c.to.selects(d) || !c.names(port) {
			continue
		}
		if port.Protocol == TCP || c.entry.GRPC && port.Protocol != GRPC {
			return false
		}
	}
	return true
}

// names reports whether the clause is about the port.
func (c *clause) names(p Port) bool {
	return slices.ContainsFunc(c.entry.Ports, func(r PortRef) bool { return r.All || r.names(p) })
}
