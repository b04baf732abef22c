package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// group is a part of a `to` on which the ports of a rule have the same numbers.
type group struct {
	to    []identity.Pattern
	ports []uint16 // ascending; empty: every port
}

// groups splits `to` by what the entry's ports mean there; workloads that
// declare none of them are left out. Rules with equal selectors share the
// result.
func (c *compiler) groups(s *Set, p Policy, to destinations, e Entry) ([]group, bool) {
	if len(e.Ports) == 0 { // no file says so; an empty list would mean every port
		c.errs.add(s.mistake(&c.errs, p.File, e.pos, "", "a rule without ports"))
		return nil, false
	}
	key := fmt.Sprint(to.text, "\x00", len(e.HTTP) > 0, e.GRPC, e.anonymous())
	for _, r := range e.Ports {
		key += "\x00" + r.String()
	}
	if gs, ok := c.split[key]; ok {
		return gs, true
	}
	all := len(e.Ports) == 1 && e.Ports[0].All
	if !all && !c.checkPorts(s, p, to, e) || !c.checkProtocols(s, p, to, e) {
		return nil, false
	}
	var gs []group
	named := slices.ContainsFunc(e.Ports, func(r PortRef) bool { return r.Name != "" })
	switch {
	case !to.pattern.IsZero() && !named:
		gs = []group{{to: []identity.Pattern{to.pattern}}}
		for _, r := range e.Ports {
			if !all {
				gs[0].ports = append(gs[0].ports, r.Number)
			}
		}
		slices.Sort(gs[0].ports)
	case all:
		gs = []group{{to: c.exact(to.workloads)}}
	default:
		gs = c.byPorts(to.workloads, e.Ports)
	}
	c.split[key] = gs
	return gs, true
}

// byPorts groups workloads by the numbers that refs have there.
func (c *compiler) byPorts(workloads []int, refs []PortRef) []group {
	members, numbers := map[string][]int{}, map[string][]uint16{} // :: numbers as text →
	for _, i := range workloads {
		if ports := resolve(c.workloads[i], refs); len(ports) > 0 {
			key := fmt.Sprint(ports)
			members[key], numbers[key] = append(members[key], i), ports
		}
	}
	var gs []group
	for _, key := range slices.Sorted(maps.Keys(members)) {
		gs = append(gs, group{to: c.exact(members[key]), ports: numbers[key]})
	}
	return gs
}

// exact gives the patterns that match the IDs of these workloads and nothing else.
func (c *compiler) exact(workloads []int) []identity.Pattern {
	out := make([]identity.Pattern, len(workloads))
	for n, i := range workloads {
		out[n] = c.workloads[i].pattern()
	}
	return out
}

// resolve gives the numbers of w's declared ports that refs name, ascending.
func resolve(w CompiledWorkload, refs []PortRef) []uint16 {
	var out []uint16
	for _, r := range refs {
		if p, ok := w.refPort(r); ok {
			out = append(out, p.Number)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// refPort gives the declared port that r names.
func (w CompiledWorkload) refPort(r PortRef) (Port, bool) {
	if r.Name != "" {
		return w.PortByName(r.Name)
	}
	return w.Port(r.Number)
}

// checkPorts reports ports that no selected workload declares.
func (c *compiler) checkPorts(s *Set, p Policy, to destinations, e Entry) bool {
	ok := true
	for _, r := range e.Ports {
		if r.Name == "" && !to.pattern.IsZero() && len(to.workloads) == 0 {
			continue // a number needs no workload to be understood
		}
		known := slices.ContainsFunc(to.workloads, func(i int) bool {
			_, has := c.workloads[i].refPort(r)
			return has
		})
		if known {
			continue
		}
		ok = false
		var names []string
		for _, i := range to.workloads {
			for _, port := range c.workloads[i].Ports {
				names = append(names, port.Name)
			}
		}
		slices.Sort(names)
		names = slices.Compact(names)
		hint := didYouMean(r.Name, names)
		if hint == "" && len(names) > 0 && len(names) <= 10 {
			hint = "declared: " + strings.Join(names, ", ")
		}
		c.errs.add(s.mistake(&c.errs, p.File, r.pos, hint, fmt.Sprintf("port %s is declared by no workload that spec.to selects", r)))
	}
	return ok
}

// checkProtocols reports ports that cannot enforce what the rule says: nothing is
// ignored. A workload yet to come is checked when it is there.
func (c *compiler) checkProtocols(s *Set, p Policy, to destinations, e Entry) bool {
	for _, i := range to.workloads {
		w := c.workloads[i]
		for _, port := range w.Ports {
			if !slices.ContainsFunc(e.Ports, func(r PortRef) bool { return r.All || r.names(port) }) {
				continue
			}
			where := fmt.Sprintf("port %s of %s", portList([]Port{port}), w.Name)
			switch {
			case e.GRPC && port.Protocol != GRPC:
				c.errs.add(s.mistake(&c.errs, p.File, e.http, "name the grpc ports only, or declare protocol: grpc", fmt.Sprintf("%s is declared %s: it cannot tell gRPC methods", where, port.Protocol)))
			case len(e.HTTP) > 0 && port.Protocol == TCP:
				c.errs.add(s.mistake(&c.errs, p.File, e.http, "name the http ports only, or declare protocol: http", fmt.Sprintf("%s is declared tcp: it cannot tell requests", where)))
			case e.anonymous() && port.Plaintext.IsZero():
				c.errs.add(s.mistake(&c.errs, p.File, e.pos, "declare plaintext: {until: …} there, or leave anonymous out", fmt.Sprintf("%s has no plaintext: no caller without identity can come", where)))
			default:
				continue
			}
			return false
		}
	}
	return true
}

// anonymous reports whether callers without an identity are named.
func (e Entry) anonymous() bool {
	return slices.ContainsFunc(e.From, func(s Selector) bool { return s.Anonymous })
}

// names reports whether r means the port.
func (r PortRef) names(p Port) bool {
	return r.Name != "" && r.Name == p.Name || r.Name == "" && r.Number == p.Number
}

func (r PortRef) isZero() bool { return !r.All && r.Name == "" && r.Number == 0 }

// String gives the name, the number, or "all".
func (r PortRef) String() string {
	switch {
	case r.All:
		return "all"
	case r.Name != "":
		return r.Name
	}
	return fmt.Sprint(r.Number)
}

// portList gives "http (8080), metrics (9090)", or "none".
func portList(ports []Port) string {
	if len(ports) == 0 {
		return "none"
	}
	out := make([]string, len(ports))
	for i, p := range ports {
		out[i] = fmt.Sprintf("%s (%d)", p.Name, p.Number)
	}
	return strings.Join(out, ", ")
}
