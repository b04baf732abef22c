package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

// revokeFlags are what the three verbs that change the revocation list share.
type revokeFlags struct {
	reason string
	wait   time.Duration
}

func (f *revokeFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.reason, "reason", "", "why, for the audit log")
	cmd.Flags().DurationVar(&f.wait, "wait", 5*time.Second, "wait this long for every connected sidecar to have the list; 0 is not at all")
}

func (c *cli) revoke() *cobra.Command {
	cmd := c.revision("revoke SUBJECT", "Refuse an identity, at once and everywhere", "revoked",
		sallyportv1.AdminClient.Revoke)
	cmd.Long = `Revoke refuses what was issued so far to SUBJECT: a workload's name, an ID
(/PATH or in full), an instance or a certificate's serial (serial:HEX), as
"sallyport identity list" shows them. Live connections are cut. An ID or an
instance gets nothing new until it is unrevoked; of a serial only that
certificate is refused, and its sidecar gets another one.`
	return cmd
}

func (c *cli) unrevoke() *cobra.Command {
	cmd := c.revision("unrevoke SUBJECT", "Admit a revoked identity again, never what was issued to it before", "readmitted",
		sallyportv1.AdminClient.Unrevoke)
	cmd.Long = `Unrevoke lets a revoked ID or instance enrol and renew again. What was issued
before the revocation stays refused. Its sidecars come back by themselves within
half a minute.`
	return cmd
}

type revisionRPC = func(sallyportv1.AdminClient, context.Context, *sallyportv1.RevokeRequest, ...grpc.CallOption) (*sallyportv1.RevokeResponse, error)

func (c *cli) revision(use, short, done string, rpc revisionRPC) *cobra.Command {
	var f revokeFlags
	cmd := &cobra.Command{Use: use, Short: short, Args: args("SUBJECT")}
	f.register(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req := &sallyportv1.RevokeRequest{Subject: args[0], Reason: f.reason, Wait: durationpb.New(f.wait)}
		return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
			resp, err := rpc(a, ctx, req)
			if err != nil {
				return err
			}
			return c.printRevoked(resp, done, f.wait)
		})
	}
	return cmd
}

func (c *cli) ban() *cobra.Command {
	var f revokeFlags
	cmd := &cobra.Command{
		Use: "ban NODE", Short: "Revoke every instance on a node", Args: args("NODE"),
		Long: `Ban revokes all instances that live on NODE: an IP address, an instance, or an
agent (by name, /PATH or ID), and then also those that the agent vouched for.
New instances of the same workloads may enrol elsewhere.`,
	}
	f.register(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req := &sallyportv1.BanRequest{Node: args[0], Reason: f.reason, Wait: durationpb.New(f.wait)}
		return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
			resp, err := a.Ban(ctx, req)
			if err != nil {
				return err
			}
			return c.printRevoked(resp, "revoked", f.wait)
		})
	}
	return cmd
}

func (c *cli) printRevoked(resp *sallyportv1.RevokeResponse, done string, wait time.Duration) error {
	err := c.print(resp, func(w io.Writer) {
		for _, s := range resp.GetSubjects() {
			fmt.Fprintf(w, "%s %s\n", s, done)
		}
		fmt.Fprintf(w, "revocation list %s", resp.GetList())
		if wait > 0 {
			fmt.Fprintf(w, ", held by %s", count(int(resp.GetAcked()), "sidecar"))
		}
		fmt.Fprintln(w)
		for _, p := range resp.GetPending() {
			fmt.Fprintf(w, "  has not acknowledged yet: %s\n", p)
		}
		for _, n := range resp.GetNacks() {
			fmt.Fprintf(w, "  refuses the list: %s\n", n)
		}
	})
	if err == nil && len(resp.GetPending())+len(resp.GetNacks()) > 0 {
		return errReported
	}
	return err
}

func (c *cli) taint() *cobra.Command {
	return &cobra.Command{
		Use: "taint AUTHORITY", Short: "Stop believing in one signing key", Args: args("AUTHORITY"),
		Long: `Taint replaces a signing key that may be in the wrong hands: AUTHORITY is its
subject as "sallyport status" shows it, or the hash of its key (key_hash in
"sallyport status --output json"). Everybody
renews at once; half a minute later everything that the key signed is refused
everywhere.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
				resp, err := a.Taint(ctx, &sallyportv1.TaintRequest{Authority: args[0]})
				if err != nil {
					return err
				}
				return c.print(resp, func(w io.Writer) {
					by := resp.GetReplacedBy()
					if by == "" {
						by = "what its own replica makes now"
					}
					fmt.Fprintf(w, "%s is tainted; %s signs in its place\n", resp.GetAuthority(), by)
				})
			})
		},
	}
}
