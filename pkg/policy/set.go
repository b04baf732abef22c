package policy

import (
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Limits of what a user may write. They keep a mistake (or a hostile file) from
// exhausting the control plane; errors name the limit.
const (
	MaxFileSize = 4 << 20  // bytes in one file
	MaxFiles    = 2000     // files in one set
	MaxSetSize  = 32 << 20 // bytes in one set
	MaxSets     = 1000     // sets in one folder
	MaxTreeSize = 64 << 20 // bytes in all sets of one folder
	MaxRules    = 200_000  // compiled rules in all sets
	MaxErrors   = 50       // mistakes reported at once; more are counted
)

// Set is the content of one folder of resource files: what is applied as a
// whole or not at all. A Set from [Parse] is valid by itself; references into
// other sets are checked by [Compile].
type Set struct {
	Name      string // "" is the root set
	Workloads []Workload
	Policies  []Policy
	Tests     []PolicyTest
	Externals []External
	// What follows is in the root set only.
	TrustDomains []TrustDomain
	TokenIssuers []TokenIssuer
	Defaults     []Defaults
	Scopes       []Scope
	Invariants   []Invariant

	sources map[string][]byte // :: reported file path → content, for snippets
}

// Workload is a named service: its identity, how it proves it, what it serves.
type Workload struct {
	Name   string            // metadata.name, a DNS label
	Set    string            // "" is the root set
	ID     string            // path of its SPIFFE ID, "/<name>" unless written; a template's has {selector} for segments
	Labels map[string]string // what selectors match; a template's may be {selector}
	Attest []Attest          // any one proves it; none: it cannot enrol
	Ports  []Port            // in the order written
	// MaxStale is what becomes of callers while revocations may be unknown.
	MaxStale MaxStale
	// Endpoints are where instances without sidecar serve by mutual TLS themselves,
	// in the order written: a declared grpc port of some address each. Addresses are
	// dialled; no decision reads them.
	Endpoints []netip.AddrPort
	File      string // path below the policy folder, with slashes
	Line      int    // of metadata.name, from 1
	Col       int    // in characters, from 1

	id     pos            // of spec.id where written, else of metadata.name
	labels map[string]pos // :: key → where it is written
	ports  []pos          // of Ports
}

// MaxStale bounds how old a workload's revocation list may become while its
// sidecar is cut off from the control plane and from all neighbours. The zero
// value goes on for ever, with an alarm.
type MaxStale struct {
	After  time.Duration // 0: never
	Refuse bool          // new connections are refused then; else they are only alarmed about
}

// Policy says who may, and who must not, reach the workloads that To selects.
type Policy struct {
	Name  string // metadata.name, a DNS label
	Set   string // "" is the root set
	To    Selector
	Allow []Entry
	Deny  []Entry // wins over every Allow, of any policy
	File  string  // path below the policy folder, with slashes
	Line  int     // of metadata.name, from 1
	Col   int     // in characters, from 1
}

// Entry is one element of a Policy's allow or deny list.
type Entry struct {
	From  []Selector  // any one of them matches
	Ports []PortRef   // any one of them; [all] is one PortRef with All set
	HTTP  []HTTPMatch // any one of them, of http, grpc and when; empty: the whole connection
	GRPC  bool        // HTTP was written as gRPC methods: only grpc ports can tell
	// The rule holds from Since until before Until, to the second; the zero time is
	// no limit.
	Since, Until time.Time
	Audit        bool   // of a deny: recorded, not enforced
	Reason       string // at most [MaxReason] bytes, printable

	pos
	http, when pos   // of http or grpc, and of when
	matches    []pos // of the entries of http or grpc
	until      pos
}

// Defaults is a door left open while a team moves in: until Until, every identity
// of this trust domain may reach every port of the workloads that To selects,
// unless a deny matches. What no allow names is recorded as what would be denied.
type Defaults struct {
	Name  string // metadata.name, a DNS label
	To    Selector
	Until time.Time
	File  string // path below the policy folder, with slashes
	Line  int    // of metadata.name, from 1
	Col   int    // in characters, from 1

	until pos
}

// Scope says what the set of its name may say. A set other than the root set that
// has none may define nothing.
type Scope struct {
	Name   string   // of the set, a DNS label
	Owners []string // who may change the set, as in "oidc-group:billing"
	// IDs are patterns of what the set may define and guard: its workloads,
	// templates and Externals, and the to of its policies.
	IDs      []ScopeID
	Labels   map[string][]string // :: key that each of its workloads has → values, any one of them
	Evidence []Attest            // each entry of the set's has all that one of these says
	File     string              // path below the policy folder, with slashes
	Line     int                 // of metadata.name, from 1
	Col      int                 // in characters, from 1
}

// ScopeID is a pattern of IDs, written as in Selector.ID.
type ScopeID struct {
	ID string

	pos
}

// Invariant says that no identity which From selects may ever reach one that To
// selects: see [Prove].
type Invariant struct {
	Name     string // metadata.name, a DNS label
	From, To Selector
	File     string // path below the policy folder, with slashes
	Line     int    // of metadata.name, from 1
	Col      int    // in characters, from 1
}

// External is a destination outside every mesh. Its ID, /external/NAME, is never
// issued; the sidecar of the caller decides.
type External struct {
	Name string // metadata.name, a DNS label
	Set  string // "" is the root set
	Host string // name or address
	Port Port   // named by its protocol
	TLS  bool   // the caller's sidecar speaks TLS to Host, and checks its name
	File string // path below the policy folder, with slashes
	Line int    // of metadata.name, from 1
	Col  int    // in characters, from 1
}

// TokenIssuer is an OpenID Connect issuer whose tokens end users bring. Rules name
// it under when.
type TokenIssuer struct {
	Name     string // metadata.name, a DNS label
	Issuer   string // https URL, as in the claim iss
	Audience string // as in the claim aud
	File     string // path below the policy folder, with slashes
	Line     int    // of metadata.name, from 1
	Col      int    // in characters, from 1
}

// MaxReason is the longest reason of a rule, in bytes.
const MaxReason = 256

// Selector picks identities. Exactly one of its exported fields is set.
type Selector struct {
	Workload  string            // metadata.name
	Labels    map[string]string // all of them must match
	ID        string            // "/a/*" in this trust domain, or "spiffe://td/a/**"
	External  string            // metadata.name of an External; of a destination
	Anonymous bool              // callers without an identity; of a source

	pos
}

// PortRef names a port: all of them, a declared name or a number. The zero
// PortRef names none.
type PortRef struct {
	All    bool
	Name   string
	Number uint16

	pos
}

// PolicyTest is a list of questions with the expected answers, asked by
// [RunTests] before a change lands.
type PolicyTest struct {
	Name  string // metadata.name, a DNS label
	Set   string // "" is the root set
	Cases []Case
	File  string // path below the policy folder, with slashes
	Line  int    // of metadata.name, from 1
	Col   int    // in characters, from 1
}

// Case asks whether From may reach Port of To.
type Case struct {
	From string       // a workload's name, or an ID as in Selector.ID without wildcards; "" is a caller without identity
	To   string       // the same; must be a workload, or external:NAME
	Port PortRef      // zero: every declared port of To
	HTTP *HTTPRequest // nil: every request
	// At is when it is asked; the zero time counts every window of time as open.
	At     time.Time
	Expect Effect

	pos            // of the case
	from, to, http pos
	grpc           bool // HTTP was written as a gRPC method
}

// CompiledWorkload is a Workload with its full identity.
type CompiledWorkload struct {
	Workload
	ID spiffeid.ID // of a template: zero, or the one that was asked for

	Template bool             // the identity is filled in from evidence: see Resolve
	Pattern  identity.Pattern // of a template: the IDs that there can be
}

// Port gives the declared port that has this number.
func (w CompiledWorkload) Port(number uint16) (Port, bool) {
	for _, p := range w.Ports {
		if p.Number == number {
			return p, true
		}
	}
	return Port{}, false
}

// PortByName gives the declared port of this name.
func (w CompiledWorkload) PortByName(name string) (Port, bool) {
	for _, p := range w.Ports {
		if p.Name == name {
			return p, true
		}
	}
	return Port{}, false
}

// pos is a place in a file; the file is the one of the resource around it.
type pos struct {
	line, col int // from 1, col in characters; zero: unknown
}
