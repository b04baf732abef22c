// Command sallyport-controlplane issues identities and pushes rules and
// endpoints to sidecars. It is wiring only: package controlplane is the program.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sallyport-mesh/sallyport/internal/completion"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
)

// version is stamped by the build.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit code: 0 after a clean stop, 1 when the program could not
// go on, 2 for wrong flags or configuration.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if completion.Asked(args) {
		if err := completion.Answer(commands(), args, stdout, stderr); err != nil {
			fmt.Fprintf(stderr, "sallyport-controlplane: %v\n", err)
			return 2
		}
		return 0
	}
	cfg, showVersion, err := parse(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err == nil && showVersion:
		fmt.Fprintln(stdout, "sallyport-controlplane", version)
		return 0
	case err == nil:
		cfg = cfg.WithDefaults()
		err = cfg.Validate()
	}
	if err != nil {
		fmt.Fprintf(stderr, "sallyport-controlplane: %s\n", strings.ReplaceAll(err.Error(), "\n", "\n  "))
		return 2
	}
	log := hclog.New(&hclog.LoggerOptions{
		Name: "controlplane", Level: hclog.LevelFromString(cfg.Log.Level), Output: stderr, JSONFormat: cfg.Log.Format == "json",
	})
	cp, err := controlplane.New(ctx, cfg, controlplane.Options{Log: log, Now: time.Now, Version: version})
	if err == nil {
		err = cp.Run(ctx)
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintf(stderr, "sallyport-controlplane: %v\n", err)
		return 1
	}
	return 0
}
