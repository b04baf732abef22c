package configfile

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.yaml.in/yaml/v4"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// colour reads itself, and its own error is shown.
type colour string

func (c *colour) UnmarshalText(b []byte) error {
	if string(b) != "red" {
		return fmt.Errorf("%q is not a colour", b)
	}
	*c = colour(b)
	return nil
}

// node reads itself from YAML.
type node struct{ line int }

func (n *node) UnmarshalYAML(y *yaml.Node) error {
	if y.Kind != yaml.ScalarNode {
		return errors.New("want one word")
	}
	n.line = y.Line
	return nil
}

// config has a field of every kind.
type config struct {
	Name   string            `yaml:"name"`
	Wait   time.Duration     `yaml:"wait"`
	On     bool              `yaml:"on"`
	Count  uint16            `yaml:"count"`
	Offset int               `yaml:"offset"`
	Ratio  float64           `yaml:"ratio"`
	Addr   netip.AddrPort    `yaml:"addr"`
	IP     netip.Addr        `yaml:"ip"`
	Ranges []netip.Prefix    `yaml:"ranges"`
	Colour colour            `yaml:"colour"`
	Node   node              `yaml:"node"`
	Ports  map[string]string `yaml:"ports"`
	Inner  struct {
		Listen string `yaml:"listen"`
		Other  string `yaml:"other"`
	} `yaml:"inner"`
	List []struct {
		Key  string        `yaml:"key"`
		Wait time.Duration `yaml:"wait"`
	} `yaml:"list"`
	Plain   string // its key is "plain"
	Skipped string `yaml:"-"`
}

const full = `# comment
name: "x y"
wait: 30s
on: true
count: 65535
offset: -3
ratio: 0.5
addr: 127.0.0.1:80
ip: ::1
ranges: [10.0.0.0/8, "fd00::/8"]
colour: red
node: here
ports: {http: 8080, a.b: x}
inner: {listen: "a:1"}
list:
  - {key: a, wait: 1s}
  - key: b
Plain-less: no
`

