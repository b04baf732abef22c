package policy

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

const header = "apiVersion: sallyport.dev/v1\n"

// one is a valid file, to be spoilt by the tests.
const oneFile = header + "kind: Policy\nmetadata: {name: p}\nspec:\n  to: {workload: payments}\n  allow:\n" +
	"    - from: [{workload: orders}, {id: /ops/**}]\n      ports: [http, 8443]\n      reason: because\n" +
	"  deny:\n    - {from: [{labels: {env: dev}}], ports: [all]}\n" +
	"---\n" + header + "kind: Workload\nmetadata: {name: payments, labels: {a: b}}\nspec:\n  id: /shop/payments\n" +
	"  attest: [{kind: join-token}]\n  ports:\n    - {name: http, port: 8080, protocol: http}\n" +
	"---\n" + header + "kind: PolicyTest\nmetadata: {name: t}\nspec: {cases: [{from: orders, to: payments, port: http, expect: allow}]}\n"

// TestText refuses what is not plain, complete text.
func TestText(t *testing.T) {
	for name, c := range map[string]struct{ file, want string }{
		"NUL":              {"# a\n# b\x00c\n", "f.yaml:2:4: control character U+0000 is not allowed"},
		"escape":           {"# \x1b[2J\n", "f.yaml:1:3: control character U+001B is not allowed"},
		"not UTF-8":        {"# ü\n# a\xff\n", "f.yaml:2:4: byte 0xff is not UTF-8 text"},
		"surrogate":        {"# \xed\xa0\x80\n", "f.yaml:1:3: byte 0xed is not UTF-8 text"},
		"UTF-16":           {"\xff\xfea\x00\n\x00", "f.yaml:1:1: byte 0xff is not UTF-8 text"},
		"byte order mark":  {"\xef\xbb\xbf# a\n", "f.yaml:1:1: the file begins with a byte order mark"},
		"inner BOM":        {"# a\ufeff\n", "f.yaml:1:4: invisible character U+FEFF"},
		"carriage return":  {"# a\rkind: Policy\n", "f.yaml:1:4: a carriage return without a newline"},
		"last is return":   {"# a\n\r", "f.yaml:2:1: a carriage return without a newline"},
		"next line":        {"# ü\u0085kind: Policy\n", "f.yaml:1:4: control character U+0085"},
		"line separator":   {"# a\u2028kind: Policy\n", "f.yaml:1:4: invisible character U+2028"},
		"right-to-left":    {"# a\u202e\n", "f.yaml:1:4: invisible character U+202E"},
		"isolate":          {"# a\u2066\n", "f.yaml:1:4: invisible character U+2066"},
		"delete":           {"# a\x7f\n", "f.yaml:1:4: control character U+007F"},
		"no final newline": {"# a\n# b", "f.yaml:2:4: the file does not end with a newline"},
		"too many values":  {"[" + strings.Repeat("a,", maxValues) + "]\n", "f.yaml: more than 200000 values in one document"},
		"late values":      {"# a\n---\n[" + strings.Repeat("a,", maxValues) + "]\n---\n# b\n", "f.yaml: more than 200000 values in one document"},
		"too big":          {strings.Repeat("#\n", MaxFileSize/2+1), "f.yaml: 4194306 bytes; a resource file has at most 4 MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseFiles("", map[string][]byte{"f.yaml": []byte(c.file)})
			var errs Errors
			if !errors.As(err, &errs) || len(errs) != 1 || !strings.HasPrefix(err.Error(), c.want) {
				t.Fatalf("got %v, want %s", err, c.want)
			}
			if strings.ContainsAny(err.Error(), "\x00\x1b\r") || !utf8.ValidString(err.Error()) {
				t.Errorf("the message repeats what a terminal obeys: %q", err)
			}
		})
	}
}

// TestManyDocuments takes a file whose documents together hold more values than
// one of them may.
func TestManyDocuments(t *testing.T) {
	dense := "---\n# " + strings.Repeat(",", maxValues*3/4) + "\n" + header + "kind: Policy\nmetadata: {name: p%d}\nspec: {to: {id: /**}, deny: []}\n"
	var file strings.Builder
	for i := range 3 {
		fmt.Fprintf(&file, dense, i)
	}
	set, err := ParseFiles("", map[string][]byte{"f.yaml": []byte(file.String())})
	require.NoError(t, err)
	if got := len(set.Policies); got != 3 {
		t.Errorf("got %d policies, want 3", got)
	}
}

