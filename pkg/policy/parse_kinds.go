package policy

import (
	"net/url"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v4"
)

// rootOnly reports a kind that only the root set may hold.
func (f *fileReader) rootOnly(kind string, p pos) bool {
	if f.set.Name == "" {
		return true
	}
	f.fail(p, "whoever keeps the root set can write it into the folder itself", "kind %s belongs into the root set; this is set %s, and Scope %s cannot grant it", kind, f.set.Name, f.set.Name)
	return false
}

// defaults parses the spec of a Defaults.
func (f *fileReader) defaults(name string, p pos, n *yaml.Node) {
	spec, ok := f.object(n, "spec", defaultsSpec.known)
	if !f.rootOnly("Defaults", p) || !ok {
		return
	}
	d := Defaults{Name: name, File: f.file, Line: p.line, Col: p.col}
	if tn, ok := spec.need("to"); ok {
		d.To, _ = f.selector(tn, "spec.to", doorSelector.names())
	}
	if an, ok := spec.need("audit"); ok {
		if o, ok := f.object(an, "spec.audit", untilOnly.known); ok {
			if un, ok := o.need("until"); ok {
				d.Until, _ = f.time(un, "spec.audit.until")
			}
		}
	}
	f.set.Defaults = append(f.set.Defaults, d)
}

// external parses the spec of an External.
func (f *fileReader) external(name string, p pos, n *yaml.Node) {
	o, ok := f.object(n, "spec", externalSpec.known)
	if !ok {
		return
	}
	x := External{Name: name, Set: f.set.Name, File: f.file, Line: p.line, Col: p.col}
	var hn *yaml.Node
	if x.Host, hn, ok = o.text("host"); ok && (x.Host == "" || !canonicalHost(x.Host)) {
		f.fail(at(hn), "", "spec.host: %q is not a host name or address in lower case; IPv6 stands in brackets", shorten(x.Host))
	}
	if pn, ok := o.need("port"); ok {
		x.Port.Number, _ = f.portNumber(pn, "spec.port")
	}
	x.Port.Protocol, _ = f.protocol(o)
	x.Port.Name = string(x.Port.Protocol)
	if tn, ok := o.need("tls"); ok {
		x.TLS, _ = f.truth(tn, "spec.tls")
	}
	f.set.Externals = append(f.set.Externals, x)
}

// externalPrefix is where the IDs of Externals lie.
const externalPrefix = "/external"

// isExternal reports whether id is below [externalPrefix].
func isExternal(id spiffeid.ID) bool {
	return id.Path() == externalPrefix || strings.HasPrefix(id.Path(), externalPrefix+"/")
}

// tokenIssuer parses the spec of a TokenIssuer.
func (f *fileReader) tokenIssuer(name string, p pos, n *yaml.Node) {
	o, ok := f.object(n, "spec", tokenIssuerSpec.known)
	if !f.rootOnly("TokenIssuer", p) || !ok {
		return
	}
	t := TokenIssuer{Name: name, File: f.file, Line: p.line, Col: p.col}
	var in, an *yaml.Node
	if t.Issuer, in, ok = o.text("issuer"); ok {
		u, err := url.Parse(t.Issuer)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			f.fail(at(in), "", "spec.issuer: %q is not an https URL without user, query and fragment", shorten(t.Issuer))
		}
	}
	if t.Audience, an, ok = o.text("audience"); ok && t.Audience == "" {
		f.fail(at(an), "", "spec.audience is empty: it would take tokens made for others")
	}
	f.set.TokenIssuers = append(f.set.TokenIssuers, t)
}
