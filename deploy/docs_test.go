package deploy_test

import (
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v4"

	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/host"
	"github.com/sallyport-mesh/sallyport/internal/sidecar"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// identityDoc shows, section by section, complete files for one mesh.
const identityDoc = "../docs/identity.md"

var docFile = regexp.MustCompile("(?s)```yaml\n# (\\S+)\n(.*?)```")

// section is the files under one heading of identityDoc.
type section struct {
	title string
	files map[string]string // :: name → content
}

func readSections(t *testing.T) []section {
	t.Helper()
	text, err := os.ReadFile(identityDoc)
	require.NoError(t, err)
	var out []section
	for _, part := range regexp.MustCompile(`(?m)^##+ `).Split(string(text), -1)[1:] {
		title, body, _ := strings.Cut(part, "\n")
		s := section{title, map[string]string{}}
		for _, m := range docFile.FindAllStringSubmatch(body, -1) {
			if s.files[m[1]] != "" {
				t.Errorf("%s: %s is there twice", title, m[1])
			}
			s.files[m[1]] = m[2]
		}
		if n := strings.Count(body, "```yaml"); n != len(s.files) {
			t.Errorf("%s: of %d files %d say their name in the first line", title, n, len(s.files))
		}
		out = append(out, s)
	}
	return out
}

// TestFilesOfIdentityDoc reads each file of docs/identity.md as the program does
// that it is for, and looks whether those of one section fit together.
func TestFilesOfIdentityDoc(t *testing.T) {
	sections := readSections(t)
	policies := fstest.MapFS{}
	read := map[string]int{} // :: kind of file → how many
	for _, s := range sections {
		for name, content := range s.files {
			read[path.Base(name)]++
			if path.Dir(name) == "policy" {
				read["policy"]++
				if policies[path.Base(name)] != nil {
					t.Errorf("%s is there twice", name)
				}
				policies[path.Base(name)] = &fstest.MapFile{Data: []byte(content)}
			}
		}
	}
	for kind, want := range map[string]int{"policy": 6, "controlplane.yaml": 4, "proxy.yaml": 4, "agent.yaml": 1, "deployment.yaml": 1, "deploy.yaml": 1, ".gitlab-ci.yml": 1} {
		if read[kind] < want {
			t.Errorf("%d files %s, want %d", read[kind], kind, want)
		}
	}
	rules := compileAll(t, policies)
	for _, s := range sections {
		t.Run(s.title, func(t *testing.T) { s.check(t, rules) })
	}
}

func compileAll(t *testing.T, files fs.FS) *policy.Ruleset {
	t.Helper()
	sets, err := policy.ParseTree(files)
	require.NoError(t, err)
	rules, err := policy.Compile(spiffeid.RequireTrustDomainFromString("shop.example"), sets)
	require.NoError(t, err)
	if report := policy.RunTests(rules, sets); report.Failed() {
		t.Error(report)
	}
	return rules
}

func (s section) check(t *testing.T, rules *policy.Ruleset) {
	var evidence []agent.EvidenceConfig
	for name, content := range s.files {
		file := filepath.Join(t.TempDir(), filepath.Base(name))
		require.NoError(t, os.WriteFile(file, []byte(content), 0o600))
		switch path.Base(name) {
		case "proxy.yaml":
			evidence = append(evidence, s.checkProxy(t, file, rules))
		case "agent.yaml":
			c, err := host.Load(file)
			require.NoError(t, err, name)
			evidence = append(evidence, c.Evidence)
		case "controlplane.yaml":
			c, err := controlplane.LoadConfig(file)
			if err == nil {
				err = c.WithDefaults().Validate()
			}
			require.NoError(t, err, name)
		case "deployment.yaml":
			evidence = append(evidence, s.checkDeployment(t, file, rules))
		default:
			var any yaml.Node
			require.NoError(t, yaml.Unmarshal([]byte(content), &any), name)
		}
	}
	for _, e := range evidence {
		if e.Kind != "" && !anyAdmits(rules, e) {
			t.Errorf("no Workload asks for the evidence %+v", e)
		}
	}
}

// checkProxy loads a sidecar's configuration and looks whom it calls.
func (s section) checkProxy(t *testing.T, file string, rules *policy.Ruleset) agent.EvidenceConfig {
	t.Helper()
	c, err := sidecar.Load(file)
	require.NoError(t, err)
	for _, o := range c.Outbound {
		name, _, _ := strings.Cut(o.To, ":")
		labels := strings.Split(name, ".")
		id := "spiffe://shop.example"
		for i := len(labels) - 1; i >= 0; i-- {
			id += "/" + labels[i]
		}
		if _, ok := rules.Workload(spiffeid.RequireFromString(id)); !ok {
			t.Errorf("outbound to %s: no such workload", o.To)
		}
	}
	for port := range c.App {
		if !anyServes(rules, port) {
			t.Errorf("app.%s: no Workload declares this port", port)
		}
	}
	return c.Evidence
}

func anyServes(rules *policy.Ruleset, port string) bool {
	for _, w := range append(rules.Workloads(), rules.Templates()...) {
		for _, p := range w.Ports {
			if p.Name == port {
				return true
			}
		}
	}
	return false
}

func anyAdmits(rules *policy.Ruleset, e agent.EvidenceConfig) bool {
	for _, w := range append(rules.Workloads(), rules.Templates()...) {
		for _, a := range w.Attest {
			if a.Kind == e.Kind && a.Issuer == e.Issuer+e.Cluster+e.CA {
				return true
			}
		}
	}
	return false
}

// object is what is looked at in a Kubernetes object.
type object struct {
	Kind string
	Data map[string]string
	Spec struct {
		Template struct {
			Spec struct {
				InitContainers []container `yaml:"initContainers"`
				Containers     []container
				Volumes        []struct{ Name string }
			}
		}
	}
}

type container struct {
	VolumeMounts []struct {
		Name string
		Path string `yaml:"mountPath"`
	} `yaml:"volumeMounts"`
}

// checkDeployment loads the proxy.yaml of the ConfigMap; whatever it names is
// mounted into the sidecar, and the token into nothing else.
func (s section) checkDeployment(t *testing.T, file string, rules *policy.Ruleset) agent.EvidenceConfig {
	t.Helper()
	config, sidecarOf, app := readDeployment(t, file)
	proxy := filepath.Join(t.TempDir(), "proxy.yaml")
	require.NoError(t, os.WriteFile(proxy, []byte(config), 0o600))
	evidence := s.checkProxy(t, proxy, rules)
	c, err := sidecar.Load(proxy)
	require.NoError(t, err)
	for _, file := range []string{c.Evidence.TokenFile, c.TrustBundle, c.StateDir, c.Admin.Socket, c.WorkloadAPI.Socket} {
		if !sidecarOf.mounts(file) {
			t.Errorf("%s is on no volume of the sidecar", file)
		}
	}
	if !app.mounts(c.WorkloadAPI.Socket) {
		t.Errorf("the app does not see %s", c.WorkloadAPI.Socket)
	}
	for _, file := range []string{c.Evidence.TokenFile, c.StateDir} {
		if app.mounts(file) {
			t.Errorf("the app sees %s", file)
		}
	}
	return evidence
}

func (c container) mounts(file string) bool {
	for _, m := range c.VolumeMounts {
		if strings.HasPrefix(file, m.Path+"/") {
			return true
		}
	}
	return false
}

func readDeployment(t *testing.T, file string) (config string, proxy, app container) {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	for _, doc := range strings.Split(string(text), "\n---\n") {
		var o object
		require.NoError(t, yaml.Unmarshal([]byte(doc), &o))
		switch o.Kind {
		case "ConfigMap":
			config = o.Data["proxy.yaml"]
		case "Deployment":
			pod := o.Spec.Template.Spec
			require.Len(t, pod.InitContainers, 1)
			require.Len(t, pod.Containers, 1)
			proxy, app = pod.InitContainers[0], pod.Containers[0]
			volumes := map[string]bool{}
			for _, v := range pod.Volumes {
				volumes[v.Name] = true
			}
			for _, m := range append(proxy.VolumeMounts, app.VolumeMounts...) {
				if !volumes[m.Name] {
					t.Errorf("volume %s is mounted and not there", m.Name)
				}
			}
		default:
			t.Errorf("a %q: want a ConfigMap or a Deployment", o.Kind)
		}
	}
	return config, proxy, app
}

var hereFile = regexp.MustCompile(`(?s)cat > (\S+) <<'EOF'\n(.*?\n)EOF\n`)

// TestFilesOfFederationDoc reads the files that docs/federation.md has its reader
// write as the programs do.
func TestFilesOfFederationDoc(t *testing.T) {
	text, err := os.ReadFile("../docs/federation.md")
	require.NoError(t, err)
	t.Chdir(t.TempDir())
	require.NoError(t, os.Mkdir("policy", 0o700))
	for _, m := range hereFile.FindAllStringSubmatch(string(text), -1) {
		require.NoError(t, os.WriteFile(m[1], []byte(m[2]), 0o600))
	}
	c, err := controlplane.LoadConfig("controlplane.yaml")
	require.NoError(t, err)
	require.NoError(t, c.WithDefaults().Validate())
	p, err := sidecar.Load("proxy.yaml")
	require.NoError(t, err)
	if p.WorkloadAPI.Socket == "" {
		t.Error("the app of the example has no socket")
	}
	rules := compileAll(t, os.DirFS("policy"))
	if _, ok := rules.Workload(spiffeid.RequireFromString("spiffe://shop.example/shop/payments")); !ok {
		t.Error("nobody is spiffe://shop.example/shop/payments, whom the store expects")
	}
}
