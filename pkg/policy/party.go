package policy

import (
	"fmt"
	"maps"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Party is an identity that exists or could: one end of a [Breach].
type Party struct {
	Name   string            // of its Workload, or "external:NAME"; "" where nobody defined one
	ID     spiffeid.ID       // zero: callers without an identity
	Labels map[string]string // that it has, or would have
	Exists bool              // a document defines it, by itself or as one of a template

	ports []Port // declared
	exact bool   // of one that could exist: no other ID would do
}

// String names a party for people.
func (p Party) String() string {
	labels := ""
	if len(p.Labels) > 0 {
		labels = " with labels " + Selector{Labels: p.Labels}.labelText()
	}
	switch {
	case p.ID.IsZero():
		return "callers without an identity"
	case p.Exists && p.Name != "":
		return p.Name + " (" + p.ID.String() + ")" + labels
	}
	return p.ID.String() + labels + " (nobody yet: could exist)"
}

// key tells parties apart where an ID matters, and not only who selects it.
func (p *Party) key() string {
	if p.exact {
		return p.ID.String()
	}
	return ""
}

// end is a side of a question.
type end int

const (
	asSource end = iota
	asDestination
	asBoth
)

// freshNames are segments for IDs that nobody defined; they get a number where
// somebody wrote the same.
var freshNames = [...]string{asSource: "any-caller", asDestination: "any-service"}

// chooser is a Selector with its pattern read.
type chooser struct {
	Selector
	pattern identity.Pattern // where an ID is selected
}

// selects reports whether the party is picked.
func (c *chooser) selects(p *Party) bool {
	switch {
	case c.Anonymous:
		return p.ID.IsZero()
	case c.Workload != "":
		return p.Exists && p.Name == c.Workload
	case c.External != "":
		return p.Exists && p.Name == "external:"+c.External
	case c.ID != "":
		return c.pattern.Match(p.ID)
	}
	for k, v := range c.Labels {
		if got, ok := p.Labels[k]; !ok || got != v {
			return false
		}
	}
	return len(c.Labels) > 0
}

// clash reports whether two parties that could exist have one ID and different
// labels: they cannot both exist.
func clash(a, b *Party) bool {
	return !a.Exists && !b.Exists && !a.ID.IsZero() && a.ID == b.ID && !maps.Equal(a.Labels, b.Labels)
}

// unused gives a name that is not taken.
func unused(name string, taken map[string]bool) string {
	for n := 2; taken[name]; n++ {
		name = fmt.Sprintf("%s-%d", strings.TrimRight(name, "-0123456789"), n)
	}
	return name
}

// shortest gives a segment of one character that is not taken, or of more if need be.
func shortest(taken map[string]bool) string {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
	for _, first := range append([]string{""}, strings.Split(letters, "")...) {
		for _, last := range letters {
			if s := first + string(last); !taken[s] {
				return s
			}
		}
	}
	return unused("any", taken)
}
