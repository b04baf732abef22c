package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
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

// TestCompletionKnowsTheCommandLine: each verb that there is, and its flags, are
// offered, and nothing else.
func TestCompletionKnowsTheCommandLine(t *testing.T) {
	ask := func(args ...string) []string {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), append([]string{"__completeNoDesc"}, args...), &stdout, &stderr); code != 0 {
			t.Fatalf("%q: %d, %s", args, code, &stderr)
		}
		words := strings.Fields(stdout.String())
		slices.Sort(words)
		return words
	}
	want := []string{":4"}
	for _, m := range regexp.MustCompile(`(?m)sallyport-proxy ([a-z]+)( .*)?$`).FindAllStringSubmatch(strings.SplitAfter(usage, "\n\n")[0], -1) {
		want = append(want, m[1])
		flags := regexp.MustCompile(`--[a-z]+`).FindAllString(m[2], -1)
		if got := ask(m[1], "-"); !slices.Equal(slices.DeleteFunc(got, func(w string) bool { return !strings.HasPrefix(w, "--") || w == "--help" }), flags) {
			t.Errorf("%s: got flags %q, want %q", m[1], got, flags)
		}
	}
	slices.Sort(want)
	if got := ask(""); !slices.Equal(got, want) {
		t.Errorf("got %q, want the verbs of the usage %q", got, want)
	}
	if got := ask("run", "-c"); !slices.Contains(got, "-config") {
		t.Errorf("one dash: got %q", got)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), []string{"completion", shell}, &stdout, &stderr); code != 0 || !strings.Contains(stdout.String(), "sallyport-proxy") {
			t.Errorf("%s: %d, %s%s", shell, code, &stdout, &stderr)
		}
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"completion", "tcsh"}, &stdout, &stderr); code != 2 || !strings.Contains(stderr.String(), "tcsh") {
		t.Errorf("tcsh: %d, %s", code, &stderr)
	}
}
