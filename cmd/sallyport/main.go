// Command sallyport is the operator's tool: it applies and explains policy,
// makes join tokens, shows flows and status, and runs local meshes. The policy
// verbs work offline on a folder, too.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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

// run returns the exit code: 0 well, 1 an error or a refusal.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c := &cli{stdout: stdout, stderr: stderr}
	root := c.root()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errReported):
	case ctx.Err() != nil && (errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled):
		return 0 // Ctrl-C, as ends `flows --follow`
	case c.output == "json" || asksJSON(args):
		c.printErrors(err)
	default:
		fmt.Fprintf(stderr, "sallyport: %s\n", message(err))
	}
	return 1
}

// message strips the transport's wrapping from an error of the admin API.
func message(err error) string {
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	return err.Error()
}

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "sallyport",
		Short:         "Operate a Sallyport mesh",
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version,

		PersistentPreRunE: c.checkOutput,
	}
	root.PersistentFlags().StringVar(&c.socket, "socket", "", "the control plane's admin `socket` (default $SALLYPORT_ADMIN_SOCKET, .sallyport/admin.sock, /var/lib/sallyport/admin.sock)")
	root.PersistentFlags().StringVar(&c.output, "output", "text", "`form` of what is printed: text or json")
	root.AddCommand(c.up(), c.apply(), c.history(), c.rollback(), c.set(), c.token(), c.identity(), c.status(),
		c.flows(), c.explain(), c.audit(), c.policy(), c.bundle(), c.ca(), c.version())
	c.complete(root)
	return root
}

func (c *cli) version() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if c.output == "json" {
				return c.printJSON(map[string]string{"version": version})
			}
			_, err := fmt.Fprintln(c.stdout, "sallyport", version)
			return err
		},
	}
}
