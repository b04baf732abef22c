// Package policy is Sallyport's rule language: it parses the files that
// platform engineers write, compiles them, and decides. Sidecar, control plane
// and command line all ask this one evaluator.
//
// It is a pure library: files come in as an [io/fs.FS], nothing is fetched, no
// clock is read, no grpc is imported. The language is described in
// docs/policy.md.
package policy

import (
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Effect is a verdict. The zero value denies.
type Effect uint8

// Verdicts, from the most to the least restrictive.
const (
	Deny    Effect = iota
	Inspect        // the connection may pass; each request on it is to be decided by itself
	Allow          // the connection, or the request, may pass
)

// String gives "deny", "inspect" or "allow".
func (e Effect) String() string {
	switch e {
	case Allow:
		return "allow"
	case Inspect:
		return "inspect"
	}
	return "deny"
}

// MarshalText gives what String gives.
func (e Effect) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// Protocol is what a workload's owner declares a port to speak. Nothing sniffs.
type Protocol string

// Protocols.
const (
	TCP  Protocol = "tcp"
	HTTP Protocol = "http"
	GRPC Protocol = "grpc"
)

// Port is a declared port of a workload.
type Port struct {
	Name     string // a DNS label, unique in its workload
	Number   uint16 // unique in its workload; what callers name on the wire
	Protocol Protocol
	// Plaintext is until when callers without mutual TLS, which have no identity,
	// may come to this port while a team moves in; zero: never.
	Plaintext time.Time
	// Direct is where the sidecar also takes plain mutual TLS for this port, for
	// callers that have no sidecar; 0: nowhere. No decision reads it.
	Direct uint16
}

// Request asks whether Src may open a connection to Port of Dst, or, with HTTP,
// whether it may send this request there. The zero Src is a caller without an
// identity.
type Request struct {
	Src, Dst spiffeid.ID
	Port     uint16
	HTTP     *HTTPRequest
}

// RuleRef says which rule decided and where it is written. The zero RuleRef
// means that no rule did.
type RuleRef struct {
	Set    string // "" is the root set
	Policy string // metadata.name
	File   string // path below the policy folder, with slashes
	Line   int    // line of the rule's entry under allow or deny, from 1
}

// IsZero reports whether r names no rule.
func (r RuleRef) IsZero() bool { return r == RuleRef{} }

// Location gives file:line, or "" for the zero RuleRef.
func (r RuleRef) Location() string {
	if r.IsZero() {
		return ""
	}
	return fmt.Sprintf("%s:%d", r.File, r.Line)
}

// String gives POLICY (file:line), with the set's name before the policy's
// where it is not the root set, or "no rule".
func (r RuleRef) String() string {
	if r.IsZero() {
		return "no rule"
	}
	name := r.Policy
	if r.Set != "" {
		name = r.Set + "/" + r.Policy
	}
	return name + " (" + r.Location() + ")"
}

// Decision is the answer to a [Request]. The zero Decision denies.
type Decision struct {
	Effect Effect
	Would  Effect  // what full enforcement says; Deny where something is only audited
	Rule   RuleRef // the one that decided Effect; zero where none did, and for Inspect
	Reason string  // the rule's reason; told to the refused only when a deny rule decided

	// Audited is the deny in audit mode that full enforcement would refuse by.
	// Where it is zero, Would denies and Effect allows, Rule is an open door: a
	// Defaults document.
	Audited RuleRef
}

// Rule is one compiled entry under allow or deny of a Policy, or a Defaults
// document, with every label and port name resolved. It is the form that travels
// to sidecars.
type Rule struct {
	Ref    RuleRef
	Reason string // beside Ref: a Decision takes both
	Effect Effect
	// Audit says that a deny only records, and that an allow is an open door: it
	// grants what full enforcement would refuse.
	Audit     bool
	From      []identity.Pattern // any one of them matches
	Anonymous bool               // matches callers without an identity too
	To        []identity.Pattern // any one of them matches
	Ports     []uint16           // ascending; empty: every port ("all")
	HTTP      []HTTPMatch        // any one of them matches; empty: the whole connection
	// The rule holds from Since until before Until; the zero time is no limit.
	Since, Until time.Time

	col int // of the entry in its file, where it was compiled
}
