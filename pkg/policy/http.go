package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// HTTPRequest is one request, as the app that it is meant for will understand it.
type HTTPRequest struct {
	Method string              // as sent (RFC 9110 section 9.1)
	Path   string              // of the request target, without query
	Host   string              // lower case, without port and trailing dot
	Header map[string][]string // :: name as [net/http.CanonicalHeaderKey] gives it → values
	// Claims are those of an end user whose token was verified: issuer's name →
	// claim → values.
	Claims map[string]map[string][]string
}

// Errors of [HTTPRequest.Check].
var (
	errMethod = errors.New("the method is not of A-Z, 0-9, '-' and '_'")
	errHost   = errors.New("the host is not a lower-case name or address without port and trailing dot")
)

// Check reports what in h more than one reader could understand differently. Such
// a request is refused wherever a rule looks at requests, never normalised: a
// path with empty, "." or ".." segments, a character that is encoded and need not
// be, or is not and must be, "\\", ";", "#", "%", "?" and control characters in
// any form; a method or a host in other than one form. It does not allocate
// unless it fails.
func (h *HTTPRequest) Check() error {
	if err := CheckPath(h.Path); err != nil {
		return err
	}
	if h.Method == "" {
		return errMethod
	}
	for i := range len(h.Method) {
		if c := h.Method[i]; (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return errMethod
		}
	}
	if !canonicalHost(h.Host) {
		return errHost
	}
	return nil
}

// canonicalHost accepts "" (HTTP/1.0), names, and addresses, IPv6 in brackets.
func canonicalHost(s string) bool {
	if s == "" {
		return true
	}
	if inner, ok := strings.CutPrefix(s, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		return ok && inner != "" && only(inner, ":.")
	}
	return only(s, "-_.") && s[0] != '.' && s[len(s)-1] != '.' && !strings.Contains(s, "..")
}

// HTTPMatch says which requests a rule is about. All of what is set must match;
// the zero HTTPMatch matches every request.
type HTTPMatch struct {
	Methods []string // any one of them
	Paths   []string // patterns, any one of them: see [CheckPathPattern]
	Hosts   []string // any one of them
	Headers []HeaderMatch
	Claims  []ClaimMatch
}

// HeaderMatch asks for a header. For an allow, exactly one field line must have
// the value; for a deny, any field line, or any member of a comma-separated list,
// suffices.
type HeaderMatch struct {
	Name    string // as [net/http.CanonicalHeaderKey] gives it
	Present bool   // any value will do
	Equals  string // else this one, byte by byte
}

// ClaimMatch asks for a claim of the end user's token.
type ClaimMatch struct {
	Issuer string // name of a TokenIssuer document
	Claim  string
	Value  string // equal to the claim, or to one of its elements
}

// request reports whether some part of the rule is about h.
func (r *Rule) request(h *HTTPRequest) bool {
	for i := range r.HTTP {
		m := &r.HTTP[i]
		if m.rest(h, r.Effect) && (len(m.Paths) == 0 || slices.ContainsFunc(m.Paths, func(p string) bool { return MatchPath(p, h.Path) })) {
			return true
		}
	}
	return false
}

// rest reports whether everything but the path matches.
func (m *HTTPMatch) rest(h *HTTPRequest, e Effect) bool {
	if len(m.Methods) > 0 && !slices.Contains(m.Methods, h.Method) || len(m.Hosts) > 0 && !slices.Contains(m.Hosts, h.Host) {
		return false
	}
	for i := range m.Headers {
		if !m.Headers[i].match(h.Header[m.Headers[i].Name], e) {
			return false
		}
	}
	for _, c := range m.Claims {
		if !slices.Contains(h.Claims[c.Issuer][c.Claim], c.Value) {
			return false
		}
	}
	return true
}

func (m *HeaderMatch) match(lines []string, e Effect) bool {
	switch {
	case m.Present:
		return len(lines) > 0
	case e == Allow:
		return len(lines) == 1 && lines[0] == m.Equals
	}
	for _, line := range lines {
		if line == m.Equals {
			return true
		}
		for member := range strings.SplitSeq(line, ",") {
			if strings.Trim(member, " \t") == m.Equals {
				return true
			}
		}
	}
	return false
}

// requests finds the rules that are about a request.
type requests struct {
	all   []condition
	any   []condition       // of every path
	paths trie[[]condition] // :: pattern →
}

// condition is one HTTPMatch of a rule, without its paths.
type condition struct {
	match *HTTPMatch
	rule  int32 // index of rules
	say   say
}

func (q *requests) add(rule *Rule, i int32) {
	for m := range rule.HTTP {
		c := condition{match: &rule.HTTP[m], rule: i, say: rule.say()}
		q.all = append(q.all, c)
		if len(c.match.Paths) == 0 {
			q.any = append(q.any, c)
		}
		for _, p := range c.match.Paths {
			at := q.paths.add(p)
			*at = append(*at, c)
		}
	}
}

func (q *requests) match(h *HTTPRequest, v *verdict) {
	tell(q.any, h, v)
	q.paths.match(h.Path, func(cs *[]condition) { tell(*cs, h, v) })
}

func tell(cs []condition, h *HTTPRequest, v *verdict) {
	for i := range cs {
		c := &cs[i]
		e := Deny
		if c.say == allows || c.say == opens {
			e = Allow
		}
		if c.match.rest(h, e) {
			v.add(c.say, c.rule)
		}
	}
}

// MaxPath is the longest path, and path pattern, in bytes.
const MaxPath = 8192

// MatchPath reports whether a pattern, good by [CheckPathPattern], matches a path,
// good by [CheckPath]. It goes by segment: "*" is one that is not empty, a final
// "**" one or more, everything else is literal, so that "/" and a trailing slash
// match only where they are written.
func MatchPath(pattern, path string) bool {
	pattern, path = strings.TrimPrefix(pattern, "/"), strings.TrimPrefix(path, "/")
	more, left := true, true
	for more && left {
		if pattern == "**" {
			return path != "" && path[len(path)-1] != '/'
		}
		var want, got string
		want, pattern, more = cut(pattern)
		got, path, left = cut(path)
		if want != got && (want != "*" || got == "") {
			return false
		}
	}
	return more == left
}

// CheckPathPattern reports what is wrong with a path pattern: a wildcard that is
// only a part of a segment, a "**" that is not last, or a segment that no
// canonical path has.
func CheckPathPattern(p string) error {
	if !strings.HasPrefix(p, "/") {
		return errors.New("a path begins with a slash")
	}
	segs := strings.Split(p[1:], "/")
	for i, seg := range segs {
		switch {
		case seg == "*", seg == "**" && i == len(segs)-1:
			segs[i] = "x"
		case seg == "**":
			return errors.New(`"**" must be the last segment`)
		case strings.Contains(seg, "*"):
			return fmt.Errorf("segment %q: a wildcard stands for a whole segment", shorten(seg))
		}
	}
	return CheckPath("/" + strings.Join(segs, "/"))
}
