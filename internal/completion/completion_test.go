package completion

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"
)

// TestMain makes the test binary the program whose command lines bash completes.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) != "demo" {
		os.Exit(m.Run())
	}
	if err := Answer(demo(), os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}

// demo has the shapes of our daemons: flags before any verb, and verbs with flags.
func demo() *cobra.Command {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.String("config", "", "configuration `file`")
	flags.String("data-dir", "", "`folder` for state")
	flags.String("level", "", "how much to tell")
	flags.Bool("dev", false, "without configuration")
	run := flag.NewFlagSet("run", flag.ContinueOnError)
	run.String("config", "", "configuration `file`")
	return Program("demo", flags, Standard{Name: "run", Short: "Run it", Flags: run}, Standard{Name: "version", Short: "Print the version"})
}

// TestBash has real bash complete the end of each line.
func TestBash(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no bash")
	}
	self, err := os.Executable()
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, os.Symlink(self, filepath.Join(dir, "demo")))
	work := filepath.Join(dir, "work")
	require.NoError(t, os.MkdirAll(filepath.Join(work, "folder"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(work, "file.yaml"), nil, 0o600))
	for _, c := range []struct{ line, want string }{
		{"demo ", "completion run version"},
		{"demo ve", "version"},
		{"demo run --", "--config --help"},
		{"demo -c", "-config"},
		{"demo --d", "--data-dir --dev"},
		{"demo --data-dir ", "folder"},
		{"demo --data-dir=", "folder"},
		{"demo --level ", ""},
		{"demo completion ", "bash fish zsh"},
	} {
		script := `source <(demo completion bash)
complete -p demo >/dev/null || exit 3
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9 COMPREPLY=() COMP_WORDS=(${1/=/ = })
[[ $1 == *' ' ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
__start_demo 2>/dev/null
printf '%s\n' "${COMPREPLY[@]%%  *}"`
		cmd := exec.CommandContext(t.Context(), bash, "--norc", "-c", script, "bash", c.line)
		cmd.Dir = work
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0")
		out, err := cmd.Output()
		require.NoError(t, err, c.line)
		got := strings.Fields(string(out))
		slices.Sort(got)
		if strings.Join(got, " ") != c.want {
			t.Errorf("%q: got %q, want %q", c.line, got, c.want)
		}
	}
}

func TestScripts(t *testing.T) {
	for shell, want := range map[string]string{"bash": "_filedir", "zsh": "#compdef demo", "fish": "complete -c demo"} {
		var out bytes.Buffer
		if err := Script(&out, demo(), shell); err != nil || !strings.Contains(out.String(), want) || !strings.Contains(out.String(), "__complete") {
			t.Errorf("%s: %v\n%s", shell, err, &out)
		}
	}
	if err := Script(new(bytes.Buffer), demo(), "tcsh"); err == nil || !strings.Contains(err.Error(), "tcsh") {
		t.Errorf("tcsh: %v", err)
	}
	for _, args := range [][]string{nil, {"run"}, {"-config", "completion"}} {
		if Asked(args) {
			t.Errorf("%q is not for completion", args)
		}
	}
}