func TestDecode(t *testing.T) {
	var c config
	text := strings.Replace(full, "Plain-less: no", "plain: 1e3", 1)
	require.NoError(t, Decode("c.yaml", []byte("\ufeff"+text), &c))
	got := fmt.Sprint(c.Name, c.Wait, c.On, c.Count, c.Offset, c.Ratio, c.Addr, c.IP, c.Ranges, c.Colour, c.Node.line, c.Ports, c.Inner.Listen, c.List, c.Plain)
	want := "x y30strue65535 -3 0.5 127.0.0.1:80 ::1 [10.0.0.0/8 fd00::/8] red12map[a.b:x http:8080]a:1[{a 1s} {b 0s}]1e3"
	if strings.ReplaceAll(got, " ", "") != strings.ReplaceAll(want, " ", "") {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// TestAbsentAndEmptyKeepTheDefault also holds for what cannot be read.
func TestAbsentAndEmptyKeepTheDefault(t *testing.T) {
	for _, text := range []string{"", "# nothing\n", "---\n", "null\n", "wait:\nname: ~\nports:\ninner:\n", "wait: soon\n", "inner: 3\n", "count: 65536\n", "ip: \"\" # 3\n"} {
		c := config{IP: netip.IPv6Loopback(), Name: "n", Wait: time.Second, Count: 7, Ports: map[string]string{"a": "b"}}
		c.Inner.Listen = "l"
		before := c
		err := Decode("c.yaml", []byte(text), &c)
		if fails := strings.ContainsAny(text, "36") || strings.Contains(text, "soon"); fails != (err != nil) {
			t.Errorf("%q: got %v", text, err)
		}
		if !reflect.DeepEqual(c, before) {
			t.Errorf("%q: got %+v, want %+v", text, c, before)
		}
	}
}

func TestMistakes(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"nmae: x\n", "c.yaml:1:1: unknown key \"nmae\"\n    nmae: x\n    ^\n    hint: did you mean \"name\"?"},
		{"inner:\n  lisen: x\n", "c.yaml:2:3: unknown key \"lisen\" in inner\n      lisen: x\n      ^\n    hint: did you mean \"listen\"?"},
		{"inner: {zzzzz: x}\n", "c.yaml:1:9: unknown key \"zzzzz\" in inner\n    inner: {zzzzz: x}\n            ^\n    hint: keys here are listen, other"},
		{"name: a\nnam: b\n", `hint: keys here are name, wait`}, // name is there and cannot have been meant
		{"list: [{kex: 1}]\n", `c.yaml:1:9: unknown key "kex" in list[0]`},
		{"Skipped: x\n", `unknown key "Skipped"`},
		{"wait: soon\n", "c.yaml:1:7: wait: want a duration such as 30s or 1h, not \"soon\"\n    wait: soon\n          ^"},
		{"wait: 5\n", `c.yaml:1:7: wait: want a duration such as 30s or 1h, not "5"`},
		{"wait: [1s]\n", "c.yaml:1:7: wait: want a duration such as 30s or 1h, not a list"},
		{"on: maybe\n", `c.yaml:1:5: on: want true or false, not "maybe"`},
		{"count: 65536\n", `c.yaml:1:8: count: want a whole number from 0 to 65535, not "65536"`},
		{"count: -1\n", "from 0 to 65535"},
		{"count: {a: b}\n", "not keys with values"},
		{"offset: much\n", `c.yaml:1:9: offset: want a whole number, not "much"`},
		{"ratio: x\n", `ratio: want a number, not "x"`},
		{"addr: 1.2.3.4\n", `c.yaml:1:7: addr: want an IP address with a port such as 127.0.0.1:8080, not "1.2.3.4"`},
		{"ip: host\n", `ip: want an IP address such as 10.0.0.1, not "host"`},
		{"ip: \"\"\n", `ip: want an IP address such as 10.0.0.1, not ""`},
		{"ranges: [10.0.0.0/8, ten]\n", `c.yaml:1:22: ranges[1]: want an address range such as 10.0.0.0/8, not "ten"`},
		{"ranges: 10.0.0.0/8\n", `ranges: want a list such as [a, b], not "10.0.0.0/8"`},
		{"ranges: [~]\n", "ranges[0]: want an address range such as 10.0.0.0/8, not nothing"},
		{"colour: blue\n", `c.yaml:1:9: colour: "blue" is not a colour`},
		{"colour: []\n", "colour: want a single value, not a list"},
		{"node: []\n", "c.yaml:1:7: node: want one word"},
		{"name: {a: b}\n", "name: want a single value, not keys with values"},
		{"ports: [a]\n", "ports: want keys with values, not a list"},
		{"ports: {a: [b]}\n", "ports.a: want a single value, not a list"},
		{"ports:\n  a:\n", "ports.a: want a single value, not nothing"},
		{"ports: {a: b, a: c}\n", "c.yaml:1:15: key \"ports.a\" is on line 1 already\n"},
		{"name: a\n\nname: b\n", "c.yaml:3:1: key \"name\" is on line 1 already\n    name: b\n    ^\n    hint: remove one of them"},
		{"list: [a]\n", `c.yaml:1:8: list[0]: want keys with values, not "a"`},
		{"[a]: b\n", "c.yaml:1:1: want a key, not a list"},
		{"- a\n", "c.yaml:1:1: want keys with values, not a list"},
		{"word\n", `c.yaml:1:1: want keys with values, not "word"`},
		{"name: &x a\n", "c.yaml:1:7: YAML anchors are not supported"},
		{"name: &x a\nplain: *x\n", "c.yaml:2:8: YAML aliases are not supported"},
		{"inner:\n  <<: {listen: a}\n", "c.yaml:2:3: YAML merge keys (<<) are not supported"},
		{"name: !!str 1\n", "c.yaml:1:7: YAML tags are not supported"},
		{"name: a: b\n", "c.yaml:1:8: not valid YAML: "},
		{"name: [\n", "c.yaml:1:7: not valid YAML: "},
		{"inner:\n\tlisten: x\n", "hint: indent with spaces, not with tabs"},
		{"name: \"open\nwait: 1s\n", "c.yaml:1:7: not valid YAML: found unexpected end"},
		{"name: a\n---\nname: b\n", "more than one YAML document"},
		{"name: a\xff\n", "c.yaml:1:8: byte 0xff is not UTF-8 text"},
		{"# ä\nname: a\u2028b\n", "c.yaml:2:8: invisible character U+2028 is not allowed"},
		{"# a\rname: b\n", "c.yaml:1:4: a carriage return without a newline"},
		{"name: ä\nports: {ä: [], b: []}\n", "c.yaml:2:19: ports.b: "}, // columns are characters
		{"a\x00b: x\n", "c.yaml:1:2: invisible character U+0000"},
		{"name: " + strings.Repeat("[", 50) + strings.Repeat("]", 50) + "\n", "c.yaml:1:39: not valid YAML: "},
		{strings.Repeat(" ", MaxSize) + "\n", "c.yaml: more than 1048576 bytes"},
		{strings.Repeat("k", 70) + ": x\n", `unknown key "kkk`},
	} {
		err := Decode("c.yaml", []byte(c.text), new(config))
		var m Mistakes
		if !errors.As(err, &m) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.200q:\ngot  %v\nwant %s", c.text, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "configfile") {
			t.Errorf("%q: the error speaks of Go: %v", c.text, err)
		}
	}
}

