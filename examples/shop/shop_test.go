package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// freeAddr gives a loopback address that nobody listens on.
func freeAddr(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// startService runs one service until the test ends or stop is called.
func startService(t *testing.T, service func(*shop, context.Context) error, env map[string]string) (stop func()) {
	s := &shop{env: func(k string) string { return env[k] }, log: log.New(io.Discard, "", 0), now: time.Now, tick: 5 * time.Millisecond}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- service(s, ctx) }()
	addr := env["LISTEN_HTTP"] + env["LISTEN_TCP"]
	require.Eventually(t, func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	}, 5*time.Second, 5*time.Millisecond)
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("service ended with %v", err)
		}
	}
	t.Cleanup(stop)
	return stop
}

func get(t *testing.T, url string) (int, []byte) {
	resp, err := newClient().Get(url)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, body
}

func TestCheckoutNamesEveryHop(t *testing.T) {
	ledger, payments, orders, frontend := freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t)
	startService(t, (*shop).ledger, map[string]string{"LISTEN_TCP": ledger})
	startService(t, (*shop).payments, map[string]string{"LISTEN_HTTP": payments, "UPSTREAM_LEDGER_TCP": ledger})
	startService(t, (*shop).orders, map[string]string{"LISTEN_HTTP": orders, "UPSTREAM_PAYMENTS_HTTP": payments})
	startService(t, (*shop).frontend, map[string]string{"LISTEN_HTTP": frontend, "UPSTREAM_ORDERS_HTTP": orders})
	for n := int64(1); n <= 2; n++ {
		code, body := get(t, "http://"+frontend+"/checkout")
		if code != http.StatusOK {
			t.Fatalf("checkout answered %d: %s", code, body)
		}
		var got receipt
		require.NoError(t, json.Unmarshal(body, &got))
		want := receipt{Order: fmt.Sprintf("order-%d", n), Cents: 1999, Entry: n, Balance: n * 1999, Hops: []hop{
			{"frontend", "took the request"},
			{"orders", fmt.Sprintf("made order-%d for a lantern", n)},
			{"payments", "charged 1999 cents"},
			{"ledger", fmt.Sprintf("wrote entry %d", n)},
		}}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("receipt\n got %+v\nwant %+v", got, want)
		}
	}
}

func TestCheckoutTellsWhatAHopAnswered(t *testing.T) {
	refusal := `{"error":"denied by policy","decision_id":"00112233aabbccdd"}`
	orders := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, refusal)
	}))
	defer orders.Close()
	frontend := freeAddr(t)
	startService(t, (*shop).frontend, map[string]string{"LISTEN_HTTP": frontend, "UPSTREAM_ORDERS_HTTP": orders.Listener.Addr().String()})
	code, body := get(t, "http://"+frontend+"/checkout")
	var got struct{ Error string }
	require.NoError(t, json.Unmarshal(body, &got))
	if want := "orders answered 403 Forbidden: " + refusal; code != http.StatusBadGateway || got.Error != want {
		t.Errorf("got %d %q, want 502 %q", code, got.Error, want)
	}
}

func TestLedgerSpeaksFirst(t *testing.T) {
	addr := freeAddr(t)
	startService(t, (*shop).ledger, map[string]string{"LISTEN_TCP": addr})
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(5*time.Second)))
	got, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || got != "220 ledger ready\n" {
		t.Errorf("first line %q, %v; want the banner", got, err)
	}
}

func TestLedgerCommands(t *testing.T) {
	var b book
	for _, c := range []struct {
		in, want string
		more     bool
	}{
		{"RECORD a 5", "250 1 5", true},
		{"RECORD b 7", "250 2 12", true},
		{"BALANCE", "250 2 12", true},
		{"RECORD c -1", "500 cents must be a number above zero", false},
		{"RECORD c", "500 want RECORD order cents, BALANCE or QUIT", false},
		{"", "500 want RECORD order cents, BALANCE or QUIT", false},
		{"QUIT", "221 bye", false},
	} {
		got, more := b.answer(c.in)
		if got != c.want || more != c.more {
			t.Errorf("%q: got %q %v, want %q %v", c.in, got, more, c.want, c.more)
		}
	}
}

