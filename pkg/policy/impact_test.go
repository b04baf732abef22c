package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

const impactFiles = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: payments, labels: {app: payments}}
spec: {ports: [{name: http, port: 8080, protocol: http}, {name: raw, port: 7000, protocol: tcp}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: orders, labels: {team: sales}}
spec: {}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: web, labels: {team: sales}}
spec: {}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: batch, labels: {team: night}}
spec: {}
---
apiVersion: sallyport.dev/v1
kind: External
metadata: {name: mail}
spec: {host: mail.example, port: 25, protocol: tcp, tls: false}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: pay}
spec:
  to: {workload: payments}
  allow:
    - {from: [{workload: orders}], ports: [raw]}
    - {from: [{workload: batch}], ports: [raw], until: 2026-11-01T00:00:00Z}
    - {from: [{workload: web}], ports: [http], http: [{methods: [GET], paths: [/a]}]}
    - {from: [{workload: web}], ports: [raw]}
    - {from: [{workload: web}], ports: [raw], since: 2027-01-01T00:00:00Z}
  deny:
    - {from: [{workload: batch}], ports: [http]}
`

func impactRules(t *testing.T, more string) *Ruleset {
	t.Helper()
	_, rs, err := load(fstest.MapFS{"a.yaml": {Data: []byte(impactFiles + more)}})
	require.NoError(t, err)
	return rs
}

func TestImpact(t *testing.T) {
	rs := impactRules(t, "")
	pay := id("/payments")
	last := time.Date(2026, 11, 20, 8, 0, 0, 0, time.UTC)
	record := func(src string, port uint16, was Effect, n int) Observed {
		return Observed{Request: Request{Src: id(src), Dst: pay, Port: port}, Effect: was, Would: was, Reporter: pay, Time: last, Count: n}
	}
	request := record("/web", 8080, Allow, 3)
	request.HTTP = &HTTPRequest{Method: "GET", Path: "/b"}
	told := record("/batch", 7000, Allow, 9)
	told.Reporter = id("/batch")
	outside := Observed{Request: Request{Src: id("/web"), Dst: External{Name: "mail"}.ID(td), Port: 25}, Effect: Allow, Reporter: id("/web"), Time: last}
	got := ImpactOf(rs, last, []Observed{
		record("/orders", 7000, Allow, 5), record("/orders", 7000, Deny, 2), record("/batch", 7000, Allow, 4), record("/batch", 7000, Allow, 1),
		record("/web", 8080, Allow, 6), request, told, outside,
	})
	want := `would be refused:
  batch → payments:raw (7000): 5 times, last 2026-11-20T08:00:00Z (no rule)
  web → /external/mail:tcp (25): 1 times, last 2026-11-20T08:00:00Z (no rule)
  web → payments:http (8080) GET /b: 3 times, last 2026-11-20T08:00:00Z (no rule)
would be allowed:
  orders → payments:raw (7000): 2 times, last 2026-11-20T08:00:00Z (pay a.yaml:32)
unknown: rules look at requests that were not recorded:
  web → payments:http (8080): 6 times, last 2026-11-20T08:00:00Z (no rule)
5 records stay as they are; 9 were not of the destination's own sidecar and do not count
allows that match no record:
  pay (a.yaml:33)
  pay (a.yaml:35)
