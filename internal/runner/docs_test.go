package runner

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v4"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

var (
	yamlBlock = regexp.MustCompile("(?s)```yaml\n(.*?)```")
	hereFile  = regexp.MustCompile(`(?s)cat > (\S+) <<'EOF'\n(.*?\n)EOF\n`)
	docsTD    = spiffeid.RequireTrustDomainFromString("dev.example")
)

func readDoc(t *testing.T, path string) string {
	data, err := os.ReadFile(filepath.Join("..", "..", path))
	require.NoError(t, err)
	return string(data)
}

// checkPolicy holds an example to what `sallyport policy test` asks of a folder.
func checkPolicy(t *testing.T, where, content string) *policy.Ruleset {
	t.Helper()
	sets, err := policy.ParseTree(fstest.MapFS{"example.yaml": {Data: []byte(content)}})
	require.NoError(t, err, where)
	rules, err := policy.Compile(docsTD, sets)
	require.NoError(t, err, where)
	if report := policy.RunTests(rules, sets); report.Failed() {
		t.Errorf("%s: %s", where, report)
	}
	return rules
}

// TestExamplesOfTheDocs takes each policy folder and mesh.yaml of the documents
// as a reader would.
func TestExamplesOfTheDocs(t *testing.T) {
	docs, err := filepath.Glob("../../docs/*.md")
	require.NoError(t, err)
	found := 0
	for _, path := range docs {
		for _, m := range yamlBlock.FindAllStringSubmatch(readDoc(t, filepath.Join("docs", filepath.Base(path))), -1) {
			switch content := m[1]; {
			case strings.Contains(content, "kind: Mesh\n"):
				found++
				_, err := parse(path, []byte(content), 0)
				require.NoError(t, err, path)
			case strings.Contains(content, "kind: Workload\n"):
				found++
				checkPolicy(t, path, content)
			}
		}
	}
	if found < 2 {
		t.Errorf("%d complete examples, want those of policy.md and mesh.md at least", found)
	}
	// README.md shows a file of the shop.
	shown := yamlBlock.FindStringSubmatch(readDoc(t, "README.md"))
	require.NotNil(t, shown)
	if want := readDoc(t, "examples/shop/policy/payments.yaml"); shown[1] != want {
		t.Errorf("README.md shows\n%s\nand the shop has\n%s", shown[1], want)
	}
}

// TestFilesOfTheStart checks the files that docs/start.md has its reader write.
func TestFilesOfTheStart(t *testing.T) {
	files := map[string]string{}
	for _, m := range hereFile.FindAllStringSubmatch(readDoc(t, "docs/start.md"), -1) {
		files[m[1]] = m[2]
	}
	rules := checkPolicy(t, "docs/start.md", files["policy/payments.yaml"])
	checkPolicy(t, "docs/start.md, edited", strings.ReplaceAll(files["policy/payments.yaml"], "allow", "deny"))
	for _, name := range []string{"payments/proxy.yaml", "orders/proxy.yaml"} {
		var c proxyFile
		require.NoError(t, yaml.Load([]byte(files[name]), &c, yaml.WithKnownFields()), name)
		for _, o := range c.Outbound {
			u, err := parseUpstream(docsTD, text{value: o.To})
			require.NoError(t, err)
			if target, ok := rules.Workload(u.ref); !ok || !declares(target, u.port) {
				t.Errorf("%s: nobody serves %s", name, o.To)
			}
		}
	}
}

// TestEveryMeshKeyIsDocumented compares docs/mesh.md with the form of mesh.yaml.
func TestEveryMeshKeyIsDocumented(t *testing.T) {
	doc := readDoc(t, "docs/mesh.md")
	for _, key := range keysOf("", reflect.TypeFor[meshFile]()) {
		if !strings.Contains(doc, "`"+key) {
			t.Errorf("docs/mesh.md does not describe %s", key)
		}
	}
	for name := range (tryData{}).funcs() {
		if !strings.Contains(doc, "`{{"+name) {
			t.Errorf("docs/mesh.md does not describe the placeholder %s", name)
		}
	}
}

// keysOf lists the paths of all values below t.
func keysOf(prefix string, t reflect.Type) []string {
	switch {
	case t == reflect.TypeFor[text]():
		return []string{prefix}
	case t.Kind() == reflect.Slice:
		if t.Elem() == reflect.TypeFor[text]() {
			return []string{prefix}
		}
		return keysOf(prefix+"[]", t.Elem())
	case t.Kind() == reflect.Map:
		return []string{prefix}
	}
	var all []string
	for i := range t.NumField() {
		key := t.Field(i).Tag.Get("yaml")
		if prefix != "" {
			key = prefix + "." + key
		}
		all = append(all, keysOf(key, t.Field(i).Type)...)
	}
	return all
}
