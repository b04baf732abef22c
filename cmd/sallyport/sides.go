package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// loadSide loads what [cli.loadSets] does.
func (c *cli) loadSide(ctx context.Context, name, trustDomain string) (*policy.Ruleset, error) {
	rules, _, err := c.loadSets(ctx, name, trustDomain)
	return rules, err
}

// loadSets loads a folder, what is in force ("live") or was ("live@REVISION"), or a
// folder of a git revision ("git:REVISION:FOLDER").
func (c *cli) loadSets(ctx context.Context, name, trustDomain string) (*policy.Ruleset, []*policy.Set, error) {
	var sets []*policy.Set
	var err error
	trustDomain, err = c.sideDomain(ctx, name, trustDomain)
	if err != nil {
		return nil, nil, err
	}
	revision, named := strings.CutPrefix(name, "live@")
	rest, isGit := strings.CutPrefix(name, "git:")
	switch {
	case named || name == "live":
		sets, err = c.applied(ctx, revision, named)
	case isGit:
		if sets, err = gitSets(ctx, rest); err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
	default:
		rules, sets, err := load(name, trustDomain)
		return rules, sets, err
	}
	if err != nil {
		return nil, nil, err
	}
	rules, err := compileSide(sets, trustDomain)
	return rules, sets, err
}

