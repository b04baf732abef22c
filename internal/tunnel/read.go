package tunnel

import (
	"errors"
	"io"

	"golang.org/x/net/http2"
)

// readLoop takes in frames until the connection ends or the peer breaks the
// protocol. It never waits for the app nor for a write: what the app has not read
// is buffered, and what there is to answer is left to the flusher.
func (s *Session) readLoop() error {
	if s.server {
		magic := make([]byte, len(http2.ClientPreface))
		if _, err := io.ReadFull(s.br, magic); err != nil {
			return err
		}
		if string(magic) != http2.ClientPreface {
			return &violation{code: http2.ErrCodeProtocol, reason: "no HTTP/2 preface"}
		}
	}
	for {
		fh, err := s.fr.ReadFrameHeader()
		if err == nil {
			err = s.readFrame(fh)
		}
		if err != nil {
			return asViolation(err)
		}
	}
}

// asViolation translates the framer's errors.
func asViolation(err error) error {
	var ce http2.ConnectionError
	var se http2.StreamError
	switch {
	case errors.Is(err, http2.ErrFrameTooLarge):
		return &violation{code: http2.ErrCodeFrameSize, reason: "frame too large"}
	case errors.As(err, &ce):
		return &violation{code: http2.ErrCode(ce), reason: "bad frame"}
	case errors.As(err, &se):
		return &violation{code: se.Code, reason: "bad frame", stream: se.StreamID}
	}
	return err
}

func (s *Session) readFrame(fh http2.FrameHeader) error {
	if !s.reading && (fh.Type != http2.FrameSettings || fh.Flags.Has(http2.FlagSettingsAck)) {
		return &violation{code: http2.ErrCodeProtocol, reason: "preface without SETTINGS"}
	}
	switch fh.Type {
	case http2.FrameData:
		return s.readData(fh)
	case http2.FrameHeaders:
		return s.readHeaders(fh)
	case http2.FramePushPromise:
		return &violation{code: http2.ErrCodeProtocol, reason: "PUSH_PROMISE"}
	case http2.FrameSettings, http2.FramePing, http2.FrameGoAway, http2.FrameWindowUpdate,
		http2.FrameRSTStream, http2.FramePriority:
		f, err := s.fr.ReadFrameForHeader(fh)
		if err != nil {
			return err
		}
		return s.control(f)
	case frameMessage:
		if s.cfg.Messages.Limit != nil {
			return s.readMessage(fh)
		}
	}
	return s.skip(int(fh.Length)) // RFC 9113 section 4.1: unknown types are ignored
}

// readData moves a DATA frame's payload into the stream's buffer, without a copy
// on the way. Padding and data that nobody wants count against the windows too.
func (s *Session) readData(fh http2.FrameHeader) error {
	st, err := s.admitData(fh)
	if err != nil {
		return err
	}
	n, pad := int(fh.Length), 0
	if fh.Flags.Has(http2.FlagDataPadded) {
		b, err := s.readPadLength(n)
		if err != nil {
			return err
		}
		pad = b
		n -= 1 + pad
	}
	if st == nil {
		_, err := s.br.Discard(n + pad)
		return err
	}
	if err := s.fill(st, n); err != nil {
		return err
	}
	if _, err := s.br.Discard(pad); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if over := int(fh.Length) - n; over > 0 {
		st.consumedLocked(over)
	}
	if fh.Flags.Has(http2.FlagDataEndStream) {
		s.onEnd(st)
	}
	return nil
}

// admitData checks a DATA frame against stream state, windows and budget before any
// of its payload is read. A nil stream means: discard.
func (s *Session) admitData(fh http2.FrameHeader) (*Stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if fh.StreamID == 0 {
		return nil, &violation{code: http2.ErrCodeProtocol, reason: "DATA without a stream"}
	}
	st, err := s.lookup(fh.StreamID)
	if err != nil {
		return nil, err
	}
	n := int(fh.Length)
	if !s.granted.take(n) {
		return nil, &violation{code: http2.ErrCodeFlowControl, reason: "data beyond the connection window"}
	}
	switch {
	case n > 0 && st != nil:
		s.budget.earn(earnReceived)
	case fh.Flags.Has(http2.FlagDataEndStream) && st != nil:
	case !s.budget.spend(costFrame, s.cfg.Now()):
		return nil, &violation{code: http2.ErrCodeEnhanceYourCalm, reason: "too many empty frames"}
	}
	switch {
	case st == nil:
		return nil, nil
	case st.recvEnd:
		return nil, &violation{code: http2.ErrCodeStreamClosed, reason: "DATA after END_STREAM", stream: st.id}
	case !s.server && !st.open && st.rerr == nil:
		return nil, &violation{code: http2.ErrCodeProtocol, reason: "DATA before the response", stream: st.id}
	case !st.granted.take(n):
		return nil, &violation{code: http2.ErrCodeFlowControl, reason: "data beyond the stream window", stream: st.id}
	}
	return st, nil
}

// readPadLength reads the pad length of a DATA frame with n bytes of payload.
func (s *Session) readPadLength(n int) (int, error) {
	if n == 0 {
		return 0, &violation{code: http2.ErrCodeFrameSize, reason: "padded frame without pad length"}
	}
	b, err := s.br.ReadByte()
	if err != nil {
		return 0, err
	}
	if int(b) > n-1 {
		return 0, &violation{code: http2.ErrCodeProtocol, reason: "more padding than payload"}
	}
	return int(b), nil
}

// fill reads n bytes into st's buffer; the windows were checked.
func (s *Session) fill(st *Stream, n int) error {
	for n > 0 {
		s.mu.Lock()
		room := st.buf.space()
		s.mu.Unlock()
		k, err := io.ReadFull(s.br, room[:min(n, len(room))])
		n -= k
		s.mu.Lock()
		st.buf.commit(k)
		s.readable.Broadcast()
		s.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// onEnd takes the peer's END_STREAM.
func (s *Session) onEnd(st *Stream) {
	if st.rerr != nil {
		return
	}
	st.recvEnd = true
	s.readable.Broadcast()
	if st.sentEnd {
		s.finish(lingerClean, http2.ErrCodeNo)
	}
}
