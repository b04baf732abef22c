package runner

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const smallMesh = `apiVersion: sallyport.dev/v1
kind: Mesh
spec:
  trustDomain: test.example
  policies: policy
  controlPlane: {listen: "127.0.0.1:1001", metrics: "127.0.0.1:1002"}
  workloads:
    - name: back
      command: [app]
      serve: {http: "127.0.0.1:1003"}
      tunnel: "127.0.0.1:1004"
      admin: "127.0.0.1:1005"
      outbound: [{listen: "127.0.0.1:1006", to: "/shop/card-desk:http"}]
  try: hello {{addr "back" "http"}}
`

func TestParse(t *testing.T) {
	m, err := parse("/m/mesh.yaml", []byte(smallMesh), 100)
	require.NoError(t, err)
	w := m.loads[0]
	for _, c := range []struct{ what, got, want string }{
		{"policies", m.policies, "/m/policy"},
		{"listen", m.control.listen.String(), "127.0.0.1:1101"},
		{"metrics", m.control.metrics.String(), "127.0.0.1:1102"},
		{"serve", w.serve["http"].String(), "127.0.0.1:1103"},
		{"tunnel", w.tunnel.String(), "127.0.0.1:1104"},
		{"admin", w.admin.String(), "127.0.0.1:1105"},
		{"outbound", w.upstream[0].listen.String(), "127.0.0.1:1106"},
		{"outbound env", w.upstream[0].env(), "UPSTREAM_CARD_DESK_HTTP"},
		{"outbound ref", w.upstream[0].ref.String(), "spiffe://test.example/shop/card-desk"},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %s, want %s", c.what, c.got, c.want)
		}
	}
}

func TestTryQuotesPathsForAShell(t *testing.T) {
	var b strings.Builder
	m := &mesh{policies: "/my shop/policy", try: text{value: "vi {{policies}}/a.yaml"}}
	require.NoError(t, tryData{mesh: m}.render(&b))
	if want := "vi '/my shop/policy'/a.yaml"; b.String() != want {
		t.Errorf("got %s, want %s", b.String(), want)
	}
}

