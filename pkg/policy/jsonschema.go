package policy

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
)

// JSONSchema gives a JSON Schema (draft 2020-12) of one document of the files, for
// editors: it completes and describes fields, and refuses what has the wrong shape.
// It refuses nothing that [Parse] accepts. What depends on other documents, only
// [Compile] can tell.
func JSONSchema() []byte { return writeSchema(kinds) }

func writeSchema(kinds []string) []byte {
	d := definitions{}
	top := d.write(documentShape(kinds))
	top["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	top["title"] = "Sallyport policy, " + APIVersion
	top["$defs"] = d
	out, err := json.MarshalIndent(top, "", "  ")
	if err != nil {
		panic(fmt.Sprintf("maps, lists and text do not marshal: %v", err))
	}
	return append(out, '\n')
}

// definitions are the shapes that have a name. // :: name → schema
type definitions map[string]any

// of gives the schema of s, by reference where it has a name.
func (d definitions) of(s *shape) map[string]any {
	if s.name == "" {
		return d.write(s)
	}
	if _, there := d[s.name]; !there {
		d[s.name] = d.write(s)
	}
	return map[string]any{"$ref": "#/$defs/" + s.name}
}

func (d definitions) write(s *shape) map[string]any {
	out := map[string]any{}
	if s.doc != "" {
		out["description"] = s.doc
	}
	switch len(s.types) {
	case 0:
	case 1:
		out["type"] = s.types[0]
	default:
		out["type"] = s.types
	}
	d.scalar(s, out)
	d.bounds(s, out)
	switch {
	case len(s.forms) > 0:
		var all []any
		for _, f := range s.forms {
			all = append(all, d.of(f))
		}
		out["anyOf"] = all
	case len(s.variants) > 0:
		d.variants(s, out)
	case s.fields != nil:
		d.fields(s, out)
	case s.each != nil && s.types[0] == "array":
		out["items"] = d.of(s.each)
	case s.each != nil:
		out["propertyNames"], out["additionalProperties"] = d.of(s.keys), d.of(s.each)
	}
	return out
}

func (d definitions) scalar(s *shape, out map[string]any) {
	if s.pattern != "" {
		out["pattern"] = s.pattern
	}
	switch {
	case len(s.enum) == 1 && s.types[0] == "boolean":
		out["const"] = s.enum[0] == "true"
	case len(s.enum) == 1:
		out["const"] = s.enum[0]
	case len(s.enum) > 1:
		out["enum"] = s.enum
	case slices.Equal(s.types, []string{"string"}) && s.example != "" && s.example[0] != '"':
		out["examples"] = []string{s.example}
	}
}

func (d definitions) bounds(s *shape, out map[string]any) {
	if len(s.types) == 0 {
		return
	}
	low, high := "minItems", "maxItems"
	switch s.types[0] {
	case "string":
		low, high = "minLength", "maxLength"
	case "integer":
		low, high = "minimum", "maximum"
	case "object":
		low, high = "minProperties", "maxProperties"
	}
	if s.low > 0 {
		out[low] = s.low
	}
	if s.high > 0 {
		out[high] = s.high
	}
}

func (d definitions) fields(s *shape, out map[string]any) {
	properties, required := map[string]any{}, []string{}
	for _, f := range s.fields {
		if f.later != known {
			continue
		}
		properties[f.name] = d.of(f.shape)
		if f.required {
			required = append(required, f.name)
		}
	}
	out["properties"], out["additionalProperties"] = properties, false
	if len(required) > 0 {
		out["required"] = required
	}
	if s.one {
		out["minProperties"], out["maxProperties"] = 1, 1
	}
	if len(s.some) > 0 {
		var ways []any
		for _, name := range s.some {
			ways = append(ways, map[string]any{"required": []string{name}})
		}
		out["anyOf"] = ways
	}
	if len(s.apart) > 0 {
		out["not"] = map[string]any{"required": s.apart}
	}
}

// variants writes what depends on kind behind conditions: an editor that knows the
// kind then completes and complains about that one only. What all variants have
// stands before, for the time until kind is written.
func (d definitions) variants(s *shape, out map[string]any) {
	var names []string
	var all []any
	every := map[string][]member{} // :: field → in each variant that has it
	for _, v := range s.variants {
		names = append(names, v.kind)
		then := d.of(v.shape)
		if v.shape.name == "" {
			then["title"] = v.kind
		}
		is := map[string]any{"properties": map[string]any{"kind": map[string]any{"const": v.kind}}, "required": []string{"kind"}}
		all = append(all, map[string]any{"if": is, "then": then})
		for _, f := range v.shape.fields {
			every[f.name] = append(every[f.name], f)
		}
	}
	properties, required := map[string]any{}, []string{}
	for _, name := range slices.Sorted(maps.Keys(every)) {
		in := every[name]
		switch {
		case name == "kind":
			properties[name] = map[string]any{"enum": names, "description": "what the rest is about"}
		case len(in) < len(s.variants):
			continue
		case slices.ContainsFunc(in, func(f member) bool { return !reflect.DeepEqual(f.shape, in[0].shape) }):
			properties[name] = map[string]any{"description": "depends on kind"}
		default:
			properties[name] = d.of(in[0].shape)
		}
		if !slices.ContainsFunc(in, func(f member) bool { return !f.required }) {
			required = append(required, name)
		}
	}
	out["properties"], out["required"], out["allOf"] = properties, required, all
}
