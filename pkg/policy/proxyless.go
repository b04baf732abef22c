package policy

import (
	"strings"
	"time"
)

// ForProxyless gives the rules for a gRPC server that enforces its own, by xDS, and
// those that mean something else there. Such a server has no clock for rules, keeps
// no audit, knows nobody without an identity, and sees of a request its method,
// host and metadata. As with [Ruleset.ForLevel] it never allows what r does not:
// an allow that it cannot enforce is left out, a deny is widened to the whole port
// and to all times, a deny in audit mode is left out.
func (r *Ruleset) ForProxyless() (*Ruleset, []RuleRef) {
	return r.rewrite(Rule.forProxyless)
}

func (r Rule) forProxyless() (out Rule, keep, same bool) {
	out, keep, same = r, !r.Audit, !r.Audit
	if !r.Since.IsZero() || !r.Until.IsZero() {
		out.Since, out.Until, same = time.Time{}, time.Time{}, false
		keep = keep && r.say() == denies
	}
	if r.Anonymous {
		out.Anonymous, same = false, false
	}
	var seen []HTTPMatch
	for _, m := range r.HTTP {
		if m.seenByGRPC() {
			seen = append(seen, m)
		}
	}
	if len(seen) < len(r.HTTP) {
		same = false
		out.HTTP = seen
		if r.Effect == Deny {
			out.HTTP = nil // the whole port
		}
		keep = keep && (r.Effect == Deny || len(seen) > 0)
	}
	return out, keep, same
}

// seenByGRPC reports whether a gRPC server sees all that m asks of a request.
func (m HTTPMatch) seenByGRPC() bool {
	for _, h := range m.Headers {
		joined := !h.Present && (h.Equals == "" || strings.Contains(h.Equals, ",")) // as lines are, there
		if joined || !metadata(strings.ToLower(h.Name)) {
			return false
		}
	}
	return len(m.Claims) == 0
}

// metadata reports whether a header is one that every gRPC server shows as it came:
// not binary, not of the transport, none of gRPC's own.
func metadata(name string) bool {
	switch name {
	case "te", "host", "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "content-type", "content-length", "user-agent":
		return false
	}
	return !strings.HasPrefix(name, "grpc-") && !strings.HasPrefix(name, ":") && !strings.HasSuffix(name, "-bin")
}
