package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"maps"
	"os"
	"sync"
	"syscall"

	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// verificationError marks what VerifyConnection refused, so that it can be told
// from everything else that a handshake may end with.
type verificationError struct{ error }

func (e verificationError) Unwrap() error { return e.error }

func markVerification(c *tls.Config) {
	verify := c.VerifyConnection
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if err := verify(s); err != nil {
			return verificationError{err}
		}
		return nil
	}
}

// failures counts handshakes that failed, by class. The zero value is ready.
type failures struct {
	mu sync.Mutex
	n  map[string]uint64 // guarded by mu
}

func (f *failures) add(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n == nil {
		f.n = make(map[string]uint64)
	}
	f.n[failureClass(err)]++
}

func (f *failures) counts() map[string]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.n)
}

// failureClass gives one of a fixed set of labels.
func failureClass(err error) string {
	var (
		record tls.RecordHeaderError
		alert  tls.AlertError
		verify verificationError
	)
	switch {
	case errors.Is(err, errEvicted):
		return "evicted"
	case errors.Is(err, errTooMany):
		return "too-many"
	case errors.Is(err, revocation.ErrRevoked):
		return "revoked"
	case errors.As(err, &verify):
		return "peer-not-verified"
	case errors.Is(err, identity.ErrNoIdentity):
		return "no-identity"
	case errors.As(err, &record):
		return "not-tls"
	case errors.As(err, &alert):
		return "peer-refused-us"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case errors.Is(err, context.Canceled):
		return "stopping"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "peer-gone"
	}
	return "protocol"
}
