// Package completion completes command lines in shells, from the same table of
// verbs and flags that a program reads its command line by. The scripts are cobra's:
// they ask the program itself for candidates, so nothing can be missing in them.
// Programs that use the standard library's flags describe themselves by [Program].
//
// It runs nothing but completion: what verbs do is no business of this package.
package completion

import (
	"bytes"
	_ "embed"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Shells are those that there are scripts for.
var Shells = []string{"bash", "zsh", "fish"}

// bash stands in for the parts of the package bash-completion that the script uses,
// where that package is not loaded.
//
//go:embed fallback.bash
var bash []byte

// Verb gives the verb that prints the script for a shell.
func Verb() *cobra.Command {
	return &cobra.Command{
		Use: "completion SHELL", Short: "Print a script that completes command lines: for bash, zsh or fish",
		Long: `Completion prints a script that completes verbs, flags and their values.

  bash:  source <(PROGRAM completion bash), in ~/.bashrc
  zsh:   PROGRAM completion zsh > "${fpath[1]}/_PROGRAM"
  fish:  PROGRAM completion fish > ~/.config/fish/completions/PROGRAM.fish`,
		Args: cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs), ValidArgs: Shells,
		RunE: func(cmd *cobra.Command, args []string) error { return Script(cmd.OutOrStdout(), cmd.Root(), args[0]) },
	}
}

// Script writes the script of a program for a shell.
func Script(w io.Writer, root *cobra.Command, shell string) error {
	switch shell {
	case "bash":
		if _, err := w.Write(bash); err != nil {
			return err
		}
		return root.GenBashCompletionV2(w, true)
	case "zsh":
		return root.GenZshCompletion(w)
	case "fish":
		return root.GenFishCompletion(w, true)
	}
	return fmt.Errorf("no completion for %q; there are %s", shell, strings.Join(Shells, ", "))
}

// Standard is a verb of a program that uses the standard library's flags.
type Standard struct {
	Name, Short string
	Flags       *flag.FlagSet // nil: none
}

// Program gives the table of such a program, whose flags before any verb may be nil.
// It is good for completion only.
func Program(name string, flags *flag.FlagSet, verbs ...Standard) *cobra.Command {
	root := &cobra.Command{Use: name, Run: func(*cobra.Command, []string) {}, ValidArgsFunction: cobra.NoFileCompletions}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommand(&cobra.Command{Hidden: true})
	if flags != nil {
		root.Flags().AddGoFlagSet(flags)
	}
	for _, v := range verbs {
		cmd := &cobra.Command{Use: v.Name, Short: v.Short, Run: root.Run, ValidArgsFunction: cobra.NoFileCompletions}
		if v.Flags != nil {
			cmd.Flags().AddGoFlagSet(v.Flags)
		}
		root.AddCommand(cmd)
	}
	root.AddCommand(Verb())
	Values(root, nil)
	return root
}

// Values says how the values of flags are completed, for all verbs of a program: by
// the flag's name in byName or, where it is not there, as files or folders if its
// usage calls its value `file`, `path`, `socket` or `folder`, and not at all
// otherwise.
func Values(cmd *cobra.Command, byName map[string]cobra.CompletionFunc) {
	each := func(f *pflag.Flag) {
		if _, done := cmd.GetFlagCompletionFunc(f.Name); done || f.NoOptDefVal != "" {
			return
		}
		complete, ok := byName[f.Name]
		if value, _ := pflag.UnquoteUsage(f); !ok {
			complete = byValue(value)
		}
		if err := cmd.RegisterFlagCompletionFunc(f.Name, complete); err != nil {
			panic(err) // the flag is there, and has no other
		}
	}
	cmd.LocalNonPersistentFlags().VisitAll(each)
	cmd.PersistentFlags().VisitAll(each)
	for _, c := range cmd.Commands() {
		Values(c, byName)
	}
}

func byValue(value string) cobra.CompletionFunc {
	switch value {
	case "file", "path", "socket":
		return Files
	case "folder":
		return Folders
	}
	return cobra.NoFileCompletions
}

// Files completes names of files.
func Files(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// Folders completes names of folders.
func Folders(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

// Asked reports whether a command line is for [Answer].
func Asked(args []string) bool {
	return len(args) > 0 && slices.Contains([]string{"completion", cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}, args[0])
}

// Answer prints a script of a [Program], or the candidates that a script asks for.
// Flags with one dash get candidates with one dash.
func Answer(program *cobra.Command, args []string, stdout, stderr io.Writer) error {
	var out bytes.Buffer
	asked := args
	last := args[len(args)-1]
	single := args[0] != "completion" && len(last) > 1 && last[0] == '-' && last[1] != '-'
	if single {
		asked = append(slices.Clone(args[:len(args)-1]), "-"+last)
	}
	program.SilenceErrors, program.SilenceUsage = true, true
	program.SetArgs(asked)
	program.SetOut(&out)
	program.SetErr(stderr)
	if err := program.Execute(); err != nil {
		return err
	}
	for line := range strings.Lines(out.String()) {
		if single {
			line = strings.TrimPrefix(line, "-")
		}
		if _, err := io.WriteString(stdout, line); err != nil {
			return err
		}
	}
	return nil
}