// applied reads the sets of a revision; "live" has none, and is the one in force.
func (c *cli) applied(ctx context.Context, revision string, named bool) (sets []*policy.Set, err error) {
	if named && revision == "" {
		return nil, errors.New("live@: want a revision, as in live@1.42: sallyport history lists them")
	}
	if !named {
		revision = ""
	}
	err = c.admin(ctx, func(ctx context.Context, a sallyportv1.AdminClient) error {
		resp, err := a.Files(ctx, &sallyportv1.FilesRequest{Revision: revision})
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
	return sets, err
}

func compileSide(sets []*policy.Set, trustDomain string) (*policy.Ruleset, error) {
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

// gitSets reads a folder as a revision of the repository around it has it. What
// policy.ReadFiles would not read of a folder is not read here either.
func gitSets(ctx context.Context, name string) ([]*policy.Set, error) {
	revision, dir, ok := strings.Cut(name, ":")
	if !ok || revision == "" || dir == "" || strings.HasPrefix(revision, "-") {
		return nil, errors.New("want git:REVISION:FOLDER, as in git:HEAD~1:policy")
	}
	top, err := git(ctx, ".", "rev-parse", "--show-toplevel", "--show-prefix")
	if err != nil {
		return nil, err
	}
	root, prefix, _ := strings.Cut(strings.TrimSuffix(top.String(), "\n"), "\n")
	tree := revision + ":"
	if in := path.Join(prefix, dir); in != "." {
		tree += in
	}
	out, err := git(ctx, root, "archive", "--format=tar", tree)
	if err != nil {
		return nil, err
	}
	files := map[string]map[string][]byte{} // :: set → file → content
	for tr := tar.NewReader(out); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		set, file := path.Split(h.Name)
		set = strings.TrimSuffix(set, "/")
		resource := strings.HasSuffix(file, ".yaml") || strings.HasSuffix(file, ".yml")
		if h.Typeflag != tar.TypeReg || !resource || strings.HasPrefix(h.Name, ".") || strings.HasPrefix(file, ".") {
			continue
		}
		if files[set] == nil {
			files[set] = map[string][]byte{}
		}
		if files[set][file], err = io.ReadAll(io.LimitReader(tr, policy.MaxFileSize+1)); err != nil {
			return nil, err
		}
	}
	var sets []*policy.Set
	for set, content := range files {
		s, err := policy.ParseFiles(set, content)
		if err != nil {
			return nil, err
		}
		sets = append(sets, s)
	}
	return sets, nil
}

// git runs the command in a folder; its own words are the error.
func git(ctx context.Context, dir string, args ...string) (*bytes.Buffer, error) {
	var out, problem bytes.Buffer
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", dir}, args...)...)
	cmd.Stdout, cmd.Stderr = &limited{buf: &out, left: 2 * policy.MaxTreeSize}, &problem
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("git %s: %w: %s", args[0], err, strings.TrimSpace(problem.String()))
	}
	return &out, nil
}

// limited refuses more than a folder may have.
type limited struct {
	buf  *bytes.Buffer
	left int
}

// Write implements io.Writer.
func (l *limited) Write(p []byte) (int, error) {
	if l.left -= len(p); l.left < 0 {
		return 0, errors.New("the folder is too large")
	}
	return l.buf.Write(p)
}

func (c *cli) policyTest(trustDomain *string) *cobra.Command {
	var junit string
	cmd := &cobra.Command{
		Use: "test DIR", Short: "Run the PolicyTests of a folder", Args: args("DIR"),
		Long: "Test runs the PolicyTests of a folder; live, live@REVISION and git:REVISION:FOLDER\nstand for one, as in policy diff.",
		RunE: func(cmd *cobra.Command, args []string) error {
			rules, sets, err := c.loadSets(cmd.Context(), args[0], *trustDomain)
			if err != nil {
				return err
			}
			report := policy.RunTests(rules, sets)
			if junit != "" {
				if err := writeJUnit(junit, report); err != nil {
					return err
				}
			}
			return c.printTests(report)
		},
	}
	cmd.Flags().StringVar(&junit, "junit", "", "also write the outcome to this `file`, as JUnit XML")
	return cmd
}

func (c *cli) policyProve(trustDomain *string) *cobra.Command {
	return &cobra.Command{
		Use: "prove DIR", Short: "Prove the Invariants of a folder over every identity that could exist", Args: args("DIR"),
		Long: `Prove shows that no Invariant can be broken, by anybody who exists or could exist, on
any port, by any request, at any time; or it gives a counter-example. Open doors count
as open. The folder may be live, live@REVISION or git:REVISION:FOLDER, as in policy
diff. The exit code is 1 if an Invariant does not hold.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			rules, sets, err := c.loadSets(cmd.Context(), args[0], *trustDomain)
			if err != nil {
				return err
			}
			return c.printProof(policy.Prove(rules, sets))
		},
	}
}

func (c *cli) printProof(proof policy.Proof) error {
	if c.output == "json" {
		if err := c.printJSON(proofJSON(proof)); err != nil {
			return err
		}
	} else if _, err := fmt.Fprint(c.stdout, proof); err != nil {
		return err
	}
	if proof.Failed() {
		return errReported
	}
	return nil
}

// The form that build services read: one suite, one case for each PolicyTest.
type junitSuite struct {
	XMLName  xml.Name    `xml:"testsuite"`
	Name     string      `xml:"name,attr"`
	Tests    int         `xml:"tests,attr"`
	Failures int         `xml:"failures,attr"`
	Cases    []junitCase `xml:"testcase"`
}

type junitCase struct {
	Class   string        `xml:"classname,attr"`
	Name    string        `xml:"name,attr"`
	File    string        `xml:"file,attr"`
	Line    int           `xml:"line,attr"`
	Failure *junitFailure `xml:"failure"`
}

type junitFailure struct {
	Message string `xml:"message,attr"`
	Text    string `xml:",chardata"`
}

func writeJUnit(file string, report policy.TestReport) error {
	suite := junitSuite{Name: "policy", Tests: len(report.Results)}
	for _, r := range report.Results {
		c := junitCase{Class: "policy", Name: r.Name, File: r.File, Line: r.Line}
		if r.Set != "" {
			c.Class += "." + r.Set
		}
		if r.Failed > 0 {
			suite.Failures++
			c.Failure = &junitFailure{Message: fmt.Sprintf("%d of %d questions", r.Failed, r.Questions), Text: r.Failures.Error()}
		}
		suite.Cases = append(suite.Cases, c)
	}
	out, err := xml.MarshalIndent(suite, "", "  ")
	if err != nil {
		return fmt.Errorf("--junit: %w", err)
	}
	if err := os.WriteFile(file, append([]byte(xml.Header), append(out, '\n')...), 0o666); err != nil {
		return fmt.Errorf("--junit: %w", err)
	}
	return nil
}