// TestTruncated cuts a file at every byte. A cut is noticed unless it falls
// behind a newline; what is left then holds a part of the resources, each whole
// or cut between two rules or fields.
func TestTruncated(t *testing.T) {
	_, err := ParseFiles("", map[string][]byte{"f.yaml": []byte(oneFile)})
	require.NoError(t, err)
	parsed := 0
	for i := range oneFile {
		_, err := ParseFiles("", map[string][]byte{"f.yaml": []byte(oneFile[:i])})
		if err == nil && !strings.HasSuffix(oneFile[:i], "\n") {
			t.Errorf("cut at byte %d: parsed", i)
		}
		if err == nil {
			parsed++
		}
	}
	if parsed == 0 || parsed > 12 {
		t.Errorf("%d cuts went unnoticed, want 1 to 12", parsed)
	}
}

func TestCarriageReturnNewline(t *testing.T) {
	unix, err := ParseFiles("", map[string][]byte{"f.yaml": []byte(oneFile)})
	require.NoError(t, err)
	dos, err := ParseFiles("", map[string][]byte{"f.yaml": []byte(strings.ReplaceAll(oneFile, "\n", "\r\n"))})
	require.NoError(t, err)
	unix.sources, dos.sources = nil, nil
	require.Equal(t, unix, dos)
}

// openCounter fails the test when a file is opened that is too big to be read.
type openCounter struct {
	fstest.MapFS
	opened []string
}

func (o *openCounter) Open(name string) (fs.File, error) {
	o.opened = append(o.opened, name)
	return o.MapFS.Open(name)
}

func (o *openCounter) Stat(name string) (fs.FileInfo, error) { return o.MapFS.Stat(name) }

func (o *openCounter) ReadDir(name string) ([]fs.DirEntry, error) { return o.MapFS.ReadDir(name) }

func TestBigFilesAreNotRead(t *testing.T) {
	fsys := &openCounter{MapFS: fstest.MapFS{
		"big.yaml":      {Data: make([]byte, 100<<20)},
		"good.yaml":     {Data: []byte("# fine\n")},
		"team/big.yaml": {Data: make([]byte, MaxFileSize+1)},
	}}
	for name, read := range map[string]func() error{
		"ReadFiles": func() error { _, err := ReadFiles(fsys); return err },
		"ParseTree": func() error { _, err := ParseTree(fsys); return err },
		"Parse":     func() error { _, err := Parse(fsys, ""); return err },
	} {
		err := read()
		if err == nil || !strings.Contains(err.Error(), "big.yaml: 104857600 bytes; a resource file has at most 4 MiB") {
			t.Errorf("%s: got %v, want an error on big.yaml", name, err)
		}
		if name != "Parse" && !strings.Contains(fmt.Sprint(err), "team/big.yaml: ") {
			t.Errorf("%s: got %v, want an error on team/big.yaml too", name, err)
		}
	}
	for _, name := range fsys.opened {
		if strings.Contains(name, "big.yaml") {
			t.Errorf("%s was opened", name)
		}
	}
}

func TestLimits(t *testing.T) {
	big := []byte(strings.Repeat(strings.Repeat("#", 1023)+"\n", 4096))
	mib := big[:1<<20]
	files := func(dir string, n, mibs int) fstest.MapFS {
		m := fstest.MapFS{}
		for i := range n {
			m[fmt.Sprintf("%s%d.yaml", dir, i)] = &fstest.MapFile{Data: big[:mibs<<20]}
		}
		return m
	}
	tree := fstest.MapFS{}
	for i := range 3 {
		maps.Copy(tree, files(fmt.Sprintf("s%d/", i), 7, 4))
	}
	sets := fstest.MapFS{}
	for i := range MaxSets + 1 {
		sets[fmt.Sprintf("s%d/a.yaml", i)] = &fstest.MapFile{Data: []byte("#\n")}
	}
	for name, c := range map[string]struct {
		fsys fstest.MapFS
		want string
	}{
		"files in a set": {files("", MaxFiles+1, 0), "more than 2000 files in one set"},
		"size of a set":  {files("", 9, 4), "more than 32 MiB in one set"},
		"size of a tree": {tree, "more than 64 MiB in all sets"},
		"sets":           {sets, "more than 1000 sets"},
	} {
		_, err := ReadFiles(c.fsys)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %s", name, err, c.want)
		}
	}
	// Files that come over a wire are held to the same limits.
	wire := map[string][]byte{}
	for i := range 33 {
		wire[fmt.Sprintf("%d.yaml", i)] = mib
	}
	if _, err := ParseFiles("", wire); err == nil || !strings.Contains(err.Error(), "more than 32 MiB in one set") {
		t.Errorf("33 MiB of files: got %v", err)
	}
	for i := range MaxFiles + 1 {
		wire[fmt.Sprintf("%d.yaml", i)] = []byte("#\n")
	}
	if _, err := ParseFiles("", wire); err == nil || !strings.Contains(err.Error(), "more than 2000 files in one set") {
		t.Errorf("2001 files: got %v", err)
	}
}

