package main

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// documents are the verbs whose output is a document in any case.
var documents = map[string]string{
	"policy schema": "a JSON Schema",
	"policy fmt":    "policy files",
	"completion":    "a script",
	"up":            "what the programs of a mesh print",
}

// example is how the test calls a verb.
type example struct{ verb, args string }

// TestEveryVerbHasJSON walks the table of commands. Each verb that is no document is
// called, in the order below, and prints one object with the fields that docs/json.md
// lists.
func TestEveryVerbHasJSON(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{})
	dir := t.TempDir()
	files := map[string]string{
		"policy/a.yaml":      "apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: a}\nspec: {attest: [{kind: join-token}, {kind: unix, via: [/agent], uid: 7}]}\n",
		"policy/shop/b.yaml": "apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: b}\nspec: {attest: [{kind: join-token}], ports: [{name: http, port: 80, protocol: http}]}\n",
		"policy/scope.yaml":  "apiVersion: sallyport.dev/v1\nkind: Scope\nmetadata: {name: shop}\nspec: {ids: [/b], evidence: [{kind: join-token}]}\n",
		"evidence.yaml":      "uid: 7\n",
		"flows":              "",
	}
	for name, content := range files {
		require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	t.Chdir(dir)
	call := func(verb, args string) string {
		var out, errs bytes.Buffer
		words := append(strings.Fields(verb), strings.Fields(args)...)
		code := run(t.Context(), append(words, "--socket", m.Socket, "--output", "json"), &out, &errs)
		if s := out.String(); code != 0 && strings.HasPrefix(s, `{"errors"`) || strings.Contains(errs.String(), "sallyport:") {
			t.Errorf("%s: code %d\n%s%s", verb, code, s, errs.String())
		}
		return out.String()
	}
	call("apply", "policy")
	m.Agent("b")
	var ids struct{ Identities []struct{ Instance string } }
	require.NoError(t, json.Unmarshal([]byte(call("identity list", "")), &ids))
	require.NotEmpty(t, ids.Identities)
	status, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
	require.NoError(t, err)
	history, err := m.Admin.History(t.Context(), &sallyportv1.HistoryRequest{})
	require.NoError(t, err)
	examples := []example{
		{"policy check", "policy"}, {"policy test", "policy"}, {"policy prove", "policy"}, {"policy diff", "policy policy"},
		{"policy impact", "policy --flows flows"}, {"policy suggest", "policy --flows flows"},
		{"apply", "policy"}, {"history", ""}, {"status", ""}, {"flows", ""}, {"audit", ""},
		{"explain", "--from a --to b"}, {"token create", "--workload a"}, {"bundle show", ""},
		{"identity list", ""}, {"identity explain", "--kind unix --evidence evidence.yaml"},
		{"identity revoke", "a --wait 0"}, {"identity unrevoke", "a --wait 0"}, {"identity ban", ids.Identities[0].Instance + " --wait 0"},
		{"set remove", "shop"}, {"rollback", history.GetRevisions()[0].GetRevision()},
		{"ca csr", "--key key.pem --trust-domain shop.example"}, {"ca taint", status.GetAuthorities()[0].GetKeyHash()},
		{"version", ""},
	}
	documented := fieldsInDocs(t)
	called := map[string]bool{}
	for _, e := range examples {
		called[e.verb] = true
		fields := jsonFields(t, e.verb, call(e.verb, e.args))
		if e.verb == "flows" {
			continue // TestFlows…: none was recorded here
		}
		if !slices.Equal(fields, documented[e.verb]) {
			t.Errorf("| `%s` | `%s` |\ndocs/json.md says %q", e.verb, strings.Join(fields, "`, `"), documented[e.verb])
		}
	}
	everyVerb(func(path []string, cmd *cobra.Command) {
		verb := strings.Join(path, " ")
		if !cmd.HasSubCommands() && cmd.Name() != "help" && !called[verb] && documents[verb] == "" {
			t.Errorf("nobody calls %q here: add it, and its fields to docs/json.md", verb)
		}
	})
	for verb := range documented {
		if !called[verb] {
			t.Errorf("docs/json.md lists %q, which is no verb", verb)
		}
	}
}

