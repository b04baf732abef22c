package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/sallyport-mesh/sallyport/internal/completion"
	"github.com/sallyport-mesh/sallyport/internal/host"
	"github.com/sallyport-mesh/sallyport/internal/sidecar"
)

// opener reads a configuration file and prepares what runs by it. misused: the
// configuration is to blame.
type opener func(ctx context.Context, file string, stderr io.Writer) (run func(context.Context) error, misused bool, err error)

func serve(ctx context.Context, verb, file string, args []string, stderr io.Writer, open opener) int {
	flags := serveFlags(verb, &file)
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stderr, usage)
		return 0
	} else if err != nil {
		return complain(stderr, 2, fmt.Errorf("%w; try: sallyport-proxy help", err))
	}
	if flags.NArg() > 0 {
		return complain(stderr, 2, fmt.Errorf("unexpected argument %q; try: sallyport-proxy help", flags.Arg(0)))
	}
	run, misused, err := open(ctx, file, stderr)
	if misused {
		return complain(stderr, 2, err)
	}
	if err == nil {
		err = run(ctx)
	}
	if err != nil {
		return complain(stderr, 1, err)
	}
	return 0
}

// serveFlags declares the flags of run and agent; file has the default.
func serveFlags(verb string, file *string) *flag.FlagSet {
	flags := flag.NewFlagSet("sallyport-proxy "+verb, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(file, "config", *file, "configuration `file`")
	return flags
}

// commands is the command line for completion.
func commands() *cobra.Command {
	return completion.Program("sallyport-proxy", nil,
		completion.Standard{Name: "run", Short: "Serve one app", Flags: serveFlags("run", new(string))},
		completion.Standard{Name: "agent", Short: "Serve every process of a host that a workload names", Flags: serveFlags("agent", new(string))},
		completion.Standard{Name: "version", Short: "Print the version"},
		completion.Standard{Name: "help", Short: "Print what there is"})
}

func openSidecar(ctx context.Context, file string, stderr io.Writer) (func(context.Context) error, bool, error) {
	cfg, err := sidecar.Load(file)
	if err != nil {
		return nil, true, err
	}
	s, err := sidecar.New(ctx, cfg, sidecar.Options{Log: logger("proxy", cfg.Log.Level, cfg.Log.Format, stderr), Now: time.Now, Version: version})
	if err != nil {
		return nil, false, err
	}
	return s.Run, false, nil
}

func openAgent(ctx context.Context, file string, stderr io.Writer) (func(context.Context) error, bool, error) {
	cfg, err := host.Load(file)
	if err != nil {
		return nil, true, err
	}
	h, err := host.New(ctx, cfg, host.Options{Log: logger("agent", cfg.Log.Level, cfg.Log.Format, stderr), Now: time.Now, Version: version})
	if err != nil {
		return nil, false, err
	}
	return h.Run, false, nil
}

func logger(name, level, format string, w io.Writer) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Name: name, Level: hclog.LevelFromString(level), Output: w, JSONFormat: format == "json"})
}
