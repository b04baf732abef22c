package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Kinds of evidence that a Workload's attest list can name.
const (
	// JoinToken is a single-use token made by the operator for one workload. As
	// the token names its workload, no two workloads can be proved by the same
	// one.
	JoinToken = "join-token"
	// X509Pop is a certificate of another PKI, and possession of its key.
	X509Pop = "x509pop"
	// Kubernetes is a projected service-account token.
	Kubernetes = "kubernetes"
	// OIDC is an ID token of an OpenID Connect issuer.
	OIDC = "oidc"
	// Unix is what a trusted agent says of a process on its host.
	Unix = "unix"
)

// Selectors is what evidence says, by key: namespace → shop. What the keys of
// each kind are, docs/policy.md lists.
type Selectors = map[string][]string

// Attest is evidence that proves a workload: of the kind, from the issuer where
// one is named, and with every selector.
type Attest struct {
	Kind   string
	Issuer string            // name of the control plane's configured issuer, cluster or CA; "" is the only one
	Via    []string          // Unix: paths of the agents whose word counts, at least one
	Select map[string]string // :: key → the value that evidence must have

	pos
}

// claimPrefix stands before the names of claims among selectors.
const claimPrefix = "claims."

// form is how one kind is written: the fields that hold selectors, and which
// other fields it has.
type form struct {
	selectors []string
	multi     []string // those of which evidence may have several values
	required  []string
	issuer    string // the field that names the issuer; "": none
	via       bool
	claims    bool
}

func formOf(kind string) (form, bool) {
	switch kind {
	case JoinToken:
		return form{}, true
	case X509Pop:
		return form{issuer: "ca", multi: []string{"organization", "organizationalUnit", "dns", "uri", "ip", "email"},
			selectors: []string{"commonName", "organization", "organizationalUnit", "dns", "uri", "ip", "email", "fingerprint", "issuerFingerprint"}}, true
	case Kubernetes:
		return form{issuer: "cluster", required: []string{"namespace", "serviceAccount"},
			selectors: []string{"namespace", "serviceAccount", "podName", "podUID", "node"}}, true
	case OIDC:
		return form{issuer: "issuer", claims: true}, true
	case Unix:
		return form{via: true, multi: []string{"group"},
			selectors: []string{"uid", "gid", "user", "group", "path", "sha256", "unit", "container", "cgroup"}}, true
	}
	return form{}, false
}

func kindsOfEvidence() []string { return []string{JoinToken, X509Pop, Kubernetes, OIDC, Unix} }

// has reports whether evidence of this form can have the selector.
func (f form) has(key string) bool {
	return slices.Contains(f.selectors, key) || f.claims && strings.HasPrefix(key, claimPrefix)
}

// several reports whether evidence can have more than one value of key.
func (f form) several(key string) bool {
	return slices.Contains(f.multi, key) || strings.HasPrefix(key, claimPrefix)
}