func TestFileNames(t *testing.T) {
	for _, name := range []string{"a.txt", "", ".yaml", ".a.yaml", "../a.yaml", "a/b.yaml", `a\b.yaml`, "a\n.yaml", "a\x1b.yaml", "a.YAML"} {
		_, err := ParseFiles("", map[string][]byte{name: []byte("#\n")})
		if err == nil || !strings.Contains(err.Error(), "not the name of a resource file") || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("file %q: got %v", name, err)
		}
	}
	for _, name := range []string{"A", "a_b", "../x", "a/b", "-", strings.Repeat("a", 64), "\x1b"} {
		_, err := ParseFiles(name, map[string][]byte{"a.yaml": []byte("#\n")})
		if err == nil || !strings.Contains(err.Error(), "a set's name is") || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("set %q: got %v", name, err)
		}
	}
	set, err := ParseFiles("team", map[string][]byte{"a.yml": []byte(oneFile)})
	require.NoError(t, err)
	if got, want := set.Policies[0].File, "team/a.yml"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestRealFolder reads a folder as Kubernetes mounts it, with what else lies
// about in folders.
func TestRealFolder(t *testing.T) {
	dir := t.TempDir()
	write := func(name, data string) {
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, []byte(data), 0o600))
	}
	write("..2026/a.yaml", oneFile)
	write("..2026/team/b.yaml", "# fine\n")
	require.NoError(t, os.Symlink("..2026", filepath.Join(dir, "..data")))
	require.NoError(t, os.Symlink("..data/a.yaml", filepath.Join(dir, "a.yaml")))
	require.NoError(t, os.Symlink("..data/team", filepath.Join(dir, "team")))
	require.NoError(t, os.Symlink("nobody@host.123", filepath.Join(dir, ".#a.yaml"))) // an editor's lock
	write("a.yaml~", "{")
	write("empty/readme.md", "no set\n")

	sets, err := ParseTree(os.DirFS(dir))
	require.NoError(t, err)
	var names []string
	for _, s := range sets {
		names = append(names, s.Name)
	}
	if want := []string{"", "team"}; !slices.Equal(names, want) {
		t.Errorf("got sets %q, want %q", names, want)
	}
	if got, want := sets[0].Policies[0].File, "a.yaml"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}

	require.NoError(t, syscall.Mkfifo(filepath.Join(dir, "pipe.yaml"), 0o600))
	require.NoError(t, os.Symlink("nowhere", filepath.Join(dir, "dangling.yaml")))
	done := make(chan error, 1)
	go func() { _, err := ParseTree(os.DirFS(dir)); done <- err }()
	select {
	case err = <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("reading a pipe blocks")
	}
	for _, want := range []string{"pipe.yaml: not a regular file", "dangling.yaml: reading: no such file or directory"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the cause is lost in %v", err)
	}

	_, err = ParseTree(os.DirFS(filepath.Join(dir, "gone")))
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder that vanished: got %v, want fs.ErrNotExist", err)
	}
}

// TestParseMemory bounds what the densest text costs: a document of maxValues
// stays below 400 MiB.
func TestParseMemory(t *testing.T) {
	const values = maxValues / 8
	dense := []byte("[" + strings.Repeat("a,", values) + "]\n")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := ParseFiles("", map[string][]byte{"f.yaml": dense})
	runtime.ReadMemStats(&after)
	if err == nil {
		t.Error("a list was taken for a resource")
	}
	if got, want := (after.TotalAlloc-before.TotalAlloc)/values, uint64(400<<20/maxValues); got > want {
		t.Errorf("one value allocates %d bytes, want at most %d", got, want)
	}
}

