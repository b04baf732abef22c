package bench

import (
	"fmt"

	"github.com/casbin/casbin/v3"
	"github.com/casbin/casbin/v3/model"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

const casbinEffect = `
[policy_effect]
e = some(where (p.eft == allow)) && !some(where (p.eft == deny))
`

// casbinPolicies has one line of policy for each rule.
var casbinPolicies = map[Kind]string{
	Connection: `
[request_definition]
r = from, group, port
[policy_definition]
p = from, port, eft
` + casbinEffect + `
[matchers]
m = r.port == p.port && (r.from == p.from || r.group == p.from)
`,
	HTTP: `
[request_definition]
r = from, method, path
[policy_definition]
p = from, method, path, eft
` + casbinEffect + `
[matchers]
m = r.from == p.from && r.method == p.method && matchPath(r.path, p.path)
`}

// casbinRoles has one line for each port and effect; the sources are in roles.
const casbinRoles = `
[request_definition]
r = from, group, port
[policy_definition]
p = role, port, eft
[role_definition]
g = _, _
` + casbinEffect + `
[matchers]
m = r.port == p.port && (g(r.from, p.role) || g(r.group, p.role))
`

// enforcer is what the kinds of enforcer have in common.
type enforcer interface {
	Enforce(...any) (bool, error)
}

func newCasbinPolicies(kind Kind, rules []Rule) (Prepare, error) {
	e, err := newEnforcer(casbinPolicies[kind], casbinLines(kind, rules), nil)
	if err != nil {
		return nil, err
	}
	return func(q Question) func() (bool, error) { return casbinAsk(e, kind, q) }, nil
}

// newCasbinRoles makes a role of each port and effect.
func newCasbinRoles(kind Kind, rules []Rule) (Prepare, error) {
	var lines, members [][]string
	seen := map[string]bool{}
	for _, r := range rules {
		port := fmt.Sprint(r.Port)
		role := casbinEft(r) + port
		if !seen[role] {
			seen[role] = true
			lines = append(lines, []string{role, port, casbinEft(r)})
		}
		if member := r.From + " " + role; !seen[member] {
			seen[member] = true
			members = append(members, []string{r.From, role})
		}
	}
	e, err := newEnforcer(casbinRoles, lines, members)
	if err != nil {
		return nil, err
	}
	return func(q Question) func() (bool, error) { return casbinAsk(e, kind, q) }, nil
}

// newCasbinShards has an enforcer for each source that rules name.
func newCasbinShards(kind Kind, rules []Rule) (Prepare, error) {
	of := map[string][]Rule{}
	for _, r := range rules {
		of[r.From] = append(of[r.From], r)
	}
	shards := map[string]*casbin.Enforcer{}
	for from, rules := range of {
		e, err := newEnforcer(casbinPolicies[kind], casbinLines(kind, rules), nil)
		if err != nil {
			return nil, err
		}
		shards[from] = e
	}
	return func(q Question) func() (bool, error) {
		return func() (bool, error) {
			e := shards[q.From]
			if e == nil {
				return false, nil
			}
			return e.Enforce(q.From, q.Method, q.Path)
		}
	}, nil
}

// newCasbinCached remembers answers: from the second time on, a question costs what
// it takes to find its answer.
func newCasbinCached(kind Kind, rules []Rule) (Prepare, error) {
	m, err := model.NewModelFromString(casbinPolicies[kind])
	if err != nil {
		return nil, err
	}
	e, err := casbin.NewCachedEnforcer(m)
	if err != nil {
		return nil, err
	}
	if err := fill(e.Enforcer, casbinLines(kind, rules), nil); err != nil {
		return nil, err
	}
	return func(q Question) func() (bool, error) { return casbinAsk(e, kind, q) }, nil
}

func casbinAsk(e enforcer, kind Kind, q Question) func() (bool, error) {
	if kind == HTTP {
		return func() (bool, error) { return e.Enforce(q.From, q.Method, q.Path) }
	}
	port := fmt.Sprint(q.Port)
	return func() (bool, error) { return e.Enforce(q.From, q.Names[0], port) }
}

func casbinLines(kind Kind, rules []Rule) [][]string {
	var lines [][]string
	seen := map[string]bool{}
	for _, r := range rules {
		line := []string{r.From, fmt.Sprint(r.Port), casbinEft(r)}
		if kind == HTTP {
			line = []string{r.From, r.Method, r.Path, casbinEft(r)}
		}
		if key := fmt.Sprint(line); !seen[key] { // a line given twice is an error
			seen[key] = true
			lines = append(lines, line)
		}
	}
	return lines
}

func casbinEft(r Rule) string {
	if r.Deny {
		return "deny"
	}
	return "allow"
}

func newEnforcer(text string, lines, members [][]string) (*casbin.Enforcer, error) {
	m, err := model.NewModelFromString(text)
	if err != nil {
		return nil, err
	}
	e, err := casbin.NewEnforcer(m)
	if err != nil {
		return nil, err
	}
	return e, fill(e, lines, members)
}

// fill gives an enforcer its lines, and our matcher of paths, which is quicker than
// those that come with it and means the same as everywhere else here.
func fill(e *casbin.Enforcer, lines, members [][]string) error {
	e.AddFunction("matchPath", func(args ...any) (any, error) {
		return policy.MatchPath(args[1].(string), args[0].(string)), nil
	})
	if ok, err := e.AddPolicies(lines); err != nil || !ok {
		return fmt.Errorf("adding %d lines of policy: %v, %w", len(lines), ok, err)
	}
	if len(members) == 0 {
		return nil
	}
	if ok, err := e.AddGroupingPolicies(members); err != nil || !ok {
		return fmt.Errorf("adding %d members of roles: %v, %w", len(members), ok, err)
	}
	return nil
}
