package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	maxWays  = 100_000   // ways that are listed
	maxPairs = 4_000_000 // pairs of places that are asked about
)

// WaysQuestion asks what can be reached. Exactly one of From and To is set: to a
// workload's name, an ID, a pattern of IDs as in [Selector], "anonymous" (From) or
// "external:NAME" (To).
type WaysQuestion struct {
	From, To string
	All      bool      // over any number of hops, else one
	Now      time.Time // windows of time are told from then on; zero: all of them
}

// Ways lists what From can reach, or what can reach To: for every declared port of
// every destination, from everybody who could exist and whom the rules tell apart.
// Each answer is one of [Ruleset.Decide].
//
// With All it goes on from every place that is reached, nearest first. Of what
// lies further on it lists the shortest path, and longer ones only where they
// carry other requests or hold at another time. Windows of the hops of a path need
// not be open together: who got in can wait.
func (r *Ruleset) Ways(q WaysQuestion) (Reached, error) {
	if (q.From == "") == (q.To == "") {
		return Reached{}, fmt.Errorf("asking for ways: want either a source or a destination")
	}
	if path := strings.TrimPrefix(q.From, r.trustDomain().IDString()); strings.HasPrefix(q.From, "external:") || strings.HasPrefix(path, externalPrefix+"/") {
		return Reached{}, fmt.Errorf("--from %s: an External is a destination, and never calls", q.From)
	}
	s := waySearch{r: r, q: q, notes: map[string]bool{}, kinds: map[string]bool{}}
	s.destinations()
	var err error
	if q.From != "" {
		err = s.outward()
	} else {
		err = s.inward()
	}
	if err != nil {
		return Reached{}, err
	}
	slices.SortStableFunc(s.out.Ways, compareWays)
	s.out.Notes = slices.Sorted(maps.Keys(s.notes))
	return s.out, nil
}

// waySearch is one run of [Ruleset.Ways].
type waySearch struct {
	r     *Ruleset
	q     WaysQuestion
	nodes []wayNode
	at    map[int32][]int // :: index of targets → indexes of nodes
	kinds map[string]bool // what is listed of a place: see news
	notes map[string]bool
	pairs int
	out   Reached
}

// wayNode is a destination: one ID, or the IDs of a template that rules do not
// tell apart as a destination.
type wayNode struct {
	place   Place
	id      string // or a witness
	ports   []Port
	targets []int32
}

// outward follows the ways from q.From.
func (s *waySearch) outward() error {
	start, sel, err := s.r.source(s.q.From)
	if err != nil {
		return err
	}
	type step struct {
		sel  selection
		path []string
	}
	queue := []step{{sel, []string{start.Name}}}
	seen := map[int]bool{}
	for depth := 0; len(queue) > 0; depth++ {
		now := queue[0]
		queue = queue[1:]
		byTarget := s.naming(now.sel)
		for _, n := range s.candidates(byTarget) {
			node := &s.nodes[n]
			if depth > 0 && (node.id == start.ID || node.place.Name == now.path[len(now.path)-1]) {
				continue // back to where it began, or no step at all
			}
			reached := false
			for _, w := range s.into(node, aboutTargets(node.targets, byTarget), now.sel) {
				reached = true
				if seen[n] && !s.news(w.To, w) {
					continue
				}
				s.news(w.To, w)
				w.Path = append(slices.Clone(now.path[:len(now.path)-1]), w.From.Name, w.To.Name)
				s.list(w)
			}
			if !reached || seen[n] {
				continue
			}
			seen[n] = true
			if s.q.All && node.place.Kind != Outside {
				queue = append(queue, step{node.source(), append(slices.Clone(now.path), node.place.Name)})
			}
		}
	}
	return nil
}

