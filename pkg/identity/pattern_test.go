package identity

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
)

func TestPatternMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, id string
		want        bool
	}{
		{"spiffe://td/a", "spiffe://td/a", true},
		{"spiffe://td/a", "spiffe://td/ab", false},
		{"spiffe://td/a", "spiffe://td/a/b", false},
		{"spiffe://td/a", "spiffe://td2/a", false},
		{"spiffe://td2/a", "spiffe://td/a", false},
		{"spiffe://td", "spiffe://td", true},
		{"spiffe://td", "spiffe://td/a", false},
		{"spiffe://td/*", "spiffe://td/a", true},
		{"spiffe://td/*", "spiffe://td/a/b", false},
		{"spiffe://td/*", "spiffe://td", false},
		{"spiffe://td/*", "spiffe://tdx/a", false},
		{"spiffe://td/*", "spiffe://t/a", false},
		{"spiffe://td/*", "spiffe://te/a", false}, // C7: another trust domain of the same length
		{"spiffe://td/**", "spiffe://te/a/b", false},
		{"spiffe://td/*/b", "spiffe://td/a/b", true},
		{"spiffe://td/*/b", "spiffe://td/a/c", false},
		{"spiffe://td/*/b", "spiffe://td/a", false},
		{"spiffe://td/*/b", "spiffe://td/a/b/c", false},
		{"spiffe://td/a/**", "spiffe://td/a", false},
		{"spiffe://td/a/**", "spiffe://td/a/b", true},
		{"spiffe://td/a/**", "spiffe://td/a/b/c/d", true},
		{"spiffe://td/a/**", "spiffe://td/ab/c", false},
		{"spiffe://td/**", "spiffe://td/a", true},
		{"spiffe://td/**", "spiffe://td", false},
		{"spiffe://td/a/*/**", "spiffe://td/a/b", false},
		{"spiffe://td/a/*/**", "spiffe://td/a/b/c", true},
		{"spiffe://td/a.b/*", "spiffe://td/aXb/c", false}, // A9: a dot is a dot
	} {
		p, err := ParsePattern(c.pattern)
		require.NoError(t, err)
		id := spiffeid.RequireFromString(c.id)
		if got := p.Match(id); got != c.want {
			t.Errorf("%s matches %s: got %v, want %v", c.pattern, c.id, got, c.want)
		}
		if got := naiveMatch(c.pattern, c.id); got != c.want {
			t.Errorf("reference: %s matches %s: got %v, want %v", c.pattern, c.id, got, c.want)
		}
	}
}

func TestPatternZero(t *testing.T) {
	var p Pattern
	if p.Match(ordersID) || p.Match(spiffeid.ID{}) {
		t.Error("the zero pattern matches something")
	}
	if !p.IsZero() || p.String() != "" || p.TrustDomain() != (spiffeid.TrustDomain{}) {
		t.Error("the zero pattern is not empty")
	}
	if _, ok := p.Exact(); ok {
		t.Error("the zero pattern names an ID")
	}
	if ExactPattern(spiffeid.ID{}) != p {
		t.Error("the zero ID's pattern is not the zero pattern")
	}
	all, err := ParsePattern("spiffe://td/**")
	require.NoError(t, err)
	if all.Match(spiffeid.ID{}) {
		t.Error("a wildcard matches the zero ID")
	}
}

func TestPatternRefused(t *testing.T) {
	for _, s := range []string{
		"", "td/a", "/a", "*", "**", "spiffe://", "spiffe:///a", "SPIFFE://td/a", "https://td/a",
		"spiffe://*/a", "spiffe://t*/a", "spiffe://**", "spiffe://td*",
		"spiffe://td/", "spiffe://td//a", "spiffe://td/a/", "spiffe://td/*/", "spiffe://td/**/",
		"spiffe://td/**/a", "spiffe://td/**/**", "spiffe://td/***", "spiffe://td/a*", "spiffe://td/*a", "spiffe://td/a*b",
		"spiffe://td/.", "spiffe://td/../a", "spiffe://td/%2e", "spiffe://td/a?b", "spiffe://td/a#b", "spiffe://td/é",
		"spiffe://TD/a", "spiffe://u@td/a", "spiffe://td:1/a", "spiffe://td/a\x00", "spiffe://td/a\n",
		"spiffe://td/" + strings.Repeat("a", MaxIDLength),
	} {
		if p, err := ParsePattern(s); err == nil {
			t.Errorf("ParsePattern(%q) = %v, want an error", s, p)
		} else if len(err.Error()) > 1000 || strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("ParsePattern(%q): unfit error %q", s, err)
		}
	}
}

