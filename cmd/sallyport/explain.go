package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/insight"
)

func (c *cli) explain() *cobra.Command {
	req := &sallyportv1.ExplainRequest{}
	var request, at, log, side string
	cmd := &cobra.Command{
		Use: "explain [DECISION]", Short: "Say what would happen to a connection and which line decides", Args: cobra.MaximumNArgs(1),
		Long: `Explain answers for --from and --to (a workload's name, /path or spiffe:// ID)
on one --port or on all declared ones, or for the decision id of a flow record, which
whoever was refused is told, too. --http asks about one request, --at about another
moment than now. For a refusal it names the nearest rule and the one field in which
that one misses.

With --in the rules are those of a folder, live, live@REVISION or
git:REVISION:FOLDER, as in policy diff; a folder needs no control plane.

The record of a decision is looked up in the control plane, or with --flows in a file
of JSON lines: a sidecar's log. Rules are those that are in force now, as they held when
it was decided.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				req.DecisionId = args[0]
			}
			if log != "" {
				if err := c.recordedDecision(log, req); err != nil {
					return err
				}
			}
			if req.GetDecisionId() == "" && (req.GetFrom() == "" || req.GetTo() == "") {
				return errors.New("explain needs --from and --to, or --decision")
			}
			if request != "" {
				var ok bool
				if req.Method, req.Path, ok = strings.Cut(request, " "); !ok {
					return fmt.Errorf("--http %q: want a method and a path, as in \"POST /v1/charges\"", request)
				}
			}
			if at != "" {
				t, err := time.Parse(time.RFC3339, at)
				if err != nil {
					return fmt.Errorf("--at %q: want a time as in 2026-12-31T00:00:00Z", at)
				}
				req.At = timestamppb.New(t)
			}
			show := func(resp *sallyportv1.ExplainResponse, err error) error {
				if err != nil {
					return err
				}
				return c.print(resp, func(w io.Writer) {
					for _, e := range resp.GetExplanations() {
						printExplanation(w, e)
					}
				})
			}
			if side != "" {
				return show(c.explainIn(cmd.Context(), side, req))
			}
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error { return show(a.Explain(ctx, req)) })
		},
	}
	cmd.Flags().StringVar(&req.From, "from", "", "who calls")
	cmd.Flags().StringVar(&req.To, "to", "", "who is called")
	cmd.Flags().StringVar(&req.Port, "port", "", "name or number (default: every declared port)")
	cmd.Flags().StringVar(&request, "http", "", "one `request`, as in \"POST /v1/charges\"")
	cmd.Flags().StringVar(&req.Host, "host", "", "its host")
	cmd.Flags().StringArrayVar(&req.Headers, "header", nil, "a `line` of its header, as in \"x-team: sales\"; may be given again")
	cmd.Flags().StringVar(&at, "at", "", "another `time` than now, as in 2026-12-31T00:00:00Z")
	cmd.Flags().StringVar(&req.DecisionId, "decision", "", "decision `id` of a flow record")
	cmd.Flags().StringVar(&log, "flows", "", "look the decision up in this `file` of JSON lines")
	cmd.Flags().StringVar(&side, "in", "", "rules of this `folder`, or of live, live@REVISION or git:REVISION:FOLDER")
	return cmd
}

// explainIn answers req by the rules of a side. A full ID says which trust domain the
// files are of.
func (c *cli) explainIn(ctx context.Context, side string, req *sallyportv1.ExplainRequest) (*sallyportv1.ExplainResponse, error) {
	if req.GetDecisionId() != "" {
		return nil, errors.New("--in: a decision that the control plane has on record is explained by its own rules; name --flows FILE, or --from and --to")
	}
	domain := offlineTrustDomain
	if id, err := spiffeid.FromString(req.GetTo()); err == nil {
		domain = id.TrustDomain().Name()
	}
	rules, err := c.loadSide(ctx, side, domain)
	if err != nil {
		return nil, err
	}
	if domain, err = c.sideDomain(ctx, side, domain); err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(domain)
	if err != nil {
		return nil, err
	}
	resp, err := insight.Explain(rules, td, req, time.Now())
	if s, ok := status.FromError(err); err != nil && ok {
		return nil, errors.New(s.Message())
	}
	return resp, err
}

// recordedDecision turns the decision that req asks for, which a file has on record,
// into the question that was decided. The destination's record counts before others.
func (c *cli) recordedDecision(log string, req *sallyportv1.ExplainRequest) error {
	var found *flow.Flow
	err := eachLine(log, func(data []byte) error {
		var f flow.Flow
		if err := f.UnmarshalJSON(data); err != nil {
			return err
		}
		if f.ID == req.GetDecisionId() && (found == nil || found.Side != flow.Inbound && f.Side == flow.Inbound) {
			found = &f
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case found == nil:
		return fmt.Errorf("--flows %s: no record has the decision id %q", log, req.GetDecisionId())
	case found.Src.IsZero():
		return fmt.Errorf("--flows %s: %s was about a caller without identity, whom explain cannot ask about", log, found.ID)
	}
	if c.output != "json" {
		if _, err := fmt.Fprintln(printable{c.stdout}, "recorded: "+flowLine(*found)); err != nil {
			return err
		}
	}
	req.DecisionId = ""
	req.From, req.To, req.Port, req.At = found.Src.String(), found.Dst.String(), fmt.Sprint(found.Port), timestamppb.New(found.Start)
	if h := found.HTTP; h != nil {
		req.Method, req.Path, req.Host = h.Method, h.Path, h.Host
		for name, lines := range h.Header {
			for _, l := range lines {
				req.Headers = append(req.Headers, name+": "+l)
			}
		}
	}
	return nil
}

func printExplanation(w io.Writer, e *sallyportv1.Explanation) {
	fmt.Fprintf(w, "%s  %s → %s:%s\n", strings.ToUpper(e.GetVerdict()), e.GetFrom(), e.GetTo(), strings.TrimSuffix(e.GetPort()+" "+e.GetRequest(), " "))
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "  %-15s %s\n", label, fmt.Sprintf(format, args...))
	}
	switch {
	case e.GetVerdict() == "inspect":
		line("decided by", "each request by itself: ask about one with --http")
	case e.GetRule() != "" && e.GetWould() == "deny" && e.GetAudited() == "":
		line("let through by", "the open door of %s (%s); no rule allows it", e.GetRule(), e.GetLocation())
	case e.GetRule() != "":
		line("decided by", "%s (%s)", e.GetRule(), e.GetLocation())
	default:
		line("decided by", "no rule allows it, and what no rule allows is denied")
	}
	if e.GetAudited() != "" {
		line("would be denied", "by %s (%s), which only records", e.GetAudited(), e.GetAuditedLocation())
	}
	if e.GetReason() != "" {
		line("reason", "%s", e.GetReason())
	}
	if e.GetNearest() != "" {
		line("nearest rule", "%s (%s)", e.GetNearest(), e.GetNearestLocation())
		line("what it misses", "%s", e.GetMissed())
	}
	if e.GetNote() != "" {
		line("note", "%s", e.GetNote())
	}
}
