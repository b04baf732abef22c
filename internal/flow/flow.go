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

// MaxText bounds each free text of a record (Error, Reason), in bytes. [ToALS]
// shortens longer ones, [FromALS] refuses them.
const MaxText = 256

// maxName bounds a rule's name and location: two file names and a line.
const maxName = 1024

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

func clean(s string, limit int) string {
	if isClean(s, limit) {
		return s
	}
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
