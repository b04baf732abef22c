package main

import (
	"github.com/spf13/cobra"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func (c *cli) policySchema() *cobra.Command {
	return &cobra.Command{
		Use: "schema", Short: "Print a JSON Schema of the files, for editors", Args: cobra.NoArgs,
		Long: `Schema prints a JSON Schema (draft 2020-12) of the documents of policy files. An
editor with yaml-language-server completes and checks a file that begins with

  # yaml-language-server: $schema=policy.schema.json`,
		RunE: func(*cobra.Command, []string) error {
			_, err := c.stdout.Write(policy.JSONSchema())
			return err
		},
	}
}
