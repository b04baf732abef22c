package policy

import "strings"

// trie maps patterns to values and finds all those that match an ID or a path.
// Its keys are the segments of identity.Pattern, the trust domain first, or those
// of a path pattern, of which the last one may be empty. The zero trie is empty.
type trie[T any] struct {
	root node[T]
	n    int // patterns
}

type node[T any] struct {
	next map[string]*node[T] // :: literal segment →
	star *node[T]            // "*"
	here *T                  // of the pattern that ends here
	rest *T                  // of the pattern that goes on with a final "**"
}

// add gives the value of a pattern, made when it is new.
func (t *trie[T]) add(pattern string) *T {
	n, path, more := &t.root, trimScheme(pattern), true
	for more {
		var seg string
		seg, path, more = strings.Cut(path, "/")
		switch {
		case seg == "**" && !more:
			if n.rest == nil {
				n.rest, t.n = new(T), t.n+1
			}
			return n.rest
		case seg == "*":
			if n.star == nil {
				n.star = &node[T]{}
			}
			n = n.star
		default:
			if n.next[seg] == nil {
				if n.next == nil {
					n.next = map[string]*node[T]{}
				}
				n.next[seg] = &node[T]{}
			}
			n = n.next[seg]
		}
	}
	if n.here == nil {
		n.here, t.n = new(T), t.n+1
	}
	return n.here
}

// match calls fn with the value of every pattern that matches id. It visits each
// node at most once and does not allocate.
func (t *trie[T]) match(id string, fn func(*T)) {
	if t.n > 0 && id != "" {
		t.root.visit(trimScheme(id), true, fn)
	}
}

// visit goes on below n with the segments of path, if there are more. A wildcard
// matches no empty segment, which only the last one can be.
func (n *node[T]) visit(path string, more bool, fn func(*T)) {
	if !more {
		if n.here != nil {
			fn(n.here)
		}
		return
	}
	if n.rest != nil && path != "" && path[len(path)-1] != '/' {
		fn(n.rest)
	}
	seg, rest, more := cut(path)
	if len(n.next) > 0 {
		if next := n.next[seg]; next != nil {
			next.visit(rest, more, fn)
		}
	}
	if n.star != nil && seg != "" {
		n.star.visit(rest, more, fn)
	}
}

// trimScheme turns "spiffe://td/a/b" into "td/a/b", and "/a/b" into "a/b".
func trimScheme(id string) string {
	return strings.TrimPrefix(strings.TrimPrefix(id, "spiffe:/"), "/")
}

// cut splits "a/b/c" into "a" and "b/c"; more is false where there is no slash.
func cut(path string) (seg, rest string, more bool) {
	if i := strings.IndexByte(path, '/'); i >= 0 {
		return path[:i], path[i+1:], true
	}
	return path, "", false
}
