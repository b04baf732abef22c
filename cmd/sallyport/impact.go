package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// maxRecord is the longest record that is read from a file, in bytes.
const maxRecord = 64 << 10

// recorded is where recorded flows come from.
type recorded struct {
	flows string
	last  string
}

func (r *recorded) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&r.flows, "flows", "live", "records: a `file` of JSON lines (sallyport flows --output json, or a sidecar's log), or live")
	cmd.Flags().StringVar(&r.last, "last", "30d", "only records of the last `time`, as in 12h or 30d")
}

func (c *cli) policyImpact(trustDomain *string) *cobra.Command {
	var from recorded
	var patch bool
	cmd := &cobra.Command{
		Use: "impact DIR", Short: "Decide recorded connections again, by the rules of a folder", Args: args("DIR"),
		Long: `Impact tells which recorded connections would get another verdict if the folder
were applied now: by whom, to what, how often and when last. Only records of the
destination's own sidecar count. What cannot be told from a record is reported as
unknown. Below it are the allows that no record matches.

The exit code is 1 if a verdict changes, or might. With --patch all that is printed
is a patch that removes the allows without a record from the files, for git apply or
patch -p1; review it: what happens once a year may not be recorded.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			records, td, err := c.observed(cmd.Context(), from)
			if err != nil {
				return err
			}
			rules, sets, err := load(args[0], recordedDomain(*trustDomain, td))
			if err != nil {
				return err
			}
			impact := policy.ImpactOf(rules, time.Now(), records)
			if patch {
				return c.printRemoval(args[0], sets, impact)
			}
			if c.output == "json" {
				err = c.printJSON(impactJSON(impact))
			} else {
				_, err = io.WriteString(c.stdout, impact.String())
			}
			if err == nil && impact.Changes() {
				err = errReported
			}
			return err
		},
	}
	from.flags(cmd)
	cmd.Flags().BoolVar(&patch, "patch", false, "print a patch that removes the allows that no record matches")
	return cmd
}

func (c *cli) policySuggest(trustDomain *string) *cobra.Command {
	var from recorded
	cmd := &cobra.Command{
		Use: "suggest DIR", Short: "Write rules for what came through open doors", Args: args("DIR"),
		Long: `Suggest prints policies that would allow what was recorded to pass through an open
door (kind: Defaults) and that no rule of the folder allows: by workload, or by a
label where everybody who has it was seen. Review the file before you add it.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			records, td, err := c.observed(cmd.Context(), from)
			if err != nil {
				return err
			}
			rules, _, err := load(args[0], recordedDomain(*trustDomain, td))
			if err != nil {
				return err
			}
			all := policy.Suggest(rules, time.Now(), records)
			if c.output == "json" {
				return c.printJSON(suggestionsJSON(all))
			}
			if len(all) == 0 {
				_, err = fmt.Fprintln(c.stderr, "nothing came through an open door that no rule allows")
				return err
			}
			_, err = c.stdout.Write(policy.SuggestionFile(all))
			return err
		},
	}
	from.flags(cmd)
	return cmd
}

// recordedDomain is the trust domain to read the folder in: the one that was asked
// for, or that of the records.
func recordedDomain(asked, recorded string) string {
	if asked == offlineTrustDomain && recorded != "" {
		return recorded
	}
	return asked
}

// observed reads the records that are asked for, and the trust domain of their
// destinations' sidecars.
func (c *cli) observed(ctx context.Context, from recorded) (records []policy.Observed, trustDomain string, err error) {
	last, err := parseLast(from.last)
	if err != nil {
		return nil, "", err
	}
	since := time.Now().Add(-last)
	take := func(data []byte) error {
		var f flow.Flow
		if err := f.UnmarshalJSON(data); err != nil {
			return err
		}
		o, ok := observedFlow(f)
		if !ok || f.Start.Before(since) {
			return nil
		}
		if o.Reporter == o.Dst {
			trustDomain = o.Dst.TrustDomain().Name()
		}
		records = append(records, o)
		return nil
	}
	if from.flows != "live" {
		err = eachLine(from.flows, take)
		return records, trustDomain, err
	}
	err = c.admin(ctx, func(ctx context.Context, a sallyportv1.AdminClient) error {
		stream, err := a.Flows(ctx, &sallyportv1.FlowsRequest{})
		if err != nil {
			return err
		}
		return c.eachFlow(stream, take)
	})
	return records, trustDomain, err
}

// observedFlow leaves out what no rule was asked about: connections that failed
// before, and refusals for another reason, which the record gives. A record in a sidecar's own log
// names no reporter: it is the sidecar's, on its own side.
func observedFlow(f flow.Flow) (policy.Observed, bool) {
	verdict := f.Verdict()
	if verdict != policy.Allow.String() && verdict != policy.Deny.String() {
		return policy.Observed{}, false
	}
	if f.Effect == policy.Deny && f.Rule.IsZero() && f.Error != "" {
		return policy.Observed{}, false
	}
	reporter, err := spiffeid.FromString(f.Reporter)
	if err != nil {
		if reporter = f.Src; f.Side == flow.Inbound {
			reporter = f.Dst
		}
	}
	return policy.Observed{
		Request: f.Request, Effect: f.Effect, Would: f.Would, Audited: f.Audited, Reporter: reporter, Time: f.Start, Count: 1,
	}, true
}

// parseLast reads a duration, or days.
func parseLast(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.Atoi(days); err == nil && n > 0 && n <= 36500 {
			return time.Duration(n) * 24 * time.Hour, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("--last %q: want a time such as 12h or 30d", s)
	}
	return d, nil
}

func eachLine(path string, take func([]byte) error) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("--flows: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, maxRecord)
	for n := 1; lines.Scan(); n++ {
		if len(strings.TrimSpace(lines.Text())) == 0 {
			continue
		}
		if err := take(lines.Bytes()); err != nil {
			return fmt.Errorf("--flows %s:%d: %w", path, n, err)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("--flows %s: %w", path, err)
	}
	return nil
}
