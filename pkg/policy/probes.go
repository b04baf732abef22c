package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// maxProbes bounds the kinds of request that are told apart for one source, and
// maxPathNodes the search for kinds of path.
const (
	maxProbes    = 4096
	maxPathNodes = 20_000
	maxSubset    = 4 // values of one header, or claim, that are told apart in combination
)

// probes are requests, one for each kind that some conditions tell apart: each
// condition holds for all requests of a kind or for none.
type probes struct {
	dims  []dimension
	all   []probe
	exact bool

	patterns []string    // of paths
	paths    []pathClass // what the second dimension stands for
}

// dimension is one property of a request.
type dimension struct {
	names []string // of its values; "" needs no words
	exact []string // the same, in words that nobody can take for another value; nil: they are so
}

type probe struct {
	request HTTPRequest
	at      []int // :: index of dims → index of names
}

// conditions gives what the rules ask of requests of a source to a port.
func (ix *index) conditions(src string, port uint16) []condition {
	var out []condition
	take := func(c *cell) {
		for _, p := range c.parts(port) {
			if p.asks != nil {
				out = append(out, p.asks.all...)
			}
		}
	}
	if s := ix.exact[src]; s != nil {
		take(&s.cell)
	}
	ix.wild.match(src, take)
	return out
}

func (c *cell) parts(port uint16) []*part {
	out := []*part{&c.all}
	if n, ok := c.search(port); ok {
		out = append(out, &c.ports[n].part)
	}
	return out
}

func (c *comparison) probesOf(conditions []condition) (probes, bool) {
	var key strings.Builder
	for _, cond := range conditions {
		fmt.Fprintf(&key, "%p%d ", cond.match, cond.say)
	}
	p, ok := c.probes[key.String()]
	if !ok {
		matches := make([]*HTTPMatch, len(conditions))
		for i, cond := range conditions {
			matches[i] = cond.match
		}
		p = newProbes(matches)
		c.probes[key.String()] = p
	}
	return p, p.exact
}

// newProbes makes the product of the properties that matches look at.
func newProbes(matches []*HTTPMatch) probes {
	v := collect(matches)
	paths, exact := pathClasses(v.paths)
	out := probes{exact: exact && v.small(), patterns: v.paths, paths: paths}
	var set []func(*HTTPRequest, int) // :: index of dims → puts a value in
	dim := func(names []string, put func(*HTTPRequest, int)) {
		out.dims = append(out.dims, dimension{names: names})
		set = append(set, put)
	}
	methods := append(v.methods, otherThan("OTHER", v.methods))
	dim(append(slices.Clone(v.methods), "other methods"), func(h *HTTPRequest, i int) { h.Method = methods[i] })
	names := make([]string, len(paths))
	for i, p := range paths {
		names[i] = p.name
	}
	dim(names, func(h *HTTPRequest, i int) { h.Path = paths[i].witness })
	if len(v.hosts) > 0 {
		hosts := append(v.hosts, otherThan("other.invalid", v.hosts))
		dim(append(slices.Clone(v.hosts), "other hosts"), func(h *HTTPRequest, i int) { h.Host = hosts[i] })
		out.say(append(slices.Clone(v.hosts), "hosts not "+strings.Join(v.hosts, " or ")))
	}
	for _, name := range slices.Sorted(maps.Keys(v.headers)) {
		states := headerStates(strings.ToLower(name), slices.Sorted(maps.Keys(v.headers[name])))
		names, exact := make([]string, len(states)), make([]string, len(states))
		for i, s := range states {
			names[i], exact[i] = s.name, s.exact
		}
		dim(names, func(h *HTTPRequest, i int) { h.Header[name] = states[i].lines })
		out.say(exact)
	}
	for _, key := range slices.SortedFunc(maps.Keys(v.claims), func(a, b [2]string) int { return strings.Compare(a[0]+" "+a[1], b[0]+" "+b[1]) }) {
		values := slices.Sorted(maps.Keys(v.claims[key]))
		sets := subsets(values)
		names, exact := make([]string, len(sets)), make([]string, len(sets))
		for i, s := range sets {
			exact[i] = onlyValues(key[1]+" of "+key[0], s, values, "")
			names[i] = fmt.Sprintf("%s of %s: %s", key[1], key[0], strings.Join(s, ", "))
			if len(s) == 0 {
				names[i] = "without " + key[1] + " of " + key[0]
			}
		}
		dim(names, func(h *HTTPRequest, i int) {
			if h.Claims[key[0]] == nil {
				h.Claims[key[0]] = map[string][]string{}
			}
			h.Claims[key[0]][key[1]] = sets[i]
		})
		out.say(exact)
	}
	out.fill(set)
	return out
}

