package tunnel

import (
	"strings"
	"testing"
)

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]Target{
		"payments.shop.mesh:8080":       {"payments.shop.mesh", 8080},
		"a:1":                           {"a", 1},
		"A-b_c.d:65535":                 {"A-b_c.d", 65535},
		"10.0.0.1:80":                   {"10.0.0.1", 80},
		"[::1]:80":                      {"::1", 80},
		"[2001:db8::1]:443":             {"2001:db8::1", 443},
		strings.Repeat("a", 63) + ":80": {strings.Repeat("a", 63), 80},
	} {
		got, err := ParseTarget(in)
		if got != want || err != nil {
			t.Errorf("%q: got %v, %v; want %v", in, got, err, want)
		}
		if got.String() != in {
			t.Errorf("%q came back as %q", in, got.String())
		}
	}
	for _, in := range []string{
		"", ":", "a", "a:", ":80", "a:0", "a:080", "a:+80", "a:-1", "a:65536", "a:99999999999", "a:8o", "a: 80",
		"a.:80", ".a:80", "a..b:80", "u@a:80", "u:p@a:80", "a/b:80", "a:80/", "a%2eb:80", "a b:80", "a\x00:80", "a\n:80",
		"ä:80", "::1:80", "[::1]", "[::1]80", "[::1:80", "::1]:80", "[]:80", "[a]:80", "[10.0.0.1]:80", "[::1%lo]:80",
		"[0:0::1]:80", "[::FFFF]:80", "127.1:80", "0x7f.1:80", "010.0.0.1:80", "1.2.3.4.5:80", "a.1:80", "http://a:80",
		"*:80", "a,b:80", strings.Repeat("a", 64) + ":80", strings.Repeat("a.", 130) + "a:80",
	} {
		if got, err := ParseTarget(in); err == nil {
			t.Errorf("%q was taken as %v", in, got)
		}
	}
}

func FuzzParseTarget(f *testing.F) {
	for _, s := range []string{"a.b:80", "[::1]:1", "10.0.0.1:80", "u@a:80", "a%2f:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseTarget(s)
		if err == nil && got.String() != s {
			t.Errorf("%q came back as %q", s, got)
		}
	})
}
