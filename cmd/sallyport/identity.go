package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v4"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/peercred"
)

// maxEvidence bounds an evidence file, in bytes.
const maxEvidence = 256 << 10

func (c *cli) identity() *cobra.Command {
	identity := group("identity", "Who lives where, which workload evidence would prove, and who is refused")
	identity.AddCommand(c.identityList(), c.identityExplain(), c.revoke(), c.unrevoke(), c.ban())
	return identity
}

func (c *cli) identityList() *cobra.Command {
	req := &sallyportv1.IdentitiesRequest{}
	cmd := &cobra.Command{
		Use: "list", Short: "List instances: where, until when, by which evidence", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), func(ctx context.Context, a sallyportv1.AdminClient) error {
				resp, err := a.Identities(ctx, req)
				if err != nil {
					return err
				}
				return c.print(resp, func(w io.Writer) { printIdentities(w, resp) })
			})
		},
	}
	cmd.Flags().StringVar(&req.Workload, "workload", "", "only these: a workload's `name`, /path or spiffe:// ID")
	return cmd
}

func printIdentities(w io.Writer, resp *sallyportv1.IdentitiesResponse) {
	fmt.Fprintln(w, "ID\tINSTANCE\tWHERE\tUNTIL\tSTATE\tEVIDENCE")
	for _, i := range resp.GetIdentities() {
		state := "not connected"
		switch {
		case i.GetRevoked():
			state = "revoked"
		case i.GetWorkload() == "":
			state = "no Workload has this ID"
		case i.GetConnected():
			state = "connected"
		case i.GetAgent() != "":
			state = "by its agent"
		}
		where := i.GetOrigin()
		if i.GetAgent() != "" {
			where = i.GetAgent()
		}
		evidence := i.GetEvidence()
		if i.GetSubject() != "" {
			evidence += ": " + i.GetSubject()
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", i.GetSpiffeId(), i.GetInstance(), orDash(where), local(i.GetExpires()), state, evidence)
	}
	if len(resp.GetRevocations()) > 0 {
		fmt.Fprintln(w, "\nREVOKED\t\tSINCE\tREMEMBERED UNTIL\tBY\tWHY")
	}
	for _, r := range resp.GetRevocations() {
		until := local(r.GetUntil())
		if r.GetBlocked() {
			until = "unrevoked"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", r.GetKind(), r.GetSubject(), local(r.GetSince()), until, r.GetActor(), orDash(r.GetReason()))
	}
}

func (c *cli) identityExplain() *cobra.Command {
	req := &sallyportv1.ExplainIdentityRequest{}
	var file string
	var pid int
	cmd := &cobra.Command{
		Use: "explain", Short: "Say which workload evidence would prove, and by what the others miss it", Args: cobra.NoArgs,
		Long: `Explain looks at evidence as an enrolment would, and redeems nothing. --evidence
names a file with a token (JWT), a PEM certificate chain, or a YAML or JSON mapping
of selectors, which needs --kind; "-" is standard input. --pid looks at a process of
this machine as an agent here would (Linux). The exit code is 1 unless the evidence
is good and proves exactly one workload.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			read := c.process
			if !cmd.Flags().Changed("pid") {
				read = func(_ context.Context, req *sallyportv1.ExplainIdentityRequest, _ int) error {
					return c.evidence(req, file, cmd.InOrStdin())
				}
			} else if file != "" {
				return errors.New("--pid and --evidence exclude each other")
			}
			if err := read(cmd.Context(), req, pid); err != nil {
				return err
			}
			return c.explainIdentity(cmd.Context(), req)
		},
	}
	cmd.Flags().StringVar(&file, "evidence", "", "`file` with the evidence")
	cmd.Flags().IntVar(&pid, "pid", 0, "`number` of a process of this machine")
	cmd.Flags().StringVar(&req.Kind, "kind", "", "kind of evidence: x509pop, kubernetes, oidc, unix")
	cmd.Flags().StringVar(&req.Issuer, "issuer", "", "`name` under attest in the control plane's configuration (default: the only one)")
	cmd.Flags().StringVar(&req.Via, "via", "", "kind unix: the `agent`'s name, /path or ID (default: the only one that Workloads name)")
	return cmd
}

func (c *cli) explainIdentity(ctx context.Context, req *sallyportv1.ExplainIdentityRequest) error {
	return c.admin(ctx, func(ctx context.Context, a sallyportv1.AdminClient) error {
		resp, err := a.ExplainIdentity(ctx, req)
		if err != nil {
			return err
		}
		if err := c.print(resp, func(w io.Writer) { printIdentityExplanation(w, resp) }); err != nil {
			return err
		}
		if resp.GetProblem() != "" || countMatches(resp) != 1 {
			return errReported
		}
		return nil
	})
}

// process looks at a process as an agent would, and says what it could not read.
func (c *cli) process(ctx context.Context, req *sallyportv1.ExplainIdentityRequest, pid int) error {
	if req.GetKind() != "" && req.GetKind() != attest.KindUnix {
		return fmt.Errorf("--kind %s: a process is evidence of kind %s", req.GetKind(), attest.KindUnix)
	}
	p, err := new(peercred.Inspector).PID(ctx, pid)
	if err != nil {
		return err
	}
	defer p.Close()
	for _, missing := range p.Missing {
		fmt.Fprintf(c.stderr, "not known: %s\n", missing)
	}
	req.Kind, req.Selectors = attest.KindUnix, map[string]*sallyportv1.Values{}
	for key, values := range attest.ProcessSelectors(p) {
		req.Selectors[key] = &sallyportv1.Values{Values: values}
	}
	return nil
}

// evidence reads a file into the request.
func (c *cli) evidence(req *sallyportv1.ExplainIdentityRequest, file string, stdin io.Reader) error {
	if file == "" {
		return errors.New("explain needs --evidence or --pid")
	}
	in := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, maxEvidence+1))
	if err != nil {
		return fmt.Errorf("reading %s: %w", file, err)
	}
	switch text := strings.TrimSpace(string(data)); {
	case len(data) > maxEvidence:
		return fmt.Errorf("%s: larger than %d bytes", file, maxEvidence)
	case text == "":
		return fmt.Errorf("%s: is empty", file)
	case strings.Contains(text, "-----BEGIN "):
		req.Evidence = certificates(data)
		return nil
	case strings.HasPrefix(text, "sp1."):
		return fmt.Errorf("%s: is a join token, which proves the workload that it was made for; there is nothing to explain", file)
	case strings.Count(text, ".") == 2 && !strings.ContainsAny(text, " \t\n:{"):
		req.Evidence = []byte(text)
		return nil
	}
	if req.GetKind() == "" {
		return fmt.Errorf("%s: is a mapping of selectors, so say of which --kind", file)
	}
	req.Selectors, err = readSelectors(data)
	if err != nil {
		return fmt.Errorf("%s: neither a token, nor PEM, nor a mapping of selectors: %w", file, err)
	}
	return nil
}

// certificates leaves out of a PEM file what is nobody's business, such as the key.
func certificates(data []byte) []byte {
	const begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
	var out []byte
	for {
		from := bytes.Index(data, []byte(begin))
		if from < 0 {
			return out
		}
		to := bytes.Index(data[from:], []byte(end))
		if to < 0 {
			return out
		}
		out = append(append(out, data[from:from+to+len(end)]...), '\n')
		data = data[from+to+len(end):]
	}
}

// readSelectors reads a mapping of selectors to one value or a list of them. A
// mapping below a key is another way to write "key.". Values are taken as written.
func readSelectors(data []byte) (map[string]*sallyportv1.Values, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	if len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return nil, errors.New("want keys with values, as in namespace: shop")
	}
	out := map[string]*sallyportv1.Values{}
	return out, flatten("", doc.Content[0], out)
}

func flatten(prefix string, doc *yaml.Node, out map[string]*sallyportv1.Values) error {
	for i := 0; i+1 < len(doc.Content); i += 2 {
		key, v := prefix+doc.Content[i].Value, doc.Content[i+1]
		all := []*yaml.Node{v}
		switch v.Kind {
		case yaml.MappingNode:
			if err := flatten(key+".", v, out); err != nil {
				return err
			}
			continue
		case yaml.SequenceNode:
			all = v.Content
		}
		values := &sallyportv1.Values{}
		for _, e := range all {
			if e.Kind != yaml.ScalarNode || e.Tag == "!!null" {
				return fmt.Errorf("line %d: %s: want one value or a list of them", e.Line, key)
			}
			values.Values = append(values.Values, e.Value)
		}
		out[key] = values
	}
	return nil
}

func countMatches(resp *sallyportv1.ExplainIdentityResponse) int {
	n := 0
	for _, m := range resp.GetMatches() {
		if m.GetMatches() {
			n++
		}
	}
	return n
}

func printIdentityExplanation(w io.Writer, resp *sallyportv1.ExplainIdentityResponse) {
	switch n := countMatches(resp); {
	case n == 0:
		fmt.Fprintf(w, "NOBODY  no workload admits this evidence of kind %s\n", resp.GetKind())
	case n > 1:
		fmt.Fprintf(w, "AMBIGUOUS  %d workloads admit this evidence of kind %s, so it is refused\n", n, resp.GetKind())
	case resp.GetProblem() != "":
		fmt.Fprintf(w, "REFUSED  the evidence of kind %s is not good\n", resp.GetKind())
	default:
		fmt.Fprintf(w, "ADMITTED  by its evidence of kind %s\n", resp.GetKind())
	}
	if resp.GetProblem() != "" {
		fmt.Fprintf(w, "  problem: %s\n", resp.GetProblem())
	}
	if len(resp.GetSelectors()) == 0 {
		fmt.Fprintln(w, "\nNo selectors were found.")
	} else {
		fmt.Fprintln(w, "\nSELECTOR\tFOUND")
	}
	for _, key := range slices.Sorted(maps.Keys(resp.GetSelectors())) {
		fmt.Fprintf(w, "%s\t%s\n", key, strings.Join(resp.GetSelectors()[key].GetValues(), ", "))
	}
	if len(resp.GetMatches()) == 0 {
		fmt.Fprintf(w, "\nNo Workload has an attest entry of kind %s.\n", resp.GetKind())
		return
	}
	fmt.Fprintln(w, "\nWORKLOAD\tWRITTEN AT\tRESULT")
	for _, m := range resp.GetMatches() {
		name, result := m.GetWorkload(), "misses: "+m.GetMissed()
		if m.GetSet() != "" {
			name = m.GetSet() + "/" + name
		}
		if m.GetMatches() {
			result = "is " + m.GetSpiffeId()
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", name, m.GetLocation(), result)
	}
}
