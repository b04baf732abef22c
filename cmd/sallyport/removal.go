package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// printRemoval prints a patch without the allows that no record matches. Without a
// single record that counts it would take everything away.
func (c *cli) printRemoval(dir string, sets []*policy.Set, impact policy.Impact) error {
	seen := impact.Same
	for _, list := range [][]policy.Change{impact.Refused, impact.Allowed, impact.Unknown} {
		seen += len(list)
	}
	switch {
	case seen == 0:
		return errors.New("--patch: there is no record that counts, so every allow would be removed; see --flows and --last")
	case len(impact.Unused) == 0 && c.output == "json":
		return c.printJSON(map[string]string{"patch": ""})
	case len(impact.Unused) == 0:
		_, err := fmt.Fprintln(c.stderr, "every allow matches a record")
		return err
	}
	prefix, here, err := patchPrefix(dir)
	if err != nil {
		return err
	}
	data, err := policy.RemovalPatch(sets, impact.Unused, prefix)
	if err != nil {
		return err
	}
	if c.output == "json" {
		return c.printJSON(map[string]string{"patch": string(data)})
	}
	if !here {
		fmt.Fprintf(c.stderr, "apply it in %s\n", dir)
	}
	_, err = c.stdout.Write(data)
	return err
}

// patchPrefix gives what stands before the names of files in a patch: a folder below
// this one by its path; another one, where the patch has to be applied, by nothing.
func patchPrefix(dir string) (prefix string, here bool, err error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", false, err
	}
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(wd, dir)
	}
	rel, err := filepath.Rel(wd, dir)
	switch {
	case err != nil || !filepath.IsLocal(rel):
		return "", false, nil
	case rel == ".":
		return "", true, nil
	}
	return filepath.ToSlash(rel) + "/", true, nil
}