// otherThan gives a text that stands for all but these, and is none of them.
func otherThan(text string, these []string) string {
	for slices.Contains(these, text) {
		text += "0"
	}
	return text
}

// fill makes the product, up to maxProbes.
func (p *probes) fill(set []func(*HTTPRequest, int)) {
	at := make([]int, len(p.dims))
	for {
		if len(p.all) == maxProbes {
			p.exact = false
			return
		}
		pr := probe{request: HTTPRequest{Header: map[string][]string{}, Claims: map[string]map[string][]string{}}, at: slices.Clone(at)}
		for d, put := range set {
			put(&pr.request, at[d])
		}
		p.all = append(p.all, pr)
		d := len(at) - 1
		for ; d >= 0; d-- {
			if at[d]++; at[d] < len(p.dims[d].names) {
				break
			}
			at[d] = 0
		}
		if d < 0 {
			return
		}
	}
}

// mentioned is what conditions name.
type mentioned struct {
	methods, paths, hosts []string
	headers               map[string]map[string]bool    // :: name → values
	claims                map[[2]string]map[string]bool // :: issuer, claim → values
}

func collect(matches []*HTTPMatch) mentioned {
	v := mentioned{headers: map[string]map[string]bool{}, claims: map[[2]string]map[string]bool{}}
	for _, m := range matches {
		v.methods = append(v.methods, m.Methods...)
		v.paths = append(v.paths, m.Paths...)
		v.hosts = append(v.hosts, m.Hosts...)
		for _, h := range m.Headers {
			if v.headers[h.Name] == nil {
				v.headers[h.Name] = map[string]bool{}
			}
			if !h.Present {
				v.headers[h.Name][h.Equals] = true
			}
		}
		for _, c := range m.Claims {
			key := [2]string{c.Issuer, c.Claim}
			if v.claims[key] == nil {
				v.claims[key] = map[string]bool{}
			}
			v.claims[key][c.Value] = true
		}
	}
	for _, list := range []*[]string{&v.methods, &v.paths, &v.hosts} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	return v
}

// small reports whether every combination of values is asked about.
func (v mentioned) small() bool {
	for _, values := range v.headers {
		if len(values) > maxSubset {
			return false
		}
	}
	for _, values := range v.claims {
		if len(values) > maxSubset {
			return false
		}
	}
	return true
}

// headerState is what a request may have of one header.
type headerState struct {
	name, exact string
	lines       []string
}

// headerStates tells apart what conditions can: absent, another value, one value
// alone, several, each set of values beside another one.
func headerStates(name string, values []string) []headerState {
	other := otherThan("other", values)
	out := []headerState{{"without " + name, "without " + name, nil}, {"other " + name, onlyValues(name, nil, values, ""), []string{other}}}
	for _, v := range values {
		out = append(out, headerState{name + ": " + v, name + ": " + v, []string{v}})
	}
	for _, s := range subsets(values) {
		if len(s) > 0 {
			out = append(out, headerState{name + ": " + strings.Join(s, " and ") + " and others", onlyValues(name, s, values, " and more"), append(slices.Clone(s), other)})
		}
	}
	return out
}

// subsets gives all sets of some values, the empty one first; of many values, only
// those with one, and all.
func subsets(values []string) [][]string {
	out := [][]string{nil}
	if len(values) > maxSubset {
		for _, v := range values {
			out = append(out, []string{v})
		}
		return append(out, values)
	}
	for bits := 1; bits < 1<<len(values); bits++ {
		var s []string
		for i, v := range values {
			if bits&(1<<i) != 0 {
				s = append(s, v)
			}
		}
		out = append(out, s)
	}
	return out
}

// describe says in few words which requests some probes stand for.
func (p probes) describe(some []int) []string {
	if len(some) == len(p.all) {
		return []string{"every request"}
	}
	return p.words(p.reduce(some))
}

// words joins what differs in the method only.
func (p probes) words(all [][]int) []string {
	methods := map[string][]string{} // :: the rest → methods
	for _, at := range all {
		var rest []string
		for d := 1; d < len(at); d++ {
			if at[d] >= 0 && p.dims[d].names[at[d]] != "" {
				rest = append(rest, p.dims[d].names[at[d]])
			}
		}
		method := ""
		if at[0] >= 0 {
			method = p.dims[0].names[at[0]]
		}
		key := strings.Join(rest, ", ")
		methods[key] = append(methods[key], method)
	}
	var out []string
	for _, rest := range slices.Sorted(maps.Keys(methods)) {
		slices.Sort(methods[rest])
		list := strings.Join(slices.Compact(methods[rest]), " ")
		out = append(out, strings.TrimSpace(strings.TrimSuffix(list+" "+rest, " ")))
	}
	return out
}
