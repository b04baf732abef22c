package tunnel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"golang.org/x/net/http2"
)

// control is what waits for the flusher. Every part is bounded.
type control struct {
	preface      bool
	settingsAcks int
	pings        [][8]byte // at most maxPings
	connUpdate   int       // increments of the windows that we grant
	streamUpdate int
	resetID      uint32 // stream to reset, 0 for none
	resetCode    http2.ErrCode
	goAway       bool
	goAwayCode   http2.ErrCode
}

// flushLoop sends control frames until the session is ending and the last of them
// is out; then it shuts the connection for writing.
func (s *Session) flushLoop() {
	for range s.wake {
		s.wmu.Lock()
		last := s.flush(nil)
		s.wmu.Unlock()
		if last {
			break
		}
	}
	s.mu.Lock()
	broken := s.broken
	s.mu.Unlock()
	if broken {
		return
	}
	c, ok := s.conn.(interface{ CloseWrite() error })
	if !ok || c.CloseWrite() != nil {
		s.conn.Close()
	}
}

// flush sends all pending control frames, and a header block if there is one, in
// one write; callers hold wmu. It reports whether nothing may follow.
func (s *Session) flush(h *http2.HeadersFrameParam) (last bool) {
	s.mu.Lock()
	c, id := s.pending, uint32(0)
	s.pending = control{}
	if s.st != nil {
		id = s.st.id
	}
	last = s.ending
	if s.broken {
		s.mu.Unlock()
		return true
	}
	m, more := s.fragmentLocked()
	if more {
		s.kick()
	}
	s.extendLocked()
	s.mu.Unlock()

	s.out.Reset()
	s.encode(c, h, m, id)
	if s.out.Len() == 0 {
		return last
	}
	if _, err := s.conn.Write(s.out.Bytes()); err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.breakLocked(fmt.Errorf("writing frame: %w", err))
		return true
	}
	if !more && s.out.Cap() > keepBuffer {
		s.out = bytes.Buffer{}
	}
	return last
}

// encode puts frames into out, in an order that is right at any time: nothing
// before the preface, nothing of a stream after its reset, GOAWAY last. id is that
// of the one stream. Writing to a bytes.Buffer does not fail.
func (s *Session) encode(c control, h *http2.HeadersFrameParam, m fragment, id uint32) {
	if c.preface {
		s.encodePreface()
	}
	for range c.settingsAcks {
		s.fr.WriteSettingsAck()
	}
	for _, p := range c.pings {
		s.fr.WritePing(true, p)
	}
	if c.connUpdate > 0 {
		s.fr.WriteWindowUpdate(0, uint32(c.connUpdate))
	}
	if c.streamUpdate > 0 {
		s.fr.WriteWindowUpdate(id, uint32(c.streamUpdate))
	}
	if h != nil {
		s.fr.WriteHeaders(*h)
	}
	s.encodeFragment(m)
	if c.resetID != 0 {
		s.fr.WriteRSTStream(c.resetID, c.resetCode)
	}
	if c.goAway {
		if !s.server {
			id = 0 // GOAWAY names streams that its receiver opened
		}
		s.fr.WriteGoAway(id, c.goAwayCode, nil)
	}
}

func (s *Session) encodePreface() {
	settings := []http2.Setting{
		{ID: http2.SettingEnablePush, Val: 0},
		{ID: http2.SettingInitialWindowSize, Val: uint32(s.cfg.Window)},
		{ID: http2.SettingMaxFrameSize, Val: maxFrame},
		{ID: http2.SettingMaxHeaderListSize, Val: MaxHeaderList},
	}
	if s.server {
		settings = append(settings, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
	} else {
		s.out.WriteString(http2.ClientPreface)
	}
	s.fr.WriteSettings(settings...)
	if n := s.cfg.Window - initialWindow; n > 0 {
		s.fr.WriteWindowUpdate(0, uint32(n))
	}
}

// extendLocked keeps conn's write deadline at least half a WriteTimeout away.
// Setting it for each frame would cost more than it is worth.
func (s *Session) extendLocked() {
	if s.ending {
		return
	}
	now := time.Now()
	if s.deadline.Sub(now) < s.cfg.WriteTimeout/2 {
		s.deadline = now.Add(s.cfg.WriteTimeout)
		s.conn.SetWriteDeadline(s.deadline)
	}
}

// reserve waits until st may send and takes up to n bytes out of both windows.
func (s *Session) reserve(st *Stream, n int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if err := st.writeErrLocked(); err != nil {
			return 0, err
		}
		if w := int(min(s.allowed, st.allowed)); w > 0 {
			n = min(n, w, s.peerFrame)
			s.allowed -= outflow(n)
			st.allowed -= outflow(n)
			return n, nil
		}
		s.writable.Wait()
	}
}

// writeData sends one DATA frame in one write.
func (s *Session) writeData(st *Stream, p []byte, end bool) error {
	c := getChunk()
	defer chunks.Put(c)
	frame := c.data[:frameHead+copy(c.data[frameHead:], p)]
	binary.BigEndian.PutUint32(frame, uint32(len(p))<<8|uint32(http2.FrameData))
	frame[4] = 0
	if end {
		frame[4] = byte(http2.FlagDataEndStream)
	}
	binary.BigEndian.PutUint32(frame[5:], st.id)

	s.wmu.Lock()
	defer s.wmu.Unlock()
	if err := s.mayWrite(st); err != nil {
		return err
	}
	_, err := s.conn.Write(frame)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("writing frame: %w", err)
		s.breakLocked(err)
		return err
	}
	s.budget.earn(earnSent + len(p)/earnSentBytes)
	return nil
}

// mayWrite is the last look before bytes go out: after a reset, or when the end of
// the session has begun, no DATA may follow. Callers hold wmu.
func (s *Session) mayWrite(st *Stream) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.werr != nil {
		return st.werr
	}
	if s.ending {
		return io.ErrClosedPipe
	}
	s.extendLocked()
	return nil
}

// writeHeaders sends a header block, and whatever control frames wait, in one
// write. It returns the session's error if that ended before.
func (s *Session) writeHeaders(id uint32, end bool, fields ...[2]string) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.mu.Lock()
	ended, err := s.ending, s.err
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if ended {
		return io.ErrClosedPipe
	}
	s.hdr.Reset()
	s.encodeFields(fields)
	s.flush(&http2.HeadersFrameParam{
		StreamID: id, BlockFragment: s.hdr.Bytes(), EndStream: end, EndHeaders: true,
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
