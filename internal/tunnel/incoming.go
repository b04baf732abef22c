package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"

	"golang.org/x/net/http2"
)

// Incoming is a request for a stream. Its user answers it once, by Accept or by
// Refuse, or closes the session.
type Incoming struct {
	Target Target // where the client wants to go, well-formed but unchecked

	st      *Stream
	replied bool // guarded by the session's mutex
}

// Accept waits for the next request, until ctx ends. It returns io.EOF once the
// session has ended and no further request can come.
func (s *Session) Accept(ctx context.Context) (*Incoming, error) {
	select {
	case in := <-s.accept:
		return in, nil
	case <-s.done:
		select {
		case in := <-s.accept:
			return in, nil
		default:
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.st != nil || s.err == nil {
			return nil, io.EOF // whoever has the stream has its error
		}
		return nil, fmt.Errorf("waiting for a request: %w", s.err)
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for a request: %w", ctx.Err())
	}
}

// Accept admits the request. decisionID (1 to 64 letters, digits, '-', '_', '.')
// goes to the peer. The stream may hold data already: a client need not wait for
// the answer.
func (in *Incoming) Accept(decisionID string) (*Stream, error) {
	if err := in.answer(200, decisionID, ""); err != nil {
		return nil, fmt.Errorf("accepting stream to %v: %w", in.Target, err)
	}
	return in.st, nil
}

// Refuse rejects the request with an HTTP status from 400 to 599 and ends the
// session. Of reason, which may be empty, the peer learns the first MaxReason bytes,
// unprintable characters replaced.
func (in *Incoming) Refuse(status int, decisionID, reason string) error {
	if status < 400 || status > 599 {
		return fmt.Errorf("refusing stream to %v: bad status %d", in.Target, status)
	}
	if err := in.answer(status, decisionID, sanitise(reason)); err != nil {
		return fmt.Errorf("refusing stream to %v: %w", in.Target, err)
	}
	return nil
}

func (in *Incoming) answer(status int, decisionID, reason string) error {
	if !validDecisionID(decisionID) {
		return fmt.Errorf("bad decision id %q", decisionID)
	}
	st, s := in.st, in.st.s
	s.mu.Lock()
	if in.replied {
		s.mu.Unlock()
		return errors.New("answered already")
	}
	in.replied = true
	st.decisionID, st.open = decisionID, status == 200
	s.mu.Unlock()

	fields := [][2]string{{":status", strconv.Itoa(status)}, {headerDecisionID, decisionID}}
	if reason != "" {
		fields = append(fields, [2]string{headerReason, reason})
	}
	if err := s.writeHeaders(st.id, status != 200, fields...); err != nil || status == 200 {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.sentEnd = true
	if !st.recvEnd && !s.ending { // RFC 9113 section 8.1: stop sending, the answer is complete
		s.pending.resetID, s.pending.resetCode = st.id, http2.ErrCodeNo
	}
	st.failLocked(net.ErrClosed)
	st.buf.drop()
	s.finish(lingerClean, http2.ErrCodeNo)
	return nil
}
