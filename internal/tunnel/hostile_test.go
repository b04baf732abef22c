package tunnel

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// raw is a peer that says whatever a test wants, frame by frame.
type raw struct {
	t    testing.TB
	conn net.Conn
	*http2.Framer
}

func newRaw(t testing.TB, conn net.Conn) *raw {
	r := &raw{t: t, conn: conn, Framer: http2.NewFramer(conn, conn)}
	r.AllowIllegalWrites = true
	return r
}

func block(fields ...string) []byte {
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	for i := 0; i < len(fields); i += 2 {
		enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return b.Bytes()
}

func (r *raw) headers(id uint32, end bool, fields ...string) {
	r.WriteHeaders(http2.HeadersFrameParam{
		StreamID: id, BlockFragment: block(fields...), EndStream: end, EndHeaders: true,
	})
}

func (r *raw) connect() {
	r.headers(1, false, ":method", "CONNECT", ":authority", "payments.shop.mesh:8080")
}

// verdict reads on until the peer hangs up and returns the first RST_STREAM or
// GOAWAY code that is not NO_ERROR.
func (r *raw) verdict() (code http2.ErrCode) {
	r.conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	for {
		f, err := r.ReadFrame()
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			r.t.Error("connection not cut")
		}
		if err != nil {
			r.conn.Close()
			return code
		}
		switch f := f.(type) {
		case *http2.GoAwayFrame:
			if code == 0 {
				code = f.ErrCode
			}
		case *http2.RSTStreamFrame:
			if code == 0 {
				code = f.ErrCode
			}
		}
	}
}

// hostileClient attacks a server that accepts every stream; play runs after the
// prefaces.
func hostileClient(t testing.TB, play func(r *raw)) http2.ErrCode {
	t.Helper()
	return hostileClientTo(t, Config{}, play)
}

func hostileClientTo(t testing.TB, cfg Config, play func(r *raw)) http2.ErrCode {
	t.Helper()
	cfg.Window, cfg.HandshakeTimeout = minWindow, 200*time.Millisecond
	a, b := loopback(t)
	r := newRaw(t, a)
	io.WriteString(a, http2.ClientPreface)
	r.WriteSettings()
	ctx := within(t, 10*time.Second)
	s, err := Server(ctx, b, cfg)
	require.NoError(t, err)
	served := make(chan struct{})
	go func() {
		defer close(served)
		if in, err := s.Accept(ctx); err == nil {
			in.Accept(testID)
		}
		<-s.Done()
	}()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		play(r)
	}()
	code := r.verdict()
	<-sent
	gone(t, s)
	<-served
	return code
}

// hostileServer attacks a client that opens a stream.
func hostileServer(t testing.TB, play func(r *raw)) (http2.ErrCode, error) {
	t.Helper()
	a, b := loopback(t)
	r := newRaw(t, b)
	ctx := within(t, 10*time.Second)
	s, err := Client(ctx, a, Config{Window: minWindow, HandshakeTimeout: 200 * time.Millisecond})
	require.NoError(t, err)
	result := make(chan error)
	go func() {
		st, err := s.Open(ctx, target)
		if err == nil {
			_, err = io.Copy(io.Discard, st)
		}
		result <- err
	}()
	skipRequest(t, r)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		play(r)
	}()
	code := r.verdict()
	<-sent
	err = <-result
	gone(t, s)
	return code, err
}

// skipRequest reads the client's preface and its HEADERS.
func skipRequest(t testing.TB, r *raw) {
	t.Helper()
	_, err := io.ReadFull(r.conn, make([]byte, len(http2.ClientPreface)))
	require.NoError(t, err)
	for {
		f, err := r.ReadFrame()
		require.NoError(t, err)
		if f.Header().Type == http2.FrameHeaders {
			return
		}
	}
}

// answered returns a client's stream whose server reads nothing after its answer.
func answered(t testing.TB, a, b net.Conn) *Stream {
	t.Helper()
	s, err := Client(within(t, 10*time.Second), a, Config{})
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	opened := make(chan *Stream)
	go func() {
		st, _ := s.Open(within(t, 10*time.Second), target)
		opened <- st
	}()
	r := newRaw(t, b)
	skipRequest(t, r)
	r.WriteSettings()
	_, err = r.ReadFrame() // SETTINGS ACK
	require.NoError(t, err)
	r.headers(1, false, ":status", "200")
	st := <-opened
	require.NotNil(t, st)
	return st
}

