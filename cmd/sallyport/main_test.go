package main

import (
	"context"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"sallyport": func() { os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)) },
	})
}

// TestStories runs what operators type, offline and against a control plane
// that each story has for itself.
func TestStories(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
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
