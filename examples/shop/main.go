// Command shop is the example application of Sallyport: four services that
// serve one checkout, and an intruder that no policy names. It knows nothing of
// the mesh: it listens where LISTEN_<PORT> says and calls what
// UPSTREAM_<NAME>_<PORT> says, and `sallyport up` sets both.
//
//	frontend → orders → payments → ledger
//	intruder → payments, ledger (refused)
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Getenv, os.Stderr)
	stop()
	os.Exit(code)
}

// shop is one service: where its settings come from and where it reports.
type shop struct {
	env  func(string) string
	log  *log.Logger
	now  func() time.Time
	tick time.Duration // between two lines of a stream
}

// run runs one service until ctx is done and gives the exit code.
func run(ctx context.Context, args []string, env func(string) string, stderr io.Writer) int {
	s := &shop{env: env, log: log.New(stderr, "", 0), now: time.Now, tick: time.Second}
	services := map[string]func(context.Context) error{
		"frontend": s.frontend,
		"orders":   s.orders,
		"payments": s.payments,
		"ledger":   s.ledger,
		"intruder": s.intruder,
	}
	if len(args) != 1 || services[args[0]] == nil {
		s.log.Print("usage: shop frontend|orders|payments|ledger|intruder")
		return 2
	}
	if err := services[args[0]](ctx); err != nil {
		s.log.Print(err)
		return 1
	}
	return 0
}

// setting gives the value of an environment variable that must be there.
func (s *shop) setting(name string) (string, error) {
	v := s.env(name)
	if v == "" {
		return "", fmt.Errorf("%s is not set; `sallyport up` sets it from mesh.yaml", name)
	}
	return v, nil
}