func TestPatternExact(t *testing.T) {
	p := ExactPattern(ordersID)
	parsed, err := ParsePattern(ordersID.String())
	require.NoError(t, err)
	if p != parsed {
		t.Errorf("got %#v, want %#v", p, parsed)
	}
	if id, ok := p.Exact(); !ok || id != ordersID {
		t.Errorf("got %v, %v", id, ok)
	}
	if got := p.TrustDomain(); got != shop {
		t.Errorf("got %v, want %v", got, shop)
	}
	wild, err := ParsePattern("spiffe://shop.example/*")
	require.NoError(t, err)
	if id, ok := wild.Exact(); ok {
		t.Errorf("a wildcard is exactly %v", id)
	}
}

func TestPatternMatchDoesNotAllocate(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://shop.example/ns/shop/sa/orders")
	for _, s := range []string{id.String(), "spiffe://shop.example/ns/*/sa/*", "spiffe://shop.example/**"} {
		p, err := ParsePattern(s)
		require.NoError(t, err)
		if n := testing.AllocsPerRun(100, func() { p.Match(id) }); n != 0 {
			t.Errorf("%s: %v allocations", s, n)
		}
	}
}

// naiveMatch is the definition, without care for speed.
func naiveMatch(pattern, id string) bool {
	want, got := strings.Split(pattern, "/"), strings.Split(id, "/") // spiffe: "" TD SEGMENT…
	if last := len(want) - 1; want[last] == "**" {
		if len(got) < len(want) {
			return false
		}
		want, got = want[:last], got[:last]
	}
	if len(want) != len(got) {
		return false
	}
	for i := range want {
		if want[i] != got[i] && (i < 3 || want[i] != "*") {
			return false
		}
	}
	return true
}

// FuzzPatternD2 compares with go-spiffe what is a valid ID, and with the
// definition what matches.
func FuzzPatternD2(f *testing.F) {
	for _, s := range []string{
		"spiffe://td/a", "spiffe://td", "spiffe://td/a/b/c", "spiffe://td/*/b", "spiffe://td/**", "spiffe://td/a/**",
		"spiffe://td/..", "spiffe://td/%2e", "spiffe://td//a", "spiffe://TD/a", "spiffe://u@td/", "spiffe://td/a?q", "spiffe://td/ü", "SPIFFE://td/a",
	} {
		f.Add(s, "spiffe://td/a/b")
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, s, other string) {
		p, err := ParsePattern(s)
		if !strings.Contains(s, "*") {
			_, idErr := spiffeid.FromString(s)
			if valid := idErr == nil && len(s) <= MaxIDLength; valid != (err == nil) {
				t.Fatalf("%q: go-spiffe says %v, ParsePattern says %v", s, idErr, err)
			}
		}
		if err != nil {
			if !p.IsZero() {
				t.Fatalf("%q: refused, yet %v", s, p)
			}
			return
		}
		again, err := ParsePattern(p.String())
		if err != nil || again != p || p.String() != s {
			t.Fatalf("%q does not round-trip: %v, %v", s, again, err)
		}
		id, err := spiffeid.FromString(other)
		if err != nil {
			return
		}
		if got, want := p.Match(id), naiveMatch(s, other); got != want {
			t.Fatalf("%q matches %q: got %v, want %v", s, other, got, want)
		}
		if p.Match(id) && p.TrustDomain() != id.TrustDomain() {
			t.Fatalf("%q matches %q of another trust domain", s, other)
		}
	})
}

func BenchmarkPatternMatch(b *testing.B) {
	id := spiffeid.RequireFromString("spiffe://shop.example/ns/shop/sa/orders")
	p, err := ParsePattern("spiffe://shop.example/ns/*/sa/*")
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		p.Match(id)
	}
}
