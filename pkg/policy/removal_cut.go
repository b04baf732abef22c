package policy

import (
	"bytes"
	"sort"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// offset gives where a node begins.
func (r *remover) offset(n *yaml.Node) int {
	at := r.lines[n.Line-1]
	for range n.Column - 1 {
		_, size := utf8.DecodeRune(r.src[at:])
		at += size
	}
	return at
}

// lineAt gives the line of an offset, counted from 0; the end of the file is one
// behind the last.
func (r *remover) lineAt(offset int) int {
	return sort.SearchInts(r.lines, offset+1) - 1
}

// line gives the text of a line, counted from 0, without its end.
func (r *remover) line(n int) string {
	return strings.TrimRight(string(r.src[r.lines[n]:r.lines[n+1]]), "\r\n")
}

// isComment reports whether a line holds a comment only, and where it begins.
func (r *remover) isComment(n int) (indent int, ok bool) {
	text := r.line(n)
	trimmed := strings.TrimLeft(text, " \t")
	return len(text) - len(trimmed), strings.HasPrefix(trimmed, "#")
}

func (r *remover) isBlank(n int) bool { return strings.TrimSpace(r.line(n)) == "" }

// head goes up from a line over the comments directly above it that are not
// indented deeper.
func (r *remover) head(n, column int) int {
	for n > 0 {
		indent, ok := r.isComment(n - 1)
		if !ok || indent > column {
			break
		}
		n--
	}
	return n
}

// tail goes down from a line over all that belongs to what begins at column there:
// deeper lines, and items of a list as deep if dashes says so. It gives the first
// line behind.
func (r *remover) tail(n, column int, dashes bool) int {
	end := n + 1
	for n++; n < len(r.lines)-1; n++ {
		text := r.line(n)
		trimmed := strings.TrimLeft(text, " ")
		indent := len(text) - len(trimmed)
		_, comment := r.isComment(n)
		switch {
		case r.isBlank(n):
			continue
		case isMarker([]byte(text)):
			return end
		case indent > column, dashes && !comment && indent == column && (trimmed == "-" || strings.HasPrefix(trimmed, "- ")):
			end = n + 1
		case comment && dashes && indent == column && r.beforeItem(n, column):
			end = n + 1
		default:
			return end
		}
	}
	return end
}

// beforeItem reports whether an item of a list follows a comment.
func (r *remover) beforeItem(n, column int) bool {
	for ; n < len(r.lines)-1; n++ {
		if _, comment := r.isComment(n); comment || r.isBlank(n) {
			continue
		}
		trimmed := strings.TrimLeft(r.line(n), " ")
		return len(r.line(n))-len(trimmed) == column && strings.HasPrefix(trimmed, "-")
	}
	return false
}

func (r *remover) cutLines(from, to int) {
	r.cuts = append(r.cuts, textCut{from: r.lines[from], to: r.lines[to]})
}

// blockItem cuts an item of a list that is written with dashes.
func (r *remover) blockItem(item *yaml.Node) error {
	at := r.offset(item)
	dash := bytes.LastIndexByte(r.src[:at], '-')
	if dash < 0 || !blankOrComment(r.src[dash+1:at]) {
		return errLayout
	}
	n := r.lineAt(dash)
	column := dash - r.lines[n]
	if strings.TrimLeft(string(r.src[r.lines[n]:dash]), " ") != "" {
		return errLayout
	}
	r.cutLines(r.head(n, column), r.tail(n, column, false))
	return nil
}

// blankOrComment reports whether text says nothing.
func blankOrComment(text []byte) bool {
	for line := range bytes.Lines(text) {
		if t := bytes.TrimSpace(line); len(t) > 0 && t[0] != '#' {
			return false
		}
	}
	return true
}

// wholeField cuts a field out of a mapping that is written on lines of its own.
func (r *remover) wholeField(key, value *yaml.Node) error {
	n, column := key.Line-1, key.Column-1
	if strings.TrimSpace(r.line(n)[:min(column, len(r.line(n)))]) != "" {
		return errLayout
	}
	end := r.tail(n, column, true)
	if value.Style&yaml.FlowStyle != 0 {
		close, ok := r.flowEnd(r.offset(value))
		if !ok {
			return errLayout
		}
		end = max(end, r.lineAt(close-1)+1)
	}
	r.cutLines(r.head(n, column), end)
	return nil
}

// wholeDocument cuts a document with its "---". Of the first one, comments that a
// blank line keeps apart stay: they are about the file.
func (r *remover) wholeDocument(doc *yaml.Node) {
	last := len(r.lines) - 1
	from, to := doc.Line-1, doc.Line
	for to < last && !isMarker(r.src[r.lines[to]:]) {
		to++
	}
	for from > 0 && !isMarker(r.src[r.lines[from]:]) {
		from--
	}
	if isMarker(r.src[r.lines[from]:]) {
		r.cutLines(from, to)
		return
	}
	head := r.head(doc.Line-1, len(r.line(doc.Line-1)))
	if len(bytes.TrimSpace(r.src[:r.lines[head]])) > 0 {
		from = head
	} else if to < last {
		to++ // the next one needs no mark
	}
	r.cutLines(from, to)
}

// emptyList leaves [] of a list in brackets.
func (r *remover) emptyList(list *yaml.Node) error {
	from := r.offset(list)
	to, ok := r.flowEnd(from)
	if !ok {
		return errLayout
	}
	r.cuts = append(r.cuts, textCut{from, to, "[]"})
	return nil
}

// flowItems cuts items of a list in brackets.
func (r *remover) flowItems(list *yaml.Node, goes []bool) error {
	starts, ends := make([]int, len(goes)), make([]int, len(goes))
	for i, item := range list.Content {
		starts[i] = r.offset(item)
		var ok bool
		if ends[i], ok = r.flowEnd(starts[i]); !ok {
			return errLayout
		}
	}
	for i := 0; i < len(goes); i++ {
		if !goes[i] {
			continue
		}
		first := i
		for i+1 < len(goes) && goes[i+1] {
			i++
		}
		from, to := starts[first], ends[i]
		next := i+1 < len(goes)
		n, last := r.lineAt(from), r.lineAt(to-1)
		behind := strings.TrimLeft(strings.TrimPrefix(strings.TrimLeft(string(r.src[to:r.lines[last+1]]), " "), ","), " \r\n")
		switch {
		case strings.TrimSpace(string(r.src[r.lines[n]:from])) == "" && (behind == "" || behind[0] == '#'):
			r.cutLines(r.head(n, from-r.lines[n]), last+1)
		case !next:
			r.cuts = append(r.cuts, textCut{from: ends[first-1], to: to})
		case blankOrComment(r.src[to+1:starts[i+1]]) && !bytes.Contains(r.src[to:starts[i+1]], []byte("#")):
			r.cuts = append(r.cuts, textCut{from: from, to: starts[i+1]})
		default:
			return errLayout
		}
	}
	return nil
}

// flowEnd gives the end of what begins with a bracket: behind the one that closes it.
func (r *remover) flowEnd(at int) (int, bool) {
	if c := r.src[at]; c != '{' && c != '[' {
		return 0, false
	}
	depth := 0
	for i := at; i < len(r.src); i++ {
		switch c := r.src[i]; c {
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return i + 1, true
			}
		case '#':
			if before := r.src[i-1]; before == ' ' || before == '\t' || before == '\n' {
				i += bytes.IndexByte(r.src[i:], '\n')
			}
		case '"', '\'':
			before := bytes.TrimRight(r.src[:i], " \t\r\n")
			if bytes.IndexByte([]byte(",:[{"), before[len(before)-1]) < 0 {
				continue // within plain text
			}
			for i++; i < len(r.src) && (r.src[i] != c || c == '\'' && r.src[i+1] == c); i++ {
				if c == '\'' && r.src[i] == c || c == '"' && r.src[i] == '\\' {
					i++
				}
			}
		}
	}
	return 0, false
}