func TestHostileClient(t *testing.T) {
	connect := []string{":method", "CONNECT", ":authority", "a:1"}
	first := func(fields ...string) func(r *raw) {
		return func(r *raw) { r.headers(1, false, fields...) }
	}
	then := func(f func(r *raw)) func(r *raw) {
		return func(r *raw) { r.connect(); f(r) }
	}
	rawFrame := func(typ http2.FrameType, flags http2.Flags, id uint32, n int) func(r *raw) {
		return func(r *raw) { r.WriteRawFrame(typ, flags, id, make([]byte, n)) }
	}
	for name, c := range map[string]struct {
		play func(r *raw)
		want http2.ErrCode
	}{
		"path":                {first(append(connect, ":path", "/")...), http2.ErrCodeProtocol},
		"scheme":              {first(append(connect, ":scheme", "https")...), http2.ErrCodeProtocol},
		"protocol":            {first(append(connect, ":protocol", "websocket")...), http2.ErrCodeProtocol},
		"status":              {first(append(connect, ":status", "200")...), http2.ErrCodeProtocol},
		"no authority":        {first(":method", "CONNECT"), http2.ErrCodeProtocol},
		"no method":           {first(":authority", "a:1"), http2.ErrCodeProtocol},
		"GET":                 {first(":method", "GET", ":authority", "a:1"), http2.ErrCodeProtocol},
		"method twice":        {first(append(connect, ":method", "CONNECT")...), http2.ErrCodeProtocol},
		"authority twice":     {first(append(connect, ":authority", "b:1")...), http2.ErrCodeProtocol},
		"pseudo late":         {first(":method", "CONNECT", "x", "y", ":authority", "a:1"), http2.ErrCodeProtocol},
		"upper case":          {first(append(connect, "X-Y", "z")...), http2.ErrCodeProtocol},
		"connection field":    {first(append(connect, "connection", "close")...), http2.ErrCodeProtocol},
		"value with newline":  {first(append(connect, "x", "a\r\nb")...), http2.ErrCodeProtocol},
		"value with space":    {first(append(connect, "x", " a")...), http2.ErrCodeProtocol},
		"no port":             {first(":method", "CONNECT", ":authority", "a"), http2.ErrCodeProtocol},
		"user info":           {first(":method", "CONNECT", ":authority", "u@a:1"), http2.ErrCodeProtocol},
		"no SETTINGS id":      {rawFrame(http2.FrameSettings, 0, 1, 0), http2.ErrCodeProtocol},
		"SETTINGS size":       {rawFrame(http2.FrameSettings, 0, 0, 5), http2.ErrCodeFrameSize},
		"SETTINGS ACK size":   {rawFrame(http2.FrameSettings, http2.FlagSettingsAck, 0, 6), http2.ErrCodeFrameSize},
		"PING size":           {rawFrame(http2.FramePing, 0, 0, 7), http2.ErrCodeFrameSize},
		"PING on stream":      {rawFrame(http2.FramePing, 0, 1, 8), http2.ErrCodeProtocol},
		"GOAWAY size":         {rawFrame(http2.FrameGoAway, 0, 0, 7), http2.ErrCodeFrameSize},
		"RST size":            {then(rawFrame(http2.FrameRSTStream, 0, 1, 3)), http2.ErrCodeFrameSize},
		"WINDOW_UPDATE size":  {then(rawFrame(http2.FrameWindowUpdate, 0, 1, 3)), http2.ErrCodeFrameSize},
		"PRIORITY stream 0":   {rawFrame(http2.FramePriority, 0, 0, 5), http2.ErrCodeProtocol},
		"frame too large":     {rawFrame(http2.FrameData, 0, 1, maxFrame+1), http2.ErrCodeFrameSize},
		"PUSH_PROMISE":        {then(rawFrame(http2.FramePushPromise, 0, 1, 4)), http2.ErrCodeProtocol},
		"CONTINUATION alone":  {then(rawFrame(http2.FrameContinuation, 0, 1, 4)), http2.ErrCodeProtocol},
		"HEADERS stream 0":    {rawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 0, 4), http2.ErrCodeProtocol},
		"HEADERS even stream": {func(r *raw) { r.headers(2, false, connect...) }, http2.ErrCodeProtocol},
		"HEADERS pad short":   {rawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersPadded, 1, 0), http2.ErrCodeFrameSize},
		"HEADERS pad large": {func(r *raw) {
			r.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersPadded, 1, []byte{9, 0x82})
		}, http2.ErrCodeProtocol},
		"bad HPACK": {func(r *raw) {
			r.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, []byte{0xff, 0xff, 0xff})
		}, http2.ErrCodeCompression},
		"other stream inside a header block": {func(r *raw) {
			r.WriteRawFrame(http2.FrameHeaders, 0, 1, nil)
			r.WriteRawFrame(http2.FrameContinuation, 0, 3, nil)
		}, http2.ErrCodeProtocol},
		"DATA stream 0":               {then(rawFrame(http2.FrameData, 0, 0, 1)), http2.ErrCodeProtocol},
		"DATA on idle stream":         {then(rawFrame(http2.FrameData, 0, 3, 1)), http2.ErrCodeProtocol},
		"DATA on server's stream":     {then(rawFrame(http2.FrameData, 0, 2, 1)), http2.ErrCodeProtocol},
		"RST on idle stream":          {rawFrame(http2.FrameRSTStream, 0, 1, 4), http2.ErrCodeProtocol},
		"update on idle stream":       {func(r *raw) { r.WriteWindowUpdate(1, 1) }, http2.ErrCodeProtocol},
		"DATA after END_STREAM":       {then(func(r *raw) { r.WriteData(1, true, nil); r.WriteData(1, false, []byte("x")) }), http2.ErrCodeStreamClosed},
		"HEADERS after END_STREAM":    {then(func(r *raw) { r.WriteData(1, true, nil); r.connect() }), http2.ErrCodeStreamClosed},
		"HEADERS on connected stream": {then(func(r *raw) { r.headers(1, true, "x", "y") }), http2.ErrCodeProtocol},
		"DATA pad short":              {then(rawFrame(http2.FrameData, http2.FlagDataPadded, 1, 0)), http2.ErrCodeFrameSize},
		"DATA pad large": {then(func(r *raw) {
			r.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, []byte{2, 0})
		}), http2.ErrCodeProtocol},
		"zero increment on connection": {func(r *raw) { r.WriteWindowUpdate(0, 0) }, http2.ErrCodeProtocol},
		"zero increment on stream":     {then(func(r *raw) { r.WriteWindowUpdate(1, 0) }), http2.ErrCodeProtocol},
		"connection window overflow":   {func(r *raw) { r.WriteWindowUpdate(0, maxWindow) }, http2.ErrCodeFlowControl},
		"stream window overflow":       {then(func(r *raw) { r.WriteWindowUpdate(1, maxWindow) }), http2.ErrCodeFlowControl},
		"initial window too large": {func(r *raw) {
			r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31})
		}, http2.ErrCodeFlowControl},
		"initial window overflow": {then(func(r *raw) {
			r.WriteWindowUpdate(1, maxWindow-initialWindow)
			r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: initialWindow + 1})
		}), http2.ErrCodeFlowControl},
		"frame size setting": {func(r *raw) {
			r.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 100})
		}, http2.ErrCodeProtocol},
		"push setting": {func(r *raw) {
			r.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 2})
		}, http2.ErrCodeProtocol},
		"data beyond the window": {then(func(r *raw) {
			for range 5 {
				r.WriteData(1, false, make([]byte, maxFrame))
			}
		}), http2.ErrCodeFlowControl},
		"padding beyond the window": {then(func(r *raw) {
			for range 5 {
				r.WriteDataPadded(1, false, make([]byte, maxFrame-100), make([]byte, 99))
			}
		}), http2.ErrCodeFlowControl},
	} {
		t.Run(name, func(t *testing.T) {
			if got := hostileClient(t, c.play); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestHostileServer(t *testing.T) {
	ok := func(r *raw) { r.WriteSettings(); r.headers(1, false, ":status", "200") }
	for name, c := range map[string]struct {
		play func(r *raw)
		want http2.ErrCode
	}{
		"no SETTINGS":          {func(r *raw) { r.headers(1, false, ":status", "200") }, http2.ErrCodeProtocol},
		"SETTINGS ACK first":   {func(r *raw) { r.WriteSettingsAck() }, http2.ErrCodeProtocol},
		"HTTP/1.1":             {func(r *raw) { io.WriteString(r.conn, "HTTP/1.1 400 Bad Request\r\n\r\n") }, http2.ErrCodeFrameSize},
		"push enabled":         {func(r *raw) { r.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 1}) }, http2.ErrCodeProtocol},
		"DATA before response": {func(r *raw) { r.WriteSettings(); r.WriteData(1, false, []byte("x")) }, http2.ErrCodeProtocol},
		"pushed stream":        {func(r *raw) { ok(r); r.headers(2, false, ":status", "200") }, http2.ErrCodeProtocol},
		"other stream":         {func(r *raw) { ok(r); r.headers(3, false, ":status", "200") }, http2.ErrCodeProtocol},
		"second response":      {func(r *raw) { ok(r); r.headers(1, false, ":status", "200") }, http2.ErrCodeProtocol},
		"trailers":             {func(r *raw) { ok(r); r.headers(1, true, "x", "y") }, http2.ErrCodeProtocol},
		"no status":            {func(r *raw) { r.WriteSettings(); r.headers(1, false, "x", "y") }, http2.ErrCodeProtocol},
		"bad status":           {func(r *raw) { r.WriteSettings(); r.headers(1, false, ":status", "+20") }, http2.ErrCodeProtocol},
		"status 101":           {func(r *raw) { r.WriteSettings(); r.headers(1, false, ":status", "101") }, http2.ErrCodeProtocol},
		"1xx at the end":       {func(r *raw) { r.WriteSettings(); r.headers(1, true, ":status", "103") }, http2.ErrCodeProtocol},
		"endless 1xx": {func(r *raw) {
			r.WriteSettings()
			for range 100 {
				r.headers(1, false, ":status", "103")
			}
		}, http2.ErrCodeEnhanceYourCalm},
		"DATA on another stream": {func(r *raw) {
			ok(r)
			r.WriteData(3, false, []byte("x"))
		}, http2.ErrCodeProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := hostileServer(t, c.play)
			if got != c.want || err == nil {
				t.Errorf("got %v and error %v, want %v and an error", got, err, c.want)
			}
		})
	}
}

