package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// texts says which requests some probes stand for, and no others: "GET /v1/**
// except /v1/admin". What p.describe says is shorter, and names a path by the
// narrowest pattern that matches it, whatever else is within.
func (p probes) texts(some []int) []string {
	if len(some) == len(p.all) {
		return []string{"every request"}
	}
	type rest struct{ method, others string }
	paths := map[rest]map[int]bool{} // :: → indexes of p.paths
	for _, at := range p.reduce(some) {
		var others []string
		for d := 2; d < len(at); d++ {
			if at[d] >= 0 {
				others = append(others, p.dims[d].text(at[d]))
			}
		}
		key := rest{others: strings.Join(others, ", ")}
		if at[0] >= 0 {
			key.method = p.dims[0].names[at[0]]
		}
		if paths[key] == nil {
			paths[key] = map[int]bool{}
		}
		for i := range p.paths {
			if at[1] == i || at[1] < 0 {
				paths[key][i] = true
			}
		}
	}
	methods := map[[2]string][]string{} // :: path, others → methods
	for key, set := range paths {
		for _, path := range p.pathTexts(set) {
			methods[[2]string{path, key.others}] = append(methods[[2]string{path, key.others}], key.method)
		}
	}
	var out []string
	for _, key := range slices.SortedFunc(maps.Keys(methods), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		what := slices.DeleteFunc([]string{key[0], key[1]}, func(s string) bool { return s == "" })
		text := strings.TrimSpace(p.methodText(methods[key]) + " " + strings.Join(what, ", "))
		out = append(out, cmp.Or(text, "every request"))
	}
	return out
}

// methodText names a set of methods; "" is every one.
func (p probes) methodText(some []string) string {
	all := p.dims[0].names // the last one stands for those that no rule names
	if slices.Contains(some, "") {
		return ""
	}
	if !slices.Contains(some, all[len(all)-1]) {
		slices.Sort(some)
		return strings.Join(some, " ")
	}
	left := slices.DeleteFunc(slices.Clone(all), func(m string) bool { return slices.Contains(some, m) })
	if len(left) == 0 {
		return ""
	}
	return "all methods except " + strings.Join(left, " ")
}

// pathTexts names a set of kinds of path: by patterns, the widest first, each with
// the patterns within that are not meant.
func (p probes) pathTexts(set map[int]bool) []string {
	within := func(wide []int) (out []int) { // the kinds that all of these patterns match
		for i, c := range p.paths {
			if !slices.ContainsFunc(wide, func(n int) bool { return !slices.Contains(c.matched, n) }) {
				out = append(out, i)
			}
		}
		return out
	}
	byWidth := slices.SortedFunc(slices.Values(p.allPaths()), func(a, b int) int {
		return cmp.Or(len(p.paths[a].matched)-len(p.paths[b].matched), cmp.Compare(p.paths[a].name, p.paths[b].name))
	})
	left := maps.Clone(set)
	var out []string
	for _, i := range byWidth {
		if !left[i] {
			continue
		}
		in := within(p.paths[i].matched)
		excluded := map[int]bool{}
		var except []string
		for _, e := range byWidth {
			if !slices.Contains(in, e) || set[e] || excluded[e] {
				continue
			}
			except = append(except, p.narrowest(p.paths[e].matched, within))
			for _, x := range within(p.paths[e].matched) {
				excluded[x] = true
			}
		}
		for _, x := range in {
			if !excluded[x] {
				delete(left, x)
			}
		}
		text := p.narrowest(p.paths[i].matched, within)
		if len(except) > 0 {
			text = cmp.Or(text, "all paths") + " except " + strings.Join(except, " or ")
		}
		out = append(out, text)
	}
	return out
}

func (p probes) allPaths() []int {
	out := make([]int, len(p.paths))
	for i := range out {
		out[i] = i
	}
	return out
}

// narrowest joins patterns without those that another one implies.
func (p probes) narrowest(matched []int, within func([]int) []int) string {
	var out []string
	for n, a := range matched {
		implied := slices.ContainsFunc(matched, func(b int) bool {
			in := within([]int{b})
			both := within([]int{a, b})
			back := len(within([]int{a})) == len(both) // they match the same
			return a != b && len(in) == len(both) && !(back && slices.Index(matched, b) > n)
		})
		if !implied {
			out = append(out, p.patterns[a])
		}
	}
	return strings.Join(out, " & ")
}

// reduce gives what tells some probes apart from the others: -1 for a property
// that does not matter.
func (p probes) reduce(some []int) [][]int {
	in := map[string][]int{} // :: text of at → at
	for _, i := range some {
		in[fmt.Sprint(p.all[i].at)] = p.all[i].at
	}
	for d := range p.dims { // a property that does not matter is left out
		free := true
		for _, at := range in {
			for v := range p.dims[d].names {
				other := slices.Clone(at)
				other[d] = v
				if _, ok := in[fmt.Sprint(other)]; !ok && at[d] != v {
					free = false
				}
			}
		}
		if free {
			next := map[string][]int{}
			for _, at := range in {
				at = slices.Clone(at)
				at[d] = -1
				next[fmt.Sprint(at)] = at
			}
			in = next
		}
	}
	return slices.Collect(maps.Values(in))
}

// say gives the last property its exact words.
func (p *probes) say(exact []string) { p.dims[len(p.dims)-1].exact = exact }

func (d dimension) text(value int) string {
	if d.exact != nil {
		return d.exact[value]
	}
	return d.names[value]
}

// onlyValues says that a property has some of the values that rules name, and not
// the others.
func onlyValues(name string, some, all []string, more string) string {
	not := slices.DeleteFunc(slices.Clone(all), func(v string) bool { return slices.Contains(some, v) })
	switch {
	case len(some) == 0 && len(not) == 0:
		return name + " present"
	case len(some) == 0:
		return name + " not " + strings.Join(not, " or ")
	case len(not) == 0:
		return name + ": " + strings.Join(some, " and ") + more
	}
	return name + ": " + strings.Join(some, " and ") + more + " but not " + strings.Join(not, " or ")
}
