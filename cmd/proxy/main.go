// Command sallyport-proxy is the sidecar: one beside each app, with the app's
// identity. It is wiring only: package sidecar is the program.
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

	"github.com/sallyport-mesh/sallyport/internal/sidecar"
)

// version is stamped by the build.
var version = "dev"

const usage = `usage: sallyport-proxy run [--config proxy.yaml]
       sallyport-proxy version
       sallyport-proxy help

run serves one app until SIGTERM or SIGINT; a second signal ends it at once.
docs/sidecar.md describes the configuration file.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the second signal is not ours to catch
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run returns the exit code: 0 after a clean stop, 1 when the sidecar could not
// go on, 2 for a wrong command line or configuration.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	switch verb := args[0]; verb {
	case "run":
		return serve(ctx, args[1:], stderr)
	case "version", "-version", "--version":
		fmt.Fprintln(stdout, "sallyport-proxy", version)
		return 0
	case "help", "-h", "-help", "--help":
		fmt.Fprint(stdout, usage)
		return 0
	case "exec", "agent", "redirect", "wait":
		return complain(stderr, 2, fmt.Errorf("%s is not part of this version; there is only run", verb))
	default:
		return complain(stderr, 2, fmt.Errorf("unknown command %q; try: sallyport-proxy help", verb))
	}
}

func serve(ctx context.Context, args []string, stderr io.Writer) int {
	flags := flag.NewFlagSet("sallyport-proxy run", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	file := flags.String("config", "proxy.yaml", "configuration `file`")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stderr, usage)
		return 0
	} else if err != nil {
		return complain(stderr, 2, fmt.Errorf("%w; try: sallyport-proxy help", err))
	}
	if flags.NArg() > 0 {
		return complain(stderr, 2, fmt.Errorf("unexpected argument %q; try: sallyport-proxy help", flags.Arg(0)))
	}
	cfg, err := sidecar.Load(*file)
	if err != nil {
		return complain(stderr, 2, err)
	}
	log := hclog.New(&hclog.LoggerOptions{
		Name: "proxy", Level: hclog.LevelFromString(cfg.Log.Level), Output: stderr, JSONFormat: cfg.Log.Format == "json",
	})
	s, err := sidecar.New(ctx, cfg, sidecar.Options{Log: log, Now: time.Now, Version: version})
	if err == nil {
		err = s.Run(ctx)
	}
	if err != nil {
		return complain(stderr, 1, err)
	}
	return 0
}

// complain says what is wrong and gives the exit code.
func complain(w io.Writer, code int, err error) int {
	fmt.Fprintf(w, "sallyport-proxy: %s\n", strings.ReplaceAll(err.Error(), "\n", "\n  "))
	return code
}
