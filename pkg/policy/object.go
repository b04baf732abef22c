package policy

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"
)

// schema lists the fields of a mapping: known for those of this version; those of
// a later one are refused by name, and have the hint that goes with that. A hint
// never advises to remove what limits an allow.
type schema map[string]string

const known = ""

// object is a mapping whose keys are known, text and unique.
type object struct {
	f      *fileReader
	node   *yaml.Node
	what   string // for messages: "spec.allow[0]"
	fields map[string]*yaml.Node
	meant  map[string]bool // fields that an unknown one probably stands for
}

// object reads n as a mapping with the fields of s.
func (f *fileReader) object(n *yaml.Node, what string, s schema) (object, bool) {
	o := object{f: f, node: n, what: what, fields: map[string]*yaml.Node{}, meant: map[string]bool{}}
	if n.Kind != yaml.MappingNode {
		f.wrongType(n, what, "a mapping")
		return o, false
	}
	first := map[string]int{} // :: key → line
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		name := key.Value
		later, listed := s[name]
		switch {
		case key.Kind != yaml.ScalarNode || key.Tag != "!!str":
			f.fail(at(key), "", "%s has a key that is not text", orTop(what))
		case first[name] != 0:
			f.fail(at(key), fmt.Sprintf("first written on line %d", first[name]), "duplicate key %q", name)
		case !listed:
			f.fail(at(key), o.suggest(name, s), "unknown field %q%s", shorten(name), in(what))
		case later != known:
			f.fail(at(key), later, "field %q%s is not supported by this version", name, in(what))
		default:
			o.fields[name] = value
		}
		if first[name] == 0 {
			first[name] = key.Line
		}
	}
	return o, true
}

// suggest gives a hint on an unknown field.
func (o object) suggest(name string, s schema) string {
	if o.f.errs.full() {
		return ""
	}
	fields := slices.DeleteFunc(slices.Sorted(maps.Keys(s)), func(k string) bool { return s[k] != known })
	if meant := closest(name, fields); meant != "" {
		o.meant[meant] = true
		return didYouMean(name, fields)
	}
	return "known fields: " + strings.Join(fields, ", ")
}

// need gives a field that must be there.
func (o object) need(name string) (*yaml.Node, bool) {
	n, ok := o.fields[name]
	if !ok && !o.meant[name] {
		o.f.fail(at(o.node), "", "%s is missing", o.path(name))
	}
	return n, ok
}

// path names a field for messages.
func (o object) path(name string) string {
	if o.what == "" {
		return name
	}
	return o.what + "." + name
}

// text reads a field that must be there and be text.
func (o object) text(name string) (string, *yaml.Node, bool) {
	n, ok := o.need(name)
	if !ok {
		return "", nil, false
	}
	s, ok := o.f.text(n, o.path(name))
	return s, n, ok
}

// list reads a field that must be there and be a list that is not empty.
func (o object) list(name string) ([]*yaml.Node, bool) {
	n, ok := o.need(name)
	if !ok {
		return nil, false
	}
	items, ok := o.f.list(n, o.path(name))
	if ok && len(items) == 0 {
		o.f.fail(at(n), "", "%s is empty", o.path(name))
		return nil, false
	}
	return items, ok
}

// list reads n as a list.
func (f *fileReader) list(n *yaml.Node, what string) ([]*yaml.Node, bool) {
	if n.Kind != yaml.SequenceNode {
		f.wrongType(n, what, "a list")
		return nil, false
	}
	return n.Content, true
}

// text reads n as text. A number or a truth value is not taken for text: the
// writer decides which one is meant.
func (f *fileReader) text(n *yaml.Node, what string) (string, bool) {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
		f.wrongType(n, what, "text")
		return "", false
	}
	return n.Value, true
}

// portNumber reads n as a plain decimal number from 1 to 65535.
func (f *fileReader) portNumber(n *yaml.Node, what string) (uint16, bool) {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!int" {
		f.wrongType(n, what, "a port number")
		return 0, false
	}
	digits := strings.TrimPrefix(n.Value, "-")
	v, err := strconv.ParseUint(n.Value, 10, 64)
	switch {
	case strings.Trim(digits, "0123456789") != "" || len(digits) > 1 && digits[0] == '0':
		f.fail(at(n), "", "%s: %s is not a plain decimal number", what, shorten(n.Value))
		return 0, false
	case err != nil || v == 0 || v > 65535:
		f.fail(at(n), "", "%s: port %s is not between 1 and 65535", what, shorten(n.Value))
		return 0, false
	}
	return uint16(v), true
}

// wrongType reports that n is not what is wanted.
func (f *fileReader) wrongType(n *yaml.Node, what, want string) {
	got, hint := "", ""
	switch {
	case n.Kind == yaml.MappingNode:
		got = "a mapping"
		if want == "a list" {
			hint = "begin each element with \"- \", or write [ ] around it"
		}
	case n.Kind == yaml.SequenceNode:
		got = "a list"
	case n.Tag == "!!null":
		f.fail(at(n), "write a value or remove the field", "%s is empty; want %s", orTop(what), want)
		return
	case n.Tag == "!!str":
		got = fmt.Sprintf("the text %q", shorten(n.Value))
		if want == "a port number" && strings.Trim(n.Value, "0123456789") == "" {
			hint = "write it without quotes"
		}
	default:
		got = shorten(n.Value) + ", a " + scalarType(n.Tag)
		if want == "text" {
			hint = fmt.Sprintf("write it in quotes: %q", shorten(n.Value))
		}
	}
	f.fail(at(n), hint, "%s is %s; want %s", orTop(what), got, want)
}

func scalarType(tag string) string {
	switch tag {
	case "!!int", "!!float":
		return "number"
	case "!!bool":
		return "truth value"
	case "!!timestamp":
		return "date"
	}
	return "value of type " + tag
}

// in gives " in WHAT", or "" at the top of a document.
func in(what string) string {
	if what == "" {
		return ""
	}
	return " in " + what
}

func orTop(what string) string {
	if what == "" {
		return "the document"
	}
	return what
}

// shorten bounds what a message repeats of a file.
func shorten(s string) string {
	const limit = 100
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}

// places gives where the elements of a list are written.
func places(n *yaml.Node) []pos {
	if n.Kind != yaml.SequenceNode {
		return nil
	}
	out := make([]pos, len(n.Content))
	for i, item := range n.Content {
		out[i] = at(item)
	}
	return out
}
