package tunnel

import (
	"fmt"
	"time"

	"golang.org/x/net/http2"
)

// spend charges the peer for a frame that moves no data.
func (s *Session) spend(n int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.budget.spend(n, s.cfg.Now()) {
		return &violation{code: http2.ErrCodeEnhanceYourCalm, reason: "too many frames without data"}
	}
	return nil
}

// control acts on a frame that carries no data.
func (s *Session) control(f http2.Frame) error {
	if err := s.spend(costFrame); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch f := f.(type) {
	case *http2.SettingsFrame:
		return s.onSettings(f)
	case *http2.PingFrame:
		return s.onPing(f)
	case *http2.GoAwayFrame:
		s.onGoAway(f)
	case *http2.WindowUpdateFrame:
		return s.onWindowUpdate(f)
	case *http2.RSTStreamFrame:
		return s.onReset(f)
	}
	return nil
}

func (s *Session) onSettings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	if err := f.ForeachSetting(s.onSetting); err != nil {
		return err
	}
	if !s.reading {
		s.reading = true
		close(s.ready)
		if !s.server && !s.ending && !s.broken { // a server's clock runs until the request
			s.conn.SetReadDeadline(time.Time{})
		}
	}
	if s.pending.settingsAcks++; s.pending.settingsAcks > maxPings {
		return &violation{code: http2.ErrCodeEnhanceYourCalm, reason: "SETTINGS without reading"}
	}
	s.kick()
	return nil
}

func (s *Session) onSetting(v http2.Setting) error {
	if err := v.Valid(); err != nil {
		return err
	}
	switch v.ID {
	case http2.SettingInitialWindowSize:
		delta := int64(v.Val) - s.peerInitial
		s.peerInitial = int64(v.Val)
		if s.st != nil && !s.st.allowed.add(delta) {
			return &violation{code: http2.ErrCodeFlowControl, reason: "window overflow"}
		}
		s.writable.Broadcast()
	case http2.SettingMaxFrameSize:
		s.peerFrame = min(int(v.Val), maxPayload)
	case http2.SettingEnablePush:
		if v.Val != 0 && !s.server { // RFC 9113 section 6.5.2
			return &violation{code: http2.ErrCodeProtocol, reason: "server enables push"}
		}
	}
	return nil
}

func (s *Session) onPing(f *http2.PingFrame) error {
	if f.IsAck() {
		return nil
	}
	if len(s.pending.pings) == maxPings {
		return &violation{code: http2.ErrCodeEnhanceYourCalm, reason: "PING without reading"}
	}
	s.pending.pings = append(s.pending.pings, f.Data)
	s.kick()
	return nil
}

// onGoAway takes the peer's word that it opens or takes no further stream. A stream
// that it says it has looked at goes on.
func (s *Session) onGoAway(f *http2.GoAwayFrame) {
	s.goingAway = true
	if !s.server && (s.st == nil || f.LastStreamID < s.st.id) {
		s.abortLocked(fmt.Errorf("peer goes away (%v): %w", f.ErrCode, ErrUnprocessed), http2.ErrCodeNo)
	}
}

func (s *Session) onWindowUpdate(f *http2.WindowUpdateFrame) error {
	if f.StreamID == 0 {
		if !s.allowed.add(int64(f.Increment)) {
			return &violation{code: http2.ErrCodeFlowControl, reason: "window overflow"}
		}
		s.writable.Broadcast()
		return nil
	}
	st, err := s.lookup(f.StreamID)
	if err != nil || st == nil {
		return err
	}
	if !st.allowed.add(int64(f.Increment)) {
		return &violation{code: http2.ErrCodeFlowControl, reason: "window overflow", stream: st.id}
	}
	s.writable.Broadcast()
	return nil
}

// onReset takes a RST_STREAM. A direction that has ended stays cleanly ended: a
// server may answer in full and reset to say that it wants no more data.
func (s *Session) onReset(f *http2.RSTStreamFrame) error {
	st, err := s.lookup(f.StreamID)
	if err != nil || st == nil {
		return err
	}
	s.abortLocked(&resetError{f.ErrCode}, http2.ErrCodeNo)
	return nil
}

// lookup finds a frame's stream: nil if it is over or not looked at, an error if it
// was never opened. Callers hold mu.
func (s *Session) lookup(id uint32) (*Stream, error) {
	switch {
	case s.st != nil && s.st.id == id:
		return s.st, nil
	case s.server && id%2 == 1 && id <= s.maxID:
		return nil, nil
	}
	return nil, &violation{code: http2.ErrCodeProtocol, reason: "frame on an idle stream"}
}
