package tunnel

import (
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// readHeaders takes a request, a response, or something that may not be there. A
// header block that has begun has to end soon: a server's clock runs since the
// start, elsewhere it starts here.
func (s *Session) readHeaders(fh http2.FrameHeader) error {
	if fh.StreamID == 0 {
		return &violation{code: http2.ErrCodeProtocol, reason: "HEADERS without a stream"}
	}
	if err := s.spend(costStream); err != nil {
		return err
	}
	first := s.server && s.maxID == 0
	if !first {
		s.setReadDeadline(time.Now().Add(s.cfg.HandshakeTimeout))
	}
	block, err := s.readBlock(fh)
	if err != nil {
		return err
	}
	fields, err := s.decode(block)
	if err != nil {
		return err
	}
	s.setReadDeadline(time.Time{})
	s.mu.Lock()
	defer s.mu.Unlock()
	end := fh.Flags.Has(http2.FlagHeadersEndStream)
	if s.server && fh.StreamID%2 == 1 && fh.StreamID > s.maxID {
		s.maxID = fh.StreamID
		if !first {
			return nil // beyond our GOAWAY: RFC 9113 section 6.8 lets us ignore it
		}
		return s.onRequest(fh.StreamID, fields, end)
	}
	st, err := s.lookup(fh.StreamID)
	switch {
	case err != nil:
		return err
	case st == nil:
		return &violation{code: http2.ErrCodeStreamClosed, reason: "HEADERS on a closed stream"}
	case st.recvEnd:
		return &violation{code: http2.ErrCodeStreamClosed, reason: "HEADERS after END_STREAM", stream: st.id}
	case s.server || st.open:
		return &violation{code: http2.ErrCodeProtocol, reason: "HEADERS on a connected stream", stream: st.id}
	}
	return s.onResponse(st, fields, end)
}

// onRequest opens the server's stream, and says at once that there will be no
// other. Callers hold mu.
func (s *Session) onRequest(id uint32, fields []hpack.HeaderField, end bool) error {
	target, err := parseRequest(fields)
	if err != nil {
		return &violation{code: http2.ErrCodeProtocol, reason: "malformed request: " + err.Error(), stream: id}
	}
	if s.ending {
		return nil
	}
	st := s.newStreamLocked(id)
	st.recvEnd = end
	s.goAwayLocked()
	s.accept <- &Incoming{Target: target, st: st} // cap 1, and this is the only one
	return nil
}

// onResponse takes the answer to Open. Callers hold mu.
func (s *Session) onResponse(st *Stream, fields []hpack.HeaderField, end bool) error {
	r, err := parseResponse(fields)
	switch {
	case err != nil:
		return &violation{code: http2.ErrCodeProtocol, reason: "malformed response: " + err.Error(), stream: st.id}
	case r.status < 200 && end, r.status == 101:
		return &violation{code: http2.ErrCodeProtocol, reason: "bad informational response", stream: st.id}
	case r.status < 200 || s.ending:
		return nil
	case r.status >= 300:
		s.pending.resetID, s.pending.resetCode = st.id, http2.ErrCodeCancel
		st.failLocked(&Refused{Status: r.status, DecisionID: r.decisionID, Reason: r.reason})
		s.finish(lingerClean, http2.ErrCodeNo)
		return nil
	}
	st.decisionID, st.open = r.decisionID, true
	st.answerLocked()
	if end {
		s.onEnd(st)
	}
	return nil
}
