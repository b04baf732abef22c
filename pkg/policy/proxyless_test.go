package policy

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestForProxylessNeverAllowsMore(t *testing.T) {
	allowed := 0
	check(t, func(t *rapid.T) {
		rs := NewRuleset(rapid.SliceOfN(genAnyRule, 0, 8).Draw(t, "rules"))
		narrow, changed := rs.ForProxyless()
		for _, r := range narrow.Rules() {
			if r.Anonymous || r.Audit || !r.Since.IsZero() || !r.Until.IsZero() {
				t.Fatalf("a gRPC server is sent %+v", r)
			}
			for _, m := range r.HTTP {
				if !m.seenByGRPC() {
					t.Fatalf("a gRPC server is sent %+v", m)
				}
			}
		}
		for range 20 {
			q := genRequest.Draw(t, "request")
			if q.HTTP == nil {
				continue // it decides requests
			}
			at := epoch.Add(time.Duration(rapid.IntRange(0, 8).Draw(t, "moment")) * 30 * time.Minute)
			got := narrow.Decide(q)
			full := rs.At(at).Decide(q)
			if len(changed) == 0 && full != got {
				t.Fatalf("no rule changes, and %+v is decided as %+v, not %+v", q, got, full)
			}
			if got.Effect != Allow {
				continue
			}
			allowed++
			// What is not canonical a gRPC server refuses whatever its rules read.
			if full.Effect == Deny && q.HTTP.Check() == nil {
				t.Fatalf("a gRPC server lets through %+v (%+v) at %v: %+v; as written: %+v", q, q.HTTP, at, got, full)
			}
		}
	})
	if allowed == 0 {
		t.Error("nothing was allowed: nothing was tested")
	}
}

func TestForProxylessHeaders(t *testing.T) {
	for name, want := range map[string]bool{
		"X-Team": true, "Authorization": true,
		"Grpc-Timeout": false, "Trace-Bin": false, "Te": false, "Host": false, "Content-Type": false, "User-Agent": false,
	} {
		m := HTTPMatch{Headers: []HeaderMatch{{Name: name, Equals: "a"}}}
		if got := m.seenByGRPC(); got != want {
			t.Errorf("header %s: seen %v, want %v", name, got, want)
		}
	}
}

// An allow keeps what a gRPC server sees, a deny with anything else holds for all.
func TestForProxylessRequests(t *testing.T) {
	seen := HTTPMatch{Paths: []string{"/a.B/C"}}
	claim := HTTPMatch{Claims: []ClaimMatch{{Issuer: "corp", Claim: "groups", Value: "ops"}}}
	for name, c := range map[string]struct {
		effect Effect
		http   []HTTPMatch
		want   int // matches that are left
		keep   bool
		same   bool
	}{
		"allow, seen":     {Allow, []HTTPMatch{seen}, 1, true, true},
		"allow, both":     {Allow, []HTTPMatch{seen, claim}, 1, true, false},
		"allow, not seen": {Allow, []HTTPMatch{claim}, 0, false, false},
		"deny, seen":      {Deny, []HTTPMatch{seen}, 1, true, true},
		"deny, both":      {Deny, []HTTPMatch{seen, claim}, 0, true, false},
		"deny, not seen":  {Deny, []HTTPMatch{claim}, 0, true, false},
	} {
		out, keep, same := Rule{Effect: c.effect, HTTP: c.http}.forProxyless()
		if keep != c.keep || same != c.same || keep && len(out.HTTP) != c.want {
			t.Errorf("%s: %d matches, keep %v, same %v", name, len(out.HTTP), keep, same)
		}
	}
}
