package endpoint

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/sallyport-mesh/sallyport/internal/peercred"
)

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	require.Eventually(t, ok, deadline, time.Millisecond, what)
}

func (s *Server) connections() int {
	s.listener.mu.Lock()
	defer s.listener.mu.Unlock()
	return s.listener.total
}

// One process cannot take the endpoint from others, and its connections count
// for as long as they are open.
func TestConnectionsOfOneProcess(t *testing.T) {
	o := open(t)
	var held []net.Conn
	defer func() {
		for _, c := range held {
			_ = c.Close()
		}
	}()
	for range maxConnsOfPID {
		c, err := net.Dial("unix", o.path)
		require.NoError(t, err)
		held = append(held, c)
	}
	eventually(t, "all connections", func() bool { return o.server.connections() == maxConnsOfPID })
	c, err := net.Dial("unix", o.path)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(deadline)))
	if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("one connection more: got %v, want it closed", err)
	}
	for _, c := range held {
		require.NoError(t, c.Close())
	}
	held = nil
	eventually(t, "room again", func() bool { return o.server.connections() == 0 })
	if err := everyCall(o.raw(me()))["FetchX509SVID"](called(t)); err != nil {
		t.Errorf("after they were closed: %v", err)
	}
}

// One user cannot take the endpoint from others either.
func TestConnectionsOfOneUser(t *testing.T) {
	l := newListener(nil, hclog.NewNullLogger())
	cred := peercred.Cred{UID: 7}
	for pid := range int32(maxConnsOfUser) {
		cred.PID = pid + 1
		if !l.enter(cred) {
			t.Fatalf("turned away after %d", pid)
		}
	}
	cred.PID++
	if l.enter(cred) {
		t.Error("one more was let in")
	}
	other := cred
	other.UID = 8
	if !l.enter(other) {
		t.Error("another user was turned away")
	}
	cred.PID = 1
	l.leave(cred)
	if !l.enter(cred) {
		t.Error("no room after one left")
	}
}

// A client that says nothing, or something else than HTTP/2, is dropped.
func TestSilenceIsEnded(t *testing.T) {
	o := open(t)
	silent, err := net.Dial("unix", o.path)
	require.NoError(t, err)
	defer silent.Close()
	other, err := net.Dial("unix", o.path)
	require.NoError(t, err)
	defer other.Close()
	_, err = other.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n" + strings.Repeat("x", 64)))
	require.NoError(t, err)
	for name, c := range map[string]net.Conn{"other": other, "silent": silent} {
		require.NoError(t, c.SetReadDeadline(time.Now().Add(2*prefaceLimit)))
		if _, err := io.Copy(io.Discard, c); os.IsTimeout(err) {
			t.Errorf("%s: still connected", name)
		}
	}
}

// A watcher that does not read misses what is outdated; it delays nobody and
// keeps nothing in memory.
func TestSlowWatcherDelaysNobody(t *testing.T) {
	o := open(t)
	slow, err := net.Dial("unix", o.path)
	require.NoError(t, err)
	defer slow.Close()
	require.NoError(t, callRaw(slow, "/SpiffeWorkloadAPI/FetchX509SVID"))
	good, err := o.raw(me()).FetchX509SVID(called(t), &workload.X509SVIDRequest{})
	require.NoError(t, err)
	_, err = good.Recv()
	require.NoError(t, err)
	for n := range 200 { // far more than windows and socket buffers hold
		svid := o.authority.issue(t, ownID)
		svid.Hint = fmt.Sprint(n) + strings.Repeat("x", 8<<10)
		h := &Holding{Bundles: o.bundles}
		h.SVIDs = append(h.SVIDs, svid)
		o.feed.Set(h)
		resp, err := good.Recv()
		require.NoError(t, err)
		if got := resp.Svids[0].Hint; got != svid.Hint {
			t.Fatalf("change %d: got that of %s", n, strings.TrimRight(got, "x"))
		}
	}
}

// callRaw opens one stream of the API by hand and never reads.
func callRaw(c net.Conn, method string) error {
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		return err
	}
	fr := http2.NewFramer(c, c)
	if err := fr.WriteSettings(); err != nil {
		return err
	}
	head := rawHeaders(":method", "POST", ":scheme", "http", ":path", method, ":authority", "x",
		"content-type", "application/grpc", "te", "trailers", "workload.spiffe.io", "true")
	if err := fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head, EndHeaders: true}); err != nil {
		return err
	}
	return fr.WriteData(1, true, make([]byte, 5))
}

// A request that is too large is refused, and the connection goes on.
func TestLargeRequestIsRefused(t *testing.T) {
	o := open(t)
	api := o.raw(me())
	_, err := api.ValidateJWTSVID(called(t), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: strings.Repeat("x", maxRequest+1)})
	wantCode(t, "a large token", err, codes.ResourceExhausted)
	many := make([]string, maxAudiences+1)
	for i := range many {
		many[i] = "a"
	}
	for _, aud := range [][]string{many, {strings.Repeat("x", maxAudience+1)}} {
		_, err := api.FetchJWTSVID(called(t), &workload.JWTSVIDRequest{Audience: aud})
		wantCode(t, "a large audience", err, codes.InvalidArgument)
	}
	if err := everyCall(api)["FetchX509SVID"](called(t)); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// A stop is told to watchers, the file goes, and Serve returns nil.
func TestStop(t *testing.T) {
	o := open(t)
	s, err := o.raw(me()).FetchX509SVID(called(t), &workload.X509SVIDRequest{})
	require.NoError(t, err)
	require.NoError(t, first(s, nil))
	begin := time.Now()
	o.stop()
	wantCode(t, "the stream", first(s, nil), codes.Unavailable)
	if d := time.Since(begin); d > stopLimit {
		t.Errorf("took %v although the client took note", d)
	}
	if _, err := os.Lstat(o.path); !os.IsNotExist(err) {
		t.Errorf("the socket was left: %v", err)
	}
}

func TestNewRefusesALiveSocket(t *testing.T) {
	o := open(t)
	if s, err := New(Config{Path: o.path, Holder: o.desk}); err == nil {
		_ = s.Close()
		t.Error("a second endpoint took the first one's socket")
	}
	info, err := os.Stat(o.path)
	require.NoError(t, err)
	if got := info.Mode().Perm(); got != socketMode {
		t.Errorf("mode %o, want %o", got, socketMode)
	}
	s, err := New(Config{Path: filepath.Join(t.TempDir(), "never.sock"), Holder: o.desk})
	require.NoError(t, err)
	require.NoError(t, s.Close())
}

// Followers of a feed see the last state, however many changes came before.
func TestFeedKeepsTheLatest(t *testing.T) {
	var f Feed
	if h, _, err := f.Get(); h != nil || err != nil {
		t.Errorf("zero: got %v, %v", h, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	last := &Holding{}
	go func() {
		for range 1000 {
			f.Set(&Holding{})
		}
		f.Set(last)
	}()
	for {
		h, news, _ := f.Get()
		if h == last {
			return
		}
		select {
		case <-news:
		case <-ctx.Done():
			t.Fatal("the last change was missed")
		}
	}
}
