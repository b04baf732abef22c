package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/completion"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// completionTime is how long a control plane may take to answer while somebody waits
// for candidates.
const completionTime = time.Second

// complete makes root complete its command lines: arguments by what a verb calls
// them, flags by their names and values.
func (c *cli) complete(root *cobra.Command) {
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(completion.Verb())
	completion.Values(root, map[string]cobra.CompletionFunc{
		"output":   cobra.FixedCompletions([]cobra.Completion{"text", "json"}, cobra.ShellCompDirectiveNoFileComp),
		"verdict":  cobra.FixedCompletions([]cobra.Completion{"allow", "deny"}, cobra.ShellCompDirectiveNoFileComp),
		"kind":     cobra.FixedCompletions([]cobra.Completion{policy.X509Pop, policy.Kubernetes, policy.OIDC, policy.Unix}, cobra.ShellCompDirectiveNoFileComp),
		"flows":    cobra.FixedCompletions([]cobra.Completion{"live"}, cobra.ShellCompDirectiveDefault),
		"set":      c.sets,
		"workload": c.workloads,
		"from":     c.workloads,
		"to":       c.workloads,
		"in":       c.sides,
		"via":      c.workloads,
	})
	byArgument := c.argumentCompletions()
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.ValidArgsFunction == nil && len(cmd.ValidArgs) == 0 && !cmd.HasSubCommands() {
			cmd.ValidArgsFunction = func(cmd *cobra.Command, done []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
				names := argumentsOf(cmd)
				if len(names) > 0 && strings.HasSuffix(names[len(names)-1], "...") && len(done) >= len(names) {
					done = done[:len(names)-1]
				}
				if len(done) >= len(names) || byArgument[names[len(done)]] == nil {
					return nil, cobra.ShellCompDirectiveNoFileComp
				}
				return byArgument[names[len(done)]](cmd, done, word)
			}
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(root)
}

// argumentsOf gives what a verb calls its arguments: the words in capitals behind it.
func argumentsOf(cmd *cobra.Command) []string {
	words := strings.Fields(cmd.Use)[1:]
	for i, w := range words {
		if strings.HasPrefix(w, "-") {
			return words[:i]
		}
	}
	return words
}

// argumentCompletions says how arguments are completed, by what verbs call them.
func (c *cli) argumentCompletions() map[string]cobra.CompletionFunc {
	return map[string]cobra.CompletionFunc{
		"DIR": completion.Folders,
		"PATH...": func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return []cobra.Completion{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
		},
		"A":      c.sides,
		"[SIDE]": c.sides,
		"[DECISION]": func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveNoFileComp // of a log, and of nothing that can be listed
		},
		"B":         c.sides,
		"NAME":      c.sets,
		"REV":       c.revisions,
		"SUBJECT":   c.workloads,
		"NODE":      c.agents,
		"AUTHORITY": c.authorities,
		"SHELL":     cobra.FixedCompletions(completion.Shells, cobra.ShellCompDirectiveNoFileComp),
	}
}

// candidates asks the control plane; without one there are none.
func (c *cli) candidates(cmd *cobra.Command, ask func(context.Context, sallyportv1.AdminClient) ([]string, error)) ([]cobra.Completion, cobra.ShellCompDirective) {
	var out []string
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, completionTime)
	defer cancel()
	if err := c.admin(ctx, func(ctx context.Context, a sallyportv1.AdminClient) (err error) {
		out, err = ask(ctx, a)
		return err
	}); err != nil {
		cobra.CompDebugln(err.Error(), false)
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// fromStatus collects what take gives of the control plane's status, each once.
func (c *cli) fromStatus(cmd *cobra.Command, take func(*sallyportv1.StatusResponse) []string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return c.candidates(cmd, func(ctx context.Context, a sallyportv1.AdminClient) ([]string, error) {
		s, err := a.Status(ctx, &sallyportv1.StatusRequest{})
		var out []string
		seen := map[string]bool{"": true}
		for _, v := range take(s) {
			if !seen[v] {
				out, seen[v] = append(out, v), true
			}
		}
		return out, err
	})
}

func (c *cli) workloads(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return c.fromStatus(cmd, func(s *sallyportv1.StatusResponse) (out []string) {
		for _, w := range s.GetWorkloads() {
			out = append(out, w.GetName())
		}
		return out
	})
}

func (c *cli) sets(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return c.fromStatus(cmd, func(s *sallyportv1.StatusResponse) (out []string) {
		for _, w := range s.GetWorkloads() {
			out = append(out, w.GetSet())
		}
		return out
	})
}

func (c *cli) authorities(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return c.fromStatus(cmd, func(s *sallyportv1.StatusResponse) (out []string) {
		for _, a := range s.GetAuthorities() {
			out = append(out, a.GetSubject())
		}
		return out
	})
}

// agents gives where instances live.
func (c *cli) agents(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return c.candidates(cmd, func(ctx context.Context, a sallyportv1.AdminClient) ([]string, error) {
		resp, err := a.Identities(ctx, &sallyportv1.IdentitiesRequest{})
		var out []string
		for _, i := range resp.GetIdentities() {
			out = append(out, i.GetInstance())
		}
		return out, err
	})
}

func (c *cli) revisions(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return c.candidates(cmd, func(ctx context.Context, a sallyportv1.AdminClient) ([]string, error) {
		resp, err := a.History(ctx, &sallyportv1.HistoryRequest{})
		var out []string
		for _, r := range resp.GetRevisions() {
			out = append(out, r.GetRevision())
		}
		return out, err
	})
}

// sides completes a folder, or what else policy diff compares.
func (c *cli) sides(cmd *cobra.Command, _ []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if strings.HasPrefix(word, "live@") {
		revisions, directive := c.revisions(cmd, nil, "")
		for i := range revisions {
			revisions[i] = "live@" + revisions[i]
		}
		return revisions, directive
	}
	if word != "" {
		for _, other := range []string{"live", "live@", "git:"} {
			if strings.HasPrefix(other, word) {
				return []cobra.Completion{"live", "live@", "git:"}, cobra.ShellCompDirectiveNoSpace
			}
		}
	}
	return nil, cobra.ShellCompDirectiveFilterDirs
}
