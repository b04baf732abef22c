package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

func (c *cli) token() *cobra.Command {
	var workload string
	var ttl time.Duration
	token := group("token", "Manage join tokens")
	create := &cobra.Command{
		Use: "create", Short: "Make a join token: one sidecar may enrol with it, once", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
				resp, err := a.CreateToken(ctx, &sallyportv1.CreateTokenRequest{Workload: workload, Ttl: durationpb.New(ttl)})
				if err != nil {
					return err
				}
				fmt.Fprintf(c.stderr, "for %s, good once, until %s\n", resp.GetSpiffeId(), local(resp.GetExpires()))
				return c.print(resp, func(w io.Writer) { fmt.Fprintln(w, resp.GetToken()) })
			})
		},
	}
	create.Flags().StringVar(&workload, "workload", "", "`name` of the Workload (required)")
	create.Flags().DurationVar(&ttl, "ttl", 0, "how long it is good for (default 10m, at most 168h)")
	if err := create.MarkFlagRequired("workload"); err != nil {
		panic(err) // the flag is defined two lines above
	}
	token.AddCommand(create)
	return token
}

func local(t *timestamppb.Timestamp) string {
	if !t.IsValid() || t.AsTime().IsZero() || t.AsTime().Unix() == 0 {
		return "-"
	}
	return t.AsTime().Local().Format(time.DateTime)
}

func (c *cli) status() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Is the mesh well, and if not, what to do", Args: cobra.NoArgs,
		Long: "Status prints one screen. Its exit code is 1 when something is wrong.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
				resp, err := a.Status(ctx, &sallyportv1.StatusRequest{})
				if err != nil {
					return err
				}
				if err := c.print(resp, func(w io.Writer) { printStatus(w, resp) }); err != nil {
					return err
				}
				if len(resp.GetProblems()) > 0 {
					return errReported
				}
				return nil
			})
		},
	}
}

func printStatus(w io.Writer, s *sallyportv1.StatusResponse) {
	fmt.Fprintf(w, "trust domain\t%s\nrevision\t%s\npolicy from\t%s\nversion\t%s, up since %s\n",
		s.GetTrustDomain(), s.GetRevision(), s.GetPolicySource(), s.GetVersion(), local(s.GetStarted()))
	for _, a := range s.GetAuthorities() {
		fmt.Fprintf(w, "authority\t%s (%s, %s, until %s)\n", a.GetSubject(), authorityKind(a), a.GetState(), local(a.GetNotAfter()))
	}
	fmt.Fprintln(w, "\nWORKLOAD\tINSTANCE\tENDPOINT\tSVID UNTIL\tREVISION\tSTATE")
	for _, wl := range s.GetWorkloads() {
		name := wl.GetName()
		if wl.GetSet() != "" {
			name = wl.GetSet() + "/" + name
		}
		if len(wl.GetInstances()) == 0 {
			fmt.Fprintf(w, "%s\t-\t-\t-\t-\tnever enrolled\n", name)
		}
		for _, i := range wl.GetInstances() {
			state := "connected"
			switch {
			case i.GetRevoked():
				state = "revoked"
			case i.GetNack() != "":
				state = "refuses the revision"
			case !i.GetConnected():
				state = "not connected"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", name, i.GetInstance(), orDash(i.GetEndpoint()), local(i.GetSvidExpires()), orDash(i.GetAcked()), state)
		}
	}
	printFederated(w, s.GetFederated())
	printDoors(w, s.GetDoors())
	fmt.Fprintln(w)
	if len(s.GetProblems()) == 0 {
		fmt.Fprintln(w, "The mesh is well.")
		return
	}
	fmt.Fprintf(w, "%d to look at:\n", len(s.GetProblems()))
	for _, p := range s.GetProblems() {
		fmt.Fprintf(w, "- %s\n", strings.ReplaceAll(p, "\n", "\n  "))
	}
}

// printDoors tells of every open door who opened it, until when, and how much it is
// used by what no rule allows.
func printDoors(w io.Writer, doors []*sallyportv1.OpenDoor) {
	if len(doors) == 0 {
		return
	}
	fmt.Fprintln(w, "\nOPEN DOOR\tTO\tUNTIL\tOPENED BY\tUSED")
	for _, d := range doors {
		by := "before the history begins"
		if d.GetRevision() != "" {
			by = fmt.Sprintf("%s, %s (revision %s)", orDash(d.GetActor()), local(d.GetOpened()), d.GetRevision())
		}
		used := "never"
		if d.GetUsed() > 0 {
			used = fmt.Sprintf("%d times, last %s", d.GetUsed(), local(d.GetLastUsed()))
		}
		fmt.Fprintf(w, "%s (%s)\t%s\t%s\t%s\t%s\n", d.GetName(), d.GetLocation(), strings.Join(d.GetTo(), ", "), local(d.GetUntil()), by, used)
	}
}

// authorityKind is what an authority signs with, in the words of docs/ca.md.
func authorityKind(a *sallyportv1.Authority) string {
	if a.GetKind() == "jwt" {
		return "JWT key"
	}
	return a.GetKind()
}

func (c *cli) audit() *cobra.Command {
	req := &sallyportv1.AuditRequest{}
	cmd := &cobra.Command{
		Use: "audit", Short: "Who changed what and when, newest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
				resp, err := a.Audit(ctx, req)
				if err != nil {
					return err
				}
				return c.print(resp, func(w io.Writer) {
					for _, r := range resp.GetRecords() {
						fmt.Fprintf(w, "%s  %s %s: %s\n  by %s\n", local(r.GetTime()), r.GetAction(), r.GetSubject(), r.GetResult(), strings.TrimSuffix(r.GetActor()+", "+r.GetOrigin(), ", "))
						if r.GetDetail() != "" {
							fmt.Fprintf(w, "    %s\n", strings.ReplaceAll(strings.TrimSpace(r.GetDetail()), "\n", "\n    "))
						}
					}
				})
			})
		},
	}
	cmd.Flags().Uint32Var(&req.Limit, "limit", 0, "how many (default 50)")
	cmd.Flags().BoolVar(&req.Renewals, "renewals", false, "certificates renewed and tokens issued, instead of changes and enrolments")
	return cmd
}
