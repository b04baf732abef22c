package main

import (
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/sallyport-mesh/sallyport/internal/runner"
)

func (c *cli) up() *cobra.Command {
	cfg := runner.Config{}
	cmd := &cobra.Command{
		Use: "up DIR", Short: "Run a whole mesh on this machine, as DIR/mesh.yaml describes it", Args: args("DIR"),
		Long: `Up starts a control plane, then a sidecar and an app for each workload of
DIR/mesh.yaml, and stops them all on Ctrl-C. A process that ends by itself is
reported and stays down.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg.Dir = args[0]
			cfg.Stdout, cfg.Stderr = c.stdout, c.stderr
			cfg.Color = os.Getenv("NO_COLOR") == "" && term.IsTerminal(int(os.Stdout.Fd()))
			return runner.Run(cmd.Context(), cfg)
		},
	}
	cmd.Flags().StringVar(&cfg.State, "state", "", "`folder` for keys, sockets and data (default DIR/.sallyport)")
	cmd.Flags().IntVar(&cfg.PortOffset, "port-offset", 0, "add `N` to every port in mesh.yaml")
	return cmd
}
