package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// offlineTrustDomain stands in where a folder is checked without a control
// plane: the files name paths, and the trust domain is the control plane's.
const offlineTrustDomain = "trust-domain.invalid"

func (c *cli) policy() *cobra.Command {
	var trustDomain string
	p := group("policy", "Check, test and compare policy files, without a control plane")
	p.PersistentFlags().StringVar(&trustDomain, "trust-domain", offlineTrustDomain, "trust `domain` of the mesh, where the files name it")
	p.AddCommand(
		c.policyCheck(&trustDomain),
		c.policyTest(&trustDomain), c.policyProve(&trustDomain),
		&cobra.Command{
			Use: "diff A B", Short: "Say who gains and who loses access from A to B", Args: args("A", "B"),
			Long: `Diff says who gains and who loses access to what. Each side is a folder, what is in
force (live), a revision that was applied (live@1.42), or a folder as a git revision
has it (git:REVISION:FOLDER).`,
			RunE: func(cmd *cobra.Command, args []string) error {
				domain := trustDomain // both sides are read in the same one
				for _, side := range args {
					var err error
					if domain, err = c.sideDomain(cmd.Context(), side, domain); err != nil {
						return err
					}
				}
				before, err := c.loadSide(cmd.Context(), args[0], domain)
				if err != nil {
					return err
				}
				after, err := c.loadSide(cmd.Context(), args[1], domain)
				if err != nil {
					return err
				}
				return c.printDiff(policy.Compare(before, after))
			},
		},
		c.policyReach(&trustDomain), c.policyImpact(&trustDomain), c.policySuggest(&trustDomain),
		c.policySchema(), c.policyFmt(),
	)
	return p
}

func load(dir, trustDomain string) (*policy.Ruleset, []*policy.Set, error) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return nil, nil, fmt.Errorf("--trust-domain %s: %w", trustDomain, err)
	}
	if err := folder(dir); err != nil {
		return nil, nil, err
	}
	sets, err := policy.ParseTree(os.DirFS(dir))
	if err != nil {
		return nil, nil, err
	}
	rules, err := policy.Compile(td, sets)
	if err != nil {
		return nil, nil, err
	}
	return rules, sets, nil
}

func (c *cli) printTests(report policy.TestReport) error {
	if c.output == "json" {
		if err := c.printJSON(testsJSON(report)); err != nil {
			return err
		}
	} else if _, err := fmt.Fprintln(c.stdout, report.String()); err != nil {
		return err
	}
	if report.Failed() {
		return errReported
	}
	return nil
}

func (c *cli) printDiff(d policy.Diff) error {
	if c.output == "json" {
		return c.printJSON(diffJSON(d))
	}
	if d.Empty() {
		_, err := fmt.Fprintln(c.stdout, "no difference in who may talk to whom")
		return err
	}
	_, err := fmt.Fprintln(c.stdout, d.String())
	return err
}
