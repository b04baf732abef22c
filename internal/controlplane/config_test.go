package controlplane_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/controlplane"
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
	for content, want := range map[string]string{
		"dataDirectory: x\n":                       "dataDirectory",
		"dataDir: [\n":                             path,
		"announce: {ranges: [ten]}\n":              "ten",
		"ca: {svidTTL: soon}\n":                    "soon",
		"dataDir: x\ndataDir: y\n":                 "dataDir",
		"trustDomain: a\nlisten: {gprc: \":1\"}\n": "gprc",
	} {
		write(content)
		if _, err := controlplane.LoadConfig(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want an error that says %q", content, err, want)
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
		"ca.svidTTL":         func(c *controlplane.Config) { c.CA.SVIDTTL = time.Millisecond },
		"ca.intermediateTTL": func(c *controlplane.Config) { c.CA.IntermediateTTL = time.Hour },
		"ca.rootTTL":         func(c *controlplane.Config) { c.CA.RootTTL = 24 * time.Hour },
		"log.level":          func(c *controlplane.Config) { c.Log.Level = "chatty" },
		"log.format":         func(c *controlplane.Config) { c.Log.Format = "xml" },
	} {
		c := controlplane.Dev().WithDefaults()
		require.NoError(t, c.Validate())
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want an error that names %s", err, want)
		}
	}
}