func TestAllMistakesAtOnceInOrder(t *testing.T) {
	err := Decode("c.yaml", []byte("zzz: 1\nwait: x\nwait: y\ninner: {q: 1}\nlist:\n  - {wait: z}\n"), new(config))
	var m Mistakes
	require.ErrorAs(t, err, &m)
	var got []string
	for _, one := range m {
		got = append(got, fmt.Sprintf("%d:%d", one.Line, one.Col))
	}
	if want := "1:1 2:7 3:1 4:9 6:12"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s:\n%v", got, want, err)
	}
}

func TestMistakesAreBounded(t *testing.T) {
	var b strings.Builder
	for i := range 30 {
		fmt.Fprintf(&b, "key%d: x\n", i)
	}
	var m Mistakes
	require.ErrorAs(t, Decode("c.yaml", []byte(b.String()), new(config)), &m)
	if len(m) != MaxMistakes+1 || m[0].Line != 1 || m[MaxMistakes].Error() != "c.yaml: and 10 more mistakes" {
		t.Errorf("got %d mistakes, the last: %v", len(m), m[len(m)-1])
	}
}

func TestReport(t *testing.T) {
	const text = "naem: x\nwait: soon\nports: {a.b: 1, a: 2}\nlist:\n  - {key: k}\n  - zzz\ninner: {listen: l}\non:\n"
	bad := errors.New("bad")
	for _, c := range []struct{ key, want string }{
		{"ports.a.b", "c.yaml:3:14: ports.a.b: bad\n    ports: {a.b: 1, a: 2}\n                 ^"},
		{"ports.a", "c.yaml:3:20: ports.a: bad"},
		{"ports.c", "c.yaml:3:8: ports.c: bad"},
		{"list[0].key", "c.yaml:5:11: list[0].key: bad"},
		{"list[0].wait", "c.yaml:5:5: list[0].wait: bad"},
		{"list[9].key", "c.yaml:5:3: list[9].key: bad"},
		{"list[1].key", ""}, // list[1] could not be read
		{"wait", ""},
		{"name", ""}, // naem was meant to be it
		{"inner.listen", "c.yaml:7:17: inner.listen: bad"},
		{"plain", "c.yaml: plain: bad"}, // nowhere
		{"on", "c.yaml:8:"},
	} {
		f, err := Parse("c.yaml", []byte(text))
		require.NoError(t, err)
		f.Decode(new(config))
		before := f.Err().Error()
		f.Report(c.key, bad)
		got := f.Err().Error()
		if c.want == "" && got != before || !strings.Contains(got, c.want) {
			t.Errorf("%s: got\n%s\nwant %q", c.key, got, c.want)
		}
	}
	f, err := Parse("c.yaml", []byte("- a\n"))
	require.NoError(t, err)
	f.Decode(new(config))
	if f.Report("name", bad); strings.Contains(f.Err().Error(), "bad") {
		t.Errorf("a file that could not be read at all: got %v", f.Err())
	}
	f, err = Parse("c.yaml", nil)
	require.NoError(t, err)
	f.Report("name", bad)
	if got := f.Err().Error(); got != "c.yaml: name: bad" {
		t.Errorf("empty file: got %q", got)
	}
}

