package proxy

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// A rule begins and ends at its second, by the sidecar's own clock and without
// anybody telling it; what it let in is cut at its end.
func TestWindowsOfTime(t *testing.T) {
	w := newWorld(t)
	s := w.listen(payments, w.app("tcp", echo))
	var clock atomic.Int64
	begin := time.Unix(2_000_000_000, 0)
	clock.Store(begin.Add(-time.Second).UnixNano())
	s.views.Now = func() time.Time { return time.Unix(0, clock.Load()) }
	w.run(s.views.Run)
	r := allow(orders)
	r.Since, r.Until = begin, begin.Add(time.Hour)
	s.apply(1, r)
	c := w.client(orders, "/shop/payments:tcp", s.endpoint("a"))
	expectRefused(t, c)
	clock.Store(begin.UnixNano())
	require.Eventually(t, func() bool { return len(s.views.Load().rules.Rules()) == 1 }, 5*time.Second, time.Millisecond)
	conn := c.dial(t)
	roundTrip(t, conn, "in time")
	clock.Store(begin.Add(time.Hour - 1).UnixNano())
	roundTrip(t, conn, "in the last nanosecond")
	clock.Store(begin.Add(time.Hour).UnixNano())
	expectReset(t, conn)
	expectRefused(t, c)
	if f := s.flows.Newest(10, nil); !containsCut(f) {
		t.Errorf("no record of the cut: %+v", f)
	}
	// Set back, the clock opens the window again.
	clock.Store(begin.Add(time.Minute).UnixNano())
	require.Eventually(t, func() bool { return len(s.views.Load().rules.Rules()) == 1 }, 5*time.Second, time.Millisecond)
	roundTrip(t, c.dial(t), "again")
}

func containsCut(all []flow.Flow) bool {
	for _, f := range all {
		if f.Outcome == flow.Cut {
			return true
		}
	}
	return false
}

// A deny in audit mode and an open door let pass, and the record says what full
// enforcement would have said, and by which rule.
func TestAuditIsRecorded(t *testing.T) {
	w := newWorld(t)
	ref := func(name string, line int) policy.RuleRef {
		return policy.RuleRef{Policy: name, File: "p.yaml", Line: line}
	}
	deny := policy.Rule{Ref: ref("guard", 7), Effect: policy.Deny, Audit: true, From: []identity.Pattern{identity.ExactPattern(orders)}, To: []identity.Pattern{identity.ExactPattern(payments)}}
	door := policy.Rule{Ref: ref("moving-in", 9), Effect: policy.Allow, Audit: true, Until: time.Now().Add(time.Hour).Truncate(time.Second), From: deny.From, To: deny.To}
	for name, c := range map[string]struct {
		rules   []policy.Rule
		rule    policy.RuleRef
		audited policy.RuleRef
	}{
		"an audited deny":        {[]policy.Rule{allow(orders), deny}, allow(orders).Ref, deny.Ref},
		"an open door":           {[]policy.Rule{door}, door.Ref, policy.RuleRef{}},
		"both":                   {[]policy.Rule{door, deny}, door.Ref, deny.Ref},
		"a door that is no need": {[]policy.Rule{door, allow(orders)}, allow(orders).Ref, policy.RuleRef{}},
	} {
		t.Run(name, func(t *testing.T) {
			s := w.serve(payments, 1, c.rules, w.app("tcp", echo))
			conn := w.client(orders, "/shop/payments:tcp", s.endpoint("a")).dial(t)
			roundTrip(t, conn, "passes")
			require.NoError(t, conn.Close())
			f := only(t, s.flows)
			would := policy.Deny
			if name == "a door that is no need" {
				would = policy.Allow
			}
			if f.Effect != policy.Allow || f.Would != would || f.Rule != c.rule || f.Audited != c.audited {
				t.Errorf("recorded %+v", f.Decision)
			}
		})
	}
}

// A rule that looks at requests is none that this sidecar can follow: refused.
func TestRulesAboutRequestsAreRefused(t *testing.T) {
	w := newWorld(t)
	r := allow(orders)
	r.HTTP = []policy.HTTPMatch{{Methods: []string{"GET"}}}
	s := w.serve(payments, 1, []policy.Rule{r}, w.app("tcp", echo))
	expectRefused(t, w.client(orders, "/shop/payments:tcp", s.endpoint("a")))
	if f := only(t, s.flows); f.Outcome != flow.Refused || f.Effect != policy.Deny || f.Error == "" {
		t.Errorf("recorded %+v", f)
	}
}