// An offender can read why it is cut: the socket stays open, unread data and all,
// until it hangs up.
func TestGoAwayIsNotDestroyed(t *testing.T) {
	a, b := loopback(t)
	r := newRaw(t, a)
	io.WriteString(a, http2.ClientPreface)
	r.WriteSettings()
	s, err := Server(within(t, 5*time.Second), b, Config{})
	require.NoError(t, err)
	r.WriteData(2, false, make([]byte, 10000))
	r.WriteData(2, false, make([]byte, 10000))
	for f, err := r.ReadFrame(); err != io.EOF; f, err = r.ReadFrame() {
		require.NoError(t, err)
		if g, ok := f.(*http2.GoAwayFrame); ok && g.ErrCode != http2.ErrCodeProtocol {
			t.Errorf("GOAWAY with %v", g.ErrCode)
		}
	}
	stillOpen(t, s)
	a.Close()
	gone(t, s)
}

func stillOpen(t testing.TB, s *Session) {
	t.Helper()
	select {
	case <-s.Done():
		t.Error("connection closed before the peer hung up")
	case <-time.After(50 * time.Millisecond):
	}
}

// After a clean end the socket stays open until the peer has taken all and hung up:
// a late control frame of the peer's would otherwise reset it, and with it what is
// still on its way.
func TestLateControlFrameDestroysNothing(t *testing.T) {
	a, b := loopback(t)
	a.(*net.TCPConn).SetWriteBuffer(1 << 20)
	b.(*net.TCPConn).SetReadBuffer(128 << 10) // much smaller crawls on loopback
	s, err := Client(within(t, 5*time.Second), a, Config{})
	require.NoError(t, err)
	const total = 500 << 10
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		if st, err := s.Open(within(t, 5*time.Second), target); err == nil {
			io.Copy(io.Discard, st)
			st.Write(make([]byte, total))
			st.CloseWrite()
			st.Close()
		}
	}()
	r := newRaw(t, b)
	skipRequest(t, r)
	r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: total})
	r.WriteWindowUpdate(0, total)
	r.headers(1, false, ":status", "200")
	r.WriteData(1, true, nil)
	<-closed
	r.WritePing(false, [8]byte{})
	stillOpen(t, s)
	r.WritePing(false, [8]byte{})
	for got := 0; ; {
		f, err := r.ReadFrame()
		if err == io.EOF && got == total {
			break
		}
		if err != nil {
			t.Fatalf("after %d bytes of %d: %v", got, total, err)
		}
		if d, ok := f.(*http2.DataFrame); ok {
			got += len(d.Data())
		}
	}
	b.Close()
	gone(t, s)
}

