package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

func (c *cli) bundle() *cobra.Command {
	cmd := group("bundle", "Keys by which identities are verified")
	cmd.AddCommand(c.bundleShow())
	return cmd
}

func (c *cli) bundleShow() *cobra.Command {
	req := &sallyportv1.TrustBundleRequest{}
	cmd := &cobra.Command{
		Use: "show", Short: "Print a trust domain's SPIFFE bundle as JSON", Args: cobra.NoArgs,
		Long: `Show prints the bundle of this mesh: what another mesh puts under spec.bundle of
its TrustDomain document. With --trust-domain it prints the one in force of a
foreign trust domain.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
				resp, err := a.TrustBundle(ctx, req)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(c.stdout, string(resp.GetBundle())) // JSON in every output form
				return err
			})
		},
	}
	cmd.Flags().StringVar(&req.TrustDomain, "trust-domain", "", "a foreign trust domain's `name` (default: the own)")
	return cmd
}

func printFederated(w io.Writer, list []*sallyportv1.FederatedDomain) {
	if len(list) == 0 {
		return
	}
	fmt.Fprintln(w, "\nTRUST DOMAIN\tPROFILE\tAUTHORITIES\tLAST SUCCESS\tSTATE")
	for _, d := range list {
		profile, state, success := d.GetProfile(), "well", "-"
		if profile == "" {
			profile = "fixed bundle"
		}
		if d.GetProblem() != "" {
			state = "see below"
		}
		if d.GetLastSuccess() != nil {
			success = local(d.GetLastSuccess())
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\n", d.GetTrustDomain(), profile, d.GetAuthorities(), success, state)
	}
}
