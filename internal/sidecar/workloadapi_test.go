package sidecar

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Before the sidecar has an identity the app is told to come again.
func TestWorkloadAPIIsUnavailableWhileStarting(t *testing.T) {
	cfg := config(t, "workloadAPI: {socket: api.sock}")
	s, err := New(t.Context(), cfg, Options{Log: hclog.NewNullLogger()})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	ask, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	_, err = workloadapi.FetchX509SVID(ask, workloadapi.WithAddr("unix://"+cfg.WorkloadAPI.Socket))
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "starting") {
		t.Errorf("got %v", err)
	}
	cancel()
	require.NoError(t, <-done)
	if _, err := os.Lstat(cfg.WorkloadAPI.Socket); !os.IsNotExist(err) {
		t.Errorf("the socket was left: %v", err)
	}
	if filepath.Base(cfg.WorkloadAPI.Socket) != "api.sock" || !filepath.IsAbs(cfg.WorkloadAPI.Socket) {
		t.Errorf("socket %s", cfg.WorkloadAPI.Socket)
	}
}