// ledgerStub accepts one connection and hands it to serve.
func ledgerStub(t *testing.T, serve func(net.Conn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		serve(conn)
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

func TestRecordWaitsForTheBanner(t *testing.T) {
	early := make(chan int, 1)
	addr := ledgerStub(t, func(conn net.Conn) {
		_ = conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		n, _ := conn.Read(make([]byte, 100))
		early <- n
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprintln(conn, banner)
		_, _ = bufio.NewReader(conn).ReadString('\n')
		fmt.Fprintln(conn, "250 9 81")
	})
	entry, balance, err := record(t.Context(), addr, charge{"order-1", 5})
	if err != nil || entry != 9 || balance != 81 {
		t.Errorf("got %d %d %v, want 9 81", entry, balance, err)
	}
	if n := <-early; n != 0 {
		t.Errorf("%d bytes came before the banner was sent", n)
	}
}

func TestRecordRefusesOrdersThatAreNotOneWord(t *testing.T) {
	for _, order := range []string{"", "a b", "a 1\nRECORD b", " a"} {
		if _, _, err := record(t.Context(), "127.0.0.1:1", charge{order, 1}); err == nil || !strings.Contains(err.Error(), "want one word") {
			t.Errorf("%q: got %v, want it refused", order, err)
		}
	}
}

func TestStreamSaysThatItEnded(t *testing.T) {
	orders, frontend := freeAddr(t), freeAddr(t)
	stopOrders := startService(t, (*shop).orders, map[string]string{"LISTEN_HTTP": orders, "UPSTREAM_PAYMENTS_HTTP": "127.0.0.1:1"})
	startService(t, (*shop).frontend, map[string]string{"LISTEN_HTTP": frontend, "UPSTREAM_ORDERS_HTTP": orders})
	resp, err := newClient().Get("http://" + frontend + "/stream")
	require.NoError(t, err)
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for n := 1; n <= 3; n++ {
		if !lines.Scan() || !strings.HasSuffix(lines.Text(), fmt.Sprintf("orders: tick %d", n)) {
			t.Fatalf("line %d is %q", n, lines.Text())
		}
	}
	stopOrders()
	last := ""
	for lines.Scan() {
		last = lines.Text()
	}
	if !strings.HasPrefix(last, "frontend: the stream from orders ended: ") {
		t.Errorf("last line %q does not say that the stream ended", last)
	}
}

func TestFrontendStopsWithAnOpenStream(t *testing.T) {
	orders, frontend := freeAddr(t), freeAddr(t)
	startService(t, (*shop).orders, map[string]string{"LISTEN_HTTP": orders, "UPSTREAM_PAYMENTS_HTTP": "127.0.0.1:1"})
	stop := startService(t, (*shop).frontend, map[string]string{"LISTEN_HTTP": frontend, "UPSTREAM_ORDERS_HTTP": orders})
	resp, err := newClient().Get("http://" + frontend + "/stream")
	require.NoError(t, err)
	defer resp.Body.Close()
	start := time.Now()
	stop()
	if took := time.Since(start); took > stopTimeout/2 {
		t.Errorf("stopping took %s", took)
	}
	body, _ := io.ReadAll(resp.Body)
	if !bytes.Contains(body, []byte("frontend stops")) {
		t.Errorf("stream ended with %q", body)
	}
}

func TestIntruderReportsWhatCameBack(t *testing.T) {
	payments := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, `{"decision_id":"00112233aabbccdd"}`)
	}))
	defer payments.Close()
	ledger := ledgerStub(t, func(c net.Conn) { _ = c.(*net.TCPConn).SetLinger(0) }) // closed with a reset
	addr := freeAddr(t)
	startService(t, (*shop).intruder, map[string]string{"LISTEN_HTTP": addr, "UPSTREAM_PAYMENTS_HTTP": payments.Listener.Addr().String(), "UPSTREAM_LEDGER_TCP": ledger})
	_, body := get(t, "http://"+addr+"/attack")
	var got struct{ Attempts []attempt }
	require.NoError(t, json.Unmarshal(body, &got))
	require.Len(t, got.Attempts, 2)
	p, l := got.Attempts[0], got.Attempts[1]
	var answer map[string]string
	require.NoError(t, json.Unmarshal(p.Answer, &answer))
	if !p.Refused || p.Got != "403 Forbidden" || answer["decision_id"] != "00112233aabbccdd" {
		t.Errorf("payments: %+v", p)
	}
	if want := "closed without a byte; the flow records have the decision id"; !l.Refused || l.Unreachable || !strings.HasPrefix(l.Got, want) {
		t.Errorf("ledger: got %+v, want %q", l, want)
	}
}

func TestIntruderTellsRefusedFromUnreachable(t *testing.T) {
	for _, c := range []struct {
		code                 int
		body                 string
		refused, unreachable bool
	}{
		{http.StatusForbidden, `{"decision_id":"00112233aabbccdd"}`, true, false},
		{http.StatusServiceUnavailable, `{"decision_id":"00112233aabbccdd"}`, false, true},
		{http.StatusForbidden, `{"error":"the app's own answer"}`, false, false},
		{http.StatusBadGateway, `not JSON`, false, false},
	} {
		payments := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(c.code)
			fmt.Fprint(w, c.body)
		}))
		got := attackPayments(t.Context(), newClient(), payments.Listener.Addr().String())
		payments.Close()
		if got.Refused != c.refused || got.Unreachable != c.unreachable {
			t.Errorf("%d %s: got %+v", c.code, c.body, got)
		}
	}
	nobody := freeAddr(t)
	if got := attackPayments(t.Context(), newClient(), nobody); got.Refused || !got.Unreachable {
		t.Errorf("payments without a sidecar: got %+v", got)
	}
	if got := attackLedger(t.Context(), nobody); got.Refused || !got.Unreachable {
		t.Errorf("ledger without a sidecar: got %+v", got)
	}
}

func TestIntruderAdmitsSuccess(t *testing.T) {
	ledger := freeAddr(t)
	startService(t, (*shop).ledger, map[string]string{"LISTEN_TCP": ledger})
	if got := attackLedger(t.Context(), ledger); got.Refused || got.Got != "an entry" {
		t.Errorf("got %+v, want a success", got)
	}
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 2, "usage: shop"},
		{[]string{"bank"}, 2, "usage: shop"},
		{[]string{"orders"}, 1, "UPSTREAM_PAYMENTS_HTTP is not set"},
		{[]string{"ledger"}, 1, "LISTEN_TCP is not set"},
	} {
		var out bytes.Buffer
		code := run(t.Context(), c.args, func(string) string { return "" }, &out)
		if code != c.code || !strings.Contains(out.String(), c.says) {
			t.Errorf("shop %v: exit %d %q, want %d %q", c.args, code, out.String(), c.code, c.says)
		}
	}
}