// Match reports whether evidence of a kind, from an issuer, is what a asks for;
// via is the agent that vouches for it, zero for none. Where it is not, missed
// names the first thing that differs and what was there instead.
func (a Attest) Match(kind, issuer string, via spiffeid.ID, s Selectors) (ok bool, missed string) {
	switch {
	case kind != a.Kind:
		return false, fmt.Sprintf("kind: want %s, got %s", a.Kind, kind)
	case a.Issuer != "" && a.Issuer != issuer:
		return false, fmt.Sprintf("issuer: want %s, got %s", a.Issuer, orNone(issuer))
	case a.Kind == Unix && (via.IsZero() || !slices.Contains(a.Via, via.Path())):
		return false, fmt.Sprintf("via: want %s, got %s", strings.Join(a.Via, " or "), orNone(via.Path()))
	}
	for _, key := range a.keys() {
		if !slices.Contains(s[key], a.Select[key]) {
			return false, fmt.Sprintf("%s: want %s, got %s", key, a.Select[key], orNone(strings.Join(s[key], ", ")))
		}
	}
	return true, ""
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// keys gives the selectors in the order in which they are asked: as documented,
// claims by name.
func (a Attest) keys() []string {
	f, _ := formOf(a.Kind)
	var out []string
	for _, k := range f.selectors {
		if _, ok := a.Select[k]; ok {
			out = append(out, k)
		}
	}
	var claims []string
	for k := range a.Select {
		if !slices.Contains(f.selectors, k) {
			claims = append(claims, k)
		}
	}
	slices.Sort(claims)
	return append(out, claims...)
}

// String gives the entry on one line: "kubernetes namespace=shop".
func (a Attest) String() string {
	out := []string{a.Kind}
	if a.Issuer != "" {
		out = append(out, "issuer="+a.Issuer)
	}
	for _, v := range a.Via {
		out = append(out, "via="+v)
	}
	for _, k := range a.keys() {
		out = append(out, k+"="+a.Select[k])
	}
	return strings.Join(out, " ")
}

// checkEvidence reports pairs of workloads that one piece of evidence could
// prove. Of a selector with several values, different ones count as apart:
// whoever really has both is refused when it enrols.
func (c *compiler) checkEvidence() {
	type place struct {
		w *CompiledWorkload
		a Attest
	}
	shapes := map[string][]place{} // :: which selectors are there →
	var order []string
	for i := range c.workloads {
		for _, a := range c.workloads[i].Attest {
			if a.Kind == JoinToken {
				continue
			}
			for _, one := range a.each() {
				key := one.shape()
				if shapes[key] == nil {
					order = append(order, key)
				}
				shapes[key] = append(shapes[key], place{&c.workloads[i], one})
			}
		}
	}
	slices.Sort(order)
	told := map[[2]string]bool{} // :: names of workloads
	for n, first := range order {
		for _, second := range order[n:] {
			a, b := shapes[first][0].a, shapes[second][0].a
			if a.Kind != b.Kind {
				continue
			}
			common := commonKeys(a, b)
			seen := map[string]*CompiledWorkload{} // :: values of the common keys → the first that has them
			if first != second {
				for _, p := range shapes[first] {
					v := p.a.values(common)
					if seen[v] == nil {
						seen[v] = p.w
					}
				}
			}
			for _, p := range shapes[second] {
				v := p.a.values(common)
				other := seen[v]
				if other == nil {
					if first == second {
						seen[v] = p.w
					}
					continue
				}
				if other.Name == p.w.Name || told[[2]string{other.Name, p.w.Name}] || told[[2]string{p.w.Name, other.Name}] {
					continue
				}
				told[[2]string{other.Name, p.w.Name}] = true
				s := c.setOf(p.w.Set)
				c.errs.add(s.mistake(&c.errs, p.w.File, p.a.pos,
					fmt.Sprintf("workload %s at %s:%d; give one of them a selector in which they differ", other.Name, other.File, other.Line),
					fmt.Sprintf("the same evidence could prove two workloads, %s and %s", other.Name, p.w.Name)))
			}
		}
	}
}

// each splits an entry that several agents may vouch for.
func (a Attest) each() []Attest {
	if len(a.Via) < 2 {
		return []Attest{a}
	}
	out := make([]Attest, len(a.Via))
	for i, v := range a.Via {
		out[i] = a
		out[i].Via = []string{v}
	}
	return out
}

// shape says which things an entry names, whatever their values.
func (a Attest) shape() string {
	return a.Kind + "\x00" + strings.Join(a.named(), "\x00")
}

// named lists what an entry names; "via" and "issuer" too.
func (a Attest) named() []string {
	out := a.keys()
	if a.Issuer != "" {
		out = append(out, "issuer")
	}
	if len(a.Via) > 0 {
		out = append(out, "via")
	}
	return out
}

func commonKeys(a, b Attest) []string {
	other := b.named()
	return slices.DeleteFunc(a.named(), func(k string) bool { return !slices.Contains(other, k) })
}

// values joins what an entry says under some keys.
func (a Attest) values(keys []string) string {
	var b strings.Builder
	for _, k := range keys {
		v := a.Select[k]
		switch {
		case k == "issuer" && a.Issuer != "":
			v = a.Issuer
		case k == "via" && len(a.Via) > 0:
			v = a.Via[0]
		}
		fmt.Fprintf(&b, "%d:%s", len(v), v)
	}
	return b.String()
}

func (c *compiler) setOf(name string) *Set {
	for _, s := range c.sets {
		if s.Name == name {
			return s
		}
	}
	return c.sets[0] // every workload is of a set
}
