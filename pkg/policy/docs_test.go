package policy

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestDocs holds docs/policy.md to its word: each story that it names exists,
// each story is named, and its example passes its own tests.
func TestDocs(t *testing.T) {
	data, err := os.ReadFile("../../docs/policy.md")
	require.NoError(t, err)
	doc := string(data)

	named := map[string]bool{}
	for _, m := range regexp.MustCompile(`\*\(([a-zA-Z0-9, \n-]+)\)\*`).FindAllStringSubmatch(doc, -1) {
		for name := range strings.SplitSeq(m[1], ",") {
			named[strings.TrimSpace(name)] = true
		}
	}
	stories, err := filepath.Glob("testdata/stories/*.txtar")
	require.NoError(t, err)
	told := testNames(t, ".", "../../internal/catalog", "../../cmd/sallyport", "../../internal/meshtest", "../../test/e2e")
	for _, path := range stories {
		name := strings.TrimSuffix(filepath.Base(path), ".txtar")
		told[name] = true
		if !named[name] {
			t.Errorf("the story %s is not named", name)
		}
	}
	for name := range named {
		if !told[name] {
			t.Errorf("there is no story %q", name)
		}
	}

	_, example, ok := strings.Cut(doc, "```yaml\n")
	require.True(t, ok, "an example")
	example, _, _ = strings.Cut(example, "```")
	set, err := ParseFiles("", map[string][]byte{"example.yaml": []byte(example)})
	require.NoError(t, err)
	sets := []*Set{set}
	rules, err := Compile(td, sets)
	require.NoError(t, err)
	if report := RunTests(rules, sets); report.Failed() || len(set.Tests) == 0 {
		t.Errorf("the example fails its tests or has none:\n%s", report)
	}
}

// testNames lists the tests of some packages.
func testNames(t *testing.T, dirs ...string) map[string]bool {
	names := map[string]bool{}
	for _, dir := range dirs {
		files, err := filepath.Glob(dir + "/*_test.go")
		require.NoError(t, err)
		for _, file := range files {
			source, err := os.ReadFile(file)
			require.NoError(t, err)
			for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllStringSubmatch(string(source), -1) {
				names[m[1]] = true
			}
		}
	}
	return names
}
