package capture

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestExplicit: the destination is fixed, nothing is read, and a caller whose
// destination was not reached sees a reset.
func TestExplicit(t *testing.T) {
	for name, c := range map[string]struct {
		answer error
		ok     bool
	}{"reached": {nil, true}, "refused": {errors.New("denied"), false}} {
		t.Run(name, func(t *testing.T) {
			l := open1(t, Config{Listen: "127.0.0.1:0", AllowUIDs: []uint32{ownUID()}})
			front := Explicit("payments:http")
			asked := make(chan Ask, 1)
			serve(t, l, func(ctx context.Context, conn net.Conn) {
				ask, err := front(ctx, conn)
				_, _ = io.ReadFull(ask.Conn, make([]byte, 1)) // the caller has seen its connection by then
				if err != nil || ask.Answer(c.answer) != nil {
					t.Errorf("%v", err)
				}
				asked <- ask
				ask.Conn.Close()
			})
			caller := dial(t, l)
			_, err := caller.Write([]byte{1})
			require.NoError(t, err)
			_, err = io.ReadAll(caller)
			if (err == nil) != c.ok {
				t.Errorf("got %v", err)
			}
			if got := (<-asked).Target; got != "payments:http" {
				t.Errorf("got %q", got)
			}
		})
	}
	a, b := net.Pipe() // cannot be reset
	defer a.Close()
	defer b.Close()
	ask, err := Explicit("x")(context.Background(), a)
	require.NoError(t, err)
	require.NoError(t, ask.Answer(errors.New("denied")))
}

func TestIsolation(t *testing.T) {
	for name, c := range map[string]struct {
		own   uint32
		allow []uint32
		on    bool
	}{
		"same user":      {1000, []uint32{1000}, false},
		"one of several": {1000, []uint32{1001, 1000}, false},
		"other user":     {1000, []uint32{1001}, true},
		"nobody":         {1000, nil, true},
		"both root":      {0, []uint32{0}, false},
		"root's sidecar": {0, []uint32{1000}, true},
	} {
		got := isolationOf(c.own, c.allow)
		if got.On != c.on || !strings.Contains(got.Reason, "local isolation is o") {
			t.Errorf("%s: got %+v, want %v", name, got, c.on)
		}
	}
	if got := IsolationOf([]uint32{ownUID()}); got.On {
		t.Errorf("got %+v", got)
	}
}
