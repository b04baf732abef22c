package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func (c *cli) policyReach(trustDomain *string) *cobra.Command {
	var q policy.WaysQuestion
	cmd := &cobra.Command{
		Use: "reach [SIDE]", Short: "List what somebody can reach, or who can reach it", Args: cobra.MaximumNArgs(1),
		Long: `Reach lists the ways by which --from can reach something, or something can reach
--to: by port, with the requests and the time that limit them and the rule that
allows them. Open doors, and denies that only record, are marked. With --all it
follows them over any number of hops, nearest first, and shows the shortest path.

Who is meant is a workload's name, a /path, a spiffe:// ID or a pattern of IDs;
"anonymous" for --from, external:NAME for --to.

SIDE is what policy diff takes: a folder, live (the default), live@REVISION or
git:REVISION:FOLDER. --output is table, json or dot.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if (q.From == "") == (q.To == "") {
				return errors.New("reach needs either --from or --to")
			}
			switch c.output {
			case "text", "table", "json", "dot":
			default:
				return fmt.Errorf("--output %s: want table, json or dot", c.output)
			}
			side := "live"
			if len(args) > 0 {
				side = args[0]
			}
			domain, err := c.sideDomain(cmd.Context(), side, *trustDomain)
			if err != nil {
				return err
			}
			rules, err := c.loadSide(cmd.Context(), side, domain)
			if err != nil {
				return err
			}
			q.Now = time.Now()
			reached, err := rules.Ways(q)
			if err != nil {
				return err
			}
			return c.printReached(reached)
		},
	}
	cmd.Flags().StringVar(&q.From, "from", "", "who calls")
	cmd.Flags().StringVar(&q.To, "to", "", "who is called")
	cmd.Flags().BoolVar(&q.All, "all", false, "over any number of hops, instead of one")
	return cmd
}

// sideDomain gives the trust domain to read a side in: of what is or was in force,
// the control plane's.
func (c *cli) sideDomain(ctx context.Context, side, asked string) (string, error) {
	if asked != offlineTrustDomain || side != "live" && !strings.HasPrefix(side, "live@") {
		return asked, nil
	}
	err := c.admin(ctx, func(ctx context.Context, a sallyportv1.AdminClient) error {
		resp, err := a.Status(ctx, &sallyportv1.StatusRequest{})
		if err == nil {
			asked = resp.GetTrustDomain()
		}
		return err
	})
	return asked, err
}

func (c *cli) printReached(r policy.Reached) error {
	if c.output == "json" {
		return c.printJSON(r)
	}
	text := r.String()
	if c.output == "dot" {
		text = r.Dot()
	}
	_, err := io.WriteString(printable{c.stdout}, text)
	return err
}
