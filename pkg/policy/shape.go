package policy

import "slices"

// shape is the form of one value in the files. There is one table of them, and it
// has three readers: the parser takes from it which fields a mapping has, [Format]
// in which order they stand, and [JSONSchema] all of it. A shape says what one
// value can be by itself; names that must exist, and rules that contradict each
// other, are the parser's alone.
type shape struct {
	name    string   // among the definitions of the JSON Schema; "": written out where it stands
	doc     string   // for whoever writes the value
	types   []string // of JSON; "" among forms
	pattern string   // of text, in what Go and ECMAScript have in common
	enum    []string // of text
	low     int      // of a number; of what a list or mapping has
	high    int      // the same; 0: no limit. Of text: characters
	example string   // YAML in flow style

	fields   []member
	one      bool     // exactly one of fields is there
	some     []string // at least one of these fields is there
	apart    []string // these fields exclude each other
	keys     *shape   // of a mapping with free keys
	each     *shape   // every element of a list, and of a mapping with free keys
	forms    []*shape // any one of them
	variants []variant
	open     bool // is written on several lines even when it is short
	few      int  // so many fields may stand on one line; 0: any number

	known schema // of fields: what the parser asks
}

// member is one field of a mapping.
type member struct {
	name     string
	required bool
	later    string // not "": a field of a later version, which is refused with this hint
	shape    *shape
}

// variant is the form of a mapping whose field kind has this value.
type variant struct {
	kind  string
	shape *shape
}

// must is a field that is there in every mapping of its shape.
func must(name string, s *shape) member { return member{name: name, required: true, shape: s} }

// may is a field that can be left out.
func may(name string, s *shape) member { return member{name: name, shape: s} }

// later is a field of a later version.
func later(name, hint string) member { return member{name: name, later: hint} }

func mapping(name, doc string, fields ...member) *shape {
	s := &shape{name: name, doc: doc, types: []string{"object"}, fields: fields, known: schema{}}
	for _, f := range fields {
		s.known[f.name] = f.later
	}
	return s
}

// free is a mapping with any keys.
func free(doc string, keys, each *shape) *shape {
	return &shape{doc: doc, types: []string{"object"}, keys: keys, each: each}
}

func listOf(doc string, each *shape) *shape {
	return &shape{doc: doc, types: []string{"array"}, each: each}
}

func textual(doc, pattern, example string) *shape {
	return &shape{doc: doc, types: []string{"string"}, pattern: pattern, example: example}
}

func oneOf(doc string, values ...string) *shape {
	return &shape{doc: doc, types: []string{"string"}, enum: values, example: values[0]}
}

func truthValue(doc string) *shape {
	return &shape{doc: doc, types: []string{"boolean"}, example: "true"}
}

// with gives a copy of s that says more about its place.
func (s *shape) with(doc string) *shape {
	out := *s
	out.doc, out.name = doc, ""
	return &out
}

// between gives a copy of s with bounds; a high of 0 is none.
func (s *shape) between(low, high int) *shape {
	out := *s
	out.low, out.high = low, high
	return &out
}

// names gives the fields of this version, as they are listed.
func (s *shape) names() []string {
	var out []string
	for _, f := range s.fields {
		if f.later == known {
			out = append(out, f.name)
		}
	}
	return out
}

// field gives the shape of a field of this version.
func (s *shape) field(name string) (*shape, bool) {
	i := slices.IndexFunc(s.fields, func(f member) bool { return f.name == name && f.later == known })
	if i < 0 {
		return nil, false
	}
	return s.fields[i].shape, true
}

// of gives the variant of a kind.
func (s *shape) of(kind string) (*shape, bool) {
	for _, v := range s.variants {
		if v.kind == kind {
			return v.shape, true
		}
	}
	return nil, false
}
