package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"unicode"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

// errReported ends a verb whose output has already said what is wrong.
var errReported = errors.New("reported")

// maxMessage bounds what the admin API sends and takes, in bytes: a full set
// of files and some room.
const maxMessage = 64 << 20

// cli holds what every verb shares.
type cli struct {
	stdout, stderr io.Writer
	socket, output string
}

// socketPath finds the admin socket: flag, environment, then the usual places.
func (c *cli) socketPath() (string, error) {
	if c.socket != "" {
		return c.socket, nil
	}
	if p := os.Getenv("SALLYPORT_ADMIN_SOCKET"); p != "" {
		return p, nil
	}
	usual := []string{filepath.Join(".sallyport", "admin.sock"), "/var/lib/sallyport/admin.sock"}
	for _, p := range usual {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("no control plane found: neither %s nor %s exists; name its socket with --socket or $SALLYPORT_ADMIN_SOCKET", usual[0], usual[1])
}

// admin calls fn with a client of the admin API.
func (c *cli) admin(ctx context.Context, fn func(context.Context, sallyportv1.AdminClient) error) error {
	path, err := c.socketPath()
	if err != nil {
		return err
	}
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("no socket at %s: is the control plane running?", path)
	}
	conn, err := grpc.NewClient("unix:"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a 0600 unix socket; the kernel names both ends
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		return fmt.Errorf("dialing %s: %w", path, err)
	}
	defer conn.Close()
	err = fn(ctx, sallyportv1.NewAdminClient(conn))
	if s, ok := status.FromError(err); ok && s.Code() == codes.Unavailable {
		return fmt.Errorf("the control plane at %s does not answer: %s", path, s.Message())
	}
	return err
}

// print writes m as JSON if that was asked for, else calls text.
func (c *cli) print(m proto.Message, text func(w io.Writer)) error {
	switch c.output {
	case "json":
		data, err := protojson.MarshalOptions{Multiline: true, EmitUnpopulated: true, UseProtoNames: true}.Marshal(m)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.stdout, string(data))
		return err
	case "text":
		w := tabwriter.NewWriter(printable{c.stdout}, 0, 8, 2, ' ', 0)
		text(w)
		return w.Flush()
	default:
		return fmt.Errorf("--output %s: want text or json", c.output)
	}
}

// printable keeps from a terminal what it would obey: some of what is shown comes
// from sidecars and files.
type printable struct{ w io.Writer }

// Write implements io.Writer.
func (p printable) Write(b []byte) (int, error) {
	clean := bytes.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return '\uFFFD'
	}, b)
	if _, err := p.w.Write(clean); err != nil {
		return 0, err
	}
	return len(b), nil
}

// args wants exactly these arguments, and names them when they are not there.
func args(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, got []string) error {
		if len(got) != len(names) {
			return fmt.Errorf("usage: %s %s", cmd.CommandPath(), strings.Join(names, " "))
		}
		return nil
	}
}

// group is a verb that only has verbs below it.
func group(use, short string) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short}
	cmd.RunE = func(_ *cobra.Command, got []string) error {
		var verbs []string
		for _, c := range cmd.Commands() {
			verbs = append(verbs, c.Name())
		}
		return fmt.Errorf("usage: %s VERB, where VERB is one of: %s", cmd.CommandPath(), strings.Join(verbs, ", "))
	}
	return cmd
}

func count(n int, what string) string { return countOf(n, what, what+"s") }

func countOf(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
