package controlplane_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/configfile"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
)

func TestLoadConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "controlplane.yaml")
	write := func(content string) { require.NoError(t, os.WriteFile(path, []byte(content), 0o600)) }
	write("trustDomain: a.example\ndataDir: data\nlisten: {grpc: \"127.0.0.1:1\"}\nca: {svidTTL: 1h}\nannounce: {ranges: [10.0.0.0/8]}\n")
	c, err := controlplane.LoadConfig(path)
	require.NoError(t, err)
	if want := filepath.Join(filepath.Dir(path), "data"); c.DataDir != want {
		t.Errorf("dataDir %q, want %q", c.DataDir, want)
	}
	if c.CA.SVIDTTL != time.Hour || len(c.Announce.Ranges) != 1 {
		t.Errorf("read %+v", c)
	}
	for _, c := range []struct{ content, want string }{
		{"foo: x\n", ":1:1: unknown key \"foo\"\n    foo: x\n    ^\n    hint: keys here are trustDomain, dataDir"},
		{"dataDirectory: x\n", ":1:1: unknown key \"dataDirectory\""},
		{"dataDir: [\n", ":1:10: not valid YAML"},
		{"dataDir: [a]\n", ":1:10: dataDir: want a single value, not a list"},
		{"announce: {ranges: [ten]}\n", ":1:21: announce.ranges[0]: want an address range such as 10.0.0.0/8, not \"ten\""},
		{"ca:\n  svidTTL: soon\n", ":2:12: ca.svidTTL: want a duration such as 30s or 1h, not \"soon\"\n      svidTTL: soon\n               ^"},
		{"dataDir: x\ndataDir: y\n", ":2:1: key \"dataDir\" is on line 1 already"},
		{"trustDomain: a\nlisten: {gprc: \":1\"}\n", ":2:10: unknown key \"gprc\" in listen"},
		{"trustDomain: a\nlisten: {gprc: \":1\"}\n", "hint: did you mean \"grpc\"?"},
		{"foo: x\nca: {rootTTL: 1}\n", ":2:15: ca.rootTTL: want a duration"}, // an unknown key hides nothing
		{"etcd: {endpoints: x}\n", "etcd.endpoints: want a list such as [a, b], not \"x\""},
		{"log: debug\n", ":1:6: log: want keys with values, not \"debug\""},
	} {
		write(c.content)
		_, err := controlplane.LoadConfig(path)
		want := c.want
		if strings.HasPrefix(want, ":") {
			want = path + want
		}
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "controlplane.Config") {
			t.Errorf("%q: got %v\nwant %s", c.content, err, want)
		}
	}
}

func TestValidateNamesTheKey(t *testing.T) {
	for want, change := range map[string]func(*controlplane.Config){
		"dataDir":            func(c *controlplane.Config) { c.DataDir = "" },
		"trustDomain":        func(c *controlplane.Config) { c.TrustDomain = "Not A Domain" },
		"listen.grpc":        func(c *controlplane.Config) { c.Listen.GRPC = "8443" },
		"adminSocket":        func(c *controlplane.Config) { c.AdminSocket = "/" + strings.Repeat("x", 107) },
		"policyDir":          func(c *controlplane.Config) { c.PolicyDir = "/nowhere/at/all" },
		"certFile":           func(c *controlplane.Config) { c.Etcd.CertFile = "x" },
		"https://":           func(c *controlplane.Config) { c.Etcd.CAFile, c.Etcd.Endpoints = "x", []string{"http://a:1"} },
		"ca.svidTTL":         func(c *controlplane.Config) { c.CA.SVIDTTL = time.Millisecond },
		"ca.jwtTTL":          func(c *controlplane.Config) { c.CA.JWTKeyTTL = time.Minute },
		"ca.intermediateTTL": func(c *controlplane.Config) { c.CA.IntermediateTTL = time.Hour },
		"ca.signer \"tpm\"":  func(c *controlplane.Config) { c.CA.Signer = "tpm" },
		"ca.pkcs11.module":   func(c *controlplane.Config) { c.CA.Signer, c.CA.PKCS11.Helper = "pkcs11", "x" },
		"ca.upstream.key":    func(c *controlplane.Config) { c.CA.Signer, c.CA.Upstream.CertFile = "upstream", "x" },
		"not used with":      func(c *controlplane.Config) { c.CA.Upstream.CertFile = "x" },
		"ca.pkcs11: not":     func(c *controlplane.Config) { c.CA.PKCS11.Token = "x" },
		"ca.rootTTL":         func(c *controlplane.Config) { c.CA.RootTTL = 24 * time.Hour },
		"attest.x509pop[1].name \"factory\": is there twice": func(c *controlplane.Config) {
			c.Attest.X509Pop = []attest.X509PopConfig{{Name: "factory", CAFile: "x"}, {Name: "factory", CAFile: "y"}}
		},
		"attest.x509pop[0].name":   func(c *controlplane.Config) { c.Attest.X509Pop = []attest.X509PopConfig{{Name: "A", CAFile: "x"}} },
		"attest.x509pop[0].caFile": func(c *controlplane.Config) { c.Attest.X509Pop = []attest.X509PopConfig{{Name: "a"}} },
		"listen.bundle":            func(c *controlplane.Config) { c.Listen.Bundle = "8444" },
		"listen.web":               func(c *controlplane.Config) { c.Listen.Web = "8445" },
		"web.keyFile":              func(c *controlplane.Config) { c.Listen.Web, c.Web.CertFile = "127.0.0.1:0", "x" },
		"without listen.web":       func(c *controlplane.Config) { c.Web.CertFile, c.Web.KeyFile = "x", "y" },
		"jwtIssuer":                func(c *controlplane.Config) { c.JWTIssuer = "http://a.example" },
		"either workloadAPI":       func(c *controlplane.Config) { c.ExternalIssuer.ID = "/x" },
		"either file or url":       func(c *controlplane.Config) { c.ExternalIssuer.WorkloadAPI = "unix:///x" },
		"unix:///path":             func(c *controlplane.Config) { c.ExternalIssuer.WorkloadAPI = "/x" },
		"externalIssuer.id":        func(c *controlplane.Config) { c.ExternalIssuer.ID = "spiffe://other.example/x" },
		"needs trustDomain":        func(c *controlplane.Config) { c.TrustDomain, c.ExternalIssuer.ID = "", "/x" },
		"profile": func(c *controlplane.Config) {
			c.ExternalIssuer.WorkloadAPI, c.ExternalIssuer.Bundle.URL = "unix:///x", "https://a.example"
		},
		"log.level":  func(c *controlplane.Config) { c.Log.Level = "chatty" },
		"log.format": func(c *controlplane.Config) { c.Log.Format = "xml" },
	} {
		c := controlplane.Dev().WithDefaults()
		require.NoError(t, c.Validate())
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want an error that names %s", err, want)
		}
	}
}

// TestManualHasEveryKey compares the table of keys in the manual with what is
// read.
func TestManualHasEveryKey(t *testing.T) {
	manual, err := os.ReadFile("../../docs/controlplane.md")
	require.NoError(t, err)
	_, section, _ := strings.Cut(string(manual), "\n## controlplane.yaml\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var got []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(section, -1) {
		got = append(got, row[1])
	}
	if want := configfile.Keys(controlplane.Config{}); !slices.Equal(got, want) {
		t.Errorf("docs/controlplane.md has\n%q, want\n%q", got, want)
	}
}
