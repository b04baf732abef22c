package flow

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	alsdata "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func sample(i int) Flow {
	return Flow{
		Request: policy.Request{
			Src:  spiffeid.RequireFromString("spiffe://shop.example/orders"),
			Dst:  spiffeid.RequireFromString("spiffe://shop.example/shop/payments"),
			Port: 8080,
		},
		Decision: policy.Decision{
			Effect: policy.Allow, Would: policy.Allow, Reason: "charging belongs to orders",
			Rule: policy.RuleRef{Set: "billing", Policy: "charge-cards", File: "billing/pay.yaml", Line: 12},
		},
		ID: fmt.Sprintf("%016x", i), Start: time.Date(2026, 3, 4, 5, 6, 7, 89, time.UTC),
		Duration: 1500*time.Microsecond + 7, Side: Inbound, Outcome: Closed, PortName: "http",
		Instance: "i-1", Revision: "1.42", Sent: 17, Received: 4096,
	}
}

func TestJSONForm(t *testing.T) {
	f := sample(0xabc)
	f.Reporter = f.Dst.String()
	got, err := json.Marshal(f)
	require.NoError(t, err)
	want := `{"time":"2026-03-04T05:06:07.000000089Z","id":"0000000000000abc","side":"inbound",` +
		`"src":"spiffe://shop.example/orders","dst":"spiffe://shop.example/shop/payments","port":8080,"port_name":"http",` +
		`"verdict":"allow","would":"allow","rule":"billing/charge-cards","location":"billing/pay.yaml:12",` +
		`"reason":"charging belongs to orders","outcome":"closed","revision":"1.42",` +
		`"reporter":"spiffe://shop.example/shop/payments","instance":"i-1","sent":17,"received":4096,"duration_ms":1.500007}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	var back Flow
	require.NoError(t, json.Unmarshal(got, &back))
	if back != f {
		t.Errorf("got  %+v\nwant %+v", back, f)
	}
}

func TestJSONDefaultsToDeny(t *testing.T) {
	var f Flow
	require.NoError(t, json.Unmarshal([]byte(`{"later":"key"}`), &f))
	if f.Effect != policy.Deny || f.Would != policy.Deny {
		t.Errorf("a record without verdict gives %v, %v", f.Effect, f.Would)
	}
}

func TestJSONRefuses(t *testing.T) {
	for _, in := range []string{
		`{"verdict":"maybe"}`, `{"would":"ALLOW"}`, `{"src":"http://x"}`, `{"dst":"spiffe://"}`,
		`{"location":"file"}`, `{"location":"file:-1"}`, `{"location":"f:99999999999"}`,
		`{"duration_ms":1e3}`, `{"duration_ms":-1}`, `{"duration_ms":99999999999999}`, `{"sent":-1}`, `{"received":-1}`,
		`{"port":65536}`, `{"time":"9999-12-31T23:59:59-23:00"}`, `[]`, `{`,
	} {
		var f Flow
		if err := json.Unmarshal([]byte(in), &f); err == nil {
			t.Errorf("%s: got %+v, want an error", in, f)
		}
	}
}

func TestNoTextIsUnbounded(t *testing.T) {
	huge := strings.Repeat("a", 1<<16)
	want := 0
	for key, limit := range map[string]int{
		"src": identity.MaxIDLength, "dst": identity.MaxIDLength, "reporter": identity.MaxIDLength,
		"id": 64, "side": 64, "outcome": 64, "revision": 64, "instance": 64,
		"port_name": 253, "rule": 253, "location": 512, "audited": 253, "audited_location": 512, "reason": 256, "error": 256,
		"verdict": 5, "would": 5, "duration_ms": 20,
	} {
		for _, text := range []string{huge, "spiffe://shop.example/" + huge, "f\u009b2J:1"} {
			var f Flow
			err := json.Unmarshal(fmt.Appendf(nil, `{%q:"%s"}`, key, text), &f)
			if err == nil || len(err.Error()) > 300 || strings.ContainsRune(err.Error(), '\u009b') {
				t.Errorf("%s: got %.300v", key, err)
			}
		}
		// The longest that is allowed, for those that are free texts.
		if w := (wire{}); slices.ContainsFunc(w.texts(), func(b bounded) bool { return b.key == key && b.limit == limit }) {
			want++
		}
	}
	if w := (wire{}); want != len(w.texts()) {
		t.Errorf("%d of %d texts have the limit that is documented", want, len(w.texts()))
	}
	long := sample(1)
	long.Src = spiffeid.RequireFromString("spiffe://shop.example/" + huge)
	if _, err := FromALS(ToALS(long)); err == nil || len(err.Error()) > 300 {
		t.Errorf("a SPIFFE ID of 64 KiB: got %.300v", err)
	}
	long = sample(1)
	long.Error, long.Reason, long.PortName, long.Instance, long.Rule.Policy = huge, huge, huge, huge, huge
	data, err := json.Marshal(long)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(data, &long), "what was written must be readable")
}

func TestVerdictIsNoneWhenNothingWasDecided(t *testing.T) {
	for _, c := range []struct {
		effect  policy.Effect
		outcome Outcome
		want    string
	}{
		{policy.Deny, Failed, "none"}, {policy.Deny, Drained, "none"}, {policy.Deny, Refused, "deny"}, {policy.Deny, Cut, "deny"},
		{policy.Allow, Failed, "allow"}, {policy.Allow, Drained, "allow"}, {policy.Allow, Closed, "allow"}, {policy.Deny, "", "deny"},
	} {
		for _, side := range []Side{Inbound, Outbound} {
			f := sample(1)
			f.Side, f.Effect, f.Outcome = side, c.effect, c.outcome
			if got := f.Verdict(); got != c.want {
				t.Errorf("%s, %v, %s: got %s, want %s", side, c.effect, c.outcome, got, c.want)
			}
			data, err := json.Marshal(f)
			require.NoError(t, err)
			var back Flow
			require.NoError(t, json.Unmarshal(data, &back))
			if back != f || !strings.Contains(string(data), `"verdict":"`+c.want+`"`) {
				t.Errorf("got %s\n%+v\nwant %+v", data, back, f)
			}
		}
	}
}

func FuzzFlowJSON(f *testing.F) {
	seed, err := json.Marshal(sample(1))
	require.NoError(f, err)
	f.Add(seed)
	f.Add([]byte(`{"duration_ms":0.000001,"rule":"/x","location":":3"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var a, b Flow
		if json.Unmarshal(data, &a) != nil {
			return
		}
		first, err := json.Marshal(a)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if err := json.Unmarshal(first, &b); err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		second, err := json.Marshal(b)
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("not stable (%v):\n%s\n%s", err, first, second)
		}
	})
}

