package bench

import (
	"fmt"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
)

// newCedarPolicies writes each rule as a policy, as an author would: the answer
// names the rules that decided. Authorize goes through all of them.
func newCedarPolicies(kind Kind, rules []Rule) (Prepare, error) {
	var text strings.Builder
	for _, r := range rules {
		if kind == Connection {
			fmt.Fprintf(&text, "%s(principal in Client::%q, action == Action::\"connect\", resource == Port::\"%d\");\n", cedarEffect(r), r.From, r.Port)
		} else {
			fmt.Fprintf(&text, "%s(principal in Client::%q, action == Action::%q, resource in Path::%q);\n", cedarEffect(r), r.From, r.Method, r.Path)
		}
	}
	return newCedar(kind, text.String(), func(Question, types.EntityMap) {})
}

// newCedarEntities has few policies, whatever the number of rules: for connections
// the sources are in groups, one for each port and effect, and for HTTP a source has
// the paths of its rules as attributes, one for each method and effect. The answer
// does not tell the rule.
func newCedarEntities(kind Kind, rules []Rule) (Prepare, error) {
	var text strings.Builder
	groups := map[string][]types.Value{} // :: source → groups, for connections
	paths := map[string]map[string][]types.Value{}
	seen := map[string]bool{}
	for _, r := range rules {
		if kind == Connection {
			group := fmt.Sprintf("%s-%d", cedarEffect(r), r.Port)
			groups[r.From] = append(groups[r.From], types.NewEntityUID("Group", types.String(group)))
			if !seen[group] {
				seen[group] = true
				fmt.Fprintf(&text, "%s(principal in Group::%q, action == Action::\"connect\", resource == Port::\"%d\");\n", cedarEffect(r), group, r.Port)
			}
			continue
		}
		name := cedarEffect(r) + r.Method
		if paths[r.From] == nil {
			paths[r.From] = map[string][]types.Value{}
		}
		paths[r.From][name] = append(paths[r.From][name], types.NewEntityUID("Path", types.String(r.Path)))
		if !seen[name] {
			seen[name] = true
			fmt.Fprintf(&text, "%s(principal, action == Action::%q, resource) when { principal has %s && resource in principal.%s };\n", cedarEffect(r), r.Method, name, name)
		}
	}
	return newCedar(kind, text.String(), func(q Question, entities types.EntityMap) {
		for _, name := range q.Names {
			uid := types.NewEntityUID("Client", types.String(name))
			e := entities[uid]
			e.UID = uid
			var parents []types.EntityUID
			for p := range e.Parents.All() {
				parents = append(parents, p)
			}
			for _, g := range groups[name] {
				parents = append(parents, g.(types.EntityUID))
			}
			e.Parents = types.NewEntityUIDSet(parents...)
			attributes := types.RecordMap{}
			for name, set := range paths[name] {
				attributes[types.String(name)] = types.NewSet(set...)
			}
			e.Attributes = types.NewRecord(attributes)
			entities[uid] = e
		}
	})
}

// newCedar gives each question the entities that matter for it, which add completes:
// the source, below its patterns, and the path, below those that match it.
func newCedar(kind Kind, text string, add func(Question, types.EntityMap)) (Prepare, error) {
	policies, err := cedar.NewPolicySetFromBytes("bench.cedar", []byte(text))
	if err != nil {
		return nil, err
	}
	return func(q Question) func() (bool, error) {
		entities := types.EntityMap{}
		below := func(kind types.EntityType, name string, names []string) types.EntityUID {
			uid := types.NewEntityUID(kind, types.String(name))
			var parents []types.EntityUID
			for _, n := range names {
				if n != name {
					parents = append(parents, types.NewEntityUID(kind, types.String(n)))
				}
			}
			entities[uid] = types.Entity{UID: uid, Parents: types.NewEntityUIDSet(parents...)}
			return uid
		}
		request := cedar.Request{
			Principal: below("Client", q.From, q.Names),
			Action:    types.NewEntityUID("Action", "connect"),
			Resource:  types.NewEntityUID("Port", types.String(fmt.Sprint(q.Port))),
		}
		if kind == HTTP {
			request.Action = types.NewEntityUID("Action", types.String(q.Method))
			request.Resource = below("Path", q.Path, q.Paths)
		}
		add(q, entities)
		return func() (bool, error) {
			decision, diagnostic := cedar.Authorize(policies, entities, request)
			if len(diagnostic.Errors) > 0 {
				return false, fmt.Errorf("cedar: %v", diagnostic.Errors)
			}
			return decision == cedar.Allow, nil
		}
	}, nil
}

func cedarEffect(r Rule) string {
	if r.Deny {
		return "forbid"
	}
	return "permit"
}
