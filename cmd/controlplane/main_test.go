package main

import (
	"bytes"
	"context"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("dataDirectory: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args string
		code int
		want string
	}{
		{"-version", 0, "sallyport-controlplane dev"},
		{"-help", 0, "-data-dir"},
		{"", 2, "dataDir: required"},
		{"-colour red", 2, "-colour"},
		{"-dev extra", 2, `unexpected argument "extra"`},
		{"-dev -config x", 2, "exclude each other"},
		{"-config " + filepath.Join(dir, "none.yaml"), 2, "none.yaml"},
		{"-config " + bad, 2, "dataDirectory"},
		{"-dev -svid-ttl soon", 2, "-svid-ttl"},
		{"-dev -svid-ttl 900000h", 2, "ca.intermediateTTL"},
		{"-dev -log-level chatty", 2, "log.level"},
		{"-dev -trust-domain Not_A+Domain", 2, "trustDomain"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(context.Background(), strings.Fields(tt.args), &stdout, &stderr)
		if code != tt.code || !strings.Contains(stdout.String()+stderr.String(), tt.want) {
			t.Errorf("%q: code %d, %s%s; want %d and %q", tt.args, code, stdout.String(), stderr.String(), tt.code, tt.want)
		}
	}
}

// TestFlagsOverrideTheFile holds the order in which settings win.
func TestFlagsOverrideTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "controlplane.yaml")
	if err := os.WriteFile(path, []byte("trustDomain: a.example\nlisten: {grpc: \"127.0.0.1:1\"}\ndataDir: d\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, _, err := parse([]string{"-trust-domain", "b.example", "-config", path, "-etcd-endpoints", "x:1,y:2"}, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.TrustDomain != "b.example" || cfg.Listen.GRPC != "127.0.0.1:1" || len(cfg.Etcd.Endpoints) != 2 {
		t.Errorf("got %+v", cfg)
	}
}

// TestCompletionKnowsEveryFlag asks as a shell does.
func TestCompletionKnowsEveryFlag(t *testing.T) {
	ask := func(word string) []string {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), []string{"__completeNoDesc", word}, &stdout, &stderr); code != 0 {
			t.Fatalf("%d, %s", code, stderr.String())
		}
		return strings.Fields(stdout.String())
	}
	all, n := ask("-"), 0
	new(options).flags().VisitAll(func(f *flag.Flag) {
		if n++; !slices.Contains(all, "--"+f.Name) || !slices.Contains(ask("-"+f.Name[:2]), "-"+f.Name) {
			t.Errorf("-%s is not offered: %q, %q", f.Name, all, ask("-"+f.Name[:2]))
		}
	})
	if n < 15 {
		t.Errorf("%d flags", n)
	}
	if got := ask(""); !slices.Contains(got, "completion") {
		t.Errorf("got %q", got)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), []string{"completion", shell}, &stdout, &stderr); code != 0 || !strings.Contains(stdout.String(), "sallyport-controlplane") {
			t.Errorf("%s: %d, %s", shell, code, stderr.String())
		}
	}
}
