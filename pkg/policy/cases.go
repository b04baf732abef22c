package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// test checks that the workloads and ports of a PolicyTest exist.
func (c *compiler) test(s *Set, t PolicyTest) {
	for _, k := range t.Cases {
		if _, err := refID(c.td, k.From, c.nameToID); k.From != "" && err != "" {
			c.errs.add(s.mistake(&c.errs, t.File, k.from, c.suggestWorkload(k.From), err))
		}
		w, p, msg, hint := c.caseTo(k)
		if msg == "" {
			_, p, msg, hint = k.ports(w)
		}
		if msg != "" {
			c.errs.add(s.mistake(&c.errs, t.File, p, hint, msg))
			continue
		}
		// A test of others' doors would keep them from changing those.
		if sc := c.scopes[s.Name]; s.Name != "" && sc != nil && !sc.covers(w.pattern()) {
			c.beyond(s, sc, t.File, k.to, fmt.Sprintf("a case of PolicyTest %s asks about %s (%s), which", t.Name, w.Name, w.Workload.ID), sc.patterns()...)
		}
	}
}

// caseTo finds the destination of a case.
func (c *compiler) caseTo(k Case) (w CompiledWorkload, p pos, msg, hint string) {
	id, err := refID(c.td, k.To, c.nameToID)
	if err != "" {
		return w, k.to, err, c.suggestWorkload(k.To)
	}
	if i, known := c.byID[id.String()]; known {
		return c.workloads[i], k.to, "", ""
	}
	pattern := identity.ExactPattern(id)
	if _, known := c.abroad[id.String()]; !known && isExternal(id) {
		return w, k.to, fmt.Sprintf("unknown External %q", shorten(strings.TrimPrefix(k.To, "external:"))), c.suggestExternal(strings.TrimPrefix(k.To, "external:"))
	}
	for _, found := range [][]int{c.matchTemplates(pattern), c.matchForeign(pattern), c.selectExternals(pattern)} {
		if len(found) == 1 {
			return c.workloads[found[0]], k.to, "", ""
		}
	}
	return w, k.to, fmt.Sprintf("no workload has the ID %s", shorten(k.To)), ""
}

// ports gives the ports of its destination that a case asks about, or what is
// wrong with them.
func (k Case) ports(w CompiledWorkload) (ports []Port, p pos, msg, hint string) {
	ports = w.Ports
	if !k.Port.isZero() {
		port, ok := w.refPort(k.Port)
		if !ok {
			return nil, k.Port.pos, fmt.Sprintf("workload %s declares no port %s", k.To, k.Port), "declared: " + portList(w.Ports)
		}
		ports = []Port{port}
	}
	if len(ports) == 0 {
		return nil, k.to, fmt.Sprintf("workload %s declares no port: the case would ask nothing", k.To), ""
	}
	if k.HTTP == nil {
		return ports, k.to, "", ""
	}
	want := "http"
	ports = slices.DeleteFunc(slices.Clone(ports), func(p Port) bool { return p.Protocol == TCP || k.grpc && p.Protocol != GRPC })
	if k.grpc {
		want = "grpc"
	}
	if len(ports) == 0 {
		return nil, k.http, fmt.Sprintf("workload %s has no such port of protocol %s: nothing there can tell requests", k.To, want), "declared: " + portList(w.Ports)
	}
	return ports, k.http, "", ""
}

func (c *compiler) nameToID(name string) (spiffeid.ID, bool) {
	i, ok := c.byName[name]
	if !ok {
		return spiffeid.ID{}, false
	}
	return c.workloads[i].ID, true // zero for a template
}

// refID resolves what a test case names; problem is "" when it could.
func refID(td spiffeid.TrustDomain, ref string, byName func(string) (spiffeid.ID, bool)) (id spiffeid.ID, problem string) {
	var err error
	switch {
	case strings.HasPrefix(ref, "/"):
		id, err = spiffeid.FromPath(td, ref)
	case strings.HasPrefix(ref, "spiffe://"):
		id, err = spiffeid.FromString(ref)
	case strings.HasPrefix(ref, "external:"):
		id = External{Name: strings.TrimPrefix(ref, "external:")}.ID(td)
	default:
		var ok bool
		if id, ok = byName(ref); !ok {
			return id, fmt.Sprintf("unknown workload %q", shorten(ref))
		}
		if id.IsZero() {
			return id, fmt.Sprintf("workload %s is a template: write one of its IDs", ref)
		}
	}
	if err != nil {
		return spiffeid.ID{}, fmt.Sprintf("%q: %v", shorten(ref), err)
	}
	return id, ""
}
