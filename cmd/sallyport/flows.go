package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/flow"
)

func (c *cli) flows() *cobra.Command {
	req := &sallyportv1.FlowsRequest{}
	cmd := &cobra.Command{
		Use: "flows", Short: "Show who talked to whom and which rule decided", Args: cobra.NoArgs,
		Long: `Flows prints one line for each connection that has ended or was refused, as the
destination's sidecar and the caller's sidecar recorded it. docs/flows.md
describes the fields; --output json prints them all, one record to a line. Lines
are sorted by when the connection was accepted; JSON, and with --follow lines
too, come in the order in which the records arrived.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
				stream, err := a.Flows(ctx, req)
				if err != nil {
					return err
				}
				return c.printFlows(stream, req.GetFollow())
			})
		},
	}
	cmd.Flags().BoolVarP(&req.Follow, "follow", "f", false, "go on printing records as they arrive")
	cmd.Flags().Uint32Var(&req.Limit, "limit", 0, "only the newest `N` of those that are held (default all)")
	cmd.Flags().StringVar(&req.From, "from", "", "only calls by this workload, /path or spiffe:// ID")
	cmd.Flags().StringVar(&req.To, "to", "", "only calls to this one")
	cmd.Flags().StringVar(&req.Verdict, "verdict", "", "only allow or deny; neither has those about which nothing was decided")
	return cmd
}

// printFlows prints the records of stream: text in the order of their start
// unless it follows, for then nobody knows what is still to come.
func (c *cli) printFlows(stream sallyportv1.Admin_FlowsClient, follow bool) error {
	var held []flow.Flow
	some := false
	out := printable{c.stdout}
	err := c.eachFlow(stream, func(data []byte) error {
		some = true
		if c.output == "json" {
			_, err := fmt.Fprintf(out, "%s\n", data)
			return err
		}
		var f flow.Flow
		if err := f.UnmarshalJSON(data); err != nil {
			return err
		}
		if !follow {
			held = append(held, f)
			return nil
		}
		_, err := fmt.Fprintln(out, flowLine(f))
		return err
	})
	slices.SortStableFunc(held, func(a, b flow.Flow) int { return a.Start.Compare(b.Start) })
	for _, f := range held {
		if _, err := fmt.Fprintln(out, flowLine(f)); err != nil {
			return err
		}
	}
	if err == nil && !some && !follow {
		fmt.Fprintln(c.stderr, "no such flow records; a connection's appear within a second of its end")
	}
	return err
}

// eachFlow calls fn with every record of stream, as JSON.
func (c *cli) eachFlow(stream sallyportv1.Admin_FlowsClient, fn func(data []byte) error) error {
	var dropped uint64
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if n := resp.GetDropped(); n > dropped {
			fmt.Fprintf(c.stderr, "%d records were dropped on their way here\n", n-dropped)
			dropped = n
		}
		if len(resp.GetFlow()) == 0 {
			continue
		}
		if err := fn(resp.GetFlow()); err != nil {
			return err
		}
	}
}

// flowLine is a record on one line: when, what came of it, who, by which rule.
func flowLine(f flow.Flow) string {
	port := f.PortName
	if port == "" {
		port = fmt.Sprint(f.Port)
	}
	line := fmt.Sprintf("%s  %-8s %-5s %-7s  %s → %s:%s",
		f.Start.Local().Format("15:04:05.000"), f.Side, strings.ToUpper(f.Verdict()), f.Outcome, f.Src, f.Dst, port)
	if f.Side == flow.Inbound { // only the destination's sidecar knows the rule
		line += "  by " + f.Rule.String()
	}
	line += "  id " + f.ID
	if f.Outcome != flow.Refused {
		line += fmt.Sprintf("  %d/%d bytes  %s", f.Sent, f.Received, f.Duration.Round(100_000))
	}
	if f.Error != "" {
		line += "  " + f.Error
	}
	return line
}
