package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v4"
)

func compileSchema(t testing.TB, text []byte) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	require.NoError(t, err)
	c := jsonschema.NewCompiler()
	require.NoError(t, c.AddResource("policy.json", doc))
	s, err := c.Compile("policy.json")
	require.NoError(t, err)
	return s
}

// asJSON gives the value that an editor hands to its validator: YAML 1.2 has no
// dates.
func asJSON(n *yaml.Node) any {
	switch n.Kind {
	case yaml.MappingNode:
		out := map[string]any{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			out[n.Content[i].Value] = asJSON(n.Content[i+1])
		}
		return out
	case yaml.SequenceNode:
		out := []any{}
		for _, c := range n.Content {
			out = append(out, asJSON(c))
		}
		return out
	}
	switch n.Tag {
	case "!!null":
		return nil
	case "!!bool":
		return strings.EqualFold(n.Value, "true")
	case "!!int", "!!float":
		if f, err := strconv.ParseFloat(n.Value, 64); err == nil && f == f && f < 1e300 && f > -1e300 {
			return json.Number(strconv.FormatFloat(f, 'f', -1, 64))
		}
	}
	return n.Value
}

// someDoc is one document of a file, and the mistakes that the parser found in it.
type someDoc struct {
	value    any
	mistakes []string
}

// documentsOf gives what the schema is asked about; nil where YAML is at fault.
func documentsOf(set, file string, src []byte) (docs []someDoc) {
	var starts []int
	var nodes []*yaml.Node
	loader, err := yaml.NewLoader(bytes.NewReader(src))
	if err != nil {
		return nil
	}
	for {
		var n yaml.Node
		err := loader.Load(&n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil
		}
		if !isEmpty(&n) {
			nodes, starts = append(nodes, n.Content[0]), append(starts, n.Content[0].Line)
		}
	}
	docs = make([]someDoc, len(nodes))
	for i, n := range nodes {
		docs[i].value = asJSON(n)
	}
	_, err = ParseFiles(set, map[string][]byte{file: src})
	var all Errors
	if errors.As(err, &all) {
		for _, e := range all {
			i := len(starts) - 1
			for i > 0 && starts[i] > e.Line {
				i--
			}
			if e.Line == 0 {
				return nil
			}
			docs[i].mistakes = append(docs[i].mistakes, e.Msg)
		}
	}
	return docs
}

// shapeMistake is what the schema must refuse as well, save where it depends on
// another field. A date is text there.
var shapeMistake = regexp.MustCompile(`unknown field|unknown kind|is not supported by this version|is missing|; want (a mapping|a list|text|a port|true or false|a time)`)

var dependent = regexp.MustCompile(`, a date; want text|^evidence of kind kubernetes: |endpointID is missing|^spec.bundle is missing: `)

func isShapeMistake(msg string) bool {
	return shapeMistake.MatchString(msg) && !dependent.MatchString(msg)
}

// TestSchemaAgreesWithStories: what parses validates, and what has the wrong shape
// does not.
func TestSchemaAgreesWithStories(t *testing.T) {
	schema := compileSchema(t, JSONSchema())
	paths, err := filepath.Glob("testdata/stories/*.txtar")
	require.NoError(t, err)
	good, bad := 0, 0
	for _, p := range paths {
		ar, err := txtar.ParseFile(p)
		require.NoError(t, err)
		for _, f := range ar.Files {
			name := strings.TrimPrefix(f.Name, "before/")
			if !strings.HasSuffix(name, ".yaml") || strings.Contains(string(ar.Comment), "chop "+f.Name) {
				continue
			}
			set := path.Dir(name)
			if set == "." || !isLabel(set) {
				set = ""
			}
			for i, d := range documentsOf(set, path.Base(name), f.Data) {
				err := schema.Validate(d.value)
				switch {
				case len(d.mistakes) == 0:
					if good++; err != nil {
						t.Errorf("%s: %s, document %d parses; the schema says: %v", p, f.Name, i, err)
					}
				case slices.ContainsFunc(d.mistakes, isShapeMistake):
					if bad++; err == nil {
						t.Errorf("%s: %s, document %d validates, but: %q", p, f.Name, i, d.mistakes)
					}
				}
			}
		}
	}
	if good < 200 || bad < 30 {
		t.Errorf("%d good documents, %d bad ones: the stories are not read", good, bad)
	}
	for _, word := range []string{"payments", "5", "[]", "[x]"} {
		var n yaml.Node
		require.NoError(t, yaml.Unmarshal([]byte(word), &n))
		if schema.Validate(asJSON(n.Content[0])) == nil {
			t.Errorf("the document %s validates", word)
		}
	}
}