// inward follows the ways back from q.To.
func (s *waySearch) inward() error {
	ends, err := s.ends(s.q.To)
	if err != nil {
		return err
	}
	type step struct {
		node int
		path []string
	}
	var queue []step
	seen := map[int]bool{}
	for _, n := range ends {
		seen[n] = true
		queue = append(queue, step{n, []string{s.nodes[n].place.Name}})
	}
	by := map[string]int{} // :: source → the node by which it was found
	for len(queue) > 0 {
		now := queue[0]
		queue = queue[1:]
		node := &s.nodes[now.node]
		var rules []int32
		for _, t := range node.targets {
			rules = append(rules, s.r.targets[t].rules...)
		}
		for _, w := range s.into(node, rules, selection{all: true}) {
			n, known := by[w.From.key()]
			if !known {
				by[w.From.key()], n = now.node, now.node
			}
			end := slices.ContainsFunc(ends, func(e int) bool { return s.nodes[e].place.ID == w.From.ID })
			if len(now.path) > 1 && (end || w.From.Name == now.path[0]) {
				continue // from where it ends, or no step at all
			}
			if news := s.news(w.From, w); n != now.node && !slices.Contains(ends, now.node) && !news {
				continue
			}
			w.Path = append([]string{w.From.Name}, now.path...)
			s.list(w)
			if !s.q.All {
				continue
			}
			for _, next := range s.nodesOf(w.From) {
				if !seen[next] {
					seen[next] = true
					queue = append(queue, step{next, w.Path})
				}
			}
		}
	}
	return nil
}

// news notes what is listed of a place, and reports whether it is new: another
// port, request or time.
func (s *waySearch) news(p Place, w Way) bool {
	key := fmt.Sprint(p.key(), "\x00", w.Port.Number, "\x00", w.Only(), "\x00", w.Door)
	if s.q.To != "" {
		key = fmt.Sprint(p.key(), "\x00", w.Only(), "\x00", w.Door)
	}
	was := s.kinds[key]
	s.kinds[key] = true
	return !was
}

func (s *waySearch) list(w Way) {
	if len(s.out.Ways) == maxWays {
		s.out.More++
		return
	}
	s.out.Ways = append(s.out.Ways, w)
}

// into gives what passes from whom sel means to a destination, by some rules about
// it.
func (s *waySearch) into(n *wayNode, rules []int32, sel selection) []Way {
	if s.pairs++; s.pairs > maxPairs {
		s.notes["too many ways to follow all of them: ask for one hop, or about a part of the mesh"] = true
		return nil
	}
	slices.Sort(rules)
	var about []Rule
	grants := false
	here, err := identity.ParsePattern("spiffe://" + n.place.vector.td + "/**")
	if err != nil {
		return nil // never: it is a trust domain
	}
	to := []identity.Pattern{here} // all that is asked is about this destination
	var exact []identity.Pattern
	if sel.vector == nil && sel.id != "" {
		p, err := identity.ParsePattern(sel.id)
		if err != nil {
			return nil // never: it is an ID
		}
		exact = []identity.Pattern{p}
	}
	for _, i := range rules {
		rule := s.r.rules[i]
		rule.To = to
		switch { // a label may stand for thousands
		case sel.all:
		case sel.vector == nil && sel.id != "":
			rule.From = exact
		default:
			rule.From = slices.DeleteFunc(slices.Clone(rule.From), func(p identity.Pattern) bool { return !sel.meets(p.String()) })
		}
		about = append(about, rule)
		grants = grants || rule.Effect == Allow
	}
	if !grants {
		return nil
	}
	c := s.r.crowd(newGate(n.id, about, s.q.Now), sel)
	if c.inexact {
		s.notes["too many patterns to tell all callers of "+n.place.Name+" apart"] = true
	}
	var out []Way
	for _, port := range n.ports {
		for _, w := range c.through(port) {
			if w.To = n.place; w.To.Kind == Foreign {
				s.notes[strings.TrimPrefix(w.To.vector.td, "spiffe://")+" decides for itself as well who reaches its workloads"] = true
			}
			out = append(out, w)
		}
	}
	return out
}

// aboutTargets gives those of some rules that are about some targets.
func aboutTargets(targets []int32, byTarget map[int32][]int32) []int32 {
	var rules []int32
	for _, t := range targets {
		rules = append(rules, byTarget[t]...)
	}
	return rules
}
