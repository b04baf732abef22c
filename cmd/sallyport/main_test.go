package main

import (
	"context"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
)

var update = flag.Bool("update", false, "write what the stories compare with into testdata")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"sallyport": func() { os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)) },
	})
}

// TestCtrlC ends what follows, without a complaint.
func TestCtrlC(t *testing.T) {
	m := meshtest.New(t, meshtest.Config{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errs strings.Builder
	if code := run(ctx, []string{"--socket", m.Socket, "flows", "--follow"}, &out, &errs); code != 0 || errs.String() != "" {
		t.Errorf("got exit code %d, stderr %q, want 0 and nothing", code, errs.String())
	}
}

// TestStories runs what operators type, offline and against a control plane
// that each story has for itself.
func TestStories(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: *update,
		Setup: func(env *testscript.Env) error {
			m := meshtest.New(t, meshtest.Config{})
			env.Setenv("SALLYPORT_ADMIN_SOCKET", m.Socket)
			env.Setenv("GORACE", "atexit_sleep_ms=0") // each command is a process of its own
			// Answered: the control plane serves.
			_, err := m.Admin.History(context.Background(), &sallyportv1.HistoryRequest{})
			return err
		},
	})
}
