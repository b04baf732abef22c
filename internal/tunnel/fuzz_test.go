package tunnel

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

var fuzzed = Config{Window: minWindow, Messages: Messages{
	Limit: func(kind uint8) int { return 100 * int(kind) }, Receive: func(uint8, []byte) {},
}}

// script is a lawful exchange as the bytes that one end sends: a seed.
func script(preface string, play func(r *raw)) []byte {
	var b bytes.Buffer
	b.WriteString(preface)
	play(&raw{Framer: http2.NewFramer(&b, nil)})
	return b.Bytes()
}

// fuzzSession plays bytes to a session and sees that it ends, within its limits.
func fuzzSession(t *testing.T, data []byte, start func(conn net.Conn) *Session) {
	a, b := net.Pipe()
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		go io.Copy(io.Discard, a)
		a.Write(data)
		a.Close()
	}()
	s := start(b)
	select {
	case <-s.done:
	case <-time.After(5 * time.Second):
		t.Fatal("session hangs")
	}
	<-fed
	if st := s.st; st != nil && st.buf.n > s.cfg.Window {
		t.Errorf("%d bytes buffered, window %d", st.buf.n, s.cfg.Window)
	}
	for kind, m := range s.inbox {
		if len(m.data) > m.limit {
			t.Errorf("%d bytes of a message of kind %d, limit %d", len(m.data), kind, m.limit)
		}
	}
	if s.maxID == 0 && s.server && s.st != nil {
		t.Error("stream without request")
	}
}

func FuzzServer(f *testing.F) {
	f.Add(script(http2.ClientPreface, func(r *raw) {
		r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100})
		r.connect()
		r.WriteData(1, false, []byte("data"))
		r.WriteWindowUpdate(1, 10)
		r.WritePing(false, [8]byte{})
		r.WriteRawFrame(frameMessage, 0, 0, []byte("\x01part"))
		r.WriteRawFrame(frameMessage, flagMessageEnd, 0, []byte("\x01rest"))
		r.WriteDataPadded(1, true, []byte("end"), make([]byte, 9))
	}))
	f.Add(script(http2.ClientPreface, func(r *raw) {
		r.WriteSettings()
		r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block(":method", "CONNECT")})
		r.WriteContinuation(1, true, block(":authority", "a:1"))
		r.WriteRSTStream(1, http2.ErrCodeCancel)
		r.WriteGoAway(0, 0, nil)
	}))
	f.Fuzz(func(t *testing.T, data []byte) {
		served := make(chan struct{})
		fuzzSession(t, data, func(conn net.Conn) *Session {
			s, err := start(t.Context(), conn, fuzzed, true)
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				defer close(served)
				if in, err := s.Accept(t.Context()); err == nil {
					if st, err := in.Accept(testID); err == nil {
						st.Write([]byte("x"))
					}
				}
			}()
			return s
		})
		<-served
	})
}

func FuzzClient(f *testing.F) {
	f.Add(script("", func(r *raw) {
		r.WriteSettings()
		r.WriteSettingsAck()
		r.headers(1, false, ":status", "200", "sallyport-decision-id", testID)
		r.WriteRawFrame(frameMessage, flagMessageEnd, 0, []byte("\x02all"))
		r.WriteData(1, true, []byte("data"))
	}))
	f.Add(script("", func(r *raw) {
		r.WriteSettings()
		r.headers(1, false, ":status", "103")
		r.headers(1, true, ":status", "403", "sallyport-reason", "no")
		r.WriteRSTStream(1, 0)
		r.WriteGoAway(1, 0, nil)
	}))
	f.Fuzz(func(t *testing.T, data []byte) {
		opened := make(chan struct{})
		fuzzSession(t, data, func(conn net.Conn) *Session {
			s, err := start(t.Context(), conn, fuzzed, false)
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				defer close(opened)
				s.Open(t.Context(), target)
			}()
			return s
		})
		<-opened
	})
}
