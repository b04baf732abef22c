// Package bench compares pkg/policy with other policy engines: the same rules, the
// same questions, the same answers, and the time of each.
//
// It is a module of its own, so that what the other engines need never enters the
// go.mod of what is shipped. README.md tells how each engine is set up.
package bench

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// Kind is what rules are about.
type Kind string

const (
	Connection Kind = "connection" // identities and ports
	HTTP       Kind = "http"       // identities, methods and path patterns
)

// Rule allows or denies some sources something; what no rule allows is denied, and a
// deny wins. Everything is about one destination: a sidecar's own.
type Rule struct {
	Deny bool
	From string // path of a SPIFFE ID; for connections also PREFIX/*, one more segment
	Port uint16 // for connections

	Method string // for HTTP
	Path   string // for HTTP; a final * is one segment that is not empty, a final ** one or more
}

// Question is what is asked. All that can be known of it without a rule is there
// before any clock starts, which engines without patterns of their own profit from.
type Question struct {
	From  string
	Names []string // what From can be called by: itself, and PREFIX/*
	Port  uint16

	Method, Path string
	Paths        []string // every pattern that matches Path: itself, one with *, those with **
}

// NewQuestion fills in what follows from the arguments.
func NewQuestion(from string, port uint16, method, path string) Question {
	q := Question{From: from, Port: port, Method: method, Path: path}
	q.Names = append(patterns(from, 1), from)
	if path != "" {
		q.Paths = append(patterns(path, strings.Count(path, "/")), path)
	}
	return q
}

// patterns gives the patterns with a wildcard at the end that match a path: one with
// *, and, of those with **, all that leave at most deep segments to it.
func patterns(path string, deep int) []string {
	if strings.HasSuffix(path, "/") {
		return nil // an empty segment matches no wildcard
	}
	var out []string
	prefix := path
	for n := range deep {
		prefix = prefix[:strings.LastIndexByte(prefix, '/')]
		if n == 0 {
			out = append(out, prefix+"/*")
		}
		out = append(out, prefix+"/**")
	}
	return out
}

// Rules makes n rules of a kind, always the same.
func Rules(kind Kind, n int) []Rule {
	rules := make([]Rule, n)
	for i := range rules {
		if kind == Connection {
			rules[i] = connectionRule(i)
		} else {
			rules[i] = httpRule(i, n)
		}
	}
	return rules
}

// connectionRule names one source, every tenth a pattern; every twentieth denies.
func connectionRule(i int) Rule {
	r := Rule{From: fmt.Sprintf("/team-%d/client-%d", i%100, i), Port: uint16(8080 + i%8), Deny: i%20 == 3}
	if i%10 == 9 {
		r.From = fmt.Sprintf("/team-%d/batch-%d/*", i%100, i)
	}
	return r
}

// httpRule gives each client ten rules about a service's resources, one of which
// denies.
func httpRule(i, n int) Rule {
	client := i % max(1, n/10)
	r := Rule{From: fmt.Sprintf("/team-%d/client-%d", client%100, client), Method: []string{"GET", "POST", "PUT"}[i%3], Deny: i/max(1, n/10) == 7}
	r.Path = fmt.Sprintf("/v1/accounts/a-%d/items-%d%s", client, i%17, []string{"", "/*", "/**"}[i%7%3])
	return r
}

// Questions draws n questions of which most are about what some rule names.
func Questions(kind Kind, rules []Rule, n int, rng *rand.Rand) []Question {
	out := make([]Question, n)
	for i := range out {
		r, other := rules[rng.IntN(len(rules))], rules[rng.IntN(len(rules))]
		from := strings.Replace(r.From, "*", fmt.Sprintf("job-%d", rng.IntN(1000)), 1)
		switch rng.IntN(8) {
		case 0:
			from = "/stranger/s"
		case 1:
			r.Port, r.Method, r.Path = other.Port, other.Method, other.Path
		}
		if kind == Connection {
			out[i] = NewQuestion(from, r.Port, "", "")
			continue
		}
		path := strings.Replace(r.Path, "**", "x/y", 1)
		path = strings.Replace(path, "*", "z", 1)
		if rng.IntN(8) == 0 {
			path += "/more"
		}
		out[i] = NewQuestion(from, 0, r.Method, path)
	}
	return out
}

// Engine answers questions about rules.
type Engine struct {
	Name  string
	Kinds []Kind
	// Most is how many rules it is given: with more it takes too long to be ready. 0 is
	// no limit.
	Most int
	// Remembers says that only what was asked before is timed.
	Remembers bool
	// New makes an engine for rules; what it returns turns a question into one that
	// can be asked again and again, which is what is timed.
	New func(Kind, []Rule) (Prepare, error)
}

// Prepare turns a question into what the engine is asked. The answer is whether it
// is allowed.
type Prepare func(Question) (ask func() (bool, error))

// Ours is pkg/policy, and Rivals are the others, each in every form that makes sense.
var (
	Ours   = Engine{Name: "sallyport", Kinds: both, New: newSallyport}
	Rivals = []Engine{
		{Name: "cedar-policies", Kinds: both, New: newCedarPolicies},
		{Name: "cedar-entities", Kinds: both, New: newCedarEntities},
		{Name: "opa-rules", Kinds: both, New: newOPARules},
		{Name: "opa-data", Kinds: both, New: newOPAData},
		{Name: "opa-partial", Kinds: both, Most: 1000, New: newOPAPartial},
		{Name: "casbin-policies", Kinds: both, New: newCasbinPolicies},
		{Name: "casbin-roles", Kinds: []Kind{Connection}, New: newCasbinRoles},
		{Name: "casbin-shards", Kinds: []Kind{HTTP}, New: newCasbinShards},
		{Name: "casbin-cached", Kinds: both, Remembers: true, New: newCasbinCached},
	}
	both = []Kind{Connection, HTTP}
)
