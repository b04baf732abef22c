package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/sallyport-mesh/sallyport"

// pkg is what the checks need of one package of the module.
type pkg struct {
	Name, ImportPath, Dir, Doc string
	GoFiles, IgnoredGoFiles    []string
	Imports, Deps              []string
	Error                      *struct{ Err string }
	Module                     *struct{ Path string }
	files                      []file
}

// file is one parsed file that is not generated.
type file struct {
	name string
	src  []byte
	set  *token.FileSet
	ast  *ast.File
}

// room is the package's path below the module.
func (p pkg) room() string { return strings.TrimPrefix(p.ImportPath, module+"/") }

// matches is the pattern language of rows and bans.
func matches(pattern, path string) bool {
	if below, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == below || strings.HasPrefix(path, below+"/")
	}
	return path == pattern
}

func matchesAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, path) })
}

// rowOf gives the row of a room. A row that names the room itself goes before
// one that includes it.
func rowOf(room string) (row, bool) {
	for _, r := range rows {
		if slices.Contains(r.rooms, room) {
			return r, true
		}
	}
	for _, r := range rows {
		if matchesAny(r.rooms, room) {
			return r, true
		}
	}
	return row{}, false
}

// checkRows finds packages without a row and imports that do not go upwards.
func checkRows(p pkg) (problems []string) {
	from, ok := rowOf(p.room())
	if !ok {
		return []string{fmt.Sprintf("%s is in no row: add it to internal/arch and docs/ARCHITECTURE.md", p.room())}
	}
	for _, path := range p.Imports {
		room, ours := strings.CutPrefix(path, module+"/")
		if !ours {
			continue
		}
		if to, ok := rowOf(room); ok && to.number >= from.number {
			problems = append(problems, fmt.Sprintf("%s (row %d) imports %s (row %d). Row %d: %s", p.room(), from.number, room, to.number, from.number, from.why))
		}
	}
	return problems
}

// checkBans finds what a room reaches and must not.
func checkBans(p pkg) (problems []string) {
	for _, b := range bans {
		if !matchesAny(b.rooms, p.room()) {
			continue
		}
		reached := p.Deps
		if b.direct {
			reached = p.Imports
		}
		for _, path := range reached {
			if room, ours := strings.CutPrefix(path, module); ours {
				path = "." + room
			}
			if matchesAny(b.never, path) {
				problems = append(problems, fmt.Sprintf("%s reaches %s: %s", p.room(), path, b.why))
			}
		}
	}
	return problems
}

// checkDoc wants a package comment that begins as go doc expects it.
func checkDoc(p pkg) []string {
	if len(p.GoFiles) == 0 || len(p.files) == 0 {
		return nil // tests only, or generated
	}
	want := "Package " + p.Name + " "
	if p.Name == "main" {
		want = "Command "
	}
	if !strings.HasPrefix(p.Doc, want) {
		return []string{fmt.Sprintf("%s: package comment begins %q, want %q", p.room(), p.Doc, want)}
	}
	return nil
}

// checkFile finds init functions, os.Exit outside func main, and what is too
// long.
func checkFile(p pkg, f file) (problems []string) {
	report := func(pos token.Pos, format string, args ...any) {
		at := fmt.Sprintf("%s/%s:%d: ", p.room(), f.name, f.set.Position(pos).Line)
		problems = append(problems, at+fmt.Sprintf(format, args...))
	}
	if n := bytes.Count(f.src, []byte("\n")); n > maxFile {
		report(f.ast.Pos(), "%d lines, more than %d: split it by idea", n, maxFile)
	}
	for _, d := range f.ast.Decls {
		fn, isFunc := d.(*ast.FuncDecl)
		inMain := isFunc && fn.Recv == nil && fn.Name.Name == "main" && p.Name == "main"
		if isFunc {
			if fn.Recv == nil && fn.Name.Name == "init" {
				report(fn.Pos(), "init function: start-up belongs to main, in the open")
			}
			if n := f.set.Position(fn.End()).Line - f.set.Position(fn.Pos()).Line + 1; n > maxFunc {
				report(fn.Pos(), "function %s has %d lines, more than %d", fn.Name.Name, n, maxFunc)
			}
		}
		if inMain {
			continue
		}
		ast.Inspect(d, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok && isExit(s) {
				report(s.Pos(), "ends the process outside func main, so nothing is cleaned up")
			}
			return true
		})
	}
	return problems
}

// isExit reports os.Exit and log.Fatal*.
func isExit(s *ast.SelectorExpr) bool {
	x, ok := s.X.(*ast.Ident)
	return ok && (x.Name == "os" && s.Sel.Name == "Exit" || x.Name == "log" && strings.HasPrefix(s.Sel.Name, "Fatal"))
}

// load lists the packages of the module in the folder root, for every build
// tag that its tests use, and parses their files.
func load(root string) ([]pkg, error) {
	cmd := exec.Command("go", "list", "-e", "-deps", "-json=Name,ImportPath,Dir,Doc,GoFiles,IgnoredGoFiles,Imports,Deps,Error,Module", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("listing packages: %w: %s", err, stderr.Bytes())
	}
	var all []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("reading the list of packages: %w", err)
		}
		if p.Module == nil || p.Module.Path != module || ignored(root, p.Dir) {
			continue
		}
		if err := p.parse(); err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// ignored reports whether .gitignore names the top folder of dir.
func ignored(root, dir string) bool {
	rel, err := filepath.Rel(root, dir)
	if err != nil {
		return false
	}
	top, _, _ := strings.Cut(filepath.ToSlash(rel), "/")
	list, err := os.ReadFile(filepath.Join(root, ".gitignore"))
	return err == nil && slices.Contains(strings.Split(string(list), "\n"), "/"+top+"/")
}

// parse reads the package's own files, those for other systems included.
func (p *pkg) parse() error {
	for _, name := range slices.Concat(p.GoFiles, p.IgnoredGoFiles) {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		src, err := os.ReadFile(filepath.Join(p.Dir, name))
		if err != nil {
			return fmt.Errorf("reading a file of %s: %w", p.ImportPath, err)
		}
		f := file{name: name, src: src, set: token.NewFileSet()}
		if f.ast, err = parser.ParseFile(f.set, name, src, parser.ParseComments|parser.SkipObjectResolution); err != nil {
			return fmt.Errorf("parsing a file of %s: %w", p.ImportPath, err)
		}
		if !ast.IsGenerated(f.ast) {
			p.files = append(p.files, f)
		}
	}
	return nil
}

// check runs every check.
func check(p pkg) []string {
	problems := slices.Concat(checkRows(p), checkBans(p), checkDoc(p))
	for _, f := range p.files {
		problems = append(problems, checkFile(p, f)...)
	}
	if p.Error != nil {
		problems = append(problems, fmt.Sprintf("%s: %s", p.room(), p.Error.Err))
	}
	return problems
}

func TestHouse(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	packages, err := load(root)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, p := range packages {
		found[p.room()] = true
		for _, problem := range check(p) {
			t.Error(problem)
		}
	}
	for _, r := range rows {
		for _, room := range r.rooms {
			if !strings.HasSuffix(room, "/...") && !found[room] {
				t.Errorf("row %d names %s, which does not exist", r.number, room)
			}
		}
	}
}
