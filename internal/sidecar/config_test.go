package sidecar

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/sallyport-mesh/sallyport/internal/configfile"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// full has every key that there is.
const full = `# a sidecar
controlPlane: 127.0.0.1:8443
tokenFile: token
stateDir: state
tunnel: {listen: "127.0.0.1:15008", advertise: 10.1.2.3}
app:
  http: 127.0.0.1:8080
  smtp: unix:run/smtp.sock
outbound:
  - {listen: "127.0.0.1:9001", to: "payments:http"}
  - {listen: unix:/run/stock.sock, to: "/shop/stock:7000"}
allowUIDs: [1000, 1001]
admin: {listen: "127.0.0.1:15020", socket: admin.sock}
drain: 5s
idle: 0s
flowLog: flows.jsonl
log: {level: debug, format: json}
`

func TestParse(t *testing.T) {
	c, err := parse("/etc/sallyport/proxy.yaml", []byte(full))
	require.NoError(t, err)
	for got, want := range map[string]string{
		c.ControlPlane:       "127.0.0.1:8443",
		c.TokenFile:          "/etc/sallyport/token",
		c.StateDir:           "/etc/sallyport/state",
		c.Tunnel.Advertise:   "10.1.2.3",
		c.App["http"]:        "127.0.0.1:8080",
		c.App["smtp"]:        "unix:/etc/sallyport/run/smtp.sock",
		c.Outbound[1].Listen: "unix:/run/stock.sock",
		c.Outbound[1].To:     "/shop/stock:7000",
		c.Admin.Socket:       "/etc/sallyport/admin.sock",
		c.FlowLog:            "/etc/sallyport/flows.jsonl",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if c.Drain != 5*time.Second || c.Idle != 0 || len(c.AllowUIDs) != 2 || c.AllowUIDs[1] != 1001 {
		t.Errorf("got %+v", c)
	}
}

func TestDefaults(t *testing.T) {
	c, err := parse("proxy.yaml", []byte("controlPlane: cp.example:8443\n"))
	require.NoError(t, err)
	if c.Tunnel.Listen != "0.0.0.0:15008" || c.Admin.Listen != "127.0.0.1:15020" || c.Admin.Socket != "admin.sock" || c.StateDir != "state" ||
		c.Drain != 30*time.Second || c.Idle != time.Hour || c.Log.Level != "info" || len(c.AllowUIDs) != 1 || c.AllowUIDs[0] != uint32(os.Geteuid()) {
		t.Errorf("got %+v", c)
	}
}

func TestMistakesAreNamedByLine(t *testing.T) {
	long := strings.Repeat("x", 200)
	for _, c := range []struct{ from, to, want string }{
		{"tokenFile: token", "tokenfile: token", `p.yaml:3:1: unknown key "tokenfile"`},
		{"tokenFile: token", "evidence: {kind: oidc, tokenFile: t}", "trustBundle: required"},
		{"tokenFile: token", "evidence: {kind: tpm}\ntrustBundle: b", `p.yaml:3:18: evidence.kind: "tpm": want join-token, x509pop, kubernetes or oidc`},
		{"tokenFile: token", "evidence: {kind: x509pop, certFile: c, cluster: prod}\ntrustBundle: b", "p.yaml:3:11: evidence.keyFile: required for evidence of kind x509pop"},
		{"tokenFile: token", "evidence: {kind: x509pop, certFile: c, cluster: prod}\ntrustBundle: b", "p.yaml:3:49: evidence.cluster: not for evidence of kind x509pop"},
		{"tokenFile: token", "tokenFile: token\nevidence: {kind: kubernetes, tokenFile: t}\ntrustBundle: b", "p.yaml:3:12: tokenFile: there is evidence already"},
		{"tokenFile: token", "tokenFile: token\ntrustBundle: b", "p.yaml:4:14: trustBundle: not needed"},
		{"tokenFile: token", "identity: {workloadAPI: \"tcp://127.0.0.1:80\"}", "p.yaml:3:25: identity.workloadAPI:"},
		{"tokenFile: token", "tokenFile: token\nidentity: {workloadAPI: \"unix:///s\"}", "identity.workloadAPI: there is evidence to enrol with"},
		{"tokenFile: token", "identity: {workloadAPI: \"unix:///s\"}\nworkloadAPI: {socket: s}", "workloadAPI.socket: the identity comes from"},
		{"tokenFile: token", "identity: {workloadAPI: \"unix:///s\", controlPlaneID: x}", "identity.controlPlaneID:"},
		{"drain: 5s", "drain: soon", "p.yaml:14:8: drain: want a duration such as 30s or 1h, not \"soon\"\n    drain: soon\n           ^"},
		{"drain: 5s", "drain: 5", "p.yaml:14:8: drain: want a duration such as 30s or 1h, not \"5\""},
		{"drain: 5s", "drain: -5s", "p.yaml:14:8: drain: cannot be negative"},
		{"idle: 0s", "idle: -1s", "p.yaml:15:7: idle: cannot be negative"},
		{"controlPlane: 127.0.0.1:8443", "controlPlane: 127.0.0.1", "p.yaml:2:15: controlPlane:"},
		{"controlPlane: 127.0.0.1:8443", "controlPlane: :8443", "p.yaml:2:15: controlPlane:"},
		{"controlPlane: 127.0.0.1:8443", "drain: 1s", "p.yaml: controlPlane: required"},
		{"advertise: 10.1.2.3", "advertise: 10.1.2.3:80", "p.yaml:5:48: tunnel.advertise: want an IP address"},
		{"127.0.0.1:15008", "15008", "p.yaml:5:18: tunnel.listen:"},
		{"http: 127.0.0.1:8080", "http: 10.0.0.1:8080", "p.yaml:7:9: app.http: \"10.0.0.1\" is not on this machine's loopback"},
		{"http: 127.0.0.1:8080", "http: \"unix:\"", "p.yaml:7:9: app.http: unix: without a path"},
		{"http: 127.0.0.1:8080", "http: unix:/" + long, "p.yaml:7:9: app.http: the path has"},
		{"http: 127.0.0.1:8080", "http: 8080", "p.yaml:7:9: app.http:"},
		{"\"127.0.0.1:9001\", to", "\"0.0.0.0:9001\", to", "p.yaml:10:14: outbound[0].listen:"},
		{"unix:/run/stock.sock", "127.0.0.1:9001", "p.yaml:11:14: outbound[1].listen: the same as outbound[0].listen"},
		{"payments:http", "payments", "p.yaml:10:36: outbound[0].to:"},
		{"payments:http", "Payments:http", "p.yaml:10:36: outbound[0].to:"},
		{"payments:http", "payments:0", "p.yaml:10:36: outbound[0].to: port 0"},
		{"[1000, 1001]", "[]", "p.yaml:12:12: allowUIDs:"},
		{"[1000, 1001]", "[root]", "p.yaml:12:13: allowUIDs[0]: want a whole number from 0 to 4294967295, not \"root\""},
		{"socket: admin.sock", "socket: " + long, "p.yaml:13:44: admin.socket: the path has"},
		{"level: debug", "level: loud", "p.yaml:17:14: log.level: \"loud\""},
		{"format: json", "format: xml", "p.yaml:17:29: log.format: \"xml\""},
		{"flowLog: flows.jsonl", "drain: 6s", `p.yaml:16:1: key "drain" is on line 14 already`},
		{"# a sidecar", "a: b: c", "p.yaml:1:5: not valid YAML"},
		{"log: {level: debug, format: json}", "---\nlog: {}", "more than one YAML document"},
		{"tunnel: {", "tunnel: {port: 3, ", `p.yaml:5:10: unknown key "port" in tunnel`},
	} {
		text := strings.Replace(full, c.from, c.to, 1)
		require.NotEqual(t, full, text, c.from)
		_, err := parse("p.yaml", []byte(text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s → %s:\ngot  %v\nwant %s", c.from, c.to, err, c.want)
		}
	}
}

// TestEveryMistakeIsNamed also holds across reading and checking: an unknown
// key hides nothing, and nothing is told twice.
func TestEveryMistakeIsNamed(t *testing.T) {
	for text, want := range map[string]string{
		"app: {http: 8080}\ndrain: -1s\n":                        "p.yaml|p.yaml:1:13|p.yaml:2:8",
		"foo: 1\ndrain: soon\nlog: {level: loud}\n":              "p.yaml|p.yaml:1:1|p.yaml:2:8|p.yaml:3:14",
		"controlplane: a:1\nidle: -1s\n":                         "p.yaml:1:1|p.yaml:2:7",
		"controlPlane: [a]\noutbound: [x, {listen: y, to: z}]\n": "p.yaml:1:15|p.yaml:2:12|p.yaml:2:24|p.yaml:2:31",
	} {
		_, err := parse("p.yaml", []byte(text))
		var mistakes configfile.Mistakes
		require.ErrorAs(t, err, &mistakes)
		var got []string
		for _, m := range mistakes {
			place, _, _ := strings.Cut(m.Error(), ": ")
			got = append(got, place)
		}
		if strings.Join(got, "|") != want {
			t.Errorf("%q: got %v, want %s:\n%v", text, got, want, err)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none.yaml")); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("missing file: got %v", err)
	}
	huge := filepath.Join(dir, "huge.yaml")
	require.NoError(t, os.WriteFile(huge, make([]byte, configfile.MaxSize+1), 0o600))
	if _, err := Load(huge); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("huge file: got %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte("controlPlane: a:1\noutbound: [{listen: unix:x, to: 'a:b'}]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parse("p.yaml", data)
		if err != nil {
			if !strings.Contains(err.Error(), "p.yaml") {
				t.Errorf("the error does not name the file: %v", err)
			}
			return
		}
		for name, addr := range c.App { // what passed must be usable
			if _, err := app(name, addr); err != nil {
				t.Error(err)
			}
		}
		if m := c.check(); len(m) > 0 {
			t.Errorf("accepted, but: %v", m)
		}
	})
}

// TestManualHasEveryKey compares the table of keys in the manual with what is
// read.
func TestManualHasEveryKey(t *testing.T) {
	manual, err := os.ReadFile("../../docs/sidecar.md")
	require.NoError(t, err)
	_, section, _ := strings.Cut(string(manual), "\n## proxy.yaml\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var got []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(section, -1) {
		got = append(got, row[1])
	}
	if want := configfile.Keys(Config{}); !slices.Equal(got, want) {
		t.Errorf("docs/sidecar.md has\n%q, want\n%q", got, want)
	}
}
