package policy

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// What a sidecar of any level lets through, the rules as written let through too,
// whatever the request and whenever; and at the highest level nothing changes.
func TestForLevelNeverAllowsMore(t *testing.T) {
	allowed := 0
	check(t, func(t *rapid.T) {
		rs := NewRuleset(rapid.SliceOfN(genAnyRule, 0, 8).Draw(t, "rules"))
		if same, changed := rs.ForLevel(LevelRequests); same != rs || changed != nil {
			t.Fatalf("at the highest level %v change", changed)
		}
		for level := LevelPorts; level < LevelRequests; level++ {
			narrow, changed := rs.ForLevel(level)
			for _, r := range narrow.Rules() {
				if len(r.HTTP) > 0 || r.Anonymous || level < LevelWindows && (r.Audit || !r.Since.IsZero() || !r.Until.IsZero()) {
					t.Fatalf("level %d is sent %+v", level, r)
				}
			}
			for range 20 {
				q := genRequest.Draw(t, "request")
				at := epoch.Add(time.Duration(rapid.IntRange(0, 8).Draw(t, "moment")) * 30 * time.Minute)
				then := narrow
				if level >= LevelWindows {
					then = narrow.At(at)
				}
				conn := q
				conn.HTTP = nil
				got := then.Decide(conn)
				if got.Effect != Allow {
					continue
				}
				allowed++
				// Of a connection, Inspect means that requests may pass; they are asked about too.
				if full := rs.At(at).Decide(q); full.Effect == Deny && !(q.HTTP != nil && q.HTTP.Check() != nil) {
					t.Fatalf("level %d lets through %+v (%+v) at %v: %+v; as written: %+v", level, q, q.HTTP, at, got, full)
				}
				if full := rs.At(at).Decide(conn); len(changed) == 0 && full != got {
					t.Fatalf("level %d changes no rule, and decides %+v as %+v, not %+v", level, conn, got, full)
				}
			}
		}
	})
	if allowed == 0 {
		t.Error("nothing was allowed: nothing was tested")
	}
}