// TestSchemaHoldsTheParser asks the parser, mapping by mapping, which fields it
// knows, and value by value, what it takes: the schema must say the same. It goes
// through every kind that the parser knows.
func TestSchemaHoldsTheParser(t *testing.T) {
	held := 0
	for _, kind := range kinds {
		top := documentShape([]string{kind})
		if len(top.variants) != 1 {
			t.Errorf("kind %s has no form in resources", kind)
			continue
		}
		p := &prober{t: t, schema: compileSchema(t, JSONSchema()), kind: kind}
		p.walk("", top, func(v string) string { return v + "\n" })
		held += p.mappings
	}
	if held < 50 {
		t.Errorf("%d mappings were looked at", held)
	}
	for _, r := range resources {
		if slices.Contains(kinds, r.kind) {
			continue
		}
		_, err := ParseFiles("", map[string][]byte{"a.yaml": []byte("apiVersion: " + APIVersion + "\nkind: " + r.kind + "\nmetadata: {name: a}\nspec: {}\n")})
		if err == nil || !strings.Contains(err.Error(), "not supported by this version") || bytes.Contains(JSONSchema(), []byte(`"`+r.kind+`"`)) {
			t.Errorf("kind %s is not one of kinds: want the parser to refuse it by name (got %v), and no word of it in the schema", r.kind, err)
		}
		compileSchema(t, writeSchema(append(slices.Clone(kinds), r.kind)))
	}
}

type prober struct {
	t        *testing.T
	schema   *jsonschema.Schema
	kind     string
	mappings int
}

const strangeField = "qqqqqqqqqqqqqqqq"

// walk looks at the value of shape s at a place; wrap writes a document around it.
func (p *prober) walk(at string, s *shape, wrap func(string) string) {
	for i, v := range s.variants {
		if i > 0 || at != "" {
			p.walk(at+"("+v.kind+")", v.shape, wrap)
			continue
		}
		p.walk(at, v.shape, wrap)
	}
	if len(s.variants) > 0 {
		return
	}
	p.values(at, s, wrap)
	if s.fields != nil {
		p.fields(at, s, wrap)
	}
	for _, f := range s.forms {
		if f.fields != nil || f.each != nil {
			p.walk(at, f, wrap)
		}
	}
	switch {
	case s.each != nil && s.types[0] == "array":
		p.walk(at+"[]", s.each, func(v string) string { return wrap("[" + v + "]") })
	case s.each != nil:
		p.walk(at+".*", s.each, func(v string) string { return wrap("{" + sampleOf(s.keys) + ": " + v + "}") })
	}
}

// fields compares the fields of a mapping with those that the parser lists when
// it meets another one.
func (p *prober) fields(at string, s *shape, wrap func(string) string) {
	p.mappings++
	src := wrap(sampleWith(s, strangeField, "1"))
	got := ""
	_, err := ParseFiles("", map[string][]byte{"a.yaml": []byte(src)})
	var all Errors
	errors.As(err, &all)
	for _, e := range all {
		if strings.Contains(e.Msg, strangeField) {
			got = strings.TrimPrefix(e.Hint, "known fields: ")
		}
	}
	want := s.names()
	slices.Sort(want)
	if got != strings.Join(want, ", ") {
		p.t.Errorf("%s%s: the parser knows %q, the schema %q, by\n%s%v", p.kind, at, got, want, src, err)
	}
	p.agree(at, src)
	for _, f := range s.fields {
		if f.later != known {
			p.agree(at+"."+f.name, wrap(sampleWith(s, f.name, "1")))
			continue
		}
		if f.required {
			p.agree(at+" without "+f.name, wrap(sampleWith(s, f.name, "")))
		}
		p.walk(at+"."+f.name, f.shape, func(v string) string {
			if f.name == "endpoints" && s == workloadSpec { // they lead to a declared port
				v += ", ports: [{name: grpc, port: 15008, protocol: grpc}]"
			}
			return wrap(sampleWith(s, f.name, v))
		})
	}
}

// values tries what YAML has; the sample must be right.
func (p *prober) values(at string, s *shape, wrap func(string) string) {
	src := wrap(sampleOf(s))
	if _, err := ParseFiles("", map[string][]byte{"a.yaml": []byte(src)}); err != nil && !slices.Contains([]string{".spec.bundle", ".spec.bundleEndpoint.endpointID"}, at) && !strings.Contains(err.Error(), "evidence of kind kubernetes") {
		p.t.Errorf("%s%s: the sample is refused: %v\n%s", p.kind, at, err, src)
	}
	for _, v := range []string{sampleOf(s), "quiet", `"8"`, "7", "-7", "70000", "1.5", "true", "false", "null", "[]", "{}", "[x]", "{x: y}", "[[x]]", `""`, "all", "2030-01-01T00:00:00Z"} {
		p.agree(at, wrap(v))
	}
}

