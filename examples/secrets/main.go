// Command secrets shows how a workload gets a database password by its identity
// alone: `secrets app` fetches a JWT-SVID from its SPIFFE Workload API socket, logs
// in to a secret store with it and reads the password. Nothing secret is in its
// configuration, environment or image.
//
// `secrets store` stands in for HashiCorp Vault and speaks as much of its API as
// that takes: the JWT auth method with OIDC discovery, and KV version 2. The app
// works against the real one unchanged.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run gives the exit code: 0 well, 1 an error, 2 a wrong command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	usage := func() int {
		fmt.Fprintln(stderr, "usage: secrets store|app [flags]; -help shows them")
		return 2
	}
	if len(args) == 0 {
		return usage()
	}
	flags := flag.NewFlagSet("secrets "+args[0], flag.ContinueOnError)
	flags.SetOutput(stderr)
	var work func(context.Context) error
	switch args[0] {
	case "store":
		c := storeFlags(flags)
		work = func(ctx context.Context) error { return serveStore(ctx, *c) }
	case "app":
		c := appFlags(flags)
		work = func(ctx context.Context) error {
			password, err := c.password(ctx)
			if err == nil {
				_, err = fmt.Fprintf(stdout, "received the password of %s: %d characters\n", c.path, len(password))
			}
			return err
		}
	default:
		return usage()
	}
	if err := flags.Parse(args[1:]); err != nil {
		return 2
	}
	if err := work(ctx); err != nil {
		fmt.Fprintln(stderr, "secrets:", err)
		return 1
	}
	return 0
}