// jsonFields gives the fields of the one object, or of the first of several lines.
func jsonFields(t *testing.T, verb, out string) []string {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(out))
	var object map[string]json.RawMessage
	if err := d.Decode(&object); err != nil && !(verb == "flows" && err == io.EOF) {
		t.Errorf("%s: %v\n%s", verb, err, out)
	}
	if _, err := d.Token(); err != io.EOF && verb != "flows" {
		t.Errorf("%s: more than one object:\n%s", verb, out)
	}
	return slices.Sorted(maps.Keys(object))
}

// fieldsInDocs reads the first table of docs/json.md.
func fieldsInDocs(t *testing.T) map[string][]string {
	t.Helper()
	doc, err := os.ReadFile(docsJSON)
	require.NoError(t, err)
	_, table, _ := strings.Cut(string(doc), "|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	out := map[string][]string{}
	for row := range strings.Lines(table) {
		words := regexp.MustCompile("`([a-z0-9_ ]+)`").FindAllStringSubmatch(row, -1)
		fields := []string{}
		for _, w := range words[1:] {
			fields = append(fields, w[1])
		}
		slices.Sort(fields)
		out[words[0][1]] = fields
	}
	return out
}

var docsJSON = must(filepath.Abs("../../docs/json.md"))

func must(path string, err error) string {
	if err != nil {
		panic(err)
	}
	return path
}

// TestErrorsAsJSON: whatever is wrong, one object says so, on standard output.
func TestErrorsAsJSON(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{})
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a.yaml"), []byte("apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {nam: a}\nspec: {}\n"), 0o600))
	mistake := `{"errors":[{"file":"a.yaml","line":3,"col":12,"message":"unknown field \"nam\" in metadata","hint":"did you mean \"name\"?"}]}`
	for _, c := range []struct{ args, want string }{
		{"policy check " + dir, mistake},
		{"apply " + dir, mistake}, // as the control plane tells it
		{"policy fmt " + dir, `"line":3,"col":12`},
		{"policy check /nowhere", `{"errors":[{"file":"","line":0,"col":0,"message":"reading policy folder: `},
		{"rollback 9.9", `{"errors":[{"file":"","line":0,"col":0,"message":"`},
		{"frobnicate", `unknown command`},
		{"status --colour", `unknown flag: --colour`},
		{"set", "usage: sallyport set VERB"},
	} {
		for _, form := range []string{"--output json", "--output=json"} {
			var out, errs bytes.Buffer
			code := run(t.Context(), append(strings.Fields("--socket "+m.Socket+" "+c.args), strings.Fields(form)...), &out, &errs)
			var object struct{ Errors []jsonError }
			if err := json.Unmarshal(out.Bytes(), &object); code != 1 || err != nil || len(object.Errors) == 0 || errs.Len() > 0 || !strings.Contains(out.String(), c.want) {
				t.Errorf("%s: code %d, %v\n%s%s\nwant %s", c.args, code, err, &out, &errs, c.want)
			}
		}
	}
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"version", "--output", "yaml"}, &out, &errs); code != 1 || !strings.Contains(errs.String(), "want text or json") || out.Len() > 0 {
		t.Errorf("--output yaml: %d, %s%s", code, &out, &errs)
	}
}

// TestReadErrors: what a control plane tells as text is the same mistakes.
func TestReadErrors(t *testing.T) {
	want := policy.Errors{
		{File: "a.yaml", Line: 3, Col: 1, Msg: "one: 1", Hint: "do it", Snippet: "b.yaml:1:1: x\n^"},
		{File: "shop/b.yaml", Line: 10, Col: 12, Msg: "two"},
		{Msg: "and 3 more mistakes"},
	}
	if got := readErrors(want.Error()); !slices.Equal(got, jsonErrors(want)) {
		t.Errorf("got %+v", got)
	}
	if got := readErrors("no: such\n  thing"); len(got) != 1 || got[0].Message != "no: such\n  thing" {
		t.Errorf("got %+v", got)
	}
}
