package tunnel

import (
	"bytes"
	"crypto/rand"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
)

// mailbox collects messages.
type mailbox struct {
	limit int
	got   chan message
}

type message struct {
	kind uint8
	data []byte
}

func newMailbox(limit int) *mailbox { return &mailbox{limit, make(chan message, 4096)} }

func (m *mailbox) messages(hello string) Messages {
	return Messages{
		Hello:   []byte(hello),
		Limit:   func(uint8) int { return m.limit },
		Receive: func(kind uint8, data []byte) { m.got <- message{kind, data} },
	}
}

func (m *mailbox) next(t testing.TB) message {
	t.Helper()
	select {
	case got := <-m.got:
		return got
	case <-time.After(10 * time.Second):
		t.Fatal("no message")
		return message{}
	}
}

func (m *mailbox) expect(t testing.TB, kind uint8, data string) {
	t.Helper()
	if got := m.next(t); got.kind != kind || string(got.data) != data {
		t.Fatalf("got kind %d, %.40q (%d bytes); want %d, %.40q", got.kind, got.data, len(got.data), kind, data)
	}
}

// talking starts two sessions with messages.
func talking(t testing.TB, a, b net.Conn, limit int) (client, server *Session, forClient, forServer *mailbox) {
	t.Helper()
	ctx := within(t, 20*time.Second)
	forClient, forServer = newMailbox(limit), newMailbox(limit)
	client, err := Client(ctx, a, Config{Messages: forClient.messages("from client")})
	require.NoError(t, err)
	server, err = Server(ctx, b, Config{Messages: forServer.messages("from server")})
	require.NoError(t, err)
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server, forClient, forServer
}

func TestMessagesBothWays(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		client, server, forClient, forServer := talking(t, a, b, 8<<20)
		forServer.expect(t, 0, "from client")
		forClient.expect(t, 0, "from server")
		client.Send(1, []byte("before the request"))
		forServer.expect(t, 1, "before the request")
		c, s := streams(t, client, server)
		_, err := c.Write([]byte("data"))
		require.NoError(t, err)
		server.Send(3, []byte("x"))
		forClient.expect(t, 3, "x")
		client.Send(2, nil) // says nothing
		client.Send(2, []byte("y"))
		forServer.expect(t, 2, "y")
		readN(t, s, "data")
	})
}

// A large message goes in pieces, and data does not wait for it.
func TestLargeMessageBesideData(t *testing.T) {
	a, b := loopback(t)
	client, server, _, forServer := talking(t, a, b, 8<<20)
	forServer.expect(t, 0, "from client")
	c, s := streams(t, client, server)
	go io.Copy(s, struct{ io.Reader }{s})
	large := make([]byte, 4<<20+12345)
	rand.Read(large)
	client.Send(2, large)
	slowest := time.Duration(0)
	for range 200 {
		start := time.Now()
		_, err := c.Write([]byte("ping"))
		require.NoError(t, err)
		readN(t, c, "ping")
		slowest = max(slowest, time.Since(start))
		client.Send(1, []byte("small"))
	}
	if slowest > time.Second {
		t.Errorf("a round trip took %v", slowest)
	}
	for {
		m := forServer.next(t)
		if m.kind == 2 {
			if !bytes.Equal(m.data, large) {
				t.Error("the large message came in another form")
			}
			return
		}
	}
}

// Of one kind only what has begun and what is newest are held.
func TestNewestMessageReplaces(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	s, err := Client(within(t, 10*time.Second), a, Config{})
	require.NoError(t, err)
	for range 1000 {
		s.Send(2, make([]byte, 1<<20))
	}
	s.Send(2, []byte("newest"))
	s.mu.Lock()
	if o := s.outbox[2]; o.rest != nil || string(o.next) != "newest" {
		t.Errorf("%d and %d bytes are held", len(o.rest), len(o.next))
	}
	s.mu.Unlock()
	b.Close()
	s.Close()
	s.Send(2, []byte("too late"))
}

// A peer that knows no messages is told ours and ignores them; one that sends them
// to who does not want any, too.
func TestMessagesToWhoKnowsNone(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		ctx := within(t, 20*time.Second)
		client, err := Client(ctx, a, Config{Messages: newMailbox(10).messages("hello")})
		require.NoError(t, err)
		server, err := Server(ctx, b, Config{})
		require.NoError(t, err)
		defer server.Close()
		defer client.Close()
		client.Send(1, make([]byte, 100_000))
		c, s := streams(t, client, server)
		_, err = c.Write([]byte("data"))
		require.NoError(t, err)
		readN(t, s, "data")
	})
}

