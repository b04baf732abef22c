package sidecar

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
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
		{"tokenFile: token", "tokenfile: token", `p.yaml:3: unknown key "tokenfile"`},
		{"drain: 5s", "drain: soon", "p.yaml:14:"},
		{"drain: 5s", "drain: 5", "p.yaml:14: want a duration with its unit"},
		{"drain: 5s", "drain: -5s", "p.yaml:14: drain: cannot be negative"},
		{"idle: 0s", "idle: -1s", "p.yaml:15: idle: cannot be negative"},
		{"controlPlane: 127.0.0.1:8443", "controlPlane: 127.0.0.1", "p.yaml:2: controlPlane:"},
		{"controlPlane: 127.0.0.1:8443", "controlPlane: :8443", "p.yaml:2: controlPlane:"},
		{"controlPlane: 127.0.0.1:8443", "drain: 1s", "p.yaml:"},
		{"advertise: 10.1.2.3", "advertise: 10.1.2.3:80", "p.yaml:5: tunnel.advertise: want an IP address"},
		{"127.0.0.1:15008", "15008", "p.yaml:5: tunnel.listen:"},
		{"http: 127.0.0.1:8080", "http: 10.0.0.1:8080", "p.yaml:7: app.http: \"10.0.0.1\" is not on this machine's loopback"},
		{"http: 127.0.0.1:8080", "http: \"unix:\"", "p.yaml:7: app.http: unix: without a path"},
		{"http: 127.0.0.1:8080", "http: unix:/" + long, "p.yaml:7: app.http: the path has"},
		{"http: 127.0.0.1:8080", "http: 8080", "p.yaml:7: app.http:"},
		{"\"127.0.0.1:9001\", to", "\"0.0.0.0:9001\", to", "p.yaml:10: outbound[0].listen:"},
		{"unix:/run/stock.sock", "127.0.0.1:9001", "p.yaml:11: outbound[1].listen: the same as outbound[0].listen"},
		{"payments:http", "payments", "p.yaml:10: outbound[0].to:"},
		{"payments:http", "Payments:http", "p.yaml:10: outbound[0].to:"},
		{"payments:http", "payments:0", "p.yaml:10: outbound[0].to: port 0"},
		{"[1000, 1001]", "[]", "p.yaml:12: allowUIDs:"},
		{"[1000, 1001]", "[root]", "p.yaml:12:"},
		{"socket: admin.sock", "socket: " + long, "p.yaml:13: admin.socket: the path has"},
		{"level: debug", "level: loud", "p.yaml:17: log.level: \"loud\""},
		{"format: json", "format: xml", "p.yaml:17: log.format: \"xml\""},
		{"flowLog: flows.jsonl", "drain: 6s", "p.yaml:16:"},
		{"# a sidecar", "a: b: c", "p.yaml:1:"},
		{"log: {level: debug, format: json}", "---\nlog: {}", "more than one YAML document"},
		{"tunnel: {", "tunnel: {port: 3, ", `p.yaml:5: unknown key "port"`},
	} {
		text := strings.Replace(full, c.from, c.to, 1)
		require.NotEqual(t, full, text, c.from)
		_, err := parse("p.yaml", []byte(text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s → %s:\ngot  %v\nwant %s", c.from, c.to, err, c.want)
		}
	}
}

func TestEveryMistakeIsNamed(t *testing.T) {
	_, err := parse("p.yaml", []byte("app: {http: 8080}\ndrain: -1s\n"))
	if err == nil || strings.Count(err.Error(), "p.yaml:") != 3 {
		t.Errorf("got %v, want controlPlane, app.http and drain", err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none.yaml")); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("missing file: got %v", err)
	}
	huge := filepath.Join(dir, "huge.yaml")
	require.NoError(t, os.WriteFile(huge, make([]byte, maxConfig+1), 0o600))
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