func TestParseSaysWhereTheMistakeIs(t *testing.T) {
	for _, c := range []struct{ old, new, want string }{
		{"trustDomain: test", "trustDomane: test", "mesh.yaml:4:3: unknown key trustDomane"},
		{"tunnel:", "tunel:", "mesh.yaml:11:7: unknown key tunel"},
		{"kind: Mesh", "kind: Mess", `mesh.yaml:2:7: kind is "Mess", want Mesh`},
		{"sallyport.dev/v1", "sallyport.dev/v2", "mesh.yaml:1:13: apiVersion is"},
		{"test.example", "Test Example", "mesh.yaml:4:16: spec.trustDomain"},
		{"  policies: policy\n", "", "mesh.yaml: spec.policies is missing"},
		{"  try:", "  logLevel: loud\n  try:", "mesh.yaml:14:13: spec.logLevel"},
		{"127.0.0.1:1002\"}", "127.0.0.1:1002\", svidTTL: 1d}", "spec.controlPlane.svidTTL \"1d\""},
		{"127.0.0.1:1002\"}", "127.0.0.1:1002\", svidTTL: -1s}", "want a duration above zero"},
		{"127.0.0.1:1004", "0.0.0.0:1004", "mesh.yaml:11:15: spec.workloads[0].tunnel \"0.0.0.0:1004\": want a loopback address"},
		{"127.0.0.1:1004", "localhost:1004", "want a loopback address"},
		{"127.0.0.1:1004", "127.0.0.1:0", "want a loopback address and a port"},
		{"127.0.0.1:1004", "127.0.0.1:65500", "port 65500 with the offset 100 is 65600"},
		{"127.0.0.1:1005", "127.0.0.1:1004", "mesh.yaml:12:14: spec.workloads[0].admin: 127.0.0.1:1004 is spec.workloads[0].tunnel already"},
		{"      tunnel: \"127.0.0.1:1004\"\n", "", "spec.workloads[0].tunnel is missing"},
		{"name: back", "name: ../back", "mesh.yaml:8:13: spec.workloads[0].name"},
		{"name: back", "name: data", "none of data"},
		{"command: [app]", "command: []", "spec.workloads[0].command is missing"},
		{"serve: {http:", "serve: {HTTP:", `port name "HTTP"`},
		{"  tunnel:", "  local: {http: \"127.0.0.1:1009\"}\n      tunnel:", "local.http sets LISTEN_HTTP, and so does spec.workloads[0].serve.http"},
		{"  tunnel:", "  env: {LISTEN_HTTP: x}\n      tunnel:", "env.LISTEN_HTTP sets LISTEN_HTTP"},
		{"/shop/card-desk:http", "card-desk", "want WORKLOAD:PORT"},
		{"/shop/card-desk:http", "card-desk:70000", "is neither a name nor a number"},
		{"/shop/card-desk:http", "Card:http", "mesh.yaml:13:49: spec.workloads[0].outbound[0].to"},
		{`addr "back" "http"`, `addr "bakc" "http"`, `mesh.yaml:14:8: spec.try: spec.try:1:8: executing "spec.try" at <addr "bakc" "http">: error calling addr: no workload "bakc"`},
		{`addr "back" "http"`, `addr "back" "grpc"`, `no port "grpc"`},
		{`{{addr`, `{{adr`, `function "adr" not defined`},
		{"kind: Mesh", "kind: Mesh\nkind: Mesh", "mesh.yaml:3:1: mapping key \"kind\" already defined"},
		{"kind: Mesh", "kind: [Mesh]", "mesh.yaml:2:7: want a single value"},
		{"serve: {http: \"127.0.0.1:1003\"}", "serve: [", "mesh.yaml:1"},
		{"  try:", "---\n  try:", "mesh.yaml"},
		{"  workloads:\n", "  workloads: []\n  x:\n", "unknown key x"},
	} {
		changed := strings.Replace(smallMesh, c.old, c.new, 1)
		require.NotEqual(t, smallMesh, changed, c.old)
		_, err := parse("mesh.yaml", []byte(changed), 100)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q → %q:\n got %v\nwant %q", c.old, c.new, err, c.want)
		}
	}
}

func TestLoadLimits(t *testing.T) {
	dir := t.TempDir()
	_, err := load(dir, 0)
	if err == nil || !strings.Contains(err.Error(), "takes the folder that holds mesh.yaml") {
		t.Errorf("no file: got %v", err)
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "mesh.yaml"), make([]byte, maxMeshFile+1), 0o644))
	_, err = load(dir, 0)
	if err == nil || !strings.Contains(err.Error(), "larger than 1048576 bytes") {
		t.Errorf("huge file: got %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(smallMesh))
	f.Add([]byte("apiVersion: sallyport.dev/v1\nkind: Mesh\nspec: {workloads: [{name: a, command: [b]}]}\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		m, err := parse("mesh.yaml", content, 1)
		if err != nil {
			return
		}
		seen := map[string]bool{}
		for _, a := range m.addresses() {
			if !a.Addr().IsLoopback() || seen[a.String()] {
				t.Errorf("address %s of %s is not loopback or not its own", a, a.key)
			}
			seen[a.String()] = true
		}
		for _, w := range m.loads {
			if filepath.Base(w.name.value) != w.name.value || w.name.value == "" {
				t.Errorf("workload name %q is no folder name", w.name.value)
			}
		}
	})
}

func TestShellLine(t *testing.T) {
	s := spec{env: []string{"A=b c"}, argv: []string{"/bin/x", "it's", "-y=1"}}
	if got, want := s.String(), `env 'A=b c' /bin/x 'it'\''s' -y=1`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestMissingPolicyFolder names the file and the key that lead to it.
func TestMissingPolicyFolder(t *testing.T) {
	err := checkPolicies(&mesh{file: "mesh.yaml", policies: filepath.Join(t.TempDir(), "nosuch")})
	if err == nil || !strings.Contains(err.Error(), "mesh.yaml: spec.policies: ") || !strings.Contains(err.Error(), "nosuch is not a folder") {
		t.Errorf("got %v", err)
	}
}
