package external

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// readBundle reads BundleFile.
func (i *Issuer) readBundle() error {
	data, err := os.ReadFile(i.cfg.BundleFile)
	if err != nil {
		return err
	}
	b, err := identity.ParseBundle(i.td, data)
	if err != nil {
		return fmt.Errorf("%s: %w", i.cfg.BundleFile, err)
	}
	if len(b.X509Authorities()) == 0 {
		return fmt.Errorf("%s: %w", i.cfg.BundleFile, errNoAuthority)
	}
	i.setBundle(b)
	return nil
}

// readSVID reads CertFile and KeyFile.
func (i *Issuer) readSVID() error {
	svid, err := x509svid.Load(i.cfg.CertFile, i.cfg.KeyFile)
	if err != nil {
		return fmt.Errorf("%s and %s: %w", i.cfg.CertFile, i.cfg.KeyFile, err)
	}
	return i.setSVID(svid)
}

// watchFiles reads again what has changed, and what could not be read.
func (i *Issuer) watchFiles(ctx context.Context, what string, read func() error, paths ...string) error {
	tick := time.NewTicker(i.cfg.Poll)
	defer tick.Stop()
	var seen []os.FileInfo // of the last good reading
	for {
		now := states(paths)
		if !sameFiles(seen, now) {
			err := read()
			if seen = nil; err == nil {
				seen = now
			}
			i.note(what, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// states is nil where a file cannot be looked at.
func states(paths []string) []os.FileInfo {
	var out []os.FileInfo
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			return nil
		}
		out = append(out, st)
	}
	return out
}

func sameFiles(a, b []os.FileInfo) bool {
	if len(a) != len(b) || len(a) == 0 {
		return false
	}
	for n := range a {
		if !os.SameFile(a[n], b[n]) || !a[n].ModTime().Equal(b[n].ModTime()) || a[n].Size() != b[n].Size() {
			return false
		}
	}
	return true
}

// watchAPI follows the Workload API. The client reconnects by itself, but takes
// some answers for final, such as Canceled from an agent that ends: not we.
func (i *Issuer) watchAPI(ctx context.Context) error {
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(i.cfg.WorkloadAPI))
	if err != nil {
		return fmt.Errorf("externalIssuer.workloadAPI %s: %w", i.cfg.WorkloadAPI, err)
	}
	defer client.Close()
	for {
		err := client.WatchX509Context(ctx, watcher{i})
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(i.cfg.Poll):
			i.note("svid", fmt.Errorf("%s: %w", i.cfg.WorkloadAPI, err))
		}
	}
}

type watcher struct{ i *Issuer }

// OnX509ContextUpdate takes the control plane's SVID out of what is offered. The
// bundles are not looked at: what to trust is configured.
func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	var err error
	for _, svid := range c.SVIDs {
		if err = w.i.setSVID(svid); err == nil {
			break
		}
	}
	w.i.note("svid", err)
}

// OnX509ContextWatchError notes that the API cannot be reached, or has no SVID.
func (w watcher) OnX509ContextWatchError(err error) {
	w.i.note("svid", fmt.Errorf("%s: %w", w.i.cfg.WorkloadAPI, err))
}