func TestClosest(t *testing.T) {
	candidates := []string{"tokenFile", "to", "listen", "log"}
	for written, want := range map[string]string{
		"tokenfile": "tokenFile", "TOKENFILE": "tokenFile", "tokneFiel": "tokenFile", "too": "to", "ot": "to",
		"lsiten": "listen", "listenn": "listen", "lo": "to", "": "", "x": "", "unrelated": "", strings.Repeat("x", 99): "",
	} {
		if got := closest(written, candidates); got != want {
			t.Errorf("%q: got %q, want %q", written, got, want)
		}
	}
}

func TestKeys(t *testing.T) {
	want := "name wait on count offset ratio addr ip ranges colour node ports.NAME inner.listen inner.other list[].key list[].wait plain"
	if got := strings.Join(Keys(config{}), " "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(filepath.Join(dir, "none.yaml")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: got %v", err)
	}
	path := filepath.Join(dir, "c.yaml")
	require.NoError(t, os.WriteFile(path, []byte("wait: 1s\n"), 0o600))
	f, err := Open(path)
	require.NoError(t, err)
	var c config
	if f.Decode(&c); f.Err() != nil || c.Wait != time.Second {
		t.Errorf("got %+v, %v", c, f.Err())
	}
}

func TestSnippet(t *testing.T) {
	long := strings.Repeat("a", 300)
	for _, c := range []struct {
		src       string
		line, col int
		want      string
	}{
		{"a\nbcd", 2, 2, "bcd\n ^"},
		{"\tx\r\n", 1, 2, " x\n ^"},
		{"a\x1bb", 1, 3, "a?b\n  ^"},
		{"a", 2, 1, ""}, {"a", 0, 1, ""}, {"a", 1, 0, ""},
		{"ab", 1, 9, "ab\n  ^"},
		{long, 1, 1, strings.Repeat("a", snippetWidth) + "…\n^"},
		{long, 1, 200, strings.Repeat("a", snippetWidth) + "…\n" + strings.Repeat(" ", 75) + "^"},
	} {
		if got := Snippet([]byte(c.src), c.line, c.col); got != c.want {
			t.Errorf("%.20q %d:%d: got %q, want %q", c.src, c.line, c.col, got, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte("list: [{key: [}]\n"))
	f.Add([]byte("name: \"a\nb\"\n? [x]\n: y\n"))
	f.Add([]byte("ports: {a: &b c, d: *b, <<: {}}\n---\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var c config
		err := Decode("c.yaml", data, &c)
		if err == nil { // then the library, less strict, reads the same
			var loose config
			if err := yaml.Load(data, &loose); err == nil && fmt.Sprint(loose) != fmt.Sprint(c) {
				t.Errorf("got  %+v\nwant %+v", c, loose)
			}
			return
		}
		var m Mistakes
		if !errors.As(err, &m) || len(m) == 0 {
			t.Fatalf("got %T: %v", err, err)
		}
		lines := 1 + strings.Count(string(data), "\n")
		for _, one := range m {
			if one.File != "c.yaml" || one.Line > lines || one.Line > 0 && (one.Col < 1 || one.Snippet == "") {
				t.Errorf("%d lines, got %+v", lines, one)
			}
			if strings.Contains(one.Msg, "configfile") && !strings.Contains(string(data), "configfile") {
				t.Errorf("speaks of Go: %s", one.Msg)
			}
		}
	})
}
