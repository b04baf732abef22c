package policy

import (
	"cmp"
	"flag"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// reference is Decide as docs/policy.md tells it, and nothing else: no index, no
// trie, no memory of earlier steps. rules are in any order.
func reference(rules []Rule, q Request) Decision {
	rules = slices.SortedStableFunc(slices.Values(rules), func(a, b Rule) int {
		return cmp.Or(cmp.Compare(a.Ref.Set, b.Ref.Set), cmp.Compare(a.Ref.File, b.Ref.File), cmp.Compare(a.Ref.Line, b.Ref.Line),
			cmp.Compare(a.Ref.Policy, b.Ref.Policy), cmp.Compare(a.Reason, b.Reason))
	})
	if q.Port == 0 {
		return Decision{}
	}
	var deny, audit, allow, door *Rule // the first that matches
	maybe := map[Effect]bool{}         // some rule of the effect may match a request
	slot := func(r *Rule) **Rule {
		switch {
		case r.Effect == Deny && r.Audit:
			return &audit
		case r.Effect == Deny:
			return &deny
		case r.Audit:
			return &door
		}
		return &allow
	}
	for i := range rules {
		r := &rules[i]
		named := slices.ContainsFunc(r.From, func(p identity.Pattern) bool { return p.Match(q.Src) }) || q.Src.IsZero() && r.Anonymous
		meant := slices.ContainsFunc(r.To, func(p identity.Pattern) bool { return p.Match(q.Dst) }) && (len(r.Ports) == 0 || slices.Contains(r.Ports, q.Port))
		if !named || !meant {
			continue
		}
		holds := len(r.HTTP) == 0
		if !holds && q.HTTP == nil {
			maybe[r.Effect] = maybe[r.Effect] || !(r.Effect == Allow && r.Audit)
			continue
		}
		if !holds && !canonical(*q.HTTP) {
			return Decision{} // a rule would read what cannot be read for sure
		}
		for _, m := range r.HTTP {
			holds = holds || about(m, *q.HTTP, r.Effect)
		}
		if s := slot(r); holds && *s == nil {
			*s = r
		}
	}
	granted := allow != nil || door != nil
	switch {
	case deny != nil:
		return Decision{Rule: deny.Ref, Reason: deny.Reason}
	case maybe[Allow] && allow == nil, maybe[Deny] && granted:
		return Decision{Effect: Inspect, Would: Inspect}
	case !granted:
		return Decision{}
	}
	d := Decision{Effect: Allow, Would: Allow}
	by := allow
	if by == nil {
		by, d.Would = door, Deny
	}
	d.Rule, d.Reason = by.Ref, by.Reason
	if audit != nil {
		d.Would, d.Audited = Deny, audit.Ref
	}
	return d
}

// about reports whether m matches h.
func about(m HTTPMatch, h HTTPRequest, e Effect) bool {
	oneOf := func(list []string, s string) bool { return len(list) == 0 || slices.Contains(list, s) }
	ok := oneOf(m.Methods, h.Method) && oneOf(m.Hosts, h.Host)
	ok = ok && (len(m.Paths) == 0 || slices.ContainsFunc(m.Paths, func(p string) bool { return segmentsMatch(strings.Split(p, "/")[1:], strings.Split(h.Path, "/")[1:]) }))
	for _, want := range m.Headers {
		lines := h.Header[want.Name]
		members := strings.Split(strings.Join(lines, ","), ",")
		switch {
		case want.Present:
			ok = ok && len(lines) > 0
		case e == Allow:
			ok = ok && slices.Equal(lines, []string{want.Equals})
		default:
			ok = ok && slices.ContainsFunc(members, func(s string) bool { return strings.Trim(s, " \t") == want.Equals })
		}
	}
	for _, c := range m.Claims {
		ok = ok && slices.Contains(h.Claims[c.Issuer][c.Claim], c.Value)
	}
	return ok
}

func segmentsMatch(pattern, path []string) bool {
	for i, want := range pattern {
		if want == "**" {
			return len(path) > i && !slices.Contains(path[i:], "")
		}
		if i >= len(path) || want == "*" && path[i] == "" || want != "*" && path[i] != want {
			return false
		}
	}
	return len(path) == len(pattern)
}

// canonical decodes a path and writes it again: it is canonical if that gives the
// same, and nothing in it could be read in two ways.
func canonical(h HTTPRequest) bool {
	path, err := url.PathUnescape(h.Path)
	if err != nil || !strings.HasPrefix(path, "/") || len(h.Path) > MaxPath || strings.ContainsAny(path, ";\\#?%") || !strings.HasPrefix(h.Path, "/") ||
		strings.ToValidUTF8(path, "") != path || strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return false
	}
	again := ""
	for _, b := range []byte(path) {
		if b < 0x80 && (strings.IndexByte("/-._~!$&'()*+,=:@", b) >= 0 || strings.IndexByte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", b) >= 0) {
			again += string(rune(b))
		} else {
			again += "%" + strings.ToUpper(string("0123456789abcdef"[b>>4])+string("0123456789abcdef"[b&15]))
		}
	}
	segs := strings.Split(path, "/")[1:]
	for i, s := range segs {
		if s == "." || s == ".." || s == "" && i < len(segs)-1 {
			return false
		}
	}
	return again == h.Path && h.Method != "" && strings.Trim(h.Method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") == "" &&
		strings.ToLower(h.Host) == h.Host && !strings.ContainsAny(h.Host, ": ") && !strings.HasSuffix(h.Host, ".")
}

// The universe of requests.
var (
	genPath = rapid.SampledFrom([]string{
		"/", "/a", "/a", "/a/", "/b", "/a/b", "/a/b/", "/a/a/b", "/a/%C3%A9", "/b/a/b/a", "/a%20b",
		"/a//b", "/a/./b", "/a/../b", "/a%2fb", "/a%2Fb", "/%61", "/a%c3%a9", "/a;b", "/a%C0%AF", "", "a", "/a?b", "/a b", "/%00", "/%25", "/a\\b",
	})
	genPathPattern = rapid.SampledFrom([]string{"/", "/a", "/a/", "/*", "/**", "/a/*", "/a/**", "/*/b", "/*/b/", "/a/*/b", "/b/a/**", "/a/%C3%A9", "/a%20b"})
	genValue       = rapid.SampledFrom([]string{"x", "y", "x,y", "y, x", " x", "z"})
	genWindow      = rapid.SampledFrom([]time.Time{{}, {}, {}, epoch.Add(time.Hour), epoch.Add(2 * time.Hour), epoch.Add(3 * time.Hour)})
	epoch          = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
)

var genMatch = rapid.Custom(func(t *rapid.T) HTTPMatch {
	m := HTTPMatch{
		Methods: rapid.SliceOfN(rapid.SampledFrom([]string{"GET", "POST"}), 0, 2).Draw(t, "methods"),
		Paths:   rapid.SliceOfN(genPathPattern, 0, 2).Draw(t, "paths"),
		Hosts:   rapid.SliceOfN(rapid.SampledFrom([]string{"a.example", "b.example"}), 0, 1).Draw(t, "hosts"),
	}
	if rapid.IntRange(0, 3).Draw(t, "header") == 0 {
		present := rapid.Bool().Draw(t, "present")
		h := HeaderMatch{Name: "X-Kind", Present: present}
		if !present {
			h.Equals = rapid.SampledFrom([]string{"x", "y"}).Draw(t, "equals")
		}
		m.Headers = append(m.Headers, h)
	}
	if rapid.IntRange(0, 4).Draw(t, "claim") == 0 {
		m.Claims = []ClaimMatch{{Issuer: "people", Claim: "groups", Value: rapid.SampledFrom([]string{"x", "y"}).Draw(t, "group")}}
	}
	return m
})

// genAnyRule draws rules with everything that a rule can have.
var genAnyRule = rapid.Custom(func(t *rapid.T) Rule {
	r := genRule.Draw(t, "rule")
	r.Audit = rapid.IntRange(0, 3).Draw(t, "audit") == 0
	r.Anonymous = rapid.IntRange(0, 4).Draw(t, "anonymous") == 0
	if r.Effect == Deny || !r.Audit {
		r.HTTP = rapid.SliceOfN(genMatch, 0, 2).Draw(t, "http")
	}
	r.Since, r.Until = genWindow.Draw(t, "since"), genWindow.Draw(t, "until")
	return r
})

var genRequest = rapid.Custom(func(t *rapid.T) Request {
	return Request{
		Src:  rapid.OneOf(genID, genID, rapid.Just(spiffeid.ID{})).Draw(t, "src"),
		Dst:  rapid.OneOf(genID, genID, genID, genID, rapid.Just(spiffeid.ID{})).Draw(t, "dst"),
		Port: rapid.OneOf(genPort, genPort, genPort, genPort, rapid.Just[uint16](0)).Draw(t, "port"),
		HTTP: rapid.OneOf(rapid.Just[*HTTPRequest](nil), genHTTP, genHTTP).Draw(t, "http"),
	}
})

var genHTTP = rapid.Custom(func(t *rapid.T) *HTTPRequest {
	h := &HTTPRequest{
		Method: rapid.SampledFrom([]string{"GET", "GET", "POST", "POST", "get", "DELETE", ""}).Draw(t, "method"),
		Path:   genPath.Draw(t, "path"),
		Host:   rapid.SampledFrom([]string{"a.example", "b.example", "a.example", "", "A.example", "a.example:80", "a.example."}).Draw(t, "host"),
	}
	if v := rapid.SliceOfN(genValue, 0, 2).Draw(t, "header"); len(v) > 0 {
		h.Header = map[string][]string{"X-Kind": v}
	}
	if v := rapid.SliceOfN(rapid.SampledFrom([]string{"x", "y", "z"}), 0, 2).Draw(t, "groups"); len(v) > 0 {
		h.Claims = map[string]map[string][]string{"people": {"groups": v}}
	}
	return h
})

// questions is how many requests each random rule set is asked.
const questions = 50

// checkDecide compares every way to reach a decision with the reference.
func checkDecide(t *rapid.T) { checkDecisions(t, questions) }

func checkDecisions(t *rapid.T, questions int) {
	rules := rapid.SliceOfN(genAnyRule, 0, 12).Draw(t, "rules")
	rs := NewRuleset(rules)
	again := NewRuleset(rapid.Permutation(rs.Rules()).Draw(t, "order"))
	moment := epoch.Add(time.Duration(rapid.IntRange(0, 8).Draw(t, "moment")) * 30 * time.Minute)
	then := rs.At(moment)
	holding := slices.DeleteFunc(slices.Clone(rules), func(r Rule) bool {
		return moment.Before(r.Since) || !r.Until.IsZero() && !moment.Before(r.Until)
	})
	for i, q := range rapid.SliceOfN(genRequest, questions, questions).Draw(t, "requests") {
		want := reference(rules, q)
		ways := map[string]Decision{"Decide": rs.Decide(q)}
		slice := rs.For(q.Dst)
		if i < 5 {
			ways["NewRuleset(Rules()).Decide"] = again.Decide(q)
			ways["For(dst).Decide"] = slice.Decide(q)
			ways["NewRuleset(For(dst).Rules())"] = NewRuleset(slice.Rules()).Decide(q)
			ways["For(dst).For(dst).Decide"] = slice.For(q.Dst).Decide(q)
			ways["Explain"] = rs.Explain(q).Decision
		}
		for name, got := range ways {
			if got != want {
				t.Fatalf("%s of %+v (%+v):\ngot  %+v\nwant %+v", name, q, q.HTTP, got, want)
			}
		}
		if got, want := then.Decide(q), reference(holding, q); got != want {
			t.Fatalf("At(%v).Decide of %+v (%+v):\ngot  %+v\nwant %+v", moment, q, q.HTTP, got, want)
		}
		for _, r := range slice.Rules() {
			if len(r.To) != 1 || r.To[0] != identity.ExactPattern(q.Dst) {
				t.Fatalf("For(%s) tells of %v", q.Dst, r.To)
			}
		}
	}
}

// decisions is how many random questions TestDecideAgreesWithReference asks. CI
// asks 10^6, `make test-long` 10^7.
var decisions = flag.Int("decisions", 100_000, "random questions about random rule sets, at least")

func TestDecideAgreesWithReference(t *testing.T) {
	asked := 0
	for asked < *decisions {
		rapid.Check(t, func(t *rapid.T) {
			checkDecide(t)
			asked += questions
		})
	}
}

// FuzzDecide asks few questions of each rule set, so that inputs stay short.
func FuzzDecide(f *testing.F) {
	addNoise(f)
	f.Fuzz(rapid.MakeFuzz(func(t *rapid.T) { checkDecisions(t, 3) }))
}

// addNoise gives rapid something to draw from: what is too short is skipped.
func addNoise(f *testing.F) {
	noise := rand.NewChaCha8([32]byte{})
	for size := 512; size <= 4096; size += 256 {
		data := make([]byte, size)
		noise.Read(data)
		f.Add(data)
	}
}

// An answer for a connection holds for every request on it, or says Inspect.
func TestInspectIsHonest(t *testing.T) {
	check(t, func(t *rapid.T) {
		rs := NewRuleset(rapid.SliceOfN(genAnyRule, 0, 8).Draw(t, "rules"))
		for range 20 {
			q := genRequest.Draw(t, "request")
			q.HTTP = genHTTP.Draw(t, "http")
			request, q2 := rs.Decide(q), q.HTTP
			q.HTTP = nil
			switch conn := rs.Decide(q); {
			case conn.Effect == Deny && request.Effect != Deny:
				t.Fatalf("the connection is denied, %+v allowed", q)
			case conn.Effect == Allow && (request.Effect != Allow || request.Would != conn.Would) && q2.Check() == nil: // by whichever rule
				t.Fatalf("the connection: %+v, a request: %+v", conn, request)
			}
		}
	})
}
