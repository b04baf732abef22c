package bench

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"
)

// disagreements asks every engine every question.
func disagreements(kind Kind, rules []Rule, questions []Question, engines ...Engine) (allowed int, err error) {
	var errs []error
	var want []bool
	for _, e := range engines {
		if !slices.Contains(e.Kinds, kind) {
			continue
		}
		prepare, err := e.New(kind, rules)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", e.Name, err)
		}
		for i, q := range questions {
			got, err := prepare(q)()
			switch {
			case err != nil:
				return 0, fmt.Errorf("%s, asked about %+v: %w", e.Name, q, err)
			case len(want) <= i:
				want = append(want, got)
				if got {
					allowed++
				}
			case got != want[i]:
				errs = append(errs, fmt.Errorf("%s says %v about %+v, %s %v; rules %+v", e.Name, got, q, engines[0].Name, want[i], rules))
			}
		}
	}
	return allowed, errors.Join(errs...)
}

// smallRules draws rules from few names, so that they meet.
func smallRules(kind Kind, rng *rand.Rand) []Rule {
	pick := func(s ...string) string { return s[rng.IntN(len(s))] }
	rules := make([]Rule, 1+rng.IntN(20))
	for i := range rules {
		rules[i] = Rule{Deny: rng.IntN(4) == 0, From: pick("/a", "/a/b", "/b/c", "/a/b/c"), Port: uint16(1 + rng.IntN(3))}
		if kind == HTTP {
			rules[i].Method = pick("GET", "POST")
			rules[i].Path = pick("/", "/x", "/x/", "/x/y", "/*", "/**", "/x/*", "/x/**", "/x/y/*", "/y/**")
		} else if rng.IntN(3) == 0 {
			rules[i].From = pick("/a/*", "/a/b/*", "/*")
		}
	}
	return rules
}

func smallQuestion(kind Kind, rng *rand.Rand) Question {
	pick := func(s ...string) string { return s[rng.IntN(len(s))] }
	from := pick("/a", "/a/b", "/b/c", "/a/b/c", "/a/x", "/z")
	if kind == Connection {
		return NewQuestion(from, uint16(1+rng.IntN(4)), "", "")
	}
	return NewQuestion(from, 0, pick("GET", "POST", "PUT"), pick("/", "/x", "/x/", "/x/y", "/x/y/", "/x/y/z", "/y", "/y/z/z", "/z"))
}

// TestAgreement holds all engines to one answer, over rules that meet and over those
// that are timed.
func TestAgreement(t *testing.T) {
	engines := append([]Engine{Ours}, Rivals...)
	for _, kind := range both {
		rng := rand.New(rand.NewPCG(1, 2))
		asked, allowed := 0, 0
		ask := func(rules []Rule, questions []Question) {
			n, err := disagreements(kind, rules, questions, engines...)
			if err != nil {
				t.Fatal(err)
			}
			asked, allowed = asked+len(questions), allowed+n
		}
		for range 30 {
			var questions []Question
			for range 70 {
				questions = append(questions, smallQuestion(kind, rng))
			}
			ask(smallRules(kind, rng), questions)
		}
		for _, n := range []int{10, 200} {
			rules := Rules(kind, n)
			ask(rules, Questions(kind, rules, 500, rng))
		}
		if allowed < asked/10 || allowed > asked*9/10 {
			t.Errorf("%s: of %d questions %d were allowed: too much the same", kind, asked, allowed)
		}
		t.Logf("%s: %d questions, %d allowed", kind, asked, allowed)
	}
}

