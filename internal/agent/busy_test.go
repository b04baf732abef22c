package agent

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/internal/agent/endpoint"
	"github.com/sallyport-mesh/sallyport/internal/peercred"
)

// Whoever could not be looked at in time is not told that he is nobody: he may ask
// again.
func TestCallerThatTakesLong(t *testing.T) {
	var busy atomic.Bool
	busy.Store(true)
	s := newShelf(t, time.Hour, WalletConfig{Find: func(ctx context.Context, c endpoint.Caller) (Evidence, error) {
		if busy.Load() {
			return nil, fmt.Errorf("looking up process %d: %w", c.PID, peercred.ErrBusy)
		}
		return byUID(ctx, c)
	}})
	if os.Geteuid() != 0 {
		t.Skip("the evidence is root's")
	}
	recv, _ := s.follow(0)
	if _, err := recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want Unavailable", err)
	}
	busy.Store(false)
	again, _ := s.follow(0)
	_, err := again()
	require.NoError(t, err)
}
