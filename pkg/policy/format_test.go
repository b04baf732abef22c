package policy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"github.com/stretchr/testify/require"
)

// everyFile gives each resource file of the stories and examples that parses.
func everyFile(t testing.TB) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	add := func(name string, src []byte) {
		if _, err := ParseFiles("", map[string][]byte{"a.yaml": src}); err == nil {
			out[name] = src
		}
	}
	stories, err := filepath.Glob("testdata/stories/*.txtar")
	require.NoError(t, err)
	for _, p := range stories {
		ar, err := txtar.ParseFile(p)
		require.NoError(t, err)
		for _, f := range ar.Files {
			if strings.HasSuffix(f.Name, ".yaml") {
				add(p+":"+f.Name, f.Data)
			}
		}
	}
	for _, p := range exampleFiles(t) {
		src, err := os.ReadFile(p)
		require.NoError(t, err)
		add(p, src)
	}
	require.Greater(t, len(out), 100)
	return out
}

// exampleFiles gives the policy files below examples.
func exampleFiles(t testing.TB) []string {
	t.Helper()
	var out []string
	for _, pattern := range []string{"*/policy/*.yaml", "*/policy/*/*.yaml"} {
		found, err := filepath.Glob("../../examples/" + pattern)
		require.NoError(t, err)
		out = append(out, found...)
	}
	require.NotEmpty(t, out)
	return out
}

// sayTheSame compares what two files say: everything but where it stands.
func sayTheSame(t testing.TB, a, b []byte) string {
	t.Helper()
	one, err := ParseFiles("", map[string][]byte{"a.yaml": a})
	require.NoError(t, err)
	two, err := ParseFiles("", map[string][]byte{"a.yaml": b})
	require.NoError(t, err, "formatted:\n%s", b)
	return cmp.Diff(one, two, cmp.Exporter(func(reflect.Type) bool { return true }),
		cmp.FilterPath(func(p cmp.Path) bool {
			last := p.Last().String()
			return p.Last().Type() == reflect.TypeFor[pos]() || last == ".Line" || last == ".Col" || last == ".sources"
		}, cmp.Ignore()),
		cmp.Comparer(func(a, b time.Time) bool { return a.Equal(b) }))
}

// checkFormat formats src, and again; nil where it is not a file that parses.
func checkFormat(t testing.TB, name string, src []byte) []byte {
	t.Helper()
	out, err := Format("a.yaml", src)
	if err != nil {
		t.Errorf("%s: %v\n%s", name, err, src)
		return nil
	}
	if diff := sayTheSame(t, src, out); diff != "" {
		t.Errorf("%s: the file says something else:\n%s\nbefore:\n%s\nafter:\n%s", name, diff, src, out)
	}
	again, err := Format("a.yaml", out)
	if err != nil || string(again) != string(out) {
		t.Errorf("%s: not stable: %v\nonce:\n%s\ntwice:\n%s", name, err, out, again)
	}
	return out
}

// TestFormatChangesNoMeaning formats every story and example.
func TestFormatChangesNoMeaning(t *testing.T) {
	for name, src := range everyFile(t) {
		checkFormat(t, name, src)
	}
}

// TestExamplesAreFormatted holds the examples to the form that they show, and those
// of docs/policy.md.
func TestExamplesAreFormatted(t *testing.T) {
	files := map[string][]byte{}
	for _, p := range exampleFiles(t) {
		src, err := os.ReadFile(p)
		require.NoError(t, err)
		files[p] = src
	}
	doc, err := os.ReadFile("../../docs/policy.md")
	require.NoError(t, err)
	for i, block := range strings.Split(string(doc), "```yaml\n")[1:] {
		block, _, _ = strings.Cut(block, "```")
		files[fmt.Sprintf("docs/policy.md, example %d", i+1)] = []byte(block)
	}
	for p, src := range files {
		out, err := Format(p, src)
		require.NoError(t, err)
		if diff := cmp.Diff(string(src), string(out)); diff != "" {
			t.Errorf("%s is not in canonical form: run sallyport policy fmt -w\n%s", p, diff)
		}
	}
}

// TestFormatStories: what goes in, what comes out.
func TestFormatStories(t *testing.T) {
	ar, err := txtar.ParseFile("testdata/format.txtar")
	require.NoError(t, err)
	files := map[string]string{}
	for _, f := range ar.Files {
		files[f.Name] = string(f.Data)
	}
	for i, f := range ar.Files {
		name, ok := strings.CutSuffix(f.Name, ".yaml")
		if !ok {
			continue
		}
		out := checkFormat(t, name, f.Data)
		if *update {
			ar.Files[i+1].Data = out
		} else if want := files[name+".out"]; string(out) != want {
			t.Errorf("%s: got\n%s\nwant\n%s", name, out, want)
		}
	}
	if *update {
		require.NoError(t, os.WriteFile("testdata/format.txtar", txtar.Format(ar), 0o666))
	}
}