func TestB3RapidReset(t *testing.T) {
	got := hostileClient(t, func(r *raw) {
		r.connect()
		for id := uint32(3); id < 100000; id += 2 {
			r.headers(id, false, ":method", "CONNECT", ":authority", "a:1")
			if r.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
				return
			}
		}
		t.Error("all resets were taken")
	})
	if got != http2.ErrCodeEnhanceYourCalm {
		t.Errorf("got %v, want ENHANCE_YOUR_CALM", got)
	}
}

func TestB4HeaderBombs(t *testing.T) {
	big := strings.Repeat("x", 4000)
	for name, play := range map[string]func(r *raw){
		"continuations": func(r *raw) {
			r.WriteRawFrame(http2.FrameHeaders, 0, 1, nil)
			for range 100 {
				r.WriteContinuation(1, false, block("a", big))
			}
		},
		"empty continuations": func(r *raw) {
			r.WriteRawFrame(http2.FrameHeaders, 0, 1, nil)
			for range 1000 {
				r.WriteContinuation(1, false, nil)
			}
		},
		"large block, never complete": func(r *raw) {
			r.WriteRawFrame(http2.FrameHeaders, 0, 1, nil)
			for range 5 {
				r.WriteContinuation(1, false, make([]byte, 15000))
			}
		},
		"table references": func(r *raw) { // 4 kB of index bytes decode to 16 MB
			b := append(block("a", big), bytes.Repeat([]byte{0xbe}, 4000)...)
			r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b, EndHeaders: true})
		},
		"long string": func(r *raw) {
			r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true,
				BlockFragment: append([]byte{0x00, 0x01, 'a'}, 0x7f, 0xff, 0xff, 0x7f)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := hostileClient(t, play)
			if got != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("got %v, want ENHANCE_YOUR_CALM", got)
			}
		})
	}
}

