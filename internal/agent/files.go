package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/agent/endpoint"
	"github.com/sallyport-mesh/sallyport/internal/agent/pemfile"
)

// Files keeps one identity of a wallet in files.
type Files struct {
	wallet   *Wallet
	writer   *pemfile.Writer
	evidence Evidence
	uid      uint32

	mu      sync.Mutex
	trouble error // guarded by mu; nil: the files are as they should be
}

// NewFiles has the identity of evidence (nil: the sidecar's own app) written by
// pw. The uid is only whose share of the wallet it counts to.
func NewFiles(w *Wallet, pw *pemfile.Writer, evidence Evidence, uid uint32) *Files {
	return &Files{wallet: w, writer: pw, evidence: evidence, uid: uid, trouble: errors.New("not written yet")}
}

// Dir is the folder.
func (f *Files) Dir() string { return f.writer.Dir() }

// Close gives back the folder of files that were never kept; what is in it stays.
func (f *Files) Close() error { return f.writer.Close() }

// Trouble says why the files are not those of a present identity, or why their
// program was not told; nil when all is well.
func (f *Files) Trouble() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.trouble
}

func (f *Files) note(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil && !errors.Is(err, endpoint.ErrStarting) && (f.trouble == nil || f.trouble.Error() != err.Error()) {
		f.wallet.log.Warn("files are not up to date; trying again", "dir", f.Dir(), "error", err)
	}
	f.trouble = err
}

// Run writes each new version until ctx ends. What is on the disk stays there.
func (f *Files) Run(ctx context.Context) error {
	for failures := 1; ; failures++ {
		err := f.follow(ctx, &failures)
		if ctx.Err() != nil {
			return f.writer.Close()
		}
		if errors.Is(err, endpoint.ErrStarting) {
			failures = 1 // no news, and soon over
		}
		f.note(err)
		sleep(ctx, pauseAfter(failures, 0))
	}
}

// follow writes until something goes wrong.
func (f *Files) follow(ctx context.Context, failures *int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l, err := f.wallet.take(ctx, f.evidence, f.uid)
	if err != nil {
		return err
	}
	if err := l.usable(); err != nil {
		return err
	}
	for {
		h, news, err := l.feed.Get()
		if err != nil {
			return err
		}
		if h != nil {
			if err := f.writer.Write(h.SVIDs[0], h.Bundles); err != nil {
				return err
			}
			if err := f.writer.Notify(ctx); err != nil {
				return fmt.Errorf("onChange: %w", err)
			}
			f.note(nil)
			*failures = 1 // the next one is the first
		}
		select {
		case <-news:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Late reports the identities that health should warn of, before anything
// expires: one line for each that half of its life has passed for, or that is
// gone. Processes that the control plane knows no workload for are no trouble of
// this machine's.
func (w *Wallet) Late(now time.Time) []string {
	var out []string
	for _, i := range w.Identities() {
		switch {
		case i.NotAfter.IsZero() && (i.Denied || i.Detail == ""):
		case i.NotAfter.IsZero():
			out = append(out, fmt.Sprintf("no SVID for an app of user %d: %s", i.UID, i.Detail))
		case !now.Before(i.NotAfter):
			out = append(out, fmt.Sprintf("the SVID of %s expired at %s: %s", i.ID, i.NotAfter.UTC().Format(time.RFC3339), i.Detail))
		case i.Late:
			out = append(out, fmt.Sprintf("the SVID of %s ends at %s and is not renewed: %s", i.ID, i.NotAfter.UTC().Format(time.RFC3339), i.Detail))
		}
	}
	return out
}

// Outage is how long the identity that ends first would survive an outage that
// began now, and how many there are; negative when it has expired.
func (w *Wallet) Outage(now time.Time) (least time.Duration, count int) {
	for _, i := range w.Identities() {
		if i.NotAfter.IsZero() {
			continue
		}
		if left := i.NotAfter.Sub(now); count == 0 || left < least {
			least = left
		}
		count++
	}
	return least, count
}
