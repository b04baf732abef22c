package policy

import (
	"fmt"
	"net/netip"
	"net/url"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v4"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	maxForeign   = 1000 // workloads of one TrustDomain
	maxEndpoints = 100  // of one foreign workload
)

// trustDomain parses the spec of a TrustDomain.
func (f *fileReader) trustDomain(name string, p pos, n *yaml.Node) {
	if f.set.Name != "" {
		f.fail(p, "move the document to the top of the policy folder", "kind TrustDomain belongs into the root set")
		return
	}
	d := TrustDomain{Name: name, File: f.file, Line: p.line, Col: p.col}
	spec, ok := f.object(n, "spec", trustDomainSpec.known)
	if !ok {
		return
	}
	text, dn, ok := spec.text("trustDomain")
	if !ok {
		return
	}
	td, err := spiffeid.TrustDomainFromString(text)
	if err != nil || td.Name() != text {
		f.fail(at(dn), "write the name alone, as in partner.example", "spec.trustDomain %q is not a trust domain", shorten(text))
		return
	}
	d.Domain, d.domain = td, at(dn)
	before := f.errs.count()
	if bn, ok := spec.fields["bundle"]; ok {
		d.Bundle = f.bundle(td, bn)
	}
	if en, ok := spec.fields["bundleEndpoint"]; ok {
		f.bundleEndpoint(&d, en)
	}
	if wn, ok := spec.fields["workloads"]; ok {
		d.Workloads = f.foreignWorkloads(td, wn)
	}
	if f.errs.count() > before {
		return
	}
	switch {
	case d.Endpoint == nil && d.Bundle == nil:
		f.fail(at(n), "write bundleEndpoint, bundle or both", "spec says neither where the bundle of %s is nor what it is", td.Name())
		return
	case d.Endpoint != nil && d.Endpoint.Profile == HTTPSSPIFFE && d.Endpoint.ID.TrustDomain() == td && d.Bundle == nil:
		f.fail(at(n), "ask the other mesh for its bundle: sallyport bundle show", "spec.bundle is missing: the endpoint proves itself by the bundle that it serves, so the first one must be given")
		return
	}
	f.set.TrustDomains = append(f.set.TrustDomains, d)
}

// bundle reads a SPIFFE bundle (SPIFFE Trust Domain and Bundle, section 4).
func (f *fileReader) bundle(td spiffeid.TrustDomain, n *yaml.Node) *spiffebundle.Bundle {
	text, ok := f.text(n, "spec.bundle")
	if !ok {
		return nil
	}
	b, err := identity.ParseBundle(td, []byte(text))
	if err != nil {
		f.fail(at(n), "paste the JSON that the other mesh's sallyport bundle show prints", "spec.bundle is not a SPIFFE bundle: %v", err)
		return nil
	}
	if len(b.X509Authorities()) == 0 {
		f.fail(at(n), "", "spec.bundle holds no X.509 authority, so nobody of %s could prove an identity", td.Name())
		return nil
	}
	return b
}

func (f *fileReader) bundleEndpoint(d *TrustDomain, n *yaml.Node) {
	o, ok := f.object(n, "spec.bundleEndpoint", bundleEndpointShape.known)
	if !ok {
		return
	}
	e := &BundleEndpoint{}
	var un, pn *yaml.Node
	var ok1, ok2 bool
	if e.URL, un, ok1 = o.text("url"); ok1 {
		f.endpointURL(e.URL, un)
	}
	if e.Profile, pn, ok2 = o.text("profile"); ok2 && e.Profile != HTTPSWeb && e.Profile != HTTPSSPIFFE {
		hint := didYouMean(e.Profile, []string{HTTPSWeb, HTTPSSPIFFE})
		f.fail(at(pn), hint, "unknown profile %q; want %s or %s", shorten(e.Profile), HTTPSWeb, HTTPSSPIFFE)
	}
	idNode, has := o.fields["endpointID"]
	switch {
	case e.Profile == HTTPSWeb && has:
		f.fail(at(idNode), "remove it, or use profile "+HTTPSSPIFFE, "spec.bundleEndpoint.endpointID: a %s endpoint proves a host name, not an ID", HTTPSWeb)
	case e.Profile == HTTPSSPIFFE:
		text, idn, ok := o.text("endpointID")
		if !ok {
			break
		}
		id, err := spiffeid.FromString(text)
		if err != nil || id.Path() == "" {
			f.fail(at(idn), "", "spec.bundleEndpoint.endpointID: %q is not a SPIFFE ID with a path", shorten(text))
			break
		}
		e.ID, d.endpointID = id, at(idn)
	}
	d.Endpoint = e
}

