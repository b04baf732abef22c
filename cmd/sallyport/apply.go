package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func (c *cli) apply() *cobra.Command {
	var set string
	var wait time.Duration
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "apply DIR",
		Short: "Put a folder of policy files in force, whole or not at all",
		Long: `Apply replaces sets by the files of a folder. DIR itself is the root set and
each of its sub-folders a set of its own; with --set, DIR is that one set.
A set that DIR does not hold stays as it is; "sallyport set remove" removes one.`,
		Args: args("DIR"),
	}
	cmd.Flags().StringVar(&set, "set", "", "apply DIR as this one `set`")
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait this long for every connected sidecar to acknowledge")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "check, test and show the difference; change nothing")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		sets, err := readSets(args[0], set)
		if err != nil {
			return err
		}
		req := &sallyportv1.ApplyRequest{Sets: sets, DryRun: dryRun, Wait: durationpb.New(wait)}
		return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
			resp, err := a.Apply(ctx, req)
			if err != nil {
				return err
			}
			return c.printApplied(resp, dryRun, wait)
		})
	}
	return cmd
}

// folder refuses what is not one, and says so.
func folder(dir string) error {
	switch st, err := os.Stat(dir); {
	case err != nil:
		return fmt.Errorf("reading policy folder: %w", err)
	case !st.IsDir():
		return fmt.Errorf("%s is a file: name the folder that holds the policy files", dir)
	}
	return nil
}

// readSets reads a folder as the control plane will, with the same limits.
func readSets(dir, set string) ([]*sallyportv1.Set, error) {
	if err := folder(dir); err != nil {
		return nil, err
	}
	all, err := policy.ReadFiles(os.DirFS(dir))
	if err != nil {
		return nil, err
	}
	if set != "" {
		for name := range all {
			if name != "" {
				return nil, fmt.Errorf("%s has the sub-folder %s: a set has no sets of its own; apply without --set, or name the sub-folder", dir, name)
			}
		}
		return []*sallyportv1.Set{{Name: set, Files: all[""]}}, nil
	}
	var sets []*sallyportv1.Set
	for name, files := range all {
		if len(files) > 0 {
			sets = append(sets, &sallyportv1.Set{Name: name, Files: files})
		}
	}
	if len(sets) == 0 {
		return nil, fmt.Errorf("%s holds no policy files (*.yaml)", dir)
	}
	return sets, nil
}

// printApplied shows what an edit did. Sidecars that refused it, or did not
// answer in time, make the exit code 1.
func (c *cli) printApplied(resp *sallyportv1.ApplyResponse, dryRun bool, wait time.Duration) error {
	err := c.print(resp, func(w io.Writer) {
		if resp.GetTests() != "" {
			fmt.Fprintln(w, resp.GetTests())
		}
		if resp.GetDiff() != "" {
			fmt.Fprintln(w, resp.GetDiff())
		}
		switch {
		case dryRun:
			fmt.Fprintln(w, "dry run: nothing was changed")
		case resp.GetUnchanged():
			fmt.Fprintf(w, "unchanged: revision %s is in force\n", resp.GetRevision())
		default:
			fmt.Fprintf(w, "revision %s is in force\n", resp.GetRevision())
		}
		if wait > 0 && !dryRun {
			fmt.Fprintf(w, "%d sidecars acknowledged\n", resp.GetAcked())
		}
		for _, n := range resp.GetPending() {
			fmt.Fprintf(w, "no answer yet: %s\n", n)
		}
		for _, n := range resp.GetNacks() {
			fmt.Fprintf(w, "refused by %s\n", n)
		}
	})
	if err == nil && len(resp.GetPending())+len(resp.GetNacks()) > 0 {
		return errReported
	}
	return err
}

func (c *cli) set() *cobra.Command {
	var wait time.Duration
	set := group("set", "Manage sets")
	remove := &cobra.Command{
		Use: "remove NAME", Short: "Remove a set with everything in it", Args: args("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
				resp, err := a.RemoveSet(ctx, &sallyportv1.RemoveSetRequest{Name: args[0], Wait: durationpb.New(wait)})
				if err != nil {
					return err
				}
				return c.printApplied(resp, false, wait)
			})
		},
	}
	remove.Flags().DurationVar(&wait, "wait", 0, "wait this long for every connected sidecar to acknowledge")
	set.AddCommand(remove)
	return set
}

func (c *cli) rollback() *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use: "rollback REV", Short: "Put the files of an earlier revision in force, as a new revision", Args: args("REV"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
				resp, err := a.Rollback(ctx, &sallyportv1.RollbackRequest{Revision: args[0], Wait: durationpb.New(wait)})
				if err != nil {
					return err
				}
				return c.printApplied(resp, false, wait)
			})
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait this long for every connected sidecar to acknowledge")
	return cmd
}

func (c *cli) history() *cobra.Command {
	var limit uint32
	cmd := &cobra.Command{
		Use: "history", Short: "List applied revisions, newest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
				resp, err := a.History(ctx, &sallyportv1.HistoryRequest{Limit: limit})
				if err != nil {
					return err
				}
				return c.print(resp, func(w io.Writer) {
					fmt.Fprintln(w, "REVISION\tTIME\tWHO\tFROM\tWHAT")
					for _, r := range resp.GetRevisions() {
						rev := r.GetRevision()
						if r.GetCurrent() {
							rev += " *"
						}
						fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", rev, r.GetTime().AsTime().Local().Format(time.DateTime), r.GetActor(), r.GetOrigin(), r.GetSummary())
					}
				})
			})
		},
	}
	cmd.Flags().Uint32Var(&limit, "limit", 0, "how many (default 50)")
	return cmd
}
