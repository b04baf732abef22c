//go:build unix

package policy

import (
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// timeCPU reports the processor time of each operation from now to the end of the
// benchmark as cpu-ns/op: on a machine with other work to do, ns/op is mostly
// waiting.
func timeCPU(b *testing.B) {
	start := cpuTime(b)
	b.Cleanup(func() { b.ReportMetric(float64(cpuTime(b)-start)/float64(b.N), "cpu-ns/op") })
}

// cpuTime is what this process has used so far.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkDecide asks the same question again and again.
func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{10, 1000, 100_000} {
		rs := NewRuleset(manyRules(n))
		for _, name := range []string{"exact", "pattern", "deny", "nobody"} {
			b.Run(fmt.Sprintf("rules=%d/%s", n, name), func(b *testing.B) {
				b.ReportAllocs()
				q := manyRequests[name].q
				timeCPU(b)
				for b.Loop() {
					rs.Decide(q)
				}
			})
		}
	}
}

// BenchmarkDecideSpread asks about every source that the rules name, in random
// order, so that most of what a question needs is in no cache of the processor.
func BenchmarkDecideSpread(b *testing.B) {
	for _, n := range []int{10, 1000, 100_000} {
		rules := manyRules(n)
		rs := NewRuleset(rules)
		rng := rand.New(rand.NewPCG(1, 2))
		var questions []Request
		for len(questions) < 100_000 {
			for _, i := range rng.Perm(n) {
				src := strings.Clone(strings.Replace(rules[i].From[0].String(), "*", "x", 1))
				questions = append(questions, Request{Src: spiffeid.RequireFromString(src), Dst: id("/shop/payments"), Port: 8080})
			}
		}
		b.Run(fmt.Sprintf("rules=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			timeCPU(b)
			for b.Loop() {
				if rs.Decide(questions[i]).Rule.IsZero() {
					b.Fatalf("no rule decided about %+v", questions[i])
				}
				if i++; i == len(questions) {
					i = 0
				}
			}
		})
	}
}

// BenchmarkCompare100k compares meshes of 1,000 workloads and 100,000 rules that
// differ in one.
func BenchmarkCompare100k(b *testing.B) {
	rules := meshRules(1000, 100)
	var workloads []CompiledWorkload
	for i := range 1000 {
		workloads = append(workloads, CompiledWorkload{
			Workload: Workload{Name: fmt.Sprintf("w%d", i), Ports: []Port{{Name: "http", Number: 80}}},
			ID:       id(fmt.Sprintf("/w/%d", i)),
		})
	}
	slices.SortFunc(workloads, func(a, b CompiledWorkload) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	before, after := newRuleset(slices.Clone(rules), workloads, nil), newRuleset(rules[1:], workloads, nil)
	for b.Loop() {
		if d := Compare(before, after); len(d.Lost) != 1 || len(d.Gained) != 0 {
			b.Fatal(d)
		}
	}
}

func BenchmarkNewRuleset100k(b *testing.B) {
	rules := manyRules(100_000)
	for b.Loop() {
		NewRuleset(rules)
	}
}

// BenchmarkFor100k slices a mesh of 10,000 workloads and 100,000 rules.
func BenchmarkFor100k(b *testing.B) {
	rs := newRuleset(meshRules(10_000, 10), nil, nil)
	self := id("/w/7")
	for b.Loop() {
		rs.For(self)
	}
}

// meshFiles writes a mesh: each workload has a label and a policy with so many
// rules, by name, by label and by pattern.
func meshFiles(workloads, each int) map[string][]byte {
	const perFile = 100
	files := map[string][]byte{}
	var out strings.Builder
	for w := range workloads {
		fmt.Fprintf(&out, `---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: w%d, labels: {team: t%d}}
spec: {id: /t%d/w%d, ports: [{name: http, port: 8080, protocol: http}], attest: [{kind: join-token}]}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: p%d}
spec:
  to: {workload: w%d}
  allow:
`, w, w%(workloads/10), w%(workloads/10), w, w, w)
		for k := range each {
			from := fmt.Sprintf("{workload: w%d}", (w+k+1)%workloads)
			switch k % 10 {
			case 8:
				from = fmt.Sprintf("{labels: {team: t%d}}", (w+k)%(workloads/10))
			case 9:
				from = fmt.Sprintf("{id: /t%d/*}", (w+k)%(workloads/10))
			}
			fmt.Fprintf(&out, "    - {from: [%s], ports: [http]}\n", from)
		}
		if w%perFile == perFile-1 || w == workloads-1 {
			files[fmt.Sprintf("f%d.yaml", w/perFile)] = []byte(out.String())
			out.Reset()
		}
	}
	return files
}

// BenchmarkCompileMesh reads and compiles 10,000 workloads and 100,000 rules.
// peak-MiB is the most memory that the process held meanwhile, the files included.
func BenchmarkCompileMesh(b *testing.B) {
	files := meshFiles(10_000, 10)
	set, err := ParseFiles("", files)
	if err != nil {
		b.Fatal(err)
	}
	compile := func(b *testing.B, set *Set) {
		if rs, err := Compile(td, []*Set{set}); err != nil || len(rs.Rules()) != 100_000 {
			b.Fatalf("got %d rules, %v", len(rs.Rules()), err)
		}
	}
	b.Run("compile", func(b *testing.B) {
		watchPeak(b)
		timeCPU(b)
		for b.Loop() {
			compile(b, set)
		}
	})
	b.Run("parse-compile", func(b *testing.B) {
		watchPeak(b)
		timeCPU(b)
		for b.Loop() {
			set, err := ParseFiles("", files)
			if err != nil {
				b.Fatal(err)
			}
			compile(b, set)
		}
	})
}

// watchPeak reports the most memory that the process held from now to the end of
// the benchmark as peak-MiB.
func watchPeak(b *testing.B) {
	debug.FreeOSMemory()
	stop, peak := make(chan struct{}), make(chan uint64)
	go func() {
		sample := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
		most := uint64(0)
		for {
			metrics.Read(sample)
			most = max(most, sample[0].Value.Uint64()-sample[1].Value.Uint64())
			select {
			case <-stop:
				peak <- most
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	b.Cleanup(func() {
		close(stop)
		b.ReportMetric(float64(<-peak)/(1<<20), "peak-MiB")
	})
}
