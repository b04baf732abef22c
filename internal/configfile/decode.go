package configfile

import (
	"encoding"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
)

// Decode reads the file into the struct that into points to, as the function
// [Decode] does, and records what is wrong; see [File.Err]. Fields are structs,
// maps by string, slices, strings, numbers, booleans, durations and
// implementations of [encoding.TextUnmarshaler] or [yaml.Unmarshaler], whose
// errors are shown as they are.
func (f *File) Decode(into any) {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		panic(fmt.Sprintf("configfile: decoding into %T, want a pointer to a struct", into))
	}
	if f.root != nil {
		f.value(f.root, "", v.Elem())
	}
}

// value sets v to what n says. key is where n stands.
func (f *File) value(n *yaml.Node, key string, v reflect.Value) {
	switch u := v.Addr().Interface().(type) {
	case *time.Duration:
		d, err := time.ParseDuration(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil {
			f.wrong(n, key, v.Type())
			return
		}
		*u = d
		return
	case yaml.Unmarshaler:
		if err := u.UnmarshalYAML(n); err != nil {
			f.refuse(n, key, err.Error())
		}
		return
	case encoding.TextUnmarshaler:
		f.text(n, key, u, v)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		f.fields(n, key, v)
	case reflect.Map:
		f.entries(n, key, v)
	case reflect.Slice:
		f.elements(n, key, v)
	case reflect.String:
		if n.Kind != yaml.ScalarNode {
			f.wrong(n, key, v.Type())
			return
		}
		v.SetString(n.Value)
	default:
		scratch := reflect.New(v.Type()) // so that a failure leaves the default
		if n.Kind != yaml.ScalarNode || n.Decode(scratch.Interface()) != nil {
			f.wrong(n, key, v.Type())
			return
		}
		v.Set(scratch.Elem())
	}
}

// text sets a value that reads text itself.
func (f *File) text(n *yaml.Node, key string, u encoding.TextUnmarshaler, v reflect.Value) {
	if n.Kind != yaml.ScalarNode {
		f.wrong(n, key, v.Type())
		return
	}
	before := reflect.New(v.Type()).Elem()
	before.Set(v)
	// Types of the standard library take "" for their zero value.
	if err := u.UnmarshalText([]byte(n.Value)); err != nil || n.Value == "" && known[v.Type()] != "" {
		v.Set(before)
		if known[v.Type()] != "" {
			f.wrong(n, key, v.Type())
		} else {
			f.refuse(n, key, err.Error())
		}
	}
}

// fields reads a mapping into a struct.
func (f *File) fields(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind != yaml.MappingNode {
		f.wrong(n, key, v.Type())
		return
	}
	fields, names := fieldsOf(v.Type())
	written := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		written[n.Content[i].Value] = true
	}
	var absent []string // what is there already cannot have been meant
	for _, name := range names {
		if !written[name] {
			absent = append(absent, name)
		}
	}
	f.pairs(n, key, func(name, value *yaml.Node) {
		i, ok := fields[name.Value]
		if !ok {
			f.unknown(name, key, absent, names)
			return
		}
		if !isNull(value) { // nothing: as if the key were not there
			f.value(value, join(key, name.Value), v.Field(i))
		}
	})
}

// unknown reports a key that does not exist.
func (f *File) unknown(name *yaml.Node, key string, absent, names []string) {
	hint := "keys here are " + strings.Join(names, ", ")
	if c := closest(name.Value, absent); c != "" {
		hint = fmt.Sprintf("did you mean %q?", c)
		f.meant[join(key, c)] = true
	}
	in := ""
	if key != "" {
		in = " in " + key
	}
	f.fail(name.Line, name.Column, hint, "unknown key %s%s", quote(name.Value), in)
}

