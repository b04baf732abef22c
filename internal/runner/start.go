package runner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/agent"
)

const (
	pollEvery = 20 * time.Millisecond // between two looks at a condition
	tryFor    = time.Second           // one look at a condition
	tokenTTL  = time.Minute           // a sidecar redeems its token as it starts
)

// start brings the mesh up in the order of mesh.yaml: a process is started when
// the one before it is ready.
func (p *plan) start(ctx context.Context, g *group) error {
	control, err := g.start(p.control)
	if err != nil {
		return err
	}
	if err := p.await(ctx, control, readyz(p.mesh.control.metrics)); err != nil {
		return err
	}
	g.console.note("controlplane is ready (pid %d): grpc %s", control.pid, p.mesh.control.listen)
	conn, err := grpc.NewClient("unix://"+p.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("connecting to %s: %w", p.socket, err)
	}
	defer conn.Close()
	admin := sallyportv1.NewAdminClient(conn)
	for _, w := range p.pairs {
		if err := p.provideToken(ctx, control, w, admin); err != nil {
			return err
		}
		if err := p.startPair(ctx, g, w); err != nil {
			return err
		}
	}
	return nil
}

// startPair starts a sidecar and, behind it, its app.
func (p *plan) startPair(ctx context.Context, g *group, w pair) error {
	sidecar, err := g.start(w.sidecar)
	if err != nil {
		return err
	}
	if err := p.await(ctx, sidecar, readyz(w.admin)); err != nil {
		return err
	}
	g.console.note("%s is ready (pid %d): tunnel %s", sidecar.name, sidecar.pid, w.tunnel)
	app, err := g.start(w.app)
	if err != nil {
		return err
	}
	for _, ports := range []map[string]address{w.serve, w.local} {
		for _, a := range ports {
			if err := p.await(ctx, app, listens(a)); err != nil {
				return err
			}
		}
	}
	g.console.note("%s is ready (pid %d): %s", app.name, app.pid, w.ports())
	return nil
}

// await looks at a condition until it holds, the process ends or the start
// timeout is over.
func (p *plan) await(ctx context.Context, proc *process, holds func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.StartTimeout)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := holds(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-proc.done:
			return fmt.Errorf("waiting for %s: it ended before it was ready: %s; its last lines say why", proc.name, proc.status())
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: not ready after %s: %w", proc.name, p.cfg.StartTimeout, err)
		case <-tick.C:
		}
	}
}

// readyz holds when GET /readyz answers 200.
func readyz(a address) func(context.Context) error {
	client := &http.Client{Timeout: tryFor, Transport: &http.Transport{DisableKeepAlives: true}}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.String()+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return nil
		}
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 512)) // only to say more
		return fmt.Errorf("%s answers %s: %s", req.URL, resp.Status, strings.TrimSpace(string(body)))
	}
}

// listens holds when something accepts connections.
func listens(a address) func(context.Context) error {
	d := &net.Dialer{Timeout: tryFor}
	return func(ctx context.Context) error {
		conn, err := d.DialContext(ctx, "tcp", a.String())
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

// provideToken gives a sidecar that never enrolled a join token. One that did
// comes back with its enrolment key and needs none.
func (p *plan) provideToken(ctx context.Context, control *process, w pair, admin sallyportv1.AdminClient) error {
	enrolled, err := agent.Enrolled(filepath.Join(w.dir, "state"))
	if err != nil {
		return fmt.Errorf("starting %s: %w", w.sidecar.name, err)
	}
	if enrolled {
		return nil
	}
	var token string
	// The policy files name the workload, so a control plane that does not know
	// it has not read them yet.
	err = p.await(ctx, control, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, tryFor)
		defer cancel()
		resp, err := admin.CreateToken(ctx, &sallyportv1.CreateTokenRequest{Workload: w.name.value, Ttl: durationpb.New(tokenTTL)})
		if err != nil {
			return errors.New(status.Convert(err).Message())
		}
		token = resp.GetToken()
		return nil
	})
	if err != nil {
		return fmt.Errorf("making a join token for %s: %w", w.name.value, err)
	}
	return writePrivate(filepath.Join(w.dir, "token"), []byte(token+"\n"))
}
