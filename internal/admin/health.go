// Package admin is how a daemon shows itself to those who run it: health,
// readiness and metrics over HTTP, and profiles and internals on a private unix
// socket.
//
// It changes nothing: there is no verb here that does more than read.
package admin

import (
	"encoding/json"
	"fmt"
	"maps"
	"sync"
	"time"
)

// Status of a component. The zero Status is Down.
type Status uint8

// Statuses, from the worst to the best.
const (
	Down     Status = iota // does not do its work
	Degraded               // works, but somebody should look
	OK
)

// String gives "down", "degraded" or "ok".
func (s Status) String() string {
	switch s {
	case OK:
		return "ok"
	case Degraded:
		return "degraded"
	}
	return "down"
}

// MarshalText gives the form that String gives.
func (s Status) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (s *Status) UnmarshalText(b []byte) error {
	for _, t := range []Status{Down, Degraded, OK} {
		if t.String() == string(b) {
			*s = t
			return nil
		}
	}
	return fmt.Errorf("status %q: want ok, degraded or down", b)
}

// Component is one part of a daemon.
type Component struct {
	Status  Status    `json:"status"`
	Message string    `json:"message,omitempty"` // what is wrong and what to do about it
	Since   time.Time `json:"since"`             // when Status last changed
}

// Report is the state of a daemon: its worst component's status and every
// component by name.
type Report struct {
	Status     Status               `json:"status"`
	Components map[string]Component `json:"components"`
}

// String gives the report as JSON.
func (r Report) String() string {
	b, err := json.Marshal(r)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Health is a daemon's components. It is safe for concurrent use.
type Health struct {
	now func() time.Time

	mu     sync.Mutex
	parts  map[string]Component // guarded by mu
	before []func()             // guarded by mu; run by Report
}

// NewHealth returns a Health whose named components are down with the message
// "starting".
func NewHealth(now func() time.Time, names ...string) *Health {
	h := &Health{now: now, parts: make(map[string]Component)}
	for _, n := range names {
		h.Set(n, Down, "starting")
	}
	return h
}

// Set says how a component is. The message tells whoever reads it what to do;
// it is empty when all is well.
func (h *Health) Set(name string, s Status, message string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c, known := h.parts[name]
	if !known || c.Status != s {
		c.Since = h.now().UTC()
	}
	c.Status, c.Message = s, message
	h.parts[name] = c
}

// Get returns a component; one that was never set is down.
func (h *Health) Get(name string) Component {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.parts[name]
}

// BeforeReport has fn run by each Report before it looks, so that fn can Set
// what changes with time alone.
func (h *Health) BeforeReport(fn func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.before = append(h.before, fn)
}

// Report returns the state of all components.
func (h *Health) Report() Report {
	h.mu.Lock()
	before := h.before
	h.mu.Unlock()
	for _, fn := range before {
		fn()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	r := Report{Status: OK, Components: maps.Clone(h.parts)}
	for _, c := range h.parts {
		r.Status = min(r.Status, c.Status)
	}
	return r
}