// TestFormatKeepsComments writes comments wherever YAML takes them, and finds each
// of them again, once and in its document.
func TestFormatKeepsComments(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	files := everyFile(t)
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	planted := 0
	for range 2 {
		for _, name := range names {
			if random.IntN(2) == 0 {
				continue // time
			}
			lines := strings.Split(strings.TrimSuffix(string(files[name]), "\n"), "\n")
			for n := range 4 {
				word := fmt.Sprintf("# planted-%d", n)
				i := random.IntN(len(lines))
				changed := slices.Clone(lines)
				if random.IntN(2) == 0 {
					changed[i] += strings.Repeat(" ", 1+random.IntN(2)) + word
				} else {
					changed = slices.Insert(changed, i, strings.Repeat(" ", random.IntN(9))+word)
				}
				if sameMeaning(files[name], changed) {
					lines = changed
				}
			}
			src := strings.Join(lines, "\n") + "\n"
			out := string(checkFormat(t, name, []byte(src)))
			in, after := strings.Split(src, "\n---"), strings.Split(out, "\n---")
			for n := range 4 {
				word := fmt.Sprintf("# planted-%d", n)
				if !strings.Contains(src, word) {
					continue
				}
				planted++
				if strings.Count(out, word) != 1 || len(in) != len(after) {
					t.Errorf("%s: %s is there %d times in\n%s\nfrom\n%s", name, word, strings.Count(out, word), out, src)
					continue
				}
				for d := range in {
					if strings.Contains(in[d], word) != strings.Contains(after[d], word) {
						t.Errorf("%s: %s changed its document in\n%s\nfrom\n%s", name, word, out, src)
					}
				}
			}
		}
	}
	if planted < 300 {
		t.Errorf("%d comments", planted)
	}
}

// sameMeaning reports whether the lines parse, and to what src is: a comment may
// have become part of text.
func sameMeaning(src []byte, lines []string) bool {
	changed := []byte(strings.Join(lines, "\n") + "\n")
	if _, err := ParseFiles("", map[string][]byte{"a.yaml": changed}); err != nil {
		return false
	}
	a, err := loadAll(src)
	b, err2 := loadAll(changed)
	return err == nil && err2 == nil && slices.EqualFunc(a, b, sameNode)
}

func TestFormatRefuses(t *testing.T) {
	for _, c := range []struct{ src, want string }{
		{"kind: Policy\n", "a.yaml:1:1: apiVersion is missing"},
		{"a: [\n", "a.yaml:1:"},
		{"# no end", "does not end with a newline"},
		{"%TAG ! tag:shop.example,2026:\n---\n# nothing\n", "directives"},
		{"apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: a}\nspec: {}\n---\napiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: a}\nspec: {}\n", "a.yaml:8:"},
	} {
		if out, err := Format("a.yaml", []byte(c.src)); err == nil || !strings.Contains(err.Error(), c.want) || out != nil {
			t.Errorf("%q: got %q, %v; want %q", c.src, out, err, c.want)
		}
	}
}

// FuzzFormat: what parses is formatted, says the same, and is stable.
func FuzzFormat(f *testing.F) {
	for _, src := range everyFile(f) {
		f.Add(src)
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		if _, err := ParseFiles("", map[string][]byte{"a.yaml": src}); err != nil {
			return
		}
		if _, err := Format("a.yaml", src); err != nil && strings.Contains(err.Error(), "directives") {
			return
		} else if all := (Errors)(nil); errors.As(err, &all) {
			t.Fatalf("Format refuses what parses: %v", err)
		}
		checkFormat(t, "fuzz", src)
	})
}

// TestFormatGuard: whatever a writer of files could do wrong is noticed.
func TestFormatGuard(t *testing.T) {
	src := "# a\napiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: a, labels: {x: y}}\nspec: {} # b\n---\n# c\n"
	parts, err := readParts([]byte(src))
	require.NoError(t, err)
	require.NoError(t, unchanged(parts, []byte(src)))
	for _, change := range [][2]string{{"# a\n", ""}, {"# b", "# d"}, {" # b", "\n# b\n# b"}, {"---\n", ""}, {"---", "..."}, {"x: y", "x: z"}, {"x: y", "z: y"}, {"x: y", "x: 1"}, {"name: a, ", ""}, {"{}", "[]"}, {"\n---\n# c", "# c\n---"}} {
		if other := strings.Replace(src, change[0], change[1], 1); unchanged(parts, []byte(other)) == nil {
			t.Errorf("%q for %q is not noticed", change[1], change[0])
		}
	}
}
