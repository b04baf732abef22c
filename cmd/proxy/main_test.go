package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	bad, good := filepath.Join(dir, "bad.yaml"), filepath.Join(dir, "good.yaml")
	require.NoError(t, os.WriteFile(bad, []byte("controlPlane: 127.0.0.1:1\nport: 3\n"), 0o600))
	require.NoError(t, os.WriteFile(good, []byte("controlPlane: 127.0.0.1:1\ntunnel: {listen: \"127.0.0.1:0\"}\n"), 0o600))
	host := filepath.Join(dir, "agent.yaml")
	require.NoError(t, os.WriteFile(host, []byte("controlPlane: 127.0.0.1:1\n"), 0o600))
	for _, c := range []struct {
		args           string
		code           int
		stdout, stderr string
	}{
		{"", 2, "", "usage: sallyport-proxy run"},
		{"help", 0, "usage: sallyport-proxy run", ""},
		{"--help", 0, "usage: sallyport-proxy run", ""},
		{"version", 0, "sallyport-proxy dev\n", ""},
		{"exec -- app", 2, "", "sallyport-proxy: exec is not part of this version"},
		{"agent", 2, "", "reading configuration: open agent.yaml: no such file"},
		{"agent --config " + bad, 2, "", bad + `:2:1: unknown key "port"`},
		{"agent -config " + host, 1, "", "no join token"},
		{"redirect", 2, "", "sallyport-proxy: redirect is not part of this version"},
		{"wait", 2, "", "sallyport-proxy: wait is not part of this version"},
		{"dance", 2, "", `sallyport-proxy: unknown command "dance"`},
		{"run --port 3", 2, "", "flag provided but not defined: -port"},
		{"run -config " + good + " now", 2, "", `unexpected argument "now"`},
		{"run --help", 0, "", "usage: sallyport-proxy run"},
		{"run --config /no/such/file", 2, "", "reading configuration: open /no/such/file: no such file"},
		{"run --config " + bad, 2, "", bad + `:2:1: unknown key "port"`},
		{"run -config " + good, 1, "", "no join token"},
	} {
		var stdout, stderr strings.Builder
		code := run(context.Background(), strings.Fields(c.args), &stdout, &stderr)
		if code != c.code || !strings.HasPrefix(stdout.String(), c.stdout) || !strings.Contains(stderr.String(), c.stderr) {
			t.Errorf("%q: got %d, %q, %q\nwant %d, %q, %q", c.args, code, &stdout, &stderr, c.code, c.stdout, c.stderr)
		}
		if strings.Contains(stderr.String(), "goroutine ") {
			t.Errorf("%q: a stack trace", c.args)
		}
	}
}
