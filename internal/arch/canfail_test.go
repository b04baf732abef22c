package arch

import (
	"fmt"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// made builds a package from source, as load would.
func made(t *testing.T, room, src string) pkg {
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, "x.go", src, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	return pkg{Name: f.Name.Name, ImportPath: module + "/" + room, Doc: f.Doc.Text(), GoFiles: []string{"x.go"},
		files: []file{{name: "x.go", src: []byte(src), set: set, ast: f}}}
}

// TestEachCheckCanFail gives every check something to find, and something near
// it that is right.
func TestEachCheckCanFail(t *testing.T) {
	us := func(room string) string { return module + "/" + room }
	lines := func(n int) string { return strings.Repeat("\tx()\n", n) }
	for _, c := range []struct {
		name, room string
		imports    []string
		deps       []string
		src        string
		want       string // "" means no problem
	}{
		{"no row", "internal/util", nil, nil, "// Package util is.\npackage util", "internal/util is in no row"},
		{"up", "internal/agent", []string{us("pkg/policy"), us("api/sallyport/v1"), "crypto/tls"}, nil, "// Package agent is.\npackage agent", ""},
		{"down", "pkg/identity", []string{us("pkg/policy")}, nil, "// Package identity is.\npackage identity", "pkg/identity (row 0) imports pkg/policy (row 1)"},
		{"sideways", "internal/sidecar", []string{us("internal/runner")}, nil, "// Package sidecar is.\npackage sidecar", "(row 4) imports internal/runner (row 4)"},
		{"own room below another", "internal/issuer", []string{us("internal/issuer/ca")}, nil, "// Package issuer is.\npackage issuer", ""},
		{"proxy and etcd", "cmd/proxy", nil, []string{"go.etcd.io/etcd/client/v3"}, "// Command proxy is.\npackage main", "cmd/proxy reaches go.etcd.io/etcd/client/v3"},
		{"proxy and ca", "cmd/proxy", nil, []string{us("internal/issuer/ca")}, "// Command proxy is.\npackage main", "cmd/proxy reaches ./internal/issuer/ca"},
		{"xds and etcd", "internal/xds", nil, []string{"go.etcd.io/etcd/client/v3"}, "// Package xds is.\npackage xds", "internal/xds reaches"},
		{"control plane and etcd", "cmd/controlplane", nil, []string{"go.etcd.io/etcd/client/v3"}, "// Command controlplane is.\npackage main", ""},
		{"pkg and grpc", "pkg/policy", nil, []string{"google.golang.org/grpc/codes"}, "// Package policy is.\npackage policy", "pkg/policy reaches google.golang.org/grpc/codes"},
		{"pkg and internal", "pkg/policy", nil, []string{us("internal/store")}, "// Package policy is.\npackage policy", "pkg/policy reaches ./internal/store"},
		{"relay and tls", "internal/relay", []string{"crypto/tls"}, nil, "// Package relay is.\npackage relay", "internal/relay reaches crypto/tls"},
		{"tunnel and a library's tls", "internal/tunnel", []string{"golang.org/x/net/http2"}, []string{"crypto/tls"}, "// Package tunnel is.\npackage tunnel", ""},
		{"shipped testing", "cmd/sallyport", nil, []string{"testing"}, "// Command sallyport is.\npackage main", "cmd/sallyport reaches testing"},
		{"example knows the mesh", "examples/shop", nil, []string{us("pkg/identity")}, "// Command shop is.\npackage main", "examples/shop reaches ./pkg/identity"},
		{"no doc", "internal/flow", nil, nil, "package flow", `internal/flow: package comment begins ""`},
		{"main's doc", "cmd/proxy", nil, nil, "// Package main is.\npackage main", `want "Command "`},
		{"init", "internal/flow", nil, nil, "// Package flow is.\npackage flow\nfunc init() {}", "internal/flow/x.go:3: init function"},
		{"init method", "internal/flow", nil, nil, "// Package flow is.\npackage flow\ntype t int\nfunc (t) init() {}", ""},
		{"exit", "internal/flow", nil, nil, "// Package flow is.\npackage flow\nimport \"os\"\nfunc main() { os.Exit(1) }", "x.go:4: ends the process"},
		{"exit beside main", "cmd/proxy", nil, nil, "// Command proxy is.\npackage main\nimport \"os\"\nfunc main() {}\nfunc run() { os.Exit(1) }", "x.go:5: ends the process"},
		{"exit in main", "cmd/proxy", nil, nil, "// Command proxy is.\npackage main\nimport \"os\"\nfunc main() { os.Exit(1) }", ""},
		{"fatal", "cmd/proxy", nil, nil, "// Command proxy is.\npackage main\nimport \"log\"\nfunc run() { log.Fatalf(\"x\") }", "x.go:4: ends the process"},
		{"long file", "internal/flow", nil, nil, "// Package flow is.\npackage flow\n" + strings.Repeat("\n", maxFile-1), "401 lines, more than 400"},
		{"full file", "internal/flow", nil, nil, "// Package flow is.\npackage flow\n" + strings.Repeat("\n", maxFile-2), ""},
		{"long function", "internal/flow", nil, nil, "// Package flow is.\npackage flow\nfunc f() {\n" + lines(maxFunc-1) + "}", "function f has 81 lines"},
		{"full function", "internal/flow", nil, nil, "// Package flow is.\npackage flow\nfunc f() {\n" + lines(maxFunc-2) + "}", ""},
	} {
		p := made(t, c.room, c.src)
		p.Imports, p.Deps = c.imports, append(c.deps, c.imports...)
		got := strings.Join(check(p), "\n")
		if c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}

// TestLoadReadsWhatIsThere proves that load hands imports, documentation and
// files of other systems to the checks, and skips what git ignores.
func TestLoadReadsWhatIsThere(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{
		"go.mod":             "module " + module + "\n\ngo 1.27\n",
		".gitignore":         "/junk/\n",
		"junk/x.go":          "package junk\n",
		"internal/a/a.go":    "// Package a is.\npackage a\n\nimport _ \"" + module + "/internal/b\"\n",
		"internal/b/b.go":    "package b\n\nimport _ \"os\"\n",
		"internal/b/b_js.go": "package b\n\nfunc init() {}\n",
		"internal/b/gen.go":  "// Code generated by x. DO NOT EDIT.\n\npackage b\n\nfunc init() {}\n",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	packages, err := load(root)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range packages {
		got = append(got, fmt.Sprintf("%s doc=%t imports=%v files=%d", p.room(), p.Doc != "", p.Imports, len(p.files)))
	}
	want := []string{
		"internal/b doc=false imports=[os] files=2",
		"internal/a doc=true imports=[" + module + "/internal/b] files=1",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