// TestAgreementCanFail gives it engines that are wrong in one way each.
func TestAgreementCanFail(t *testing.T) {
	for name, wrong := range map[string]func(Rule) (Rule, bool){
		"forgets denies":   func(r Rule) (Rule, bool) { return r, !r.Deny },
		"forgets one path": func(r Rule) (Rule, bool) { return r, r.Path != "/x/**" && r.Port != 2 },
		"allows by denying": func(r Rule) (Rule, bool) {
			return Rule{From: r.From, Port: r.Port, Method: r.Method, Path: r.Path}, true
		},
	} {
		for _, kind := range both {
			rng := rand.New(rand.NewPCG(1, 2))
			found := false
			for range 60 {
				var questions []Question
				for range 50 {
					questions = append(questions, smallQuestion(kind, rng))
				}
				bad := Engine{Name: name, Kinds: both, New: func(kind Kind, rules []Rule) (Prepare, error) {
					var kept []Rule
					for _, r := range rules {
						if r, ok := wrong(r); ok {
							kept = append(kept, r)
						}
					}
					return newSallyport(kind, kept)
				}}
				if _, err := disagreements(kind, smallRules(kind, rng), questions, Ours, bad); err != nil {
					found = true
				}
			}
			if !found {
				t.Errorf("an engine that %s about %s is not found out", name, kind)
			}
		}
	}
}

var (
	rounds = flag.Int("rounds", 12, "how often each pair is timed")
	slice  = flag.Duration("slice", 20*time.Millisecond, "processor time of each timing, at least")
)

// BenchmarkPair times us and one rival in turns, in one process, on the same
// questions, in processor time of the whole process: what an engine's garbage costs
// is its cost. A ratio is that of two timings next to each other.
func BenchmarkPair(b *testing.B) {
	for _, kind := range both {
		for _, n := range []int{10, 1000, 100_000} {
			for _, e := range Rivals {
				if slices.Contains(e.Kinds, kind) {
					b.Run(fmt.Sprintf("%s/rules=%d/%s", kind, n, e.Name), func(b *testing.B) { pair(b, kind, n, e) })
				}
			}
		}
	}
}

func pair(b *testing.B, kind Kind, n int, rival Engine) {
	if rival.Most > 0 && n > rival.Most {
		b.Skipf("%s takes more than minutes to be ready for %d rules", rival.Name, n)
	}
	rules := Rules(kind, n)
	questions := Questions(kind, rules, 512, rand.New(rand.NewPCG(3, 4)))
	ours, _ := asks(b, kind, Ours, rules, questions)
	theirs, ready := asks(b, kind, rival, rules, questions)
	checked := min(len(questions), max(1, 5_000_000/n))
	if rival.Remembers {
		checked = len(questions)
	}
	for i := range checked {
		want, err1 := ours[i]()
		got, err2 := theirs[i]()
		if err1 != nil || err2 != nil || got != want {
			b.Fatalf("%+v: we say %v (%v), %s %v (%v)", questions[i], want, err1, rival.Name, got, err2)
		}
	}
	runtime.GC()
	var us, them, ratios []float64
	for range *rounds {
		u, t := timed(b, ours), timed(b, theirs)
		us, them, ratios = append(us, u), append(them, t), append(ratios, t/u)
	}
	for range b.N { // the rounds are what is timed
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(ready.Seconds(), "ready-s")
	b.ReportMetric(median(us), "ours-ns")
	b.ReportMetric(median(them), "theirs-ns")
	b.ReportMetric(slices.Min(ratios), "ratio-min")
	b.ReportMetric(median(ratios), "ratio-median")
}

// asks makes an engine ready, and tells how long that took.
func asks(b *testing.B, kind Kind, e Engine, rules []Rule, questions []Question) ([]func() (bool, error), time.Duration) {
	start := cpuTime(b)
	prepare, err := e.New(kind, rules)
	if err != nil {
		b.Fatalf("%s: %v", e.Name, err)
	}
	ready := cpuTime(b) - start
	var out []func() (bool, error)
	for _, q := range questions {
		out = append(out, prepare(q))
	}
	return out, ready
}

// timed asks questions for a while, and gives the nanoseconds of one.
func timed(b *testing.B, asks []func() (bool, error)) float64 {
	start, n := cpuTime(b), 0
	for batch := 1; ; batch *= 2 {
		for range batch {
			if _, err := asks[n%len(asks)](); err != nil {
				b.Fatal(err)
			}
			n++
		}
		if used := cpuTime(b) - start; used >= *slice {
			return float64(used.Nanoseconds()) / float64(n)
		}
	}
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// cpuTime is what this process has used so far.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
