package tunnel

import (
	"encoding/binary"
	"io"
	"slices"

	"golang.org/x/net/http2"
)

const (
	// Kinds is how many kinds of messages there are: 0 to Kinds-1. Others are
	// skipped.
	Kinds = 4

	// frameMessage is an extension frame on stream 0 (RFC 9113 section 5.5), which
	// who does not know it ignores: a kind, and a part of a message.
	frameMessage   http2.FrameType = 0xb5
	flagMessageEnd http2.Flags     = 0x1
	maxFragment                    = maxPayload - 1  // of a message in one frame
	freeFragment                   = maxFragment / 2 // from this size on a fragment pays by its bytes alone
	keepBuffer                     = 4 << 10         // write buffer that a session may keep
)

// Messages is what the users of both ends have to tell each other beside the
// stream. The session carries it and knows nothing of its meaning. The zero value
// sends nothing and skips what comes.
type Messages struct {
	// Hello is sent as a message of kind 0, together with the first frames that
	// follow the peer's preface; none if empty.
	Hello []byte
	// Limit is asked at the beginning of each message how many bytes it may have;
	// 0 has it skipped. One that turns out longer ends the session.
	Limit func(kind uint8) int
	// Receive is given each message, which is its own from then on. The session's
	// reader calls both: they must not wait.
	Receive func(kind uint8, message []byte)
}

// Send has the peer's user receive message, in frames of up to 16 KiB between
// which data goes on. It does not wait. A message of the same kind that has not
// begun to go out is replaced, so that only what is newest of each kind is held. A
// session that ends, and a peer that knows no messages, drop it. message must not
// change any more.
func (s *Session) Send(kind uint8, message []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ending && len(message) > 0 {
		s.outbox[kind].next = message
		s.kick()
	}
}

// Reject ends the session because of what the peer said in a message. It does not
// wait for that. Whoever uses the stream gets an error with the reason.
func (s *Session) Reject(reason string) {
	s.punish(&violation{code: http2.ErrCodeProtocol, reason: reason})
}

// outgoing is what there is to send of one kind.
type outgoing struct {
	rest []byte // of a message that has begun to go out; nil: none
	next []byte // the one after it; nil: none
}

// fragment is a part of a message; without data it is none.
type fragment struct {
	kind uint8
	data []byte
	end  bool
}

// fragmentLocked takes the next fragment out of the outbox: low kinds first. It
// reports whether there is more.
func (s *Session) fragmentLocked() (f fragment, more bool) {
	if !s.reading || s.ending {
		return f, false
	}
	for kind := range s.outbox {
		o := &s.outbox[kind]
		if o.rest == nil {
			o.rest, o.next = o.next, nil
		}
		if o.rest == nil {
			continue
		}
		if f.data != nil {
			return f, true
		}
		n := min(len(o.rest), maxFragment, s.peerFrame-1)
		f = fragment{uint8(kind), o.rest[:n], n == len(o.rest)}
		if o.rest = o.rest[n:]; f.end {
			o.rest = nil
		}
		if o.rest != nil || o.next != nil {
			return f, true
		}
	}
	return f, false
}

// encodeFragment puts a fragment into out.
func (s *Session) encodeFragment(f fragment) {
	if len(f.data) == 0 {
		return
	}
	var head [frameHead + 1]byte
	binary.BigEndian.PutUint32(head[:], uint32(1+len(f.data))<<8|uint32(frameMessage))
	if f.end {
		head[4] = byte(flagMessageEnd)
	}
	head[frameHead] = f.kind
	s.out.Write(head[:])
	s.out.Write(f.data)
}

// incomingMessage is a message of which not all has come. The reader owns it.
type incomingMessage struct {
	begun bool
	limit int // 0: it is skipped
	data  []byte
}

// readMessage takes in a frame of a message.
func (s *Session) readMessage(fh http2.FrameHeader) error {
	n := int(fh.Length) - 1
	if n < 0 {
		return &violation{code: http2.ErrCodeFrameSize, reason: "message frame without a kind"}
	}
	kind, err := s.br.ReadByte()
	if err != nil {
		return err
	}
	if fh.StreamID != 0 || kind >= Kinds {
		return s.skip(n)
	}
	m := &s.inbox[kind]
	if !m.begun {
		*m = incomingMessage{begun: true, limit: s.cfg.Messages.Limit(kind)}
	}
	switch {
	case m.limit == 0:
		err = s.skip(n)
	case len(m.data)+n > m.limit:
		return &violation{code: http2.ErrCodeEnhanceYourCalm, reason: "message too large"}
	default:
		err = s.fillMessage(m, n)
	}
	if err != nil || !fh.Flags.Has(flagMessageEnd) {
		return err
	}
	done := *m
	*m = incomingMessage{}
	if done.limit > 0 {
		s.cfg.Messages.Receive(kind, done.data)
	}
	return nil
}

// skip charges for what moves nothing, and discards it.
func (s *Session) skip(n int) error {
	if err := s.spend(costFrame); err != nil {
		return err
	}
	_, err := s.br.Discard(n)
	return err
}

// fillMessage reads n bytes. Whoever sends little pays for the frame.
func (s *Session) fillMessage(m *incomingMessage, n int) error {
	if n < freeFragment {
		if err := s.spend(costFrame); err != nil {
			return err
		}
	}
	have := len(m.data)
	m.data = slices.Grow(m.data, n)[:have+n]
	_, err := io.ReadFull(s.br, m.data[have:])
	return err
}
