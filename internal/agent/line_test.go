package agent

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// C9: what is asked for apps goes over one connection, which belongs to one SVID of
// the agent, also when it breaks and is made again.
func TestC9OneConnectionForEachSVID(t *testing.T) {
	s := newShelf(t, time.Hour, WalletConfig{})
	app := s.client(os.Geteuid())
	audiences := 0
	token := func() call {
		t.Helper()
		audiences++                         // another token each time
		require.Eventually(t, func() bool { // the first try may meet a connection that has just broken
			_, err := app.FetchJWTSVID(briefly(t), jwtsvid.Params{Audience: fmt.Sprint("db", audiences)})
			return err == nil
		}, 10*time.Second, time.Millisecond)
		return <-s.cp.tokens
	}
	serial := func() string {
		svid, err := s.agent.Source().GetX509SVID()
		require.NoError(t, err)
		return svid.Certificates[0].SerialNumber.String()
	}
	first := token()
	if again := token(); again != first || first.serial != serial() {
		t.Errorf("the same SVID %s: asked from %v and %v", serial(), first, again)
	}

	old, err := s.wallet.line.take()
	require.NoError(t, err)
	defer s.wallet.line.leave(old)
	s.agent.RenewNow()
	require.Eventually(t, func() bool { return serial() != first.serial }, 10*time.Second, time.Millisecond)
	second := token()
	if second.from == first.from || second.serial != serial() {
		t.Errorf("the next SVID %s: asked from %v, and from %v before", serial(), second, first)
	}

	addr := s.cp.addr
	s.cp.stop()
	s.cp.listen(addr)
	require.True(t, old.conn.GetState() != connectivity.Ready || old.conn.WaitForStateChange(briefly(t), connectivity.Ready), "it does not break")
	require.NoError(t, old.link.await(briefly(t), old.conn))
	_, err = sallyportv1.NewEnrollmentClient(old.conn).IssueJWT(briefly(t), &sallyportv1.IssueJWTRequest{Audience: []string{"db"}}, grpc.WaitForReady(true))
	require.NoError(t, err)
	if again := <-s.cp.tokens; again.serial != first.serial || again.from == first.from {
		t.Errorf("a connection of SVID %s, made again: %v", first.serial, again)
	}
	third := token()
	if third.serial != second.serial || third.from == second.from {
		t.Errorf("after a break: %v, and %v before", third, second)
	}

	s.wallet.RenewIf(func(identity.Peer) bool { return false }) // a new list: it may be about the other end
	if fourth := token(); fourth.serial != third.serial || fourth.from == third.from {
		t.Errorf("after a new list: %v, and %v before", fourth, third)
	}
}

// A wallet that has ended asks for nothing more, and leaves no connection behind.
func TestLineAfterItsEnd(t *testing.T) {
	s := newShelf(t, time.Hour, WalletConfig{})
	busy, err := s.wallet.line.take()
	require.NoError(t, err)
	s.wallet.line.close()
	require.NoError(t, busy.link.await(briefly(t), busy.conn)) // those in progress end by themselves
	s.wallet.line.leave(busy)
	if got := busy.conn.GetState(); got != connectivity.Shutdown {
		t.Errorf("left open: %v", got)
	}
	if again, err := s.wallet.line.take(); err == nil {
		t.Errorf("took %+v", again)
	}
}
