package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func (c *cli) policyCheck(trustDomain *string) *cobra.Command {
	var strict bool
	cmd := &cobra.Command{
		Use: "check DIR", Short: "Parse and resolve a folder, and warn of what is probably not meant", Args: args("DIR"),
		Long: `Check refuses a folder with mistakes. In one without it warns of rules and parts of
rules that can never match, allows that denies take away wholly, rules that another
one covers, labels that no selector names, windows of time that are over, and ports
that no rule allows anybody to reach.

The folder may be live, live@REVISION or git:REVISION:FOLDER, as in policy diff.
Warnings go to stderr; with --output json they are part of the answer. With --strict
the exit code is 1 if there are any.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			rules, sets, err := c.loadSets(cmd.Context(), args[0], *trustDomain)
			if err != nil {
				return err
			}
			warnings := rules.Warnings(sets, time.Now())
			if err := c.printCheck(rules, sets, warnings); err != nil {
				return err
			}
			if strict && len(warnings) > 0 {
				return errReported
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&strict, "strict", false, "fail where there is a warning")
	return cmd
}

func (c *cli) printCheck(rules *policy.Ruleset, sets []*policy.Set, warnings []policy.Warning) error {
	policies, tests := 0, 0
	for _, s := range sets {
		policies += len(s.Policies)
		tests += len(s.Tests)
	}
	if c.output == "json" {
		return c.printJSON(map[string]any{"sets": len(sets), "workloads": len(rules.Workloads()), "policies": policies, "tests": tests, "warnings": mapped(warnings, warningJSON)})
	}
	for i := range warnings {
		fmt.Fprintln(c.stderr, &warnings[i])
	}
	warned := ""
	if len(warnings) > 0 {
		warned = ", " + count(len(warnings), "warning")
	}
	_, err := fmt.Fprintf(c.stdout, "ok: %s, %s, %s, %s%s\n", count(len(sets), "set"), count(len(rules.Workloads()), "workload"), countOf(policies, "policy", "policies"), count(tests, "policy test"), warned)
	return err
}

type jsonWarning struct {
	Kind string `json:"kind"`
	jsonError
}

func warningJSON(w policy.Warning) jsonWarning {
	return jsonWarning{string(w.Lint), jsonError{w.File, w.Line, w.Col, w.Msg, w.Hint}}
}
