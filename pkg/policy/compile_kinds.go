package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// addExternals gives every External its ID.
func (c *compiler) addExternals() {
	for _, s := range c.sets {
		for _, x := range s.Externals {
			if x.Name == "" {
				continue // reported when it was parsed
			}
			c.externals = append(c.externals, x)
			w := x.compiled(c.td)
			c.abroad[w.ID.String()] = len(c.workloads)
			c.workloads = append(c.workloads, w)
		}
	}
	slices.SortFunc(c.externals, func(a, b External) int { return strings.Compare(a.Name, b.Name) })
}

// ID is the name that rules and records have for it, in trust domain td.
func (x External) ID(td spiffeid.TrustDomain) spiffeid.ID {
	id, _ := spiffeid.FromSegments(td, strings.TrimPrefix(externalPrefix, "/"), x.Name) // a DNS label is a segment
	return id
}

// compiled gives x in the form of a workload: what rules need of it.
func (x External) compiled(td spiffeid.TrustDomain) CompiledWorkload {
	id := x.ID(td)
	return CompiledWorkload{Workload: Workload{Name: "external:" + x.Name, Set: x.Set, ID: id.Path(), Ports: []Port{x.Port}}, ID: id}
}

// Externals gives the destinations outside every mesh, by name; nil on a sidecar.
// The caller must not change them.
func (r *Ruleset) Externals() []External {
	if r == nil {
		return nil
	}
	return r.externals
}

// external gives the External with this ID.
func (r *Ruleset) external(id spiffeid.ID) (CompiledWorkload, bool) {
	td := r.trustDomain()
	if !isExternal(id) || id.TrustDomain() != td {
		return CompiledWorkload{}, false
	}
	for _, x := range r.Externals() {
		if x.ID(td) == id {
			return x.compiled(td), true
		}
	}
	return CompiledWorkload{}, false
}

// selectExternals gives the Externals that a pattern of this trust domain matches.
func (c *compiler) selectExternals(pattern identity.Pattern) []int {
	var out []int
	for _, x := range c.externals {
		if id := x.ID(c.td); pattern.Match(id) {
			out = append(out, c.abroad[id.String()])
		}
	}
	return out
}

// suggestExternal suggests the name of an External.
func (c *compiler) suggestExternal(name string) string {
	if c.errs.full() {
		return ""
	}
	names := make([]string, len(c.externals))
	for i, x := range c.externals {
		names[i] = x.Name
	}
	if hint := didYouMean(name, names); hint != "" {
		return hint
	}
	return "define it in a document of kind: External"
}

// knownIssuer reports a rule about tokens of an issuer that nobody defined.
func (c *compiler) knownIssuer(s *Set, p Policy, e Entry) bool {
	if len(e.HTTP) == 0 || len(e.HTTP[0].Claims) == 0 {
		return true
	}
	name := e.HTTP[0].Claims[0].Issuer
	var names []string
	for _, set := range c.sets {
		for _, t := range set.TokenIssuers {
			names = append(names, t.Name)
		}
	}
	if slices.Contains(names, name) {
		return true
	}
	hint := didYouMean(name, names)
	if hint == "" {
		hint = "define it in a document of kind: TokenIssuer in the root set"
	}
	c.errs.add(s.mistake(&c.errs, p.File, e.when, hint, fmt.Sprintf("unknown TokenIssuer %q", shorten(name))))
	return false
}

// defaults compiles an open door: an allow that full enforcement would not grant.
func (c *compiler) defaults(s *Set, d Defaults) {
	if c.errs.full() || d.Until.IsZero() {
		return
	}
	everyone, err := identity.ParsePattern(c.td.IDString() + "/**")
	if err != nil {
		c.errs.add(s.mistake(&c.errs, d.File, pos{d.Line, d.Col}, "", err.Error()))
		return
	}
	p := Policy{Name: d.Name, Set: s.Name, To: d.To, File: d.File, Line: d.Line, Col: d.Col}
	to, ok := c.selectTo(s, p)
	if !ok {
		return
	}
	e := Entry{Ports: []PortRef{{All: true}}, pos: pos{d.Line, d.Col}}
	groups, ok := c.groups(s, p, to, e)
	if !ok {
		return
	}
	for _, g := range groups {
		c.add(Rule{
			Ref: RuleRef{Set: s.Name, Policy: d.Name, File: d.File, Line: d.Line}, Effect: Allow, Audit: true,
			From: []identity.Pattern{everyone}, To: g.to, Ports: g.ports, Until: d.Until,
		})
	}
}