func TestB5Churn(t *testing.T) {
	for name, frame := range map[string]func(r *raw) error{
		"PING":          func(r *raw) error { return r.WritePing(false, [8]byte{}) },
		"PING ACK":      func(r *raw) error { return r.WritePing(true, [8]byte{}) },
		"SETTINGS":      func(r *raw) error { return r.WriteSettings() },
		"SETTINGS ACK":  func(r *raw) error { return r.WriteSettingsAck() },
		"WINDOW_UPDATE": func(r *raw) error { return r.WriteWindowUpdate(1, 1) },
		"window up and down": func(r *raw) error {
			r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
			return r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: maxWindow / 2})
		},
		"PRIORITY":   func(r *raw) error { return r.WritePriority(1, http2.PriorityParam{}) },
		"empty DATA": func(r *raw) error { return r.WriteData(1, false, nil) },
		"GOAWAY":     func(r *raw) error { return r.WriteGoAway(0, 0, nil) },
		"unknown":    func(r *raw) error { return r.WriteRawFrame(0x42, 0, 0, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			got := hostileClient(t, func(r *raw) {
				r.connect()
				for range 200000 {
					if frame(r) != nil {
						return
					}
				}
				t.Error("all frames were taken")
			})
			if got != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("got %v, want ENHANCE_YOUR_CALM", got)
			}
		})
	}
}

