// Package flow is the record of one connection: who wanted what, what was
// decided and by which line, and what came of it. Records go to sinks: a ring
// for the operator, a JSON-lines file, a stream to the control plane.
//
// It decides nothing and keeps no statistics; package insight aggregates.
// docs/flows.md describes the JSON form.
package flow

import (
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Side says which end of a connection made a record.
type Side string

// Only the destination's record ([Inbound]) is evidence of a decision.
const (
	Inbound  Side = "inbound"
	Outbound Side = "outbound"
)

// Outcome says how a connection ended.
type Outcome string

// Outcomes of a connection.
const (
	Closed  Outcome = "closed"  // both ends finished
	Refused Outcome = "refused" // policy denied it; nothing reached the app
	Cut     Outcome = "cut"     // was allowed, and ended by a later policy or identity change
	Failed  Outcome = "failed"  // a network or app error; Flow.Error says which
	Drained Outcome = "drained" // ended by the sidecar's own shutdown
)

// MaxText bounds each free text of a record (Error, Reason), in bytes. Longer
// texts are shortened where a record is written and refused where it is read.
const MaxText = 256

// Limits of the other texts, in bytes. A SPIFFE ID's is identity.MaxIDLength.
const (
	maxToken    = 64  // ID, Revision, Instance, and the words Side and Outcome
	maxName     = 253 // a port's or a rule's name
	maxLocation = 512 // a set's folder, a file's name and a line
)

// Flow describes one connection, complete when it has ended. It embeds the very
// request that was decided, so that a recorded flow can be decided again.
type Flow struct {
	policy.Request
	policy.Decision

	ID       string    // decision id, 16 hex digits, the same in both ends' records
	Start    time.Time // when the connection was accepted
	Duration time.Duration
	Side     Side
	Outcome  Outcome
	Error    string // what went wrong, or why it was refused where no rule was asked; at most MaxText bytes
	PortName string // declared name of Request.Port, if known
	Reporter string // SPIFFE ID of the sidecar that made the record; a collector stamps it
	Instance string // instance of the reporter
	Revision string // policy revision that decided
	Sent     int64  // bytes to the destination app
	Received int64  // bytes from the destination app
}

// none is the verdict of a connection about which nothing was decided.
const none = "none"

// Verdict gives "allow", "deny", or "none" for a connection that ended before
// anything was decided: its Effect is Deny only because the zero Decision
// denies. A denied connection is Refused or Cut, never Failed or Drained.
func (f Flow) Verdict() string {
	if f.Effect == policy.Deny && (f.Outcome == Failed || f.Outcome == Drained) {
		return none
	}
	return f.Effect.String()
}

// Sink takes records. Record never blocks; what a sink cannot hold it drops and
// counts.
type Sink interface {
	Record(Flow)
}

type tee []Sink

// Tee returns a sink that hands each record to every one of sinks, in order.
func Tee(sinks ...Sink) Sink { return tee(sinks) }

func (t tee) Record(f Flow) {
	for _, s := range t {
		s.Record(f)
	}
}

// Text makes s fit for a record: valid UTF-8, one line, no control characters,
// at most [MaxText] bytes. Records are shown on terminals, and errors may quote
// what a peer sent.
func Text(s string) string { return clean(s, MaxText) }

// quote shortens what an error text quotes of a peer's input.
func quote(s string) string { return clean(s, maxToken) }

func clean(s string, limit int) string {
	if isClean(s, limit) {
		return s
	}
	s = s[:min(len(s), 4*limit)] // no rune is longer than four bytes
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	for len(s) > limit {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}

// isClean reports whether s may stand in a record as it is.
func isClean(s string, limit int) bool {
	if len(s) > limit || !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}
