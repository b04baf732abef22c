package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Profiles of a bundle endpoint (SPIFFE Federation section 5.2).
const (
	HTTPSWeb    = "https_web"
	HTTPSSPIFFE = "https_spiffe"
)

// TrustDomain is another mesh, whose identities policies may name.
type TrustDomain struct {
	Name      string               // metadata.name: its alias in mesh names, as in payments.shop.NAME.mesh
	Domain    spiffeid.TrustDomain // the foreign trust domain
	Endpoint  *BundleEndpoint      // nil: the bundle is fixed
	Bundle    *spiffebundle.Bundle // bootstrap, or all there is; nil: none needed
	Workloads []ForeignWorkload    // what may be called there
	File      string               // path below the policy folder, with slashes
	Line      int                  // of metadata.name, from 1
	Col       int                  // in characters, from 1

	domain, endpointID pos
}

// BundleEndpoint is where a trust domain publishes its bundle (SPIFFE Federation
// section 5.1: everything is configured, nothing guessed).
type BundleEndpoint struct {
	URL     string      // https, without user info
	Profile string      // HTTPSWeb or HTTPSSPIFFE
	ID      spiffeid.ID // HTTPSSPIFFE: the one that the endpoint must prove
}

// ForeignWorkload is a destination in another trust domain. Who may call it is
// decided there; rules of this mesh decide who may try.
type ForeignWorkload struct {
	ID        spiffeid.ID
	Ports     []Port
	Endpoints []netip.AddrPort // its sidecars' tunnel listeners
	pos
}

// TrustDomains gives the foreign trust domains, by name; nil on a sidecar. The
// caller must not change them.
func (r *Ruleset) TrustDomains() []TrustDomain {
	if r == nil {
		return nil
	}
	return r.domains
}

// compiled gives w in the form of an own workload: what rules need of it.
func (w ForeignWorkload) compiled() CompiledWorkload {
	return CompiledWorkload{Workload: Workload{Name: w.ID.String(), ID: w.ID.Path(), Ports: w.Ports}, ID: w.ID}
}

// Destination gives the workload with this ID: one of this mesh, one that a
// TrustDomain document lists, whose name is then its ID, or an External, whose name
// is external:NAME.
func (r *Ruleset) Destination(id spiffeid.ID) (CompiledWorkload, bool) {
	if w, ok := r.Workload(id); ok {
		return w, true
	}
	if w, ok := r.external(id); ok {
		return w, true
	}
	return r.foreign(id.String())
}

func (r *Ruleset) foreign(id string) (CompiledWorkload, bool) {
	for _, d := range r.TrustDomains() {
		for _, w := range d.Workloads {
			if w.ID.String() == id {
				return w.compiled(), true
			}
		}
	}
	return CompiledWorkload{}, false
}

// addDomains checks the TrustDomain documents against each other and against the
// own trust domain.
func (c *compiler) addDomains() {
	first := map[spiffeid.TrustDomain]TrustDomain{}
	for _, s := range c.sets {
		for _, d := range s.TrustDomains {
			was, twice := first[d.Domain]
			switch {
			case d.Domain.IsZero():
				continue // reported when the set was parsed
			case d.Domain == c.td:
				c.errs.add(s.mistake(&c.errs, d.File, d.domain, "name another mesh's", fmt.Sprintf("trust domain %s is this mesh's own", c.td.Name())))
			case twice:
				c.errs.add(s.mistake(&c.errs, d.File, d.domain, fmt.Sprintf("first defined by %s at %s:%d", was.Name, was.File, was.Line),
					fmt.Sprintf("trust domain %s is defined twice", d.Domain.Name())))
			default:
				first[d.Domain] = d
				c.domains = append(c.domains, d)
			}
		}
	}
	slices.SortFunc(c.domains, func(a, b TrustDomain) int { return strings.Compare(a.Name, b.Name) })
	for _, d := range c.domains {
		if d.Endpoint == nil || d.Endpoint.Profile != HTTPSSPIFFE || d.Endpoint.ID.TrustDomain() == d.Domain {
			continue
		}
		other := d.Endpoint.ID.TrustDomain()
		if _, known := first[other]; !known && other != c.td {
			c.errs.add(c.setOf("").mistake(&c.errs, d.File, d.endpointID, "define kind: TrustDomain for it too, or use an endpoint of "+d.Domain.Name(),
				fmt.Sprintf("spec.bundleEndpoint.endpointID is of trust domain %s, whose bundle is not known", other.Name())))
		}
	}
}

// knownDomain reports a pattern of a trust domain that nobody defined.
func (c *compiler) knownDomain(s *Set, file string, sel Selector, p identity.Pattern) bool {
	td := p.TrustDomain()
	if td == c.td || slices.ContainsFunc(c.domains, func(d TrustDomain) bool { return d.Domain == td }) {
		return true
	}
	var known []string
	for _, d := range c.domains {
		known = append(known, d.Domain.Name())
	}
	hint := didYouMean(td.Name(), known)
	if hint == "" {
		hint = "define it in a document of kind: TrustDomain in the root set"
	}
	c.errs.add(s.mistake(&c.errs, file, sel.pos, hint, fmt.Sprintf("unknown trust domain %s", td.Name())))
	return false
}

// selectForeign resolves a `to` in another trust domain: the workloads there that
// its document declares.
func (c *compiler) selectForeign(s *Set, p Policy, pattern identity.Pattern) []int {
	out := c.matchForeign(pattern)
	if len(out) == 0 {
		c.errs.add(s.mistake(&c.errs, p.File, p.To.pos, "list it under spec.workloads of its TrustDomain, with ports and endpoints",
			fmt.Sprintf("no declared workload of %s has the ID %s", pattern.TrustDomain().Name(), shorten(p.To.ID))))
	}
	return out
}

// matchForeign gives the declared foreign workloads that a pattern matches.
func (c *compiler) matchForeign(pattern identity.Pattern) []int {
	var out []int
	for _, d := range c.domains {
		for _, w := range d.Workloads {
			if !pattern.Match(w.ID) {
				continue
			}
			i, ok := c.abroad[w.ID.String()]
			if !ok {
				i = len(c.workloads)
				c.workloads = append(c.workloads, w.compiled())
				c.abroad[w.ID.String()] = i
			}
			out = append(out, i)
		}
	}
	return out
}
