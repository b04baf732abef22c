// Package external stands where the own CA stands, in a mesh whose SVIDs another
// SPIFFE issuer signs, such as SPIRE: it obtains the control plane's own SVID and
// the trust domain's bundle, and keeps both up to date.
//
// It signs nothing and names nobody: whose SVID that issuer signs is authorised
// here, by its ID.
package external

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sync/errgroup"

	"github.com/sallyport-mesh/sallyport/internal/federation"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Config says where SVID and bundle come from.
type Config struct {
	ID spiffeid.ID // the control plane's, as the issuer names it

	// The bundle: BundleFile, or Endpoint with a URL.
	BundleFile string
	Endpoint   federation.Config // WebRoots, MinRefresh and MaxRefresh only
	Peer       federation.Peer

	// The SVID: WorkloadAPI, as SPIFFE_ENDPOINT_SOCKET would name it, or PEM files.
	WorkloadAPI       string
	CertFile, KeyFile string

	Store store.Store
	Poll  time.Duration // between two looks at files; zero: 5 s
	Now   func() time.Time
	Log   hclog.Logger
}

const poll = 5 * time.Second

// prefix of what is stored: apart from the bundles of foreign trust domains.
const prefix = "external-issuer/"

// Issuer is the outside issuer as the control plane sees it.
type Issuer struct {
	cfg     Config
	td      spiffeid.TrustDomain
	log     hclog.Logger
	live    identity.Live
	manager *federation.Manager // nil with BundleFile

	mu       sync.Mutex
	bundle   *spiffebundle.Bundle // guarded by mu; nil before the first
	next     chan struct{}        // guarded by mu; closed when bundle is replaced
	notAfter time.Time            // guarded by mu; of the SVID in use
	life     time.Duration        // guarded by mu; of the SVID in use
	problems map[string]string    // guarded by mu :: "svid", "bundle" → why there is no newer one
}

// Open reads the files that are configured, so that what is wrong with them shows
// at once. It contacts nobody.
func Open(cfg Config) (*Issuer, error) {
	if cfg.Poll == 0 {
		cfg.Poll = poll
	}
	i := &Issuer{cfg: cfg, td: cfg.ID.TrustDomain(), log: cfg.Log.Named("external-issuer"), next: make(chan struct{}), problems: map[string]string{}}
	if cfg.BundleFile != "" {
		if err := i.readBundle(); err != nil {
			return nil, err
		}
	} else {
		i.openEndpoint()
	}
	if cfg.CertFile != "" {
		if err := i.readSVID(); err != nil {
			return nil, err
		}
	}
	return i, nil
}

// openEndpoint fetches the own bundle as a foreign one is fetched.
func (i *Issuer) openEndpoint() {
	c := i.cfg.Endpoint
	c.Store, c.Prefix, c.Now, c.Log = i.cfg.Store, prefix, i.cfg.Now, i.log
	c.Publish = func(all identity.Bundles) {
		if b := all[i.td]; b != nil && len(b.X509Authorities()) > 0 { // without any it would end the mesh
			i.setBundle(b)
		}
	}
	i.manager = federation.NewManager(c)
	i.manager.SetPeers([]federation.Peer{i.cfg.Peer})
}

// Run keeps SVID and bundle up to date until ctx ends.
func (i *Issuer) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	if i.manager != nil {
		g.Go(func() error { return i.manager.Run(ctx) })
	} else {
		g.Go(func() error { return i.watchFiles(ctx, "bundle", i.readBundle, i.cfg.BundleFile) })
	}
	if i.cfg.WorkloadAPI != "" {
		g.Go(func() error { return i.watchAPI(ctx) })
	} else {
		g.Go(func() error { return i.watchFiles(ctx, "svid", i.readSVID, i.cfg.CertFile, i.cfg.KeyFile) })
	}
	return g.Wait()
}

// TrustDomain is the one whose SVIDs the issuer signs.
func (i *Issuer) TrustDomain() spiffeid.TrustDomain { return i.td }

// ServerSVID is the control plane's own identity; before the first SVID it fails
// with [identity.ErrNoIdentity]. It trusts the own trust domain only.
func (i *Issuer) ServerSVID() identity.Source { return &i.live }

// Bundle is what to trust of the trust domain; nil before the first. The caller
// must not change it.
func (i *Issuer) Bundle() *spiffebundle.Bundle {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.bundle
}

// WatchBundle calls fn with the bundle, once there is one, and then with each new
// one, until ctx ends or fn fails.
func (i *Issuer) WatchBundle(ctx context.Context, fn func(*spiffebundle.Bundle) error) error {
	for {
		i.mu.Lock()
		b, next := i.bundle, i.next
		i.mu.Unlock()
		if b != nil {
			if err := fn(b); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-next:
		}
	}
}

// setBundle puts b in force.
func (i *Issuer) setBundle(b *spiffebundle.Bundle) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.bundle.Equal(b) {
		return
	}
	i.bundle = b
	i.live.SetBundles(identity.Bundles{i.td: b})
	close(i.next)
	i.next = make(chan struct{})
}

// setSVID puts svid in use, if it is the control plane's.
func (i *Issuer) setSVID(svid *x509svid.SVID) error {
	if svid.ID != i.cfg.ID {
		return fmt.Errorf("the SVID is of %s, and externalIssuer.id wants %s: register the control plane under that ID, or name the other one", svid.ID, i.cfg.ID)
	}
	leaf := svid.Certificates[0]
	if !i.cfg.Now().Before(leaf.NotAfter) {
		return fmt.Errorf("the SVID has ended at %s", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	i.live.SetSVID(svid)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.notAfter, i.life = leaf.NotAfter, leaf.NotAfter.Sub(leaf.NotBefore)
	return nil
}

// note keeps why something is not up to date; nil: it is.
func (i *Issuer) note(what string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	i.mu.Lock()
	was := i.problems[what]
	i.problems[what] = text
	i.mu.Unlock()
	if text != was && text != "" {
		i.log.Warn("keeping the last good state", "of", what, "error", text)
	}
}

// Problem says what is wrong, and whether the control plane can be talked to at
// all; "" if nothing.
func (i *Issuer) Problem() (text string, down bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	var all []string
	for _, what := range []string{"svid", "bundle"} {
		if p := i.problems[what]; p != "" {
			all = append(all, what+": "+p)
		}
	}
	if i.manager != nil {
		for _, s := range i.manager.Status() {
			if s.Problem != "" {
				all = append(all, "bundle: "+s.Problem)
			}
		}
	}
	left := i.notAfter.Sub(i.cfg.Now())
	switch {
	case i.notAfter.IsZero():
		all = append(all, "no SVID yet")
	case left <= 0:
		all = append(all, "the control plane's SVID has ended")
	case left < i.life/6:
		all = append(all, "the control plane's SVID ends soon and was not renewed")
	}
	if i.bundle == nil {
		all = append(all, "no bundle yet")
	}
	return strings.Join(all, "; "), left <= 0 || i.bundle == nil
}

var errNoAuthority = errors.New("it holds no X.509 authority, so nobody could be believed")
