// Package tunnel carries byte streams to one peer as HTTP/2 CONNECT (RFC 9113
// section 8.5) over a connection that somebody else dialled, secured and
// authenticated. docs/tunnel.md specifies what goes over the wire.
//
// It knows no TLS and no policy: it hands a request to its user, who accepts or
// refuses it. A session carries one stream, and the connection below closes with
// that stream; on the wire it is plain HTTP/2, which does not depend on that.
//
// Where to look: session.go (life of a connection), read.go (frames in), write.go
// (frames out), header.go (requests and responses), stream.go (the net.Conn that
// users see), message.go (what users tell each other beside it), window.go and
// budget.go (what a peer may make us hold and do).
package tunnel

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/net/http2"
)

// Limits that hold for every session. docs/tunnel.md lists them.
const (
	// MaxHeaderList bounds a header block, encoded and decoded, in bytes.
	MaxHeaderList = 32 << 10
	// MaxReason bounds the reason that comes with a refusal, in bytes.
	MaxReason = 256
	// MaxDecisionID bounds a decision id, in bytes.
	MaxDecisionID = 64
	// MaxHost bounds Target.Host, in bytes.
	MaxHost = 253

	maxFrame      = 16 << 10               // MAX_FRAME_SIZE that we announce
	maxPayload    = chunkSize - frameHead  // DATA we send: frame and header fill one 16 KiB TLS record
	frameHead     = 9                      // RFC 9113 section 4.1
	maxWindow     = 1<<31 - 1              // RFC 9113 section 6.9.1
	initialWindow = 65535                  // RFC 9113 section 6.9.2
	maxFragments  = 32                     // HEADERS and CONTINUATION frames of one header block
	maxPings      = 32                     // unanswered PINGs of a peer that does not read
	frameGrace    = 200 * time.Millisecond // for a frame on its way when a write deadline passes
	lingerClean   = 5 * time.Second        // how long the peer may take to close after a clean end
	lingerAbort   = 1 * time.Second        // and after a reset or a violation
	minWindow     = initialWindow          // smallest Config.Window
	topWindow     = 16 << 20               // largest Config.Window
)

// Config holds what a session may be told. The zero value is good.
type Config struct {
	// Window is how many bytes of received data are held until they are read:
	// 64 KiB to 16 MiB, 256 KiB if zero.
	Window int
	// HandshakeTimeout bounds the time to the peer's preface and, on a server, to
	// the end of its request's headers; 10 s if zero.
	HandshakeTimeout time.Duration
	// WriteTimeout bounds how long the connection below may take no byte before
	// the session is given up; 30 s if zero. A peer reads at all times, so only a
	// dead or hostile one reaches it.
	WriteTimeout time.Duration
	// Messages are what the users of both ends tell each other beside the stream.
	Messages Messages
	// Now is the clock of the budget for unproductive frames; time.Now if nil.
	Now func() time.Time
}

func (c Config) withDefaults() (Config, error) {
	if c.Window == 0 {
		c.Window = 256 << 10
	}
	if c.Window < minWindow || c.Window > topWindow {
		return c, fmt.Errorf("window of %d bytes: want %d to %d", c.Window, minWindow, topWindow)
	}
	if c.HandshakeTimeout <= 0 {
		c.HandshakeTimeout = 10 * time.Second
	}
	if c.WriteTimeout <= 0 {
		c.WriteTimeout = 30 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c, nil
}

// Errors that callers test for.
var (
	// ErrReset is in every error that says that the peer reset the stream; such
	// an error is syscall.ECONNRESET too.
	ErrReset = errors.New("stream reset by the peer")
	// ErrUnprocessed is in errors of Open where the peer has certainly not looked
	// at the request, so that it may be repeated elsewhere.
	ErrUnprocessed = errors.New("request not processed by the peer")
	// ErrUsed says that the session had its stream already or takes no more.
	ErrUsed = errors.New("session takes no more streams")

	errSilent = fmt.Errorf("no complete request in time: %w", os.ErrDeadlineExceeded)
)

// Refused is the error of Open when the peer answered with a status other than
// 2xx.
type Refused struct {
	Status     int    // HTTP status: 403 denied, 404 no such port, 503 app unreachable or draining
	DecisionID string // names the peer's flow record; empty if the peer sent none
	Reason     string // printable, at most MaxReason bytes; often empty
}

// Error gives status, decision id and reason on one line.
func (r *Refused) Error() string {
	s := fmt.Sprintf("refused with status %d", r.Status)
	if r.DecisionID != "" {
		s += ", decision " + r.DecisionID
	}
	if r.Reason != "" {
		s += ": " + r.Reason
	}
	return s
}

// resetError is a RST_STREAM received.
type resetError struct{ code http2.ErrCode }

func (e *resetError) Error() string { return fmt.Sprintf("%v (%v)", ErrReset, e.code) }

func (e *resetError) Is(target error) bool {
	return target == ErrReset || target == syscall.ECONNRESET ||
		target == ErrUnprocessed && e.code == http2.ErrCodeRefusedStream
}

// violation is a breach of HTTP/2 or of our limits by the peer. It ends the
// session; stream is the id where a stream alone was wrong, else 0.
type violation struct {
	code   http2.ErrCode
	reason string
	stream uint32
}

func (v *violation) Error() string {
	return fmt.Sprintf("peer broke the protocol: %s (%v)", v.reason, v.code)
}

// lost is the error of a connection that ended below us before the stream did.
func lost(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("reading frame: %w", err)
}