// genFlow draws any record that a sidecar could make.
func genFlow(t *rapid.T) Flow {
	id := rapid.Custom(func(t *rapid.T) spiffeid.ID {
		path := rapid.StringMatching(`(/[a-z0-9._-]{0,5}[a-z])+`).Draw(t, "path")
		return spiffeid.RequireFromString("spiffe://shop.example" + path)
	})
	text := rapid.Custom(func(t *rapid.T) string { return Text(rapid.String().Draw(t, "text")) })
	effect := rapid.SampledFrom([]policy.Effect{policy.Deny, policy.Allow})
	f := Flow{
		Request:  policy.Request{Src: id.Draw(t, "src"), Dst: id.Draw(t, "dst"), Port: rapid.Uint16().Draw(t, "port")},
		Decision: policy.Decision{Effect: effect.Draw(t, "effect"), Would: effect.Draw(t, "would"), Reason: text.Draw(t, "reason")},
		ID:       rapid.StringMatching(`[0-9a-f]{16}`).Draw(t, "id"),
		Start:    time.Unix(rapid.Int64Range(0, 1<<33).Draw(t, "s"), rapid.Int64Range(0, 999_999_999).Draw(t, "ns")).UTC(),
		Duration: time.Duration(rapid.Int64Range(0, 1<<62).Draw(t, "duration")),
		Side:     rapid.SampledFrom([]Side{Inbound, Outbound}).Draw(t, "side"),
		Outcome:  rapid.SampledFrom([]Outcome{Closed, Refused, Cut, Failed, Drained}).Draw(t, "outcome"),
		Error:    text.Draw(t, "error"), PortName: rapid.StringMatching(`[a-z]{0,9}`).Draw(t, "portName"),
		Instance: rapid.StringMatching(`[0-9a-f]{0,20}`).Draw(t, "instance"), Revision: rapid.StringMatching(`([0-9]\.[0-9]{1,3})?`).Draw(t, "rev"),
		Sent:     rapid.Int64Range(0, 1<<62).Draw(t, "sent"),
		Received: rapid.Int64Range(0, 1<<62).Draw(t, "received"),
	}
	if rapid.Bool().Draw(t, "hasRule") {
		f.Rule = policy.RuleRef{
			Set: rapid.StringMatching(`[a-z]{0,9}`).Draw(t, "set"), Policy: rapid.StringMatching(`[a-z]{1,9}`).Draw(t, "policy"),
			File: rapid.StringMatching(`[a-z/:.]{1,20}`).Draw(t, "file"), Line: rapid.IntRange(1, 1<<20).Draw(t, "line"),
		}
	}
	return f
}

