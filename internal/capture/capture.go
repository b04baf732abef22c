// Package capture is the sidecar's local door: it listens where the app dials,
// admits only the users who may speak with the sidecar's identity, and asks the
// new connection where it wants to go.
//
// It does not decide whether that destination may be reached, and it dials
// nothing.
package capture

import (
	"context"
	"net"
)

// Ask is what a new connection wants.
type Ask struct {
	Target string   // REF:PORT, as in "payments:http"
	Conn   net.Conn // what to relay; its owner closes it

	// Answer tells the caller, in the front's own protocol, whether the
	// destination was reached: nil for yes. It is called at most once, before
	// anything is written to Conn or, after an error, before Conn is closed.
	Answer func(error) error
}

// Front learns from a connection where it wants to go. It returns within ten
// seconds or when ctx is done, and leaves closing to the connection's owner.
type Front func(ctx context.Context, c net.Conn) (Ask, error)

// Explicit returns the front of a listener with one fixed destination. It reads
// nothing, so the server may speak first. There is no way to word a refusal:
// Answer with an error turns the close that follows into a reset.
func Explicit(target string) Front {
	return func(_ context.Context, c net.Conn) (Ask, error) {
		return Ask{Target: target, Conn: c, Answer: func(err error) error {
			if l, ok := c.(interface{ SetLinger(int) error }); ok && err != nil {
				return l.SetLinger(0)
			}
			return nil
		}}, nil
	}
}
