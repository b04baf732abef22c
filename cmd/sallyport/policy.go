package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
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
		&cobra.Command{
			Use: "check DIR", Short: "Parse and resolve a folder", Args: args("DIR"),
			RunE: func(_ *cobra.Command, args []string) error {
				rules, sets, err := load(args[0], trustDomain)
				if err != nil {
					return err
				}
				return c.printCheck(rules, sets)
			},
		},
		&cobra.Command{
			Use: "test DIR", Short: "Run the PolicyTests of a folder", Args: args("DIR"),
			RunE: func(_ *cobra.Command, args []string) error {
				rules, sets, err := load(args[0], trustDomain)
				if err != nil {
					return err
				}
				return c.printTests(policy.RunTests(rules, sets))
			},
		},
		&cobra.Command{
			Use: "diff A B", Short: "Say who gains and who loses access from folder A to folder B (or: live)", Args: args("A", "B"),
			RunE: func(cmd *cobra.Command, args []string) error {
				before, err := c.loadSide(cmd.Context(), args[0], trustDomain)
				if err != nil {
					return err
				}
				after, err := c.loadSide(cmd.Context(), args[1], trustDomain)
				if err != nil {
					return err
				}
				return c.printDiff(policy.Compare(before, after))
			},
		},
		c.policyImpact(&trustDomain), c.policySuggest(&trustDomain),
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

// loadSide loads a folder, or what is in force where it says "live".
func (c *cli) loadSide(ctx context.Context, name, trustDomain string) (*policy.Ruleset, error) {
	if name != "live" {
		rules, _, err := load(name, trustDomain)
		return rules, err
	}
	var sets []*policy.Set
	err := c.admin(ctx, func(ctx context.Context, a sallyportv1.AdminClient) error {
		resp, err := a.Files(ctx, &sallyportv1.FilesRequest{})
		if err != nil {
			return err
		}
		for _, s := range resp.GetSets() {
			set, err := policy.ParseFiles(s.GetName(), s.GetFiles())
			if err != nil {
				return err
			}
			sets = append(sets, set)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return nil, fmt.Errorf("--trust-domain %s: %w", trustDomain, err)
	}
	rules, err := policy.Compile(td, sets)
	if errors.Is(err, policy.ErrNoWorkload) {
		return policy.NewRuleset(nil), nil // nothing was ever applied
	}
	return rules, err
}

func (c *cli) printCheck(rules *policy.Ruleset, sets []*policy.Set) error {
	policies, tests := 0, 0
	for _, s := range sets {
		policies += len(s.Policies)
		tests += len(s.Tests)
	}
	if c.output == "json" {
		return c.printJSON(map[string]int{"sets": len(sets), "workloads": len(rules.Workloads()), "policies": policies, "tests": tests})
	}
	_, err := fmt.Fprintf(c.stdout, "ok: %s, %s, %s, %s\n", count(len(sets), "set"), count(len(rules.Workloads()), "workload"), countOf(policies, "policy", "policies"), count(tests, "policy test"))
	return err
}

func (c *cli) printTests(report policy.TestReport) error {
	if c.output == "json" {
		failures := []string{}
		for _, r := range report.Results {
			for _, f := range r.Failures {
				failures = append(failures, f.Error())
			}
		}
		if err := c.printJSON(map[string]any{"tests": len(report.Results), "failed": report.Failed(), "failures": failures}); err != nil {
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
		return c.printJSON(d)
	}
	if d.Empty() {
		_, err := fmt.Fprintln(c.stdout, "no difference in who may talk to whom")
		return err
	}
	_, err := fmt.Fprintln(c.stdout, d.String())
	return err
}
