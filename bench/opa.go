package bench

import (
	"context"
	"fmt"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
)

const opaHead = `package sallyport

default allow := false

allow if {
	granted
	not refused
}
`

// opaData reads the rules from data: a look-up in nested objects.
var opaData = map[Kind]string{
	Connection: opaHead + `
granted if { some name in input.names; data.rules.allow[name][input.port] }
refused if { some name in input.names; data.rules.deny[name][input.port] }
`,
	HTTP: opaHead + `
granted if { some path in input.paths; data.rules.allow[input.from][input.method][path] }
refused if { some path in input.paths; data.rules.deny[input.from][input.method][path] }
`}

// newOPARules writes each rule as a Rego rule that compares only what the input has
// with constants, so that the rule index of the compiler applies.
func newOPARules(kind Kind, rules []Rule) (Prepare, error) {
	var text strings.Builder
	text.WriteString(opaHead + "\ndefault granted := false\n\ndefault refused := false\n")
	for _, r := range rules {
		head := "granted"
		if r.Deny {
			head = "refused"
		}
		switch {
		case kind == HTTP:
			fmt.Fprintf(&text, "%s if { input.from == %q; input.method == %q; %q in input.paths }\n", head, r.From, r.Method, r.Path)
		case strings.HasSuffix(r.From, "/*"):
			fmt.Fprintf(&text, "%s if { input.group == %q; input.port == \"%d\" }\n", head, r.From, r.Port)
		default:
			fmt.Fprintf(&text, "%s if { input.from == %q; input.port == \"%d\" }\n", head, r.From, r.Port)
		}
	}
	return newOPA(text.String(), nil)
}

// newOPAData keeps the rules as data below one Rego rule for each effect.
func newOPAData(kind Kind, rules []Rule) (Prepare, error) {
	return newOPA(opaData[kind], opaRules(kind, rules))
}

// newOPAPartial is newOPAData, evaluated as far as it can be without the input.
func newOPAPartial(kind Kind, rules []Rule) (Prepare, error) {
	return newOPA(opaData[kind], opaRules(kind, rules), rego.WithPartialEval())
}

func opaRules(kind Kind, rules []Rule) map[string]any {
	data := map[string]any{"allow": map[string]any{}, "deny": map[string]any{}}
	below := func(m map[string]any, key string) map[string]any {
		if m[key] == nil {
			m[key] = map[string]any{}
		}
		return m[key].(map[string]any)
	}
	for _, r := range rules {
		of := below(data, "allow")
		if r.Deny {
			of = below(data, "deny")
		}
		if of = below(of, r.From); kind == Connection {
			of[fmt.Sprint(r.Port)] = true
		} else {
			below(of, r.Method)[r.Path] = true
		}
	}
	return map[string]any{"rules": data}
}

// newOPA prepares a query. The input is parsed before it is asked.
func newOPA(module string, data map[string]any, options ...rego.PrepareOption) (Prepare, error) {
	ctx := context.Background()
	if data == nil {
		data = map[string]any{}
	}
	query, err := rego.New(
		rego.Query("data.sallyport.allow"), rego.Module("sallyport.rego", module),
		rego.Store(inmem.NewFromObjectWithOpts(data, inmem.OptReturnASTValuesOnRead(true))), rego.StoreReadAST(true),
	).PrepareForEval(ctx, options...)
	if err != nil {
		return nil, err
	}
	return func(q Question) func() (bool, error) {
		input := map[string]any{
			"from": q.From, "port": fmt.Sprint(q.Port), "method": q.Method, "path": q.Path,
			"names": q.Names, "paths": q.Paths, "group": q.Names[0],
		}
		value, err := ast.InterfaceToValue(input)
		return func() (bool, error) {
			if err != nil {
				return false, err
			}
			result, err := query.Eval(ctx, rego.EvalParsedInput(value))
			return result.Allowed(), err
		}
	}, nil
}
