package policy

import (
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"
)

const companyDir = "../../examples/company/policy"

// TestCompany holds the large example to what it says of itself: its size, that its
// tests pass, and that a team speaks of what is its own only.
func TestCompany(t *testing.T) {
	sets, rules, err := load(os.DirFS(companyDir))
	require.NoError(t, err)
	if report := RunTests(rules, sets); report.Failed() || len(report.Results) < 7 {
		t.Error(report)
	}
	if proof := Prove(rules, sets); proof.Failed() || proof.Invariants != 6 {
		t.Error(proof)
	}
	workloads, policies, names := 0, 0, []string{}
	seen := map[string]int{}
	for _, s := range sets {
		names = append(names, s.Name)
		workloads += len(s.Workloads)
		policies += len(s.Policies)
		seen["External"] += len(s.Externals)
		seen["TrustDomain"] += len(s.TrustDomains)
		seen["TokenIssuer"] += len(s.TokenIssuers)
		for _, d := range s.Defaults {
			if seen["Defaults"]++; d.Until.Year() < 2030 {
				t.Errorf("%s closes before 2030: the example would change by itself", d.Name)
			}
		}
		team := s.Name
		if team == "" {
			team = "platform"
		}
		own := map[string]bool{}
		for _, w := range s.Workloads {
			own[w.Name] = true
			keys := slices.Sorted(maps.Keys(w.Labels))
			if !strings.HasPrefix(w.ID, "/"+team+"/") || w.Labels["team"] != team || !slices.Equal(keys, []string{"env", "team"}) {
				t.Errorf("%s:%d: %s is %s with labels %v", w.File, w.Line, w.Name, w.ID, w.Labels)
			}
			for _, p := range w.Ports {
				seen[string(p.Protocol)]++
			}
		}
		for _, p := range s.Policies {
			if s.Name != "" && !own[p.To.Workload] {
				t.Errorf("%s:%d: %s guards what is not the team's", p.File, p.Line, p.Name)
			}
			seen["deny"] += len(p.Deny)
			for _, e := range slices.Concat(p.Allow, p.Deny) {
				if !e.Since.IsZero() {
					seen["window"]++
				}
			}
		}
	}
	if workloads != 40 || policies != 120 || !slices.Equal(names, []string{"", "billing", "logistics", "storefront"}) {
		t.Errorf("%d workloads and %d policies of %q, want 40 and 120 of three teams", workloads, policies, names)
	}
	for _, what := range []string{"External", "TrustDomain", "TokenIssuer", "Defaults", "tcp", "http", "grpc", "deny", "window"} {
		if seen[what] == 0 {
			t.Errorf("no %s", what)
		}
	}
}

// BenchmarkCompany is what an edit of a file of the large example costs before it is
// applied: both sides are read, tested and compared.
func BenchmarkCompany(b *testing.B) {
	changed := fstest.MapFS{}
	require.NoError(b, fs.WalkDir(os.DirFS(companyDir), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(companyDir + "/" + p)
		if p == "billing/payments.yaml" {
			data = []byte(strings.Replace(string(data), "{workload: checkout}", "{workload: checkout}, {workload: web}", 1))
		}
		changed[p] = &fstest.MapFile{Data: data}
		return err
	}))
	read := func(b *testing.B, fsys fs.FS) ([]*Set, *Ruleset) {
		sets, rules, err := load(fsys)
		require.NoError(b, err)
		return sets, rules
	}
	sets, rules := read(b, os.DirFS(companyDir))
	_, after := read(b, changed)
	if d := Compare(rules, after); len(d.Gained) != 2 {
		b.Fatalf("web gains two requests; got %s", d)
	}
	b.Run("check", func(b *testing.B) {
		for b.Loop() {
			read(b, os.DirFS(companyDir))
		}
	})
	b.Run("test", func(b *testing.B) {
		for b.Loop() {
			RunTests(rules, sets)
		}
	})
	b.Run("prove", func(b *testing.B) {
		for b.Loop() {
			Prove(rules, sets)
		}
	})
	b.Run("diff", func(b *testing.B) {
		for b.Loop() {
			Compare(rules, after)
		}
	})
	b.Run("together", func(b *testing.B) {
		for b.Loop() {
			sets, rules := read(b, os.DirFS(companyDir))
			_, after := read(b, changed)
			RunTests(rules, sets)
			Prove(rules, sets)
			Compare(rules, after)
		}
	})
}
