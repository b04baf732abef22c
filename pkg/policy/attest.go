package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"

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
	Issuer string            // name of the control plane's configured issuer, cluster or CA; "" is the only one there
	Via    []string          // Unix: paths of the agents whose word counts, at least one
	Select map[string]string // :: key → the value that evidence must have

	pos
	td spiffeid.TrustDomain // of the agents in Via; set by Compile
}

// claimPrefix stands before the names of claims among selectors.
const claimPrefix = "claims."

// form is how one kind is written: the fields that hold selectors, and which
// other fields it has.
type form struct {
	selectors []string
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
		return form{issuer: "ca", selectors: []string{"commonName", "organization", "organizationalUnit", "dns", "uri", "ip", "email", "fingerprint", "issuerFingerprint"}}, true
	case Kubernetes:
		return form{issuer: "cluster", required: []string{"namespace", "serviceAccount"},
			selectors: []string{"namespace", "serviceAccount", "podName", "podUID", "node"}}, true
	case OIDC:
		return form{issuer: "issuer", claims: true}, true
	case Unix:
		return form{via: true, selectors: []string{"uid", "gid", "user", "group", "path", "sha256", "unit", "container", "cgroup"}}, true
	}
	return form{}, false
}

func kindsOfEvidence() []string { return []string{JoinToken, X509Pop, Kubernetes, OIDC, Unix} }

// has reports whether evidence of this form can have the selector.
func (f form) has(key string) bool {
	return slices.Contains(f.selectors, key) || f.claims && strings.HasPrefix(key, claimPrefix)
}

// Match reports whether evidence of a kind, from an issuer, is what a asks for;
// via is the agent that vouches for it, zero for none. Where it is not, missed
// names the first thing that differs and what was there instead.
//
// An entry that names no issuer matches the issuer "" and no other: whoever
// knows that there is one issuer of the kind passes "", so that configuring a
// second one never widens what an old entry admits. A join token never matches:
// it names its workload by itself.
func (a Attest) Match(kind, issuer string, via spiffeid.ID, s Selectors) (ok bool, missed string) {
	_, known := formOf(a.Kind)
	switch {
	case kind != a.Kind || !known:
		return false, fmt.Sprintf("kind: want %s, got %s", orNone(a.Kind), told(kind))
	case kind == JoinToken:
		return false, "kind: a join token names its workload by itself"
	case a.Issuer != issuer:
		return false, fmt.Sprintf("issuer: want %s, got %s", orNone(a.Issuer), told(issuer))
	case a.Kind != Unix && !via.IsZero():
		return false, fmt.Sprintf("via: want none, got %s", via)
	case a.Kind == Unix && (via.IsZero() || !slices.Contains(a.Via, via.Path())):
		return false, fmt.Sprintf("via: want %s, got %s", orNone(strings.Join(a.Via, " or ")), orNone(via.Path()))
	case a.Kind == Unix && !a.td.IsZero() && via.TrustDomain() != a.td:
		return false, fmt.Sprintf("via: want an agent of %s, got %s", a.td.Name(), via)
	}
	for _, key := range a.keys() {
		if !slices.Contains(s[key], a.Select[key]) {
			return false, fmt.Sprintf("%s: want %s, got %s", key, a.Select[key], told(s[key]...))
		}
	}
	return true, ""
}

// told lists what evidence says for people. Whoever wants to pass has written
// it, so what could fool a terminal or a reader is quoted.
func told(values ...string) string {
	const most = 5
	out := make([]string, 0, most+1)
	for i, v := range values {
		if i == most {
			out = append(out, fmt.Sprintf("%d more", len(values)-most))
			break
		}
		if v = shorten(v); strings.ContainsFunc(v, func(r rune) bool { return !unicode.IsPrint(r) || r == ' ' || r == ',' || r == '"' }) {
			v = strconv.Quote(v)
		}
		out = append(out, v)
	}
	return orNone(strings.Join(out, ", "))
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
