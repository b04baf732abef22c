package policy

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v4"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// MaxPorts is how many ports a workload can declare, and a rule can name.
const MaxPorts = 256

const maxLabels = 64 // of one workload or selector

// workload parses the spec of a Workload.
func (f *fileReader) workload(meta object, name string, p pos, n *yaml.Node) {
	w := Workload{Name: name, Set: f.set.Name, ID: "/" + name, File: f.file, Line: p.line, Col: p.col, id: p}
	templated := map[string]*yaml.Node{} // :: label → where {…} is its value
	if ln, ok := meta.fields["labels"]; ok {
		w.Labels = f.labels(ln, "metadata.labels", templated)
		w.labels = map[string]pos{}
		for i := 0; i+1 < len(ln.Content); i += 2 {
			w.labels[ln.Content[i].Value] = at(ln.Content[i])
		}
	}
	spec, ok := f.object(n, "spec", workloadSpec.known)
	if !ok {
		return
	}
	if in, ok := spec.fields["id"]; ok {
		w.ID, w.id = f.workloadID(in), at(in)
	}
	if an, ok := spec.fields["attest"]; ok {
		w.Attest = f.attest(an, "spec.attest")
	}
	f.checkTemplate(w, templated)
	if mn, ok := spec.fields["maxStale"]; ok {
		w.MaxStale = f.maxStale(mn)
	}
	if pn, ok := spec.fields["ports"]; ok {
		w.Ports, w.ports = f.ports(pn, "spec.ports"), places(pn)
	}
	if en, ok := spec.fields["endpoints"]; ok {
		w.Endpoints = f.addresses(en, w)
	}
	f.set.Workloads = append(f.set.Workloads, w)
}

// workloadID reads the path of a SPIFFE ID (SPIFFE-ID section 2.2).
func (f *fileReader) workloadID(n *yaml.Node) string {
	id, ok := f.text(n, "spec.id")
	if !ok {
		return ""
	}
	switch {
	case strings.HasPrefix(id, "spiffe://"):
		f.fail(at(n), "write the path only, as in /shop/payments: the trust domain is the control plane's", "spec.id %q is a full SPIFFE ID", shorten(id))
	case strings.ContainsAny(id, "{}"):
		return f.templateID(n, id)
	case strings.Contains(id, "*"):
		f.fail(at(n), "", "spec.id %q has a wildcard; a workload has one identity", shorten(id))
	case id == "":
		f.fail(at(n), "leave it out for /NAME", "spec.id is empty")
	case !strings.HasPrefix(id, "/"):
		f.fail(at(n), fmt.Sprintf("write %q", "/"+shorten(id)), "spec.id %q does not begin with a slash", shorten(id))
	default:
		err := spiffeid.ValidatePath(id)
		if err == nil {
			return id
		}
		f.fail(at(n), "", "spec.id %q: %v", shorten(id), err)
	}
	return ""
}

// labels reads a mapping of text to text. Values may be {selector} where templated
// is not nil, which then gets them.
func (f *fileReader) labels(n *yaml.Node, what string, templated map[string]*yaml.Node) map[string]string {
	if n.Kind != yaml.MappingNode {
		f.wrongType(n, what, "a mapping")
		return nil
	}
	if len(n.Content) > 2*maxLabels {
		f.fail(at(n), "", "%s has more than %d labels", what, maxLabels)
		return nil
	}
	labels := map[string]string{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		kn, vn := n.Content[i], n.Content[i+1]
		key, ok := f.text(kn, "a key of "+what)
		if !ok {
			continue
		}
		value, ok := f.text(vn, what+"."+shorten(key))
		switch {
		case !ok:
		case !isLabelText(key):
			f.fail(at(kn), "", "label key %q: %s", shorten(key), labelText)
		case strings.ContainsAny(value, "{}"):
			_, whole := variable(value)
			switch _, dup := labels[key]; {
			case templated == nil:
				f.fail(at(vn), "write the value itself", "%s.%s: a template stands in metadata.labels of a Workload only", what, key)
			case !whole:
				f.fail(at(vn), "write the variable alone, as in {namespace}", "%s.%s: %q is not one whole variable", what, key, shorten(value))
			case dup:
				f.fail(at(kn), "", "duplicate key %q", key)
			default:
				labels[key], templated[key] = value, vn
			}
		case !isLabelText(value):
			f.fail(at(vn), "", "label value %q: %s", shorten(value), labelText)
		default:
			if _, dup := labels[key]; dup {
				f.fail(at(kn), "", "duplicate key %q", key)
			}
			labels[key] = value
		}
	}
	return labels
}

const labelText = "want 1 to 63 of a-z, A-Z, 0-9, '-', '_', '.' and '/'"

func isLabelText(s string) bool {
	return s != "" && len(s) <= 63 && only(strings.ToLower(s), "-_./")
}