func TestErrNoWorkload(t *testing.T) {
	set, err := ParseFiles("", map[string][]byte{"f.yaml": []byte("# nothing\n")})
	require.NoError(t, err)
	for name, sets := range map[string][]*Set{"no sets": nil, "an empty set": {set}, "a zero set": {{}}} {
		_, err = Compile(td, sets)
		var errs Errors
		if !errors.Is(err, ErrNoWorkload) || !errors.As(err, &errs) {
			t.Errorf("%s: got %v, want ErrNoWorkload", name, err)
		}
	}
	if _, err = Compile(td, []*Set{{Name: "a"}, {Name: "a"}}); err == nil {
		t.Error("one set given twice was compiled")
	}
}

// FuzzParse feeds arbitrary text. Nothing panics; every mistake lies within the
// file and is printable; what parses still parses, to the same, with a comment
// behind it, and not without its last newline.
func FuzzParse(f *testing.F) {
	f.Add([]byte(oneFile))
	stories, err := filepath.Glob("testdata/stories/*.txtar")
	require.NoError(f, err)
	for _, name := range stories {
		data, err := os.ReadFile(name)
		require.NoError(f, err)
		for _, part := range strings.Split(string(data), "\n-- ") {
			if _, body, ok := strings.Cut(part, " --\n"); ok {
				f.Add([]byte(body + "\n"))
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		set, err := ParseFiles("", map[string][]byte{"f.yaml": data})
		if err != nil {
			checkErrors(t, err, data)
			return
		}
		if _, err := ParseFiles("", map[string][]byte{"f.yaml": data[:len(data)-1]}); err == nil && data[max(0, len(data)-2)] != '\n' {
			t.Fatal("parsed without its last newline")
		}
		more, err := ParseFiles("", map[string][]byte{"f.yaml": append(slices.Clone(data), "\n# end\n"...)})
		if err != nil {
			t.Fatalf("with a comment behind it: %v", err)
		}
		rs, err := Compile(td, []*Set{set})
		set.sources, more.sources = nil, nil
		require.Equal(t, set, more)
		if err != nil {
			checkErrors(t, err, data)
		} else {
			RunTests(rs, []*Set{set})
			if d := Compare(rs, rs); !d.Empty() {
				t.Fatalf("differs from itself:\n%s", d)
			}
		}
	})
}

func checkErrors(t *testing.T, err error, data []byte) {
	var errs Errors
	if !errors.As(err, &errs) || len(errs) == 0 || len(errs) > MaxErrors+1 {
		t.Fatalf("got %d mistakes in %T", len(errs), err)
	}
	lines := strings.Split(string(data), "\n")
	for _, e := range errs {
		if e.Line < 0 || e.Line > len(lines) || e.Line == 0 && e.Col != 0 {
			t.Fatalf("%v lies outside of a file of %d lines", e, len(lines))
		}
		if errors.Is(e, ErrNoWorkload) {
			continue
		}
		if e.Line > 0 && (e.Col < 1 || e.Col > 2+len([]rune(lines[e.Line-1])) || e.Snippet == "" || e.File != "f.yaml") {
			t.Fatalf("%v lies outside of its line of %d characters", e, len([]rune(lines[e.Line-1])))
		}
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		if strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Fatalf("not printable: %q", line)
		}
	}
}

// TestNoFinalNewline shows text where the file ends, also when its last line is
// blank: cut off within an indentation.
func TestNoFinalNewline(t *testing.T) {
	const why = ": the file does not end with a newline: it may be half-written"
	for src, want := range map[string]string{
		"a: b":         "x.yaml:1:5" + why + "\n    a: b\n        ^\n    hint: end the last line with a newline",
		"a: b\nc:   ":  "x.yaml:2:6" + why + "\n    c:\n         ^\n    hint: end the last line with a newline",
		"a: é\n\n\t  ": "x.yaml:1:5" + why + "\n    a: é\n        ^\n    hint: only blanks follow this line: end the file with a newline",
		"a: b\r\n ":    "x.yaml:1:5" + why + "\n    a: b\n        ^\n    hint: only blanks follow this line: end the file with a newline",
		"  ":           "x.yaml" + why + "\n    hint: delete the file or write a comment into it",
	} {
		_, err := ParseFiles("", map[string][]byte{"x.yaml": []byte(src)})
		if err == nil || err.Error() != want {
			t.Errorf("%q: got\n%v\nwant\n%s", src, err, want)
		}
	}
}
