package policy

import (
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

// TestOverlapMissesNothing draws entries of few keys and values, and asks every
// piece of evidence that could exist whether it proves two workloads.
func TestOverlapMissesNothing(t *testing.T) {
	keys := []string{"serviceAccount", "podName", "node"}
	values := []string{"a", "b"}
	var universe []Selectors // each key has one of the values, or none
	for n := range 27 {
		s := Selectors{"namespace": {"shop"}}
		for i, key := range keys {
			if v := []int{n % 3, n / 3 % 3, n / 9}[i]; v < len(values) {
				s[key] = []string{values[v]}
			}
		}
		universe = append(universe, s)
	}
	check(t, func(t *rapid.T) {
		set := &Set{}
		for w := range rapid.IntRange(2, 3).Draw(t, "workloads") {
			wl := Workload{Name: fmt.Sprintf("w%d", w), ID: fmt.Sprintf("/w%d", w)}
			for range rapid.IntRange(0, 2).Draw(t, "entries") {
				a := Attest{Kind: Kubernetes, Issuer: rapid.SampledFrom([]string{"", "prod", "test"}).Draw(t, "cluster"), Select: map[string]string{"namespace": "shop"}}
				for _, key := range keys {
					if v := rapid.SampledFrom([]string{"", "", "a", "b"}).Draw(t, key); v != "" {
						a.Select[key] = v
					}
				}
				wl.Attest = append(wl.Attest, a)
			}
			set.Workloads = append(set.Workloads, wl)
		}
		_, err := Compile(td, []*Set{set})
		proved, twice := "", ""
		for _, cluster := range []string{"prod", "test"} {
			for _, s := range universe {
				found := []string{}
				for _, w := range set.Workloads {
					for _, a := range w.Attest {
						if a.Issuer == "" {
							a.Issuer = cluster // whichever is the only one
						}
						if ok, _ := a.Match(Kubernetes, cluster, spiffeid.ID{}, s); ok {
							found = append(found, w.Name)
							break
						}
					}
				}
				if proved = strings.Join(found, " "); len(found) > 1 {
					twice = proved
				}
			}
		}
		if (err != nil) != (twice != "") {
			t.Fatalf("one evidence proves %q; Compile says %v", twice, err)
		}
	})
}

// TestEvidenceLimits refuses evidence that would take for ever to compare.
func TestEvidenceLimits(t *testing.T) {
	set := &Set{}
	for i := range MaxForms + 1 {
		set.Workloads = append(set.Workloads, Workload{Name: fmt.Sprintf("w%d", i), ID: fmt.Sprintf("/w/%d", i), Attest: []Attest{
			{Kind: OIDC, Issuer: "x", Select: map[string]string{fmt.Sprintf("claims.c%d", i): "x"}},
		}})
	}
	if _, err := Compile(td, []*Set{set}); err == nil || !strings.Contains(err.Error(), "attest entries of more than 200 forms") {
		t.Errorf("got %v", err)
	}
	set = &Set{Workloads: []Workload{{Name: "w", ID: "/w", Attest: []Attest{{Kind: Unix, Via: make([]string, MaxAttest+1)}}}}}
	if _, err := Compile(td, []*Set{set}); err == nil || !strings.Contains(err.Error(), "more than 200000 attest entries") {
		t.Errorf("got %v", err)
	}
}