// endpointURL holds to SPIFFE Federation sections 5.2.1.1 and 5.2.2.1.
func (f *fileReader) endpointURL(text string, n *yaml.Node) {
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Hostname() == "" || u.Opaque != "":
		f.fail(at(n), "", "spec.bundleEndpoint.url: %q is not a URL", shorten(text))
	case u.Scheme != "https":
		f.fail(at(n), "", "spec.bundleEndpoint.url must begin with https://")
	case u.User != nil:
		f.fail(at(n), "remove what stands before the @", "spec.bundleEndpoint.url must not hold user info")
	case u.Fragment != "":
		f.fail(at(n), "", "spec.bundleEndpoint.url has a fragment")
	}
}

func (f *fileReader) foreignWorkloads(td spiffeid.TrustDomain, n *yaml.Node) []ForeignWorkload {
	items, ok := f.list(n, "spec.workloads")
	if !ok {
		return nil
	}
	if len(items) > maxForeign {
		f.fail(at(n), "", "spec.workloads has more than %d entries", maxForeign)
		return nil
	}
	seen := map[string]int{} // :: path → line
	var out []ForeignWorkload
	for i, item := range items {
		what := fmt.Sprintf("spec.workloads[%d]", i)
		o, ok := f.object(item, what, foreignShape.known)
		if !ok {
			continue
		}
		w := ForeignWorkload{pos: at(item)}
		path, idn, ok := o.text("id")
		if !ok || !f.unique(idn, fmt.Sprintf("workload %q", shorten(path)), seen[path]) {
			continue
		}
		seen[path] = at(idn).line
		id, err := spiffeid.FromPath(td, path)
		if err != nil || path == "" {
			f.fail(at(idn), "write the path only, as in /shop/payments", "%s.id: %q is not the path of a SPIFFE ID", what, shorten(path))
			continue
		}
		w.ID = id
		if pn, ok := o.need("ports"); ok {
			w.Ports = f.ports(pn, what+".ports")
		}
		w.Endpoints = f.endpoints(o)
		out = append(out, w)
	}
	return out
}

// endpoints reads where foreign sidecars listen. Addresses are for dialling only:
// who answers there is proved by its SVID.
func (f *fileReader) endpoints(o object) []netip.AddrPort {
	items, ok := o.list("endpoints")
	if !ok {
		return nil
	}
	if len(items) > maxEndpoints {
		f.fail(at(o.fields["endpoints"]), "", "%s has more than %d entries", o.path("endpoints"), maxEndpoints)
		return nil
	}
	var out []netip.AddrPort
	for i, item := range items {
		what := fmt.Sprintf("%s[%d]", o.path("endpoints"), i)
		text, ok := f.text(item, what)
		if !ok {
			continue
		}
		ap, err := netip.ParseAddrPort(text)
		if err != nil || ap.Port() == 0 || ap.Addr().Zone() != "" || ap.Addr().IsUnspecified() || strings.TrimSpace(text) != text {
			f.fail(at(item), "write the address of the other sidecar's tunnel listener, as in 192.0.2.7:15008", "%s: %q is not an IP address with a port", what, shorten(text))
			continue
		}
		out = append(out, ap)
	}
	return out
}
