// Command sallyport-proxy is the sidecar, one beside each app with the app's
// identity, and the agent of a host. It is wiring only: packages sidecar and host
// are the programs.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/sallyport-mesh/sallyport/internal/completion"
)

// version is stamped by the build.
var version = "dev"

const usage = `usage: sallyport-proxy run [--config proxy.yaml]
       sallyport-proxy agent [--config agent.yaml]
       sallyport-proxy completion bash|zsh|fish
       sallyport-proxy version
       sallyport-proxy help

run serves one app, agent every process of a host that a workload names, until
SIGTERM or SIGINT; a second signal ends it at once. docs/sidecar.md and
docs/agent.md describe the configuration files.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the second signal is not ours to catch
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run returns the exit code: 0 after a clean stop, 1 when it could not
// go on, 2 for a wrong command line or configuration.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	if completion.Asked(args) {
		if err := completion.Answer(commands(), args, stdout, stderr); err != nil {
			return complain(stderr, 2, err)
		}
		return 0
	}
	switch verb := args[0]; verb {
	case "run":
		return serve(ctx, verb, "proxy.yaml", args[1:], stderr, openSidecar)
	case "agent":
		return serve(ctx, verb, "agent.yaml", args[1:], stderr, openAgent)
	case "version", "-version", "--version":
		fmt.Fprintln(stdout, "sallyport-proxy", version)
		return 0
	case "help", "-h", "-help", "--help":
		fmt.Fprint(stdout, usage)
		return 0
	case "exec", "redirect", "wait":
		return complain(stderr, 2, fmt.Errorf("%s is not part of this version; there are run and agent", verb))
	default:
		return complain(stderr, 2, fmt.Errorf("unknown command %q; try: sallyport-proxy help", verb))
	}
}

// complain says what is wrong and gives the exit code.
func complain(w io.Writer, code int, err error) int {
	fmt.Fprintf(w, "sallyport-proxy: %s\n", strings.ReplaceAll(err.Error(), "\n", "\n  "))
	return code
}