`
	if got.String() != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// An impact is what Decide says, for whatever was recorded.
func TestImpactIsDecide(t *testing.T) {
	check(t, func(t *rapid.T) {
		rs := NewRuleset(rapid.SliceOfN(genAnyRule, 0, 8).Draw(t, "rules"))
		at := epoch.Add(time.Duration(rapid.IntRange(0, 8).Draw(t, "moment")) * 30 * time.Minute)
		var records []Observed
		want := map[Effect]int{}
		same := 0
		for range rapid.IntRange(0, 20).Draw(t, "n") {
			q := genRequest.Draw(t, "request")
			if q.Dst.IsZero() {
				continue
			}
			o := Observed{Request: q, Effect: rapid.SampledFrom([]Effect{Deny, Allow}).Draw(t, "was"), Reporter: q.Dst}
			records = append(records, o)
			if d := reference(rs.At(at).Rules(), q); d.Effect == o.Effect {
				same++
			} else {
				want[d.Effect]++
			}
		}
		got := ImpactOf(rs, at, records)
		count := func(list []Change) (n int) {
			for _, c := range list {
				n += c.Count
			}
			return n
		}
		if got.Same != same || count(got.Allowed) != want[Allow] || count(got.Refused) != want[Deny] || count(got.Unknown) != want[Inspect] {
			t.Fatalf("got %s, want %d the same and %v", got, same, want)
		}
	})
}

func TestSuggest(t *testing.T) {
	const door = `---
apiVersion: sallyport.dev/v1
kind: Defaults
metadata: {name: door}
spec: {to: {workload: payments}, audit: {until: 2027-01-01T00:00:00Z}}
`
	rs := impactRules(t, door)
	last := time.Date(2026, 11, 20, 8, 0, 0, 0, time.UTC)
	var records []Observed
	see := func(src string, port uint16, method, path string) {
		o := Observed{Request: Request{Src: id(src), Dst: id("/payments"), Port: port}, Effect: Allow, Would: Deny, Reporter: id("/payments"), Time: last}
		if method != "" {
			o.HTTP = &HTTPRequest{Method: method, Path: path}
		}
		records = append(records, o)
	}
	see("/batch", 7000, "", "")
	see("/stranger", 7000, "", "")
	for n := range 10 {
		see("/orders", 8080, "GET", fmt.Sprintf("/v1/charges/%d", n))
		see("/web", 8080, "GET", fmt.Sprintf("/v1/charges/%d", n))
	}
	see("/orders", 8080, "POST", "/v1/charges")
	see("/orders", 8080, "GET", "/v1/health")
	lie := Observed{Request: Request{Src: id("/batch"), Dst: id("/payments"), Port: 8080}, Effect: Allow, Would: Deny, Reporter: id("/batch"), Time: last}
	records = append(records, lie)
	got := string(SuggestionFile(Suggest(rs, last, records)))
	want := `apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: seen-payments}
spec:
  to: {workload: payments}
  allow:
    # seen 2 times, last 2026-11-20T08:00:00Z
    - from: [{workload: batch}, {id: "/stranger"}]
      ports: [raw]
    # seen 22 times, last 2026-11-20T08:00:00Z
    - from: [{labels: {team: "sales"}}]
      ports: [http]
      http:
        - {methods: [POST], paths: ["/v1/charges"]}
        - {methods: [GET], paths: ["/v1/charges/*", "/v1/health"]}
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// With the suggestions and without the door, all of it is allowed.
	after := impactRules(t, "---\n"+got)
	for _, o := range records {
		if d := after.Decide(o.Request); o.Reporter == o.Dst && d.Would != Allow {
			t.Errorf("%v (%v) is not allowed by what was suggested: %+v", o.Request, o.HTTP, d)
		}
	}
	if more := Suggest(after, last, records); len(more) > 0 {
		t.Errorf("more is suggested: %+v", more)
	}
	if none := Suggest(rs, last, slices.DeleteFunc(slices.Clone(records), func(o Observed) bool { return o.Would == Deny })); len(none) > 0 {
		t.Errorf("suggested for nothing: %+v", none)
	}
	if strings.Contains(got, "127.0.0.1") {
		t.Error("an address")
	}
}

// A port that is declared no longer, or a workload that goes, refuses what came there,
// whatever the rules say.
func TestImpactOfWhatIsGone(t *testing.T) {
	const files = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: web}