// ports reads the declared ports of a workload.
func (f *fileReader) ports(n *yaml.Node, what string) []Port {
	items, ok := f.list(n, what)
	if !ok {
		return nil
	}
	if len(items) > MaxPorts {
		f.fail(at(n), "", "%s declares more than %d ports", what, MaxPorts)
		return nil
	}
	seen := portsSeen{map[string]int{}, map[uint16]int{}, map[uint16]int{}}
	var out []Port
	for i, item := range items {
		port, ok := f.port(item, fmt.Sprintf("%s[%d]", what, i), seen)
		if ok {
			out = append(out, port)
		}
	}
	return out
}

// portsSeen is where each name, number and direct number of a list stands.
type portsSeen struct {
	names           map[string]int // :: → line
	numbers, direct map[uint16]int // :: → line
}

func (f *fileReader) port(n *yaml.Node, what string, seen portsSeen) (Port, bool) {
	o, ok := f.object(n, what, portShape.known)
	if !ok {
		return Port{}, false
	}
	var p Port
	name, nn, ok1 := o.text("name")
	if ok1 {
		ok1 = f.portName(nn, name, what+".name") && f.unique(nn, fmt.Sprintf("port name %q", name), seen.names[name])
		p.Name, seen.names[name] = name, at(nn).line
	}
	numNode, ok2 := o.need("port")
	if ok2 {
		if p.Number, ok2 = f.portNumber(numNode, what+".port"); ok2 {
			ok2 = f.unique(numNode, fmt.Sprintf("port number %d", p.Number), seen.numbers[p.Number])
			seen.numbers[p.Number] = at(numNode).line
		}
	}
	p.Protocol, ok = f.protocol(o)
	var ok3 bool
	p.Direct, ok3 = f.direct(o, seen.direct)
	if tn, has := o.fields["plaintext"]; has {
		if until, good := f.object(tn, what+".plaintext", plaintextShape.known); good {
			if un, good := until.need("until"); good {
				p.Plaintext, _ = f.time(un, what+".plaintext.until")
			}
		}
	}
	return p, ok && ok1 && ok2 && ok3
}

func (f *fileReader) protocol(o object) (Protocol, bool) {
	s, n, ok := o.text("protocol")
	p := Protocol(s)
	if ok && p != TCP && p != HTTP && p != GRPC {
		f.fail(at(n), didYouMean(s, []string{string(TCP), string(HTTP), string(GRPC)}), "unknown protocol %q; want tcp, http or grpc", shorten(s))
		ok = false
	}
	return p, ok
}

// unique reports a duplicate when first, the line of an earlier one, is not 0.
func (f *fileReader) unique(n *yaml.Node, what string, first int) bool {
	if first != 0 {
		f.fail(at(n), fmt.Sprintf("first written on line %d", first), "duplicate %s", what)
	}
	return first == 0
}

// portName checks the name of a port: a DNS label with a letter, and not "all",
// which means every port.
func (f *fileReader) portName(n *yaml.Node, name, what string) bool {
	switch {
	case name == "all":
		f.fail(at(n), "", "%s: no port can be called all, which means every port", what)
	case name != "" && strings.Trim(name, "0123456789") == "":
		f.fail(at(n), "a number is written without quotes, a name has a letter", "%s: %q is not the name of a port", what, shorten(name))
	case !isLabel(name) || strings.Trim(name, "0123456789-") == "":
		f.fail(at(n), "", "%s: %q is not a lower-case DNS label with a letter", what, shorten(name))
	default:
		return true
	}
	return false
}

// checkPattern checks the id of a selector. The trust domain of "/…" is not known
// here; any will do.
func checkPattern(s string) error {
	full := s
	if strings.HasPrefix(s, "/") {
		full = "spiffe://td" + s
	}
	p, err := identity.ParsePattern(full)
	if err != nil {
		if inner := errors.Unwrap(err); inner != nil {
			err = inner
		}
		return err
	}
	if id, ok := p.Exact(); ok && id.Path() == "" {
		return errors.New("names a trust domain, not an identity")
	}
	return nil
}

// Bounds of maxStale.after.
const (
	minStale = 10 * time.Second
	topStale = 30 * 24 * time.Hour
)

func (f *fileReader) maxStale(n *yaml.Node) MaxStale {
	o, ok := f.object(n, "spec.maxStale", maxStaleShape.known)
	if !ok {
		return MaxStale{}
	}
	text, an, ok1 := o.text("after")
	then, tn, ok2 := o.text("then")
	if !ok1 || !ok2 {
		return MaxStale{}
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < minStale || d > topStale {
		f.fail(at(an), "write a time as in 90s, 30m or 2h", "spec.maxStale.after: %q is not a time between %v and %v", shorten(text), minStale, topStale)
	}
	if then != "hold" && then != "refuse" {
		f.fail(at(tn), didYouMean(then, []string{"hold", "refuse"}), "spec.maxStale.then: %q; want hold or refuse", shorten(then))
	}
	return MaxStale{After: d, Refuse: then == "refuse"}
}

// String gives the form that is written.
func (m MaxStale) String() string {
	switch {
	case m.After == 0:
		return "none"
	case m.Refuse:
		return fmt.Sprintf("after %v refuse", m.After)
	}
	return fmt.Sprintf("after %v hold", m.After)
}
