package main

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// everyVerb calls look with each command of the program, and the words that name it.
func everyVerb(look func(path []string, cmd *cobra.Command)) {
	c := &cli{stdout: io.Discard, stderr: io.Discard, output: "text"}
	var walk func(path []string, cmd *cobra.Command)
	walk = func(path []string, cmd *cobra.Command) {
		look(path, cmd)
		for _, sub := range cmd.Commands() {
			walk(append(slices.Clone(path), sub.Name()), sub)
		}
	}
	walk(nil, c.root())
}

// offered asks for candidates as a shell does.
func offered(t *testing.T, words ...string) []string {
	t.Helper()
	t.Setenv("SALLYPORT_ADMIN_SOCKET", "/nowhere")
	var out, errs bytes.Buffer
	if code := run(t.Context(), append([]string{cobra.ShellCompNoDescRequestCmd}, words...), &out, &errs); code != 0 {
		t.Fatalf("%q: code %d, %s", words, code, errs.String())
	}
	return strings.Fields(out.String())
}

// TestCompletionKnowsEveryVerbAndFlag walks the table of commands. It also holds that
// somebody thought of what arguments and values of flags can be.
func TestCompletionKnowsEveryVerbAndFlag(t *testing.T) {
	verbs, flags := 0, 0
	arguments := new(cli).argumentCompletions()
	everyVerb(func(path []string, cmd *cobra.Command) {
		if cmd.Hidden || cmd.Name() == "help" {
			return
		}
		got := offered(t, append(path, "")...)
		for _, sub := range cmd.Commands() {
			if verbs++; sub.Name() != "help" && !slices.Contains(got, sub.Name()) {
				t.Errorf("%v: %s is not offered", path, sub.Name())
			}
		}
		got = offered(t, append(path, "--")...)
		given := slices.Clone(path) // flags that are required are offered first, and alone
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Annotations[cobra.BashCompOneRequiredFlag] != nil {
				given = append(given, "--"+f.Name, "x")
			}
		})
		got = append(got, offered(t, append(given, "--")...)...)
		look := func(f *pflag.Flag) {
			if flags++; !slices.Contains(got, "--"+f.Name) {
				t.Errorf("%v: --%s is not offered", path, f.Name)
			}
			if _, ok := cmd.GetFlagCompletionFunc(f.Name); !ok && f.NoOptDefVal == "" {
				t.Errorf("%v: nothing says how the value of --%s is completed", path, f.Name)
			}
		}
		cmd.NonInheritedFlags().VisitAll(look)
		cmd.InheritedFlags().VisitAll(look)
		if cmd.HasSubCommands() {
			return
		}
		for _, name := range argumentsOf(cmd) {
			if arguments[name] == nil {
				t.Errorf("%v: nothing says how %s is completed: see argumentCompletions", path, name)
			}
		}
		if names := argumentsOf(cmd); len(names) == 0 && cmd.Args != nil && cmd.Args(cmd, []string{"x"}) == nil {
			t.Errorf("%v takes an argument and does not name it in Use", path)
		}
	})
	if verbs < 30 || flags < 100 {
		t.Errorf("%d verbs, %d flags: the table is not walked", verbs, flags)
	}
}