// agree holds the schema to what the parser says about a document.
func (p *prober) agree(at, src string) {
	docs := documentsOf("", "a.yaml", []byte(src))
	if len(docs) != 1 {
		p.t.Fatalf("%s%s: no document, by\n%s", p.kind, at, src)
	}
	err := p.schema.Validate(docs[0].value)
	if len(docs[0].mistakes) == 0 && err != nil {
		p.t.Errorf("%s%s: this parses; the schema says: %v\n%s", p.kind, at, err, src)
	}
	if err == nil && slices.ContainsFunc(docs[0].mistakes, isShapeMistake) {
		p.t.Errorf("%s%s: this validates, but: %q\n%s", p.kind, at, docs[0].mistakes, src)
	}
}

// sampleOf writes the least that s admits.
func sampleOf(s *shape) string {
	switch {
	case s.example != "":
		return s.example
	case len(s.variants) > 0:
		return sampleOf(s.variants[0].shape)
	case s.fields != nil:
		return sampleWith(s, "", "")
	case s.each != nil && s.types[0] == "array" && s.low > 0:
		return "[" + sampleOf(s.each) + "]"
	case s.each != nil && s.types[0] == "array":
		return "[]"
	case s.each != nil && s.low > 0:
		return "{" + sampleOf(s.keys) + ": " + sampleOf(s.each) + "}"
	}
	return "{}"
}

// sampleWith writes a mapping that has the field with this value, or lacks it where
// the value is "".
func sampleWith(s *shape, name, value string) string {
	var out []string
	some := slices.Contains(s.some, name)
	for i, f := range s.fields {
		need := f.required || s.one && i == 0 && name != f.name && (name == "" || name == strangeField)
		if !some && slices.Contains(s.some, f.name) {
			need, some = true, true
		}
		switch {
		case f.name == name && value != "":
			out = append(out, name+": "+value)
		case f.name != name && need:
			out = append(out, f.name+": "+sampleOf(f.shape))
		}
	}
	if name == strangeField {
		out = append(out, name+": "+value)
	} else if _, there := s.known[name]; there && s.known[name] != known {
		out = append(out, name+": "+value)
	}
	return "{" + strings.Join(out, ", ") + "}"
}

// TestSchemaSaysWhatItIsAbout: each field has a description, each definition one
// shape.
func TestSchemaSaysWhatItIsAbout(t *testing.T) {
	var doc any
	require.NoError(t, json.Unmarshal(JSONSchema(), &doc))
	var look func(at string, v any)
	look = func(at string, v any) {
		switch v := v.(type) {
		case map[string]any:
			if fields, ok := v["properties"].(map[string]any); ok && !strings.HasSuffix(at, ".if") {
				for name, f := range fields {
					f := f.(map[string]any)
					if f["description"] == nil && f["$ref"] == nil {
						t.Errorf("%s.%s has no description", at, name)
					}
				}
			}
			for k, inner := range v {
				look(at+"."+k, inner)
			}
		case []any:
			for i, inner := range v {
				look(fmt.Sprintf("%s[%d]", at, i), inner)
			}
		}
	}
	look("", doc)
	named := map[string]*shape{}
	var walk func(s *shape)
	walk = func(s *shape) {
		if s == nil {
			return
		}
		if first := named[s.name]; s.name != "" && first != nil && first != s {
			t.Errorf("two shapes are called %s", s.name)
		}
		named[s.name] = s
		walk(s.each)
		for _, f := range s.fields {
			walk(f.shape)
		}
		for _, f := range s.forms {
			walk(f)
		}
		for _, v := range s.variants {
			walk(v.shape)
		}
	}
	for _, r := range resources {
		walk(r.metadata)
		walk(r.spec)
	}
}

// FuzzSchema: the schema refuses nothing that parses.
func FuzzSchema(f *testing.F) {
	paths, err := filepath.Glob("testdata/stories/*.txtar")
	require.NoError(f, err)
	for _, p := range paths {
		data, err := os.ReadFile(p)
		require.NoError(f, err)
		for _, file := range txtar.Parse(data).Files {
			if strings.HasSuffix(file.Name, ".yaml") {
				f.Add(file.Data)
			}
		}
	}
	schema := compileSchema(f, JSONSchema())
	f.Fuzz(func(t *testing.T, src []byte) {
		if _, err := ParseFiles("", map[string][]byte{"a.yaml": src}); err != nil {
			return
		}
		for i, d := range documentsOf("", "a.yaml", src) {
			if err := schema.Validate(d.value); err != nil {
				t.Errorf("document %d parses; the schema says: %v", i, err)
			}
		}
	})
}
