//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	xdscreds "google.golang.org/grpc/credentials/xds"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	rpcstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/xds"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// Stock gRPC applications: this binary plays them, as GRPC_XDS_BOOTSTRAP is of a
// whole process. Nothing in them is of this project.
const (
	grpcServerEnv = "SALLYPORT_E2E_GRPC_SERVER" // address to listen on
	grpcClientEnv = "SALLYPORT_E2E_GRPC_CLIENT" // target to dial
)

// grpcMain plays an application, if the environment says so.
func grpcMain() (played bool) {
	var err error
	switch {
	case os.Getenv(grpcServerEnv) != "":
		err = grpcServer(os.Getenv(grpcServerEnv))
	case os.Getenv(grpcClientEnv) != "":
		err = grpcClient(os.Getenv(grpcClientEnv), os.Stdin, os.Stdout)
	default:
		return false
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return true
}

// refuseAll is for where the control plane gives no security: nothing passes then.
func refuseAll() credentials.TransportCredentials {
	return credentials.NewTLS(&tls.Config{RootCAs: x509.NewCertPool()})
}

func grpcServer(addr string) error {
	creds, err := xdscreds.NewServerCredentials(xdscreds.ServerOptions{FallbackCreds: refuseAll()})
	if err != nil {
		return err
	}
	srv, err := xds.NewGRPCServer(grpc.Creds(creds), xds.ServingModeCallback(func(_ net.Addr, args xds.ServingModeChangeArgs) {
		fmt.Println("serving mode", args.Mode, args.Err)
	}))
	if err != nil {
		return err
	}
	healthv1.RegisterHealthServer(srv, health.NewServer())
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	return srv.Serve(ln)
}

// grpcClient calls the method that each line of in names, all on one channel, and
// answers with a line: the status.
func grpcClient(target string, in io.Reader, out io.Writer) error {
	creds := insecure.NewCredentials() // through a sidecar
	if strings.HasPrefix(target, "xds:") {
		var err error
		if creds, err = xdscreds.NewClientCredentials(xdscreds.ClientOptions{FallbackCreds: refuseAll()}); err != nil {
			return err
		}
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		return err
	}
	defer conn.Close()
	for lines := bufio.NewScanner(in); lines.Scan(); {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		err := conn.Invoke(ctx, lines.Text(), &healthv1.HealthCheckRequest{}, &healthv1.HealthCheckResponse{})
		cancel()
		s := rpcstatus.Convert(err)
		fmt.Fprintf(out, "%s: %s\n", s.Code(), strings.ReplaceAll(s.Message(), "\n", " "))
	}
	return nil
}

// caller is a running client.
type caller struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Scanner
}

// newCaller starts a client. bootstrap is its file; "" for a target that needs none.
func newCaller(t *testing.T, name, bootstrap, target string) *caller {
	t.Helper()
	cmd := exec.Command(self(t))
	cmd.Env = append(os.Environ(), grpcClientEnv+"="+target, "GRPC_XDS_BOOTSTRAP="+bootstrap)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	r, w, err := os.Pipe()
	require.NoError(t, err)
	t.Cleanup(func() { _, _ = w.Close(), r.Close() })
	cmd.Args = append(cmd.Args, name)
	cmd.Stdout, cmd.Stderr = w, os.Stderr
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = in.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return &caller{t, in, bufio.NewScanner(r)}
}

const (
	check = "/grpc.health.v1.Health/Check"
	list  = "/grpc.health.v1.Health/List"
)

// call gives the status of one call.
func (c *caller) call(method string) string {
	c.t.Helper()
	_, err := fmt.Fprintln(c.in, method)
	require.NoError(c.t, err)
	if !c.out.Scan() {
		c.t.Fatalf("the client ended: %v", c.out.Err())
	}
	return c.out.Text()
}

// until calls a method until the status begins with want.
func (c *caller) until(method, want string) {
	c.t.Helper()
	realmesh.Eventually(c.t, method+" to end with "+want, func() error {
		if got := c.call(method); !strings.HasPrefix(got, want) {
			return errors.New(got)
		}
		return nil
	})
}

// want calls a method once.
func (c *caller) want(method, want string) {
	c.t.Helper()
	if got := c.call(method); !strings.HasPrefix(got, want) {
		c.t.Errorf("%s: %s, want %s", method, got, want)
	}
}

// startServer starts a server and waits for nothing.
func startServer(t *testing.T, name, bootstrap, addr string) *realmesh.Proc {
	t.Helper()
	cmd := exec.Command(self(t))
	cmd.Env = append(os.Environ(), grpcServerEnv+"="+addr, "GRPC_XDS_BOOTSTRAP="+bootstrap)
	return realmesh.Start(t, name, cmd)
}