// What the user does not want is skipped, however large, and what follows is not.
func TestUnwantedMessageIsSkipped(t *testing.T) {
	a, b := loopback(t)
	client, server, _, forServer := talking(t, a, b, 0)
	client.Send(1, make([]byte, 1<<20))
	c, s := streams(t, client, server)
	_, err := c.Write([]byte("data"))
	require.NoError(t, err)
	readN(t, s, "data")
	if n := len(forServer.got); n != 0 {
		t.Errorf("%d messages came through", n)
	}
}

// Nothing is said before the peer's preface is in.
func TestNoMessageBeforeThePreface(t *testing.T) {
	a, b := loopback(t)
	s, err := Client(within(t, 10*time.Second), a, Config{Messages: newMailbox(10).messages("hello")})
	require.NoError(t, err)
	defer s.Close()
	r := newRaw(t, b)
	_, err = io.ReadFull(b, make([]byte, len(http2.ClientPreface)))
	require.NoError(t, err)
	frames := func() (out []http2.FrameType) {
		b.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		for {
			f, err := r.ReadFrame()
			if err != nil {
				return out
			}
			out = append(out, f.Header().Type)
		}
	}
	require.Equal(t, []http2.FrameType{http2.FrameSettings, http2.FrameWindowUpdate}, frames())
	r.WriteSettings()
	require.Equal(t, []http2.FrameType{http2.FrameSettings, frameMessage}, frames())
	b.Close()
}

// Whoever receives a message may end the session for it, and says why.
func TestReject(t *testing.T) {
	a, b := loopback(t)
	client, server, _, _ := talking(t, a, b, 100)
	c, s := streams(t, client, server)
	server.Reject("a forged message")
	if _, err := s.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "a forged message") {
		t.Errorf("its own stream: %v", err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the peer's stream goes on")
	}
	gone(t, server)
	gone(t, client)
}

func TestHostileMessages(t *testing.T) {
	frame := func(r *raw, flags http2.Flags, n int) error {
		return r.WriteRawFrame(frameMessage, flags, 0, make([]byte, n))
	}
	for name, c := range map[string]struct {
		limit int
		play  func(r *raw)
		want  http2.ErrCode
	}{
		"no kind": {1 << 20, func(r *raw) { frame(r, 0, 0) }, http2.ErrCodeFrameSize},
		"longer than its limit": {1 << 20, func(r *raw) {
			for frame(r, 0, maxFrame) == nil {
			}
		}, http2.ErrCodeEnhanceYourCalm},
		"many small parts": {1 << 20, func(r *raw) {
			for frame(r, 0, 2) == nil {
			}
		}, http2.ErrCodeEnhanceYourCalm},
		"many small messages": {1 << 20, func(r *raw) {
			for frame(r, flagMessageEnd, 20) == nil {
			}
		}, http2.ErrCodeEnhanceYourCalm},
		"unwanted for ever": {0, func(r *raw) {
			for frame(r, 0, maxFrame) == nil {
			}
		}, http2.ErrCodeEnhanceYourCalm},
		"unknown kinds": {1 << 20, func(r *raw) {
			for r.WriteRawFrame(frameMessage, 0, 0, []byte{Kinds}) == nil {
			}
		}, http2.ErrCodeEnhanceYourCalm},
		"on a stream": {1 << 20, func(r *raw) {
			for r.WriteRawFrame(frameMessage, 0, 1, []byte{0}) == nil {
			}
		}, http2.ErrCodeEnhanceYourCalm},
		"cut off": {1 << 20, func(r *raw) {
			r.WriteRawFrame(frameMessage, 0, 0, make([]byte, 100))
			r.WriteRawFrame(http2.FramePing, 0, 0, make([]byte, 7))
		}, http2.ErrCodeFrameSize},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMailbox(c.limit)
			cfg := Config{Messages: m.messages("")}
			if got := hostileClientTo(t, cfg, func(r *raw) { r.connect(); c.play(r) }); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
			if n := len(m.got); n > budgetMax+budgetPerSec*5 {
				t.Errorf("%d messages came through", n)
			}
		})
	}
}
