package policy

import (
	"fmt"
	"net/netip"
	"slices"

	"go.yaml.in/yaml/v4"
)

// MaxEndpoints is how many addresses one workload can list.
const MaxEndpoints = 1000

// addresses reads where instances of w without sidecar serve. An address's port is
// the declared one: an instance decides by the port that it listens on.
func (f *fileReader) addresses(n *yaml.Node, w Workload) []netip.AddrPort {
	const what = "spec.endpoints"
	items, ok := f.list(n, what)
	if !ok {
		return nil
	}
	if len(items) > MaxEndpoints {
		f.fail(at(n), "", "%s lists more than %d addresses", what, MaxEndpoints)
		return nil
	}
	if len(w.variables()) > 0 && len(items) > 0 {
		f.fail(at(n), "write a Workload for each of them", "%s: spec.id is a template, so nothing says which identity an address has", what)
		return nil
	}
	seen := map[netip.AddrPort]int{} // :: address → line
	var out []netip.AddrPort
	for i, item := range items {
		text, ok := f.text(item, fmt.Sprintf("%s[%d]", what, i))
		if !ok {
			continue
		}
		addr, err := netip.ParseAddrPort(text)
		addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
		grpc := func(p Port) bool { return p.Number == addr.Port() && p.Protocol == GRPC }
		switch {
		case err != nil || addr.Addr().Zone() != "" || addr.Addr().IsUnspecified() || addr.Addr().IsMulticast() || addr.Port() == 0:
			f.fail(at(item), "as in 10.0.0.7:9000 or [fd00::7]:9000", "%s[%d]: %q is not the IP address and port of an instance", what, i, shorten(text))
		case !slices.ContainsFunc(w.Ports, grpc):
			f.fail(at(item), "declare it under spec.ports, or let the instance listen on one that is declared", "%s[%d]: the workload declares no port %d of protocol grpc", what, i, addr.Port())
		case f.unique(item, "address "+addr.String(), seen[addr]):
			out = append(out, addr)
		}
		seen[addr] = at(item).line
	}
	return out
}

// direct reads where the sidecar takes plain mutual TLS for a port; 0: nowhere.
func (f *fileReader) direct(o object, seen map[uint16]int) (number uint16, ok bool) {
	n, has := o.fields["direct"]
	if !has {
		return 0, true
	}
	if number, ok = f.portNumber(n, o.path("direct")); ok {
		ok = f.unique(n, fmt.Sprintf("direct port %d", number), seen[number])
		seen[number] = at(n).line
	}
	return number, ok
}