spec: {ports: [{name: http, port: 80, protocol: http}]}
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: cli}
spec: {}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: p}
spec: {to: {id: /**}, allow: [{from: [{workload: cli}], ports: [all]}]}
`
	web := spiffeid.RequireFromPath(td, "/web")
	record := Observed{
		Request: Request{Src: spiffeid.RequireFromPath(td, "/cli"), Dst: web, Port: 80}, Effect: Allow, Reporter: web,
	}
	for name, c := range map[string]struct {
		from, to string
		refused  int
	}{
		"as before":    {"", "", 0},
		"another port": {"port: 80,", "port: 8081,", 1},
		"another name": {"name: web}", "name: other}", 1},
	} {
		set, err := ParseFiles("", map[string][]byte{"a.yaml": []byte(strings.Replace(files, c.from, c.to, 1))})
		require.NoError(t, err)
		rs, err := Compile(td, []*Set{set})
		require.NoError(t, err)
		if i := ImpactOf(rs, time.Now(), []Observed{record}); len(i.Refused) != c.refused || i.Same != 1-c.refused {
			t.Errorf("%s: got\n%s", name, i)
		}
	}
}

// Rules on one line are told apart by nobody: while one of them has not begun, the
// line stays.
func TestImpactKeepsALineThatHasNotBegun(t *testing.T) {
	const files = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: web}
spec: {ports: [{name: http, port: 80, protocol: http}]}
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: p}
spec:
  to: {workload: web}
  allow:
    - {from: [{id: /a}], ports: [http]}
    - {from: [{id: /b}], ports: [http], since: 2090-01-01T00:00:00Z}
`
	for name, c := range map[string]struct {
		files  string
		unused int
	}{
		"two lines": {files, 1},
		"one line":  {strings.Replace(files, "allow:\n    - {from: [{id: /a}], ports: [http]}\n    - ", "allow: [{from: [{id: /a}], ports: [http]}, ", 1), 0},
	} {
		if name == "one line" {
			c.files = strings.TrimSuffix(c.files, "\n") + "]\n"
		}
		set, err := ParseFiles("", map[string][]byte{"a.yaml": []byte(c.files)})
		require.NoError(t, err)
		rs, err := Compile(td, []*Set{set})
		require.NoError(t, err)
		if i := ImpactOf(rs, time.Now(), nil); len(i.Unused) != c.unused {
			t.Errorf("%s: got unused %v, want %d", name, i.Unused, c.unused)
		}
	}
}

// Suggested policies have names of their own, whatever their destinations are called.
func TestSuggestedNamesDiffer(t *testing.T) {
	to := func(name, path string, template bool) Suggestion {
		return Suggestion{To: CompiledWorkload{Workload: Workload{Name: name}, ID: spiffeid.RequireFromPath(td, path), Template: template}, Ports: []string{"http"}, From: []Selector{{ID: "/a"}}}
	}
	file := string(SuggestionFile([]Suggestion{
		to("bank", "/bank", false), to("external:bank", "/external/bank", false),
		to("cluster", "/ns/Shop_A/sa/x.y", true), to("cluster", "/ns/shop-a/sa/x-y", true),
	}))
	if _, err := ParseFiles("", map[string][]byte{"a.yaml": []byte(file)}); err != nil {
		t.Errorf("%v\n%s", err, file)
	}
	for _, want := range []string{"{name: seen-bank}", "{name: seen-bank-2}", "{name: seen-ns-shop-a-sa-x-y}", "{name: seen-ns-shop-a-sa-x-y-2}"} {
		if !strings.Contains(file, want) {
			t.Errorf("no %s in\n%s", want, file)
		}
	}
}

// Nobody can be an External.
func TestExternalsNeverCall(t *testing.T) {
	set, err := ParseFiles("", map[string][]byte{"a.yaml": []byte("apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: web}\nspec: {ports: [{name: http, port: 80, protocol: http}]}\n")})
	require.NoError(t, err)
	rs, err := Compile(td, []*Set{set})
	require.NoError(t, err)
	for _, from := range []string{"external:bank", "/external/bank", td.IDString() + "/external/bank"} {
		if _, err := rs.Ways(WaysQuestion{From: from, Now: time.Now()}); err == nil || !strings.Contains(err.Error(), "never calls") {
			t.Errorf("%s: got %v", from, err)
		}
	}
}
