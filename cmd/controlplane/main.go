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

// parse reads flags and the file they name; flags override the file.
func parse(args []string, stderr io.Writer) (cfg controlplane.Config, showVersion bool, err error) {
	fs := flag.NewFlagSet("sallyport-controlplane", flag.ContinueOnError)
	fs.SetOutput(stderr)
	file := fs.String("config", "", "configuration `file` (YAML)")
	dev := fs.Bool("dev", false, "run on this machine without any configuration; state in .sallyport/")
	fs.BoolVar(&showVersion, "version", false, "print the version")
	var overrides []func()
	override := func(name, usage string, set func(string) error) {
		fs.Func(name, usage, func(v string) error {
			overrides = append(overrides, func() { err = errors.Join(err, set(v)) })
			return nil
		})
	}
	defineOverrides(&cfg, override)
	if perr := fs.Parse(args); perr != nil {
		return cfg, false, perr
	}
	if fs.NArg() > 0 {
		return cfg, false, fmt.Errorf("unexpected argument %q; flags only", fs.Arg(0))
	}
	switch {
	case *dev && *file != "":
		return cfg, false, errors.New("-dev and -config exclude each other")
	case *dev:
		cfg = controlplane.Dev()
	case *file != "":
		if cfg, err = controlplane.LoadConfig(*file); err != nil {
			return cfg, false, err
		}
	}
	for _, apply := range overrides {
		apply()
	}
	return cfg, showVersion, err
}
