package deploy_test

import (
	"bufio"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var (
	testFunc  = regexp.MustCompile(`^func ((?:Test|Fuzz)[A-Za-z0-9_]+)\(`)
	testName  = regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9_]+)`")
	clauseRow = regexp.MustCompile(`^\| ([A-Z]+ ?[0-9][0-9.]*) \|`)
)

// allTests are the names of the test functions of the whole tree.
func allTests(t *testing.T) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if m := testFunc.FindStringSubmatch(s.Text()); m != nil {
				out[m[1]] = true
			}
		}
		return nil
	})
	require.NoError(t, err)
	return out
}

// table reads the rows of a document: clause → tests.
func table(t *testing.T, doc string) map[string][]string {
	t.Helper()
	text, err := os.ReadFile(doc)
	require.NoError(t, err)
	rows := map[string][]string{}
	for line := range strings.Lines(string(text)) {
		m := clauseRow.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if rows[m[1]] != nil {
			t.Errorf("%s: two rows for %s", doc, m[1])
		}
		rows[m[1]] = []string{}
		for _, name := range testName.FindAllStringSubmatch(line, -1) {
			rows[m[1]] = append(rows[m[1]], name[1])
		}
	}
	return rows
}

// checkTable holds a document to the tree: each clause has a row with tests that
// exist, and each test that is called after a clause stands in the document.
func checkTable(t *testing.T, doc string, clauses []string, called *regexp.Regexp) {
	t.Helper()
	tests, rows, told := allTests(t), table(t, doc), map[string]bool{}
	for clause, names := range rows {
		if !slices.Contains(clauses, clause) {
			t.Errorf("%s has a row for %s, which is no clause", doc, clause)
		}
		for _, name := range names {
			told[name] = true
			if !tests[name] {
				t.Errorf("%s, %s: there is no %s", doc, clause, name)
			}
		}
	}
	for _, c := range clauses {
		if len(rows[c]) == 0 {
			t.Errorf("%s: no test for %s", doc, c)
		}
	}
	for name := range tests {
		if called.MatchString(name) && !told[name] {
			t.Errorf("%s does not tell of %s", doc, name)
		}
	}
}

// TestSPIFFEClauses: docs/spiffe.md is complete and true.
func TestSPIFFEClauses(t *testing.T) {
	checkTable(t, "../docs/spiffe.md", []string{
		"ID 2", "ID 2.1", "ID 2.2", "ID 2.3", "ID 3.1",
		"WE 3", "WE 3.1", "WE 4", "WE 7",
		"WA 1", "WA 4.3", "WA 5.2.1", "WA 5.2.2", "WA 6.2.1", "WA 6.2.2", "WA 6.2.3", "WA 6.3", "WA 7", "WA 8",
		"X 2", "X 3.1", "X 3.2", "X 4.1", "X 4.3", "X 4.4", "X 5.1", "X 5.2", "X 6.1", "X 6.2",
		"J 1", "J 2", "J 2.1", "J 2.3", "J 3", "J 6",
		"B 4.1.1", "B 4.1.2", "B 4.1.3", "B 4.2",
		"F 4.1", "F 4.2", "F 5.1", "F 5.2.1.1", "F 5.2.1.2", "F 5.2.1.3", "F 5.2.2", "F 5.2.2.3",
	}, regexp.MustCompile(`^Test(ID|WE|WA|X|J)[0-9]+_|^Test(B4|B41[0-9]|F4|F41|F5)_`))
}

// TestSecurityRows: docs/security.md is complete and true.
func TestSecurityRows(t *testing.T) {
	checkTable(t, "../docs/security.md", []string{
		"A1", "A2", "A3", "A6", "A7", "A9", "A10", "B3", "B4", "B5", "B7", "B9", "B10", "B11", "C1", "C4", "C5", "C7", "C8", "C9",
		"D1", "D2", "D3", "D4", "D5", "D6", "D8", "E1", "E3", "F1", "F3", "F5", "F6", "F7", "F8", "F9", "G1",
	}, regexp.MustCompile(`^(Test|Fuzz)(A[0-9]+|B(3|4[A-Z]|5|7|9|1[0-9])|[CDE][0-9]|F(5H|[1-36-9])|G[0-9])|[a-z](A|B|C|D|E|F|G)[0-9]{1,2}$`))
}
