package main

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func (c *cli) policyReach(trustDomain *string) *cobra.Command {
	var q policy.WaysQuestion
	var dot bool
	cmd := &cobra.Command{
		Use: "reach [SIDE]", Short: "List what somebody can reach, or who can reach it", Args: cobra.MaximumNArgs(1),
		Long: `Reach lists the ways by which --from can reach something, or something can reach
--to: by port, with the requests and the time that limit them and the rule that
allows them. Open doors, and denies that only record, are marked. With --all it
follows them over any number of hops, nearest first, and shows the shortest path.

Who is meant is a workload's name, a /path, a spiffe:// ID or a pattern of IDs;
"anonymous" for --from, external:NAME for --to.

SIDE is what policy diff takes: a folder, live (the default), live@REVISION or
git:REVISION:FOLDER. --dot prints a graph for Graphviz instead of a table.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if (q.From == "") == (q.To == "") {
				return errors.New("reach needs either --from or --to")
			}
			side := "live"
			if len(args) > 0 {
				side = args[0]
			}
			rules, err := c.loadSide(cmd.Context(), side, *trustDomain)
			if err != nil {
				return err
			}
			q.Now = time.Now()
			reached, err := rules.Ways(q)
			if err != nil {
				return err
			}
			return c.printReached(reached, dot)
		},
	}
	cmd.Flags().StringVar(&q.From, "from", "", "who calls")
	cmd.Flags().StringVar(&q.To, "to", "", "who is called")
	cmd.Flags().BoolVar(&dot, "dot", false, "print a graph, in the language of Graphviz")
	cmd.Flags().BoolVar(&q.All, "all", false, "over any number of hops, instead of one")
	return cmd
}

// sideDomain gives the trust domain to read a side in: of what is or was in force,
// the control plane's.
func (c *cli) sideDomain(ctx context.Context, side, asked string) (string, error) {
	if asked != offlineTrustDomain || side != "live" && !strings.HasPrefix(side, "live@") {
		return asked, nil
	}
	err := c.admin(ctx, func(ctx context.Context, a sallyportv1.AdminClient) error {
		resp, err := a.Status(ctx, &sallyportv1.StatusRequest{})
		if err == nil {
			asked = resp.GetTrustDomain()
		}
		return err
	})
	return asked, err
}

func (c *cli) printReached(r policy.Reached, dot bool) error {
	if c.output == "json" {
		return c.printJSON(reachedJSON(r))
	}
	text := r.String()
	if dot {
		text = r.Dot()
	}
	_, err := io.WriteString(printable{c.stdout}, text)
	return err
}

type jsonPlace struct {
	Name   string   `json:"name"`
	ID     string   `json:"id"`
	Kind   string   `json:"kind"`
	Except []string `json:"except"`
}

func placeJSON(p policy.Place) jsonPlace {
	return jsonPlace{p.Name, p.ID, string(p.Kind), append([]string{}, p.Except...)}
}

type jsonWay struct {
	From     jsonPlace `json:"from"`
	To       jsonPlace `json:"to"`
	Port     string    `json:"port"`
	Number   uint16    `json:"number"`
	Requests string    `json:"requests"`
	Since    string    `json:"since"`
	Until    string    `json:"until"`
	Rule     *jsonRule `json:"rule"`
	Door     bool      `json:"door"`
	Audited  *jsonRule `json:"audited"`
	Path     []string  `json:"path"`
}

func reachedJSON(r policy.Reached) any {
	at := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.UTC().Format(time.RFC3339)
	}
	ways := mapped(r.Ways, func(w policy.Way) jsonWay {
		return jsonWay{
			From: placeJSON(w.From), To: placeJSON(w.To), Port: w.Port.Name, Number: w.Port.Number, Requests: w.Requests,
			Since: at(w.Since), Until: at(w.Until), Rule: ruleJSON(w.Rule), Door: w.Door, Audited: ruleJSON(w.Audited), Path: append([]string{}, w.Path...),
		}
	})
	return struct {
		Ways  []jsonWay `json:"ways"`
		Notes []string  `json:"notes"`
		More  int       `json:"more"`
	}{ways, append([]string{}, r.Notes...), r.More}
}
