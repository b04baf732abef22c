package policy

import (
	"slices"
	"strings"
)

// trie maps patterns to values and finds all those that match an ID or a path.
// Its keys are the segments of identity.Pattern, the trust domain first, or those
// of a path pattern, of which the last one may be empty. The zero trie is empty.
//
// What comes before the first wildcard of a pattern is looked up in one step: most
// patterns have one wildcard, at the end.
type trie[T any] struct {
	root   node[T]             // of patterns that begin with a wildcard
	heads  map[string]*node[T] // :: literal segments before the first wildcard, joined →
	depths []int               // numbers of such segments, ascending
	n      int                 // patterns
}

type node[T any] struct {
	next map[string]*node[T] // :: literal segment →
	star *node[T]            // "*"
	here *T                  // of the pattern that ends here
	rest *T                  // of the pattern that goes on with a final "**"
}

// add gives the value of a pattern, made when it is new.
func (t *trie[T]) add(pattern string) *T {
	n, path, more := t.head(trimScheme(pattern))
	for more {
		var seg string
		seg, path, more = cut(path)
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
			n = below(&n.next, seg)
		}
	}
	if n.here == nil {
		n.here, t.n = new(T), t.n+1
	}
	return n.here
}

// head gives the node of the literal segments that a pattern begins with, and what
// follows them, if there is more.
func (t *trie[T]) head(pattern string) (n *node[T], rest string, more bool) {
	depth, end := 0, 0
	for rest, more = pattern, true; more; depth++ {
		seg, after, left := cut(rest)
		if seg == "*" || seg == "**" {
			break
		}
		end += len(seg) + min(depth, 1)
		rest, more = after, left
	}
	if depth == 0 {
		return &t.root, rest, more
	}
	if i, ok := slices.BinarySearch(t.depths, depth); !ok {
		t.depths = slices.Insert(t.depths, i, depth)
	}
	return below(&t.heads, pattern[:end]), rest, more
}

// below gives the node of a key, made when it is new.
func below[T any](next *map[string]*node[T], key string) *node[T] {
	n := (*next)[key]
	if n == nil {
		if *next == nil {
			*next = map[string]*node[T]{}
		}
		n = &node[T]{}
		(*next)[key] = n
	}
	return n
}

// match calls fn with the value of every pattern that matches id. It visits each
// node at most once and does not allocate.
func (t *trie[T]) match(id string, fn func(*T)) {
	if t.n == 0 || id == "" {
		return
	}
	path := trimScheme(id)
	if t.root.star != nil || t.root.rest != nil {
		t.root.visit(path, true, fn)
	}
	rest, more, at := path, true, 0
	for _, depth := range t.depths {
		for ; at < depth; at++ {
			if !more {
				return
			}
			_, rest, more = cut(rest)
		}
		end := len(path) - len(rest)
		if more {
			end-- // the slash
		}
		if n := t.heads[path[:end]]; n != nil {
			n.visit(rest, more, fn)
		}
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
	if n.next == nil && n.star == nil {
		return
	}
	seg, rest, more := cut(path)
	if n.next != nil {
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
