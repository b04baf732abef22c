package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

func (c *cli) policySchema() *cobra.Command {
	return &cobra.Command{
		Use: "schema", Short: "Print a JSON Schema of the files, for editors", Args: cobra.NoArgs,
		Long: `Schema prints a JSON Schema (draft 2020-12) of the documents of policy files. An
editor with yaml-language-server completes and checks a document that begins with

  # yaml-language-server: $schema=policy.schema.json`,
		RunE: func(*cobra.Command, []string) error {
			_, err := c.stdout.Write(policy.JSONSchema())
			return err
		},
	}
}

func (c *cli) policyFmt() *cobra.Command {
	var check, write bool
	cmd := &cobra.Command{
		Use: "fmt PATH...", Short: "Print files in canonical form, write them back, or check them",
		Long: `Fmt prints each file in its canonical form. PATH is a file, a folder, whose *.yaml
and *.yml files at any depth are meant, or "-", standard input. Comments, separators
and what the files say stay; files that do not parse are refused.

With --check the exit code is 1 if a file is not in that form, and those are listed.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			files, err := policyFiles(args)
			if err != nil {
				return err
			}
			var problems policy.Errors
			changed := false
			for _, file := range files {
				differs, err := c.format(file, cmd.InOrStdin(), check, write)
				var some policy.Errors
				if errors.As(err, &some) {
					problems = append(problems, some...)
				} else if err != nil {
					return err
				}
				changed = changed || differs
			}
			if len(problems) > 0 {
				return problems
			}
			if check && changed {
				return errReported
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&check, "check", false, "change nothing; list the files that are not in canonical form")
	cmd.Flags().BoolVarP(&write, "write", "w", false, "write files back instead of printing them, and list those that changed")
	cmd.MarkFlagsMutuallyExclusive("check", "write")
	return cmd
}

// policyFiles resolves folders. Hidden files and folders are left alone.
func policyFiles(paths []string) ([]string, error) {
	var out []string
	for _, path := range paths {
		if path == "-" {
			out = append(out, path)
			continue
		}
		found := false
		err := filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
			hidden := p != path && strings.HasPrefix(d.Name(), ".")
			switch {
			case err != nil:
				return err
			case d.IsDir() && hidden:
				return fs.SkipDir
			case d.IsDir() || hidden:
			case p == path || strings.HasSuffix(p, ".yaml") || strings.HasSuffix(p, ".yml"):
				out, found = append(out, p), true
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("reading policy files: %w", err)
		}
		if !found {
			return nil, fmt.Errorf("%s holds no policy files (*.yaml)", path)
		}
	}
	return out, nil
}

// format treats one file, and reports whether it was in another form.
func (c *cli) format(file string, stdin io.Reader, check, write bool) (bool, error) {
	src, name, err := readPolicyFile(file, stdin)
	if err != nil {
		return false, err
	}
	out, err := policy.Format(name, src)
	if err != nil {
		return false, err
	}
	differs := !bytes.Equal(src, out)
	switch {
	case check && differs:
		_, err = fmt.Fprintln(c.stdout, name)
	case check:
	case write && file == "-":
		return false, errors.New("-: standard input cannot be written back; leave out --write")
	case write && differs:
		if err = replaceFile(file, out); err == nil {
			_, err = fmt.Fprintln(c.stdout, name)
		}
	case !write:
		_, err = c.stdout.Write(out)
	}
	return differs, err
}

func readPolicyFile(file string, stdin io.Reader) (src []byte, name string, err error) {
	in, name := stdin, "standard input"
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, file, fmt.Errorf("reading policy files: %w", err)
		}
		defer f.Close()
		in, name = f, file
	}
	src, err = io.ReadAll(io.LimitReader(in, policy.MaxFileSize+1)) // what is larger is refused as such
	if err != nil {
		return nil, name, fmt.Errorf("reading policy files: %w", err)
	}
	return src, name, nil
}

// replaceFile moves the new content into place: a control plane that watches the
// folder never sees half of it.
func replaceFile(file string, content []byte) error {
	target, err := filepath.EvalSymlinks(file)
	if err != nil {
		return fmt.Errorf("writing %s: %w", file, err)
	}
	st, err := os.Stat(target)
	if err != nil {
		return fmt.Errorf("writing %s: %w", file, err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(target), ".fmt-*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", file, err)
	}
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Chmod(st.Mode().Perm()), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), target)
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", file, errors.Join(err, os.Remove(tmp.Name())))
	}
	return nil
}
