package attest

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/peercred"
)

func TestProcessSelectors(t *testing.T) {
	var i peercred.Inspector
	p, err := i.PID(t.Context(), os.Getpid())
	require.NoError(t, err)
	defer p.Close()
	s := ProcessSelectors(p)
	require.NoError(t, CheckProcess(s))
	if got, want := s["uid"], strconv.Itoa(os.Geteuid()); len(got) != 1 || got[0] != want {
		t.Errorf("uid %v, want %s", got, want)
	}
	if len(s["sha256"]) != 1 || len(s["path"]) != 1 || s["path"][0] != p.Path {
		t.Errorf("got %v", s)
	}
	// What cannot travel is left out, never changed.
	odd := ProcessSelectors(&peercred.Process{UID: 1, Path: "/a\nb", User: "x/y", GroupNames: []string{"ok", "no\x00"}})
	if len(odd["path"])+len(odd["user"]) != 0 || len(odd["group"]) != 1 {
		t.Errorf("got %v", odd)
	}
	require.NoError(t, CheckProcess(odd))
}

func TestD4CheckProcess(t *testing.T) {
	with := func(key string, values ...string) Selectors {
		s := Selectors{"uid": {"1000"}, "gid": {"1000"}}
		s[key] = values
		return s
	}
	hash := strings.Repeat("a", 64)
	for name, s := range map[string]Selectors{
		"all": {"uid": {"0"}, "gid": {"4294967295"}, "user": {"root"}, "group": {"a", "b"}, "path": {"/usr/bin/x y"}, "sha256": {hash},
			"unit": {"nginx.service"}, "container": {hash}, "cgroup": {"/system.slice/nginx.service"}},
		"least": with("uid", "7"),
	} {
		if err := CheckProcess(s); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	groups := make([]string, maxProcessValues)
	for i := range groups {
		groups[i] = "g"
	}
	for name, s := range map[string]Selectors{
		"nothing":      {},
		"no gid":       {"uid": {"1"}},
		"two uids":     with("uid", "1", "2"),
		"no value":     with("path"),
		"leading zero": with("uid", "01"),
		"sign":         with("uid", "-1"),
		"large":        with("gid", "4294967296"),
		"unknown key":  with("namespace", "shop"),
		"claim":        with("claims.sub", "x"),
		"short hash":   with("sha256", hash[1:]),
		"upper case":   with("sha256", strings.Repeat("A", 64)),
		"relative":     with("path", "bin/x"),
		"line break":   with("path", "/x\n"),
		"not UTF-8":    with("user", "\xff"),
		"empty":        with("user", ""),
		"slash":        with("unit", "a/b.service"),
		"long":         with("path", "/"+strings.Repeat("a", maxProcessValue)),
		"many":         with("group", groups...),
	} {
		if err := CheckProcess(s); !errors.Is(err, ErrBadEvidence) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func FuzzCheckProcess(f *testing.F) {
	f.Add("uid", "1000", "path", "/bin/x")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		s := Selectors{"uid": {"0"}, "gid": {"0"}}
		s[k1] = []string{v1}
		s[k2] = []string{v2}
		if CheckProcess(s) != nil {
			return
		}
		for _, v := range []string{v1, v2} {
			if strings.ContainsAny(v, "\x00\n\r") || v == "" {
				t.Errorf("accepted %q", v)
			}
		}
	})
}