// entries reads a mapping whose keys are free.
func (f *File) entries(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind != yaml.MappingNode {
		f.wrong(n, key, v.Type())
		return
	}
	out := reflect.MakeMap(v.Type())
	f.pairs(n, key, func(name, value *yaml.Node) {
		elem := reflect.New(v.Type().Elem()).Elem()
		f.element(value, join(key, name.Value), elem)
		out.SetMapIndex(reflect.ValueOf(name.Value).Convert(v.Type().Key()), elem)
	})
	v.Set(out)
}

// elements reads a list.
func (f *File) elements(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind != yaml.SequenceNode {
		f.wrong(n, key, v.Type())
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, c := range n.Content {
		f.element(c, fmt.Sprintf("%s[%d]", key, i), out.Index(i))
	}
	v.Set(out)
}

// element is value for what may not be left empty.
func (f *File) element(n *yaml.Node, key string, v reflect.Value) {
	if isNull(n) {
		f.wrong(n, key, v.Type())
		return
	}
	f.value(n, key, v)
}

// pairs calls each for every key of a mapping that is a single value and not
// there twice.
func (f *File) pairs(n *yaml.Node, key string, each func(name, value *yaml.Node)) {
	lines := map[string]int{} // :: key → line of its first use
	for i := 0; i+1 < len(n.Content); i += 2 {
		name, value := n.Content[i], n.Content[i+1]
		if name.Kind != yaml.ScalarNode {
			f.fail(name.Line, name.Column, "", "want a key, not %s", kindOf(name))
			continue
		}
		if line, ok := lines[name.Value]; ok {
			f.fail(name.Line, name.Column, "remove one of them", "key %s is on line %d already", quote(join(key, name.Value)), line)
			continue
		}
		lines[name.Value] = name.Line
		each(name, value)
	}
}

// wrong reports that n is not what its key takes.
func (f *File) wrong(n *yaml.Node, key string, t reflect.Type) {
	f.refuse(n, key, fmt.Sprintf("want %s, not %s", wanted(t), kindOf(n)))
}

func (f *File) refuse(n *yaml.Node, key, why string) {
	f.broken[n] = true
	if key != "" {
		why = key + ": " + why
	}
	f.fail(n.Line, n.Column, "", "%s", why)
}

// known words the types whose own errors speak of Go.
var known = map[reflect.Type]string{
	reflect.TypeFor[time.Duration]():  "a duration such as 30s or 1h",
	reflect.TypeFor[netip.Addr]():     "an IP address such as 10.0.0.1",
	reflect.TypeFor[netip.AddrPort](): "an IP address with a port such as 127.0.0.1:8080",
	reflect.TypeFor[netip.Prefix]():   "an address range such as 10.0.0.0/8",
}

// wanted words a type for the reader of a file.
func wanted(t reflect.Type) string {
	if words := known[t]; words != "" {
		return words
	}
	if reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
		return "a single value"
	}
	switch k := t.Kind(); k {
	case reflect.Struct, reflect.Map:
		return "keys with values"
	case reflect.Slice:
		return "a list such as [a, b]"
	case reflect.String:
		return "a single value"
	case reflect.Bool:
		return "true or false"
	case reflect.Float32, reflect.Float64:
		return "a number"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return fmt.Sprintf("a whole number from 0 to %d", ^uint64(0)>>(64-t.Bits()))
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return "a whole number"
	default:
		panic("configfile: cannot read a " + k.String())
	}
}

// kindOf words what was written.
func kindOf(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "keys with values"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case isNull(n):
		return "nothing"
	}
	return quote(n.Value)
}

// fieldsOf gives the fields of a struct by the key that each is written with,
// and the keys in order.
func fieldsOf(t reflect.Type) (fields map[string]int, names []string) {
	fields = make(map[string]int, t.NumField())
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		if !t.Field(i).IsExported() || name == "-" {
			continue
		}
		if name == "" {
			name = strings.ToLower(t.Field(i).Name)
		}
		fields[name] = i
		names = append(names, name)
	}
	return fields, names
}

func join(key, name string) string {
	if key == "" {
		return name
	}
	return key + "." + name
}
