package configfile

import (
	"encoding"
	"reflect"

	"go.yaml.in/yaml/v4"
)

// Keys lists the keys that [Decode] knows for a struct, in its order and in the
// form that manuals use: "log.level", "outbound[].to", and "app.NAME" where the
// name is free. Tests compare manuals with it.
func Keys(config any) []string { return keys("", reflect.TypeOf(config)) }

func keys(key string, t reflect.Type) []string {
	p := reflect.PointerTo(t)
	if p.Implements(reflect.TypeFor[yaml.Unmarshaler]()) || p.Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
		return []string{key}
	}
	switch t.Kind() {
	case reflect.Struct:
		var out []string
		fields, names := fieldsOf(t)
		for _, name := range names {
			out = append(out, keys(join(key, name), t.Field(fields[name]).Type)...)
		}
		return out
	case reflect.Map:
		return keys(key+".NAME", t.Elem())
	case reflect.Slice:
		if inner := keys(key+"[]", t.Elem()); inner[0] != key+"[]" {
			return inner
		}
	}
	return []string{key}
}