// A peer that pings and never reads cannot make us hold its answers.
func TestB5PingWithoutReading(t *testing.T) {
	t.Parallel()
	a, b := net.Pipe()
	defer a.Close()
	r := newRaw(t, a)
	go func() {
		io.WriteString(a, http2.ClientPreface)
		r.WriteSettings()
		for r.WritePing(false, [8]byte{}) == nil {
		}
	}()
	s, err := Server(within(t, 5*time.Second), b, Config{})
	require.NoError(t, err)
	gone(t, s)
	var v *violation
	if !errors.As(s.err, &v) || v.reason != "PING without reading" {
		t.Errorf("session ended with %v", s.err)
	}
}

// Time refills the budget: a peer that pings for days is welcome.
func TestBudgetRefills(t *testing.T) {
	now := time.Unix(0, 0)
	var b budget
	for range 100000 {
		now = now.Add(20 * time.Millisecond)
		if !b.spend(costFrame, now) {
			t.Fatal("50 frames a second are too many")
		}
	}
	n := 0
	for b.spend(costFrame, now) {
		n++
	}
	if n > budgetMax {
		t.Errorf("%d frames at once, want at most %d", n, budgetMax)
	}
}

func TestB7Slowness(t *testing.T) {
	const limit = 150 * time.Millisecond
	for name, play := range map[string]func(r *raw){
		"silence":      func(r *raw) {},
		"half preface": func(r *raw) { io.WriteString(r.conn, http2.ClientPreface[:10]) },
		"no request":   func(r *raw) { io.WriteString(r.conn, http2.ClientPreface); r.WriteSettings() },
		"trickle": func(r *raw) {
			io.WriteString(r.conn, http2.ClientPreface)
			r.WriteSettings()
			r.WriteRawFrame(http2.FrameHeaders, 0, 1, nil)
			for r.WriteContinuation(1, false, nil) == nil {
				time.Sleep(limit / 10)
			}
		},
		"pings only": func(r *raw) {
			io.WriteString(r.conn, http2.ClientPreface)
			r.WriteSettings()
			for r.WritePing(false, [8]byte{}) == nil {
				time.Sleep(limit / 10)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := loopback(t)
			start := time.Now()
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				play(newRaw(t, a))
			}()
			ctx := within(t, 5*time.Second)
			s, err := Server(ctx, b, Config{HandshakeTimeout: limit})
			if err == nil {
				_, err = s.Accept(ctx)
			}
			if !errors.Is(err, errSilent) {
				t.Errorf("got %v, want %v", err, errSilent)
			}
			if d := time.Since(start); d > limit+2*time.Second {
				t.Errorf("reaped after %v", d)
			}
			a.Close()
			<-sent
		})
	}
}

// A header block that stops half-way is reaped on a running session too.
func TestB7SlowTrailers(t *testing.T) {
	hostileClient(t, func(r *raw) {
		r.connect()
		r.WriteRawFrame(http2.FrameHeaders, 0, 3, nil)
	})
}

// Padding on HEADERS and DATA, priority fields, unknown frames, settings and
// unknown errors: all that a lawful peer may send.
func TestToleratesLawfulOddities(t *testing.T) {
	a, b := loopback(t)
	r := newRaw(t, a)
	io.WriteString(a, http2.ClientPreface)
	r.WriteSettings(http2.Setting{ID: 0x99, Val: 7}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0},
		http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
	ctx := within(t, 10*time.Second)
	s, err := Server(ctx, b, Config{Window: minWindow})
	require.NoError(t, err)
	defer s.Close()
	r.WriteRawFrame(0x77, 0xff, 12345, []byte("hello"))
	r.WritePriority(5, http2.PriorityParam{StreamDep: 0, Weight: 3})
	blk := block(":method", "CONNECT", ":authority", "a:1", "user-agent", "odd", "te", "trailers")
	r.WriteHeaders(http2.HeadersFrameParam{StreamID: 7, BlockFragment: blk[:3], PadLength: 9,
		Priority: http2.PriorityParam{Weight: 200}})
	r.WriteContinuation(7, true, blk[3:])
	r.WriteDataPadded(7, false, []byte("ear"), make([]byte, 200))
	r.WriteData(7, false, nil)
	r.WriteDataPadded(7, false, []byte("ly"), nil)
	const padded = 2 * minWindow / 256 // more padding than a window: it is given back at once
	for range padded {
		r.WriteDataPadded(7, false, []byte("."), make([]byte, 255))
	}
	r.WriteData(7, true, nil)
	in, err := s.Accept(ctx)
	require.NoError(t, err)
	st, err := in.Accept(testID)
	require.NoError(t, err)
	readAll(t, st, "early"+strings.Repeat(".", padded))
	_, err = st.Write(make([]byte, 20000))
	require.NoError(t, err)
	require.NoError(t, st.CloseWrite())
	if code := r.verdict(); code != 0 {
		t.Errorf("got %v, want no error", code)
	}
}

