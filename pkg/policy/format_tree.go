package policy

import (
	"slices"

	"go.yaml.in/yaml/v4"
)

// element is an entry of a mapping, an element of a list, or a whole document,
// with the comments that belong to it.
type element struct {
	key, value *yaml.Node // key is nil but in a mapping
	shape      *shape     // of value; nil where nothing is known
	start, end pos        // end: behind the bracket of a value in flow style
	kids       []*element
	head       []comment // on lines of their own above it
	beside     []comment // on its first or last line
	foot       []comment // below its last kid
	apart      bool      // an empty line stands before it
}

func newElement(key, value *yaml.Node, s *shape) *element {
	e := &element{key: key, value: value, shape: s.resolve(value), start: at(value)}
	if key != nil {
		e.start = at(key)
	}
	switch value.Kind {
	case yaml.MappingNode:
		for i := 0; i+1 < len(value.Content); i += 2 {
			k, v := value.Content[i], value.Content[i+1]
			e.kids = append(e.kids, newElement(k, v, e.shape.below(k.Value)))
		}
	case yaml.SequenceNode:
		for _, v := range value.Content {
			e.kids = append(e.kids, newElement(nil, v, e.shape.below("")))
		}
	}
	return e
}

// resolve gives the shape that a value of s has: one of forms or variants.
func (s *shape) resolve(n *yaml.Node) *shape {
	if s == nil {
		return nil
	}
	if len(s.variants) > 0 {
		v, _ := s.of(kindOf(n))
		return v
	}
	if len(s.forms) == 0 {
		return s
	}
	want := map[yaml.Kind]string{yaml.MappingNode: "object", yaml.SequenceNode: "array"}[n.Kind]
	for _, f := range s.forms {
		if slices.Contains(f.types, want) {
			return f
		}
	}
	return nil
}

// below gives the shape of a field, or of what a list or a free mapping holds.
func (s *shape) below(name string) *shape {
	if s == nil || s.fields == nil {
		if s == nil {
			return nil
		}
		return s.each
	}
	f, _ := s.field(name)
	return f
}

func (e *element) flow() bool { return e.value.Style&yaml.FlowStyle != 0 }

// last gives where the last thing inside of e begins.
func (e *element) last() pos {
	if len(e.kids) == 0 {
		return e.start
	}
	return e.kids[len(e.kids)-1].last()
}

func (p pos) before(q pos) bool { return p.line < q.line || p.line == q.line && p.col < q.col }

// place gives c to what it belongs to among the kids of e. Behind something on its
// line it belongs to that; on a line of its own it belongs to what follows, or, by
// its indentation, to the end of what is above.
func (e *element) place(c comment) {
	here := pos{c.line, c.col}
	next := slices.IndexFunc(e.kids, func(k *element) bool { return here.before(k.start) })
	if next < 0 {
		next = len(e.kids)
	}
	if next == 0 {
		e.kids[0].head = append(e.kids[0].head, c)
		return
	}
	above := e.kids[next-1]
	switch {
	case above.takes(c, e, next == len(e.kids)):
		above.place(c)
	case !c.own:
		above.beside = append(above.beside, c)
	case next < len(e.kids):
		e.kids[next].head = append(e.kids[next].head, c)
	default:
		e.foot = append(e.foot, c)
	}
}

// takes reports whether c, which stands behind the beginning of e, belongs inside.
func (e *element) takes(c comment, parent *element, isLast bool) bool {
	here := pos{c.line, c.col}
	switch {
	case len(e.kids) == 0:
		return false
	case e.flow() && !here.before(e.end):
		return false
	case !c.own:
		return e.kids[0].start.before(here)
	case e.flow() || here.before(e.last()):
		return true
	}
	column := e.value.Column
	return c.col >= column && (isLast || c.col > parent.value.Column)
}

// gap reports whether an empty line stands before e itself.
func (e *element) gap(t *text) bool { return t.blank(e.start.line - 1) }

// gaps finds the empty lines between kids, at any depth.
func (e *element) gaps(t *text) {
	for i, k := range e.kids {
		k.apart = (i > 0 || len(k.head) > 0) && k.gap(t)
		k.gaps(t)
	}
}

// hide marks the characters of scalars that could hold a "#", and finds the ends of
// values in flow style. Lines from to on are not e's.
func (t *text) hide(e *element, to int) {
	for _, k := range e.kids {
		if k.key != nil {
			t.hideScalar(k.key, e.value.Column, to)
		}
		t.hideScalar(k.value, e.value.Column, to)
		t.hide(k, to)
	}
	if e.flow() && (e.value.Kind == yaml.MappingNode || e.value.Kind == yaml.SequenceNode) {
		e.end = t.flowEnd(at(e.value))
	}
}

// hideScalar hides a quoted scalar, or the lines of a block scalar in a mapping or
// list that begins at a column.
func (t *text) hideScalar(n *yaml.Node, column, to int) {
	switch {
	case n.Kind != yaml.ScalarNode:
	case n.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) != 0:
		t.hideQuoted(n)
	case n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0:
		indent := -1
		for l := n.Line + 1; l < to; l++ {
			if t.blank(l) {
				continue
			}
			line := t.line(l)
			in := slices.IndexFunc(line, func(r rune) bool { return r != ' ' })
			if indent < 0 {
				indent = max(in, column) // at least one more than the mapping around it
				if header := t.line(n.Line)[n.Column-1:]; len(header) > 1 {
					for _, r := range header[1:min(3, len(header))] {
						if r >= '1' && r <= '9' {
							indent = column - 1 + int(r-'0')
						}
					}
				}
			}
			if in < indent {
				return
			}
			t.hideFrom(l, 0, len(line))
		}
	}
}

func (t *text) hideQuoted(n *yaml.Node) {
	quote := t.line(n.Line)[n.Column-1]
	for l, i := n.Line, n.Column; l <= len(t.lines); l, i = l+1, 0 {
		line := t.line(l)
		from := i
		for ; i < len(line); i++ {
			switch {
			case quote == '"' && line[i] == '\\':
				i++
			case line[i] == quote && quote == '\'' && i+1 < len(line) && line[i+1] == quote:
				i++
			case line[i] == quote:
				t.hideFrom(l, from, i+1)
				return
			}
		}
		t.hideFrom(l, from, len(line))
	}
}

func (t *text) hideFrom(l, from, to int) {
	if t.hidden[l-1] == nil {
		t.hidden[l-1] = make([]bool, len(t.line(l)))
	}
	for i := from; i < to && i < len(t.line(l)); i++ {
		t.hidden[l-1][i] = true
	}
}

// flowEnd finds the place behind the bracket that closes the one at p. Scalars that
// could hold brackets are hidden by then, as plain ones cannot in flow style.
func (t *text) flowEnd(p pos) pos {
	depth := 0
	for l, i := p.line, p.col-1; l <= len(t.lines); l, i = l+1, 0 {
		line, hidden := t.line(l), t.hidden[l-1]
		for ; i < len(line); i++ {
			if hidden != nil && hidden[i] {
				continue
			}
			if line[i] == '#' && (i == 0 || line[i-1] == ' ' || line[i-1] == '\t') {
				break
			}
			switch line[i] {
			case '[', '{':
				depth++
			case ']', '}':
				if depth--; depth == 0 {
					return pos{l, i + 2}
				}
			}
		}
	}
	return pos{len(t.lines) + 1, 1}
}
