package policy

import "strings"

// trie maps patterns to values and finds all those that match an ID. Its keys
// are the segments of identity.Pattern, the trust domain first. The zero trie is
// empty.
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
	n, path := &t.root, trimScheme(pattern)
	for path != "" {
		var seg string
		seg, path = cut(path)
		switch {
		case seg == "**" && path == "":
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
		t.root.visit(trimScheme(id), fn)
	}
}

func (n *node[T]) visit(path string, fn func(*T)) {
	if path == "" {
		if n.here != nil {
			fn(n.here)
		}
		return
	}
	if n.rest != nil {
		fn(n.rest)
	}
	seg, rest := cut(path)
	if len(n.next) > 0 {
		if next := n.next[seg]; next != nil {
			next.visit(rest, fn)
		}
	}
	if n.star != nil {
		n.star.visit(rest, fn)
	}
}

// trimScheme turns "spiffe://td/a/b" into "td/a/b".
func trimScheme(id string) string { return strings.TrimPrefix(id, "spiffe://") }

// cut splits "a/b/c" into "a" and "b/c".
func cut(path string) (seg, rest string) {
	if i := strings.IndexByte(path, '/'); i >= 0 {
		return path[:i], path[i+1:]
	}
	return path, ""
}