func TestInverses(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := genFlow(t)
		// Over the wire, so that a text that protobuf refuses would show.
		entry := ToALS(want)
		b, err := proto.Marshal(entry)
		if err != nil {
			t.Fatal(err)
		}
		proto.Reset(entry)
		if err := proto.Unmarshal(b, entry); err != nil {
			t.Fatal(err)
		}
		got, err := FromALS(entry)
		if err != nil || got != want {
			t.Fatalf("access log (%v):\ngot  %+v\nwant %+v", err, got, want)
		}
		b, err = json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		got = Flow{}
		if err := json.Unmarshal(b, &got); err != nil || got != want {
			t.Fatalf("JSON (%v):\ngot  %+v\nwant %+v", err, got, want)
		}
	})
}

func TestALSKeepsTheLineOfALongPath(t *testing.T) {
	f := sample(1)
	f.Rule.File = strings.Repeat("s", 63) + "/" + strings.Repeat("f", 255)
	got, err := FromALS(ToALS(f))
	if err != nil || got.Rule != f.Rule {
		t.Errorf("got %v, %v", got.Rule, err)
	}
}

func TestALSCarriesAnyError(t *testing.T) {
	f := sample(1)
	f.Error = "\x1b[2J\xff\n" + strings.Repeat("é", MaxText)
	entry := ToALS(f)
	_, err := proto.Marshal(entry)
	require.NoError(t, err)
	got, err := FromALS(entry)
	require.NoError(t, err)
	if len(got.Error) > MaxText || strings.ContainsAny(got.Error, "\x1b\n") || !utf8.ValidString(got.Error) {
		t.Errorf("got error text %q", got.Error)
	}
}

func TestFromALSRefuses(t *testing.T) {
	for name, spoil := range map[string]func(map[string]string){
		"control character": func(m map[string]string) { m[tagReason] = "a\x1b[2Jb" },
		"long text":         func(m map[string]string) { m[tagError] = strings.Repeat("x", MaxText+1) },
		"side":              func(m map[string]string) { m[tagSide] = "middle" },
		"port":              func(m map[string]string) { m[tagPort] = "70000" },
		"outcome":           func(m map[string]string) { m[tagOutcome] = "won" },
		"verdict":           func(m map[string]string) { m[tagVerdict] = "perhaps" },
	} {
		e := ToALS(sample(1))
		spoil(e.CommonProperties.CustomTags)
		if f, err := FromALS(e); err == nil {
			t.Errorf("%s: got %+v, want an error", name, f)
		}
	}
	e := ToALS(sample(1))
	e.CommonProperties.StreamId = "../../../etc/pas"
	if _, err := FromALS(e); err == nil {
		t.Error("decision id: want an error")
	}
	if _, err := FromALS(nil); err == nil {
		t.Error("nil entry: want an error")
	}
}

func FuzzFromALS(f *testing.F) {
	seed, err := proto.Marshal(ToALS(sample(1)))
	require.NoError(f, err)
	f.Add(seed)
	f.Fuzz(func(t *testing.T, data []byte) {
		var e alsdata.TCPAccessLogEntry
		if proto.Unmarshal(data, &e) != nil {
			return
		}
		want, err := FromALS(&e)
		if err != nil {
			return
		}
		if got, err := FromALS(ToALS(want)); err != nil || got != want {
			t.Fatalf("not stable (%v):\n%+v\n%+v", err, got, want)
		}
	})
}