// What a sender may send it sends, not more: windows of connection and stream, a
// window that turns negative, and the frame size.
func TestSenderObeysWindows(t *testing.T) {
	a, b := loopback(t)
	r := newRaw(t, b)
	s, err := Client(within(t, 10*time.Second), a, Config{})
	require.NoError(t, err)
	defer s.Close()
	go func() {
		if st, err := s.Open(within(t, 10*time.Second), target); err == nil {
			st.Write(make([]byte, 200000))
		}
	}()
	skipRequest(t, r)
	r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000})
	r.headers(1, false, ":status", "200")
	r.sentExactly(1000)
	r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100}) // −900 left
	r.WriteWindowUpdate(1, 900)
	r.sentExactly(0)
	r.WriteWindowUpdate(1, 50)
	r.sentExactly(50)
	r.WriteWindowUpdate(1, 1<<20)
	r.sentExactly(initialWindow - 1050) // the connection's window
	r.WriteWindowUpdate(0, 10000)
	r.sentExactly(10000)
	b.Close()
}

// sentExactly pings, and counts the DATA that comes before the answer and in one
// more round trip.
func (r *raw) sentExactly(want int) {
	r.t.Helper()
	got := 0
	for round := 0; round < 2 || got < want; round++ {
		r.WritePing(false, [8]byte{byte(round)})
		for {
			r.conn.SetReadDeadline(time.Now().Add(2 * time.Second))
			f, err := r.ReadFrame()
			if err != nil {
				r.t.Fatalf("after %d bytes of %d: %v", got, want, err)
			}
			if d, ok := f.(*http2.DataFrame); ok {
				if got += len(d.Data()); d.Length > maxPayload {
					r.t.Errorf("frame of %d bytes", d.Length)
				}
			}
			if p, ok := f.(*http2.PingFrame); ok && p.IsAck() {
				break
			}
		}
	}
	if got != want {
		r.t.Errorf("sender sent %d bytes, want %d", got, want)
	}
}

// REFUSED_STREAM and GOAWAY tell that the request may be repeated elsewhere.
func TestUnprocessed(t *testing.T) {
	for name, play := range map[string]func(r *raw){
		"refused stream": func(r *raw) { r.WriteSettings(); r.WriteRSTStream(1, http2.ErrCodeRefusedStream) },
		"goaway":         func(r *raw) { r.WriteSettings(); r.WriteGoAway(0, http2.ErrCodeNo, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := hostileServer(t, play); !errors.Is(err, ErrUnprocessed) {
				t.Errorf("got %v, want ErrUnprocessed", err)
			}
		})
	}
	_, err := hostileServer(t, func(r *raw) { r.WriteSettings(); r.WriteRSTStream(1, http2.ErrCodeConnect) })
	if errors.Is(err, ErrUnprocessed) || !errors.Is(err, ErrReset) {
		t.Errorf("got %v, want a reset that is not ErrUnprocessed", err)
	}
}

// A complete answer followed by a reset is a complete answer.
func TestResetAfterEnd(t *testing.T) {
	a, b := loopback(t)
	c := answered(t, a, b)
	r := newRaw(t, b)
	r.WriteData(1, true, []byte("all"))
	r.WriteRSTStream(1, http2.ErrCodeNo)
	b.(*net.TCPConn).CloseWrite()
	gone(t, c.s) // so the reset has come before anybody reads
	readAll(t, c, "all")
	if _, err := c.Write([]byte("x")); !errors.Is(err, ErrReset) {
		t.Errorf("Write: %v, want ErrReset", err)
	}
}
