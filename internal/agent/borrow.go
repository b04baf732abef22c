package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	instanceFile = "instance"
	instanceSize = 16 // bytes
)

// BorrowConfig configures a [Borrowed].
type BorrowConfig struct {
	ControlPlane string // gRPC address, host:port
	// WorkloadAPI is the socket as SPIFFE_ENDPOINT_SOCKET would name it:
	// unix:///path (SPIFFE Workload Endpoint 4).
	WorkloadAPI string
	// ControlPlaneID is whom to expect at ControlPlane; zero: the control plane of
	// the SVID's own trust domain.
	ControlPlaneID spiffeid.ID
	// StateDir keeps this instance's name, for SVIDs that bring none. It is made if
	// missing.
	StateDir string
	// Check is as in [Config].
	Check func(identity.Peer) error

	Now func() time.Time // nil: time.Now
	Log hclog.Logger     // nil: discard
	// Trusting is called before the first SVID is in force, with its bundles in
	// force already: what can be verified only now is. Nil: nothing is.
	Trusting func()
}

// Borrowed is an identity that somebody else keeps: it takes SVIDs and bundles
// from a Workload API socket, of our agent or of another issuer's. It enrols with
// nobody. Its methods are safe for concurrent use.
type Borrowed struct {
	cfg   BorrowConfig
	log   hclog.Logger
	name  string // of this instance, if the SVID brings none
	live  identity.Live
	ready chan struct{} // closed with the first SVID

	mu       sync.Mutex
	id       spiffeid.ID   // guarded by mu; of the first SVID, and all that follow
	instance string        // guarded by mu; "" before the first SVID
	life     time.Duration // guarded by mu; of the SVID
	status   Status        // guarded by mu
}

// CheckWorkloadAPI says what is wrong with the address of a socket: it must be an
// absolute path behind unix://, without authority (SPIFFE Workload Endpoint 4). TCP
// is refused: nobody can tell who answers there.
func CheckWorkloadAPI(addr string) error {
	if err := workloadapi.ValidateAddress(addr); err != nil {
		return fmt.Errorf("%q: want unix:///path/to/the.sock", addr)
	}
	if u, err := url.Parse(addr); err != nil || u.Scheme != "unix" || u.Host != "" || !filepath.IsAbs(u.Path) {
		return fmt.Errorf("%q: want unix:///path/to/the.sock", addr)
	}
	return nil
}

// Borrow prepares an identity from a Workload API. It contacts nobody.
func Borrow(cfg BorrowConfig) (*Borrowed, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if _, _, err := net.SplitHostPort(cfg.ControlPlane); err != nil {
		return nil, fmt.Errorf("control plane address %q: want host:port", cfg.ControlPlane)
	}
	if err := CheckWorkloadAPI(cfg.WorkloadAPI); err != nil {
		return nil, err
	}
	name, err := loadInstance(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	return &Borrowed{
		cfg: cfg, log: cfg.Log.Named("identity"), name: name, ready: make(chan struct{}),
		status: Status{Detail: "waiting for an SVID from " + cfg.WorkloadAPI, Since: cfg.Now()},
	}, nil
}

// loadInstance reads this instance's name, or draws one and saves it.
func loadInstance(dir string) (string, error) {
	if dir == "" {
		return "", errors.New("a state folder is required")
	}
	path := filepath.Join(dir, instanceFile)
	name, err := readFile(path, 2*instanceSize+1)
	if err == nil {
		if raw, err := hex.DecodeString(name); err != nil || len(raw) != instanceSize {
			return "", fmt.Errorf("%s holds no instance name; delete it", path)
		}
		return name, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("reading the instance's name: %w", err)
	}
	raw := make([]byte, instanceSize)
	if _, err := rand.Read(raw); err != nil {
		return "", fmt.Errorf("drawing an instance name: %w", err)
	}
	name = hex.EncodeToString(raw)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("making the state folder: %w", err)
	}
	if err := replaceFile(dir, instanceFile, []byte(name+"\n")); err != nil {
		return "", fmt.Errorf("saving the instance's name: %w", err)
	}
	return name, nil
}

// Source is the identity to present and what to trust.
func (b *Borrowed) Source() identity.Source { return &b.live }

// Generation changes with each new SVID and bundle; see [identity.Live].
func (b *Borrowed) Generation() uint64 { return b.live.Generation() }

// Ready is closed when the first SVID is there.
func (b *Borrowed) Ready() <-chan struct{} { return b.ready }

// ID is this workload's SPIFFE ID; zero before the first SVID.
func (b *Borrowed) ID() spiffeid.ID {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.id
}

// Instance is the name in the SVID (its subject's serialNumber), which our own
// control plane puts there and checks; of another issuer's SVID, a random name that
// is kept over restarts. It is empty before the first SVID.
func (b *Borrowed) Instance() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.instance
}

// Status reports the identity's health as of now. It is degraded while the socket
// does not answer, and when three quarters of the SVID's life have passed: other
// issuers renew at the half.
func (b *Borrowed) Status() Status {
	b.mu.Lock()
	s, life := b.status, b.life
	b.mu.Unlock()
	now := b.cfg.Now()
	if left := s.NotAfter.Sub(now); s.Detail == "" && left < life/4 {
		s.Detail = fmt.Sprintf("no newer SVID from %s", b.cfg.WorkloadAPI)
		s.Since = s.NotAfter.Add(-life / 4)
	}
	return s.at(now)
}

// SetBundles changes nothing: whoever issues the SVID also says what to trust.
func (b *Borrowed) SetBundles(identity.Bundles) error { return nil }

// Dial connects to the control plane with the present SVID; see [Agent.Dial].
func (b *Borrowed) Dial(ctx context.Context) (*grpc.ClientConn, error) {
	b.mu.Lock()
	left := b.status.NotAfter.Sub(b.cfg.Now())
	b.mu.Unlock()
	if left <= 0 {
		return nil, fmt.Errorf("connecting to the control plane: %w", identity.ErrNoIdentity)
	}
	want := b.cfg.ControlPlaneID
	if want.IsZero() {
		want = controlPlaneID(b.ID().TrustDomain())
	}
	return newLink(b.cfg.ControlPlane, identity.TLSConfig{Source: &b.live, Check: b.cfg.Check, Now: b.cfg.Now}, identity.ExactPattern(want)).dial(ctx)
}

// Run follows the socket until ctx ends, and returns nil then. Whatever goes wrong
// is shown by [Borrowed.Status] and tried again.
func (b *Borrowed) Run(ctx context.Context) error {
	for failures := 1; ctx.Err() == nil; failures++ {
		err := workloadapi.WatchX509Context(ctx, b, workloadapi.WithAddr(b.cfg.WorkloadAPI), workloadapi.WithBackoffStrategy(patience{}))
		if ctx.Err() != nil {
			break
		}
		b.OnX509ContextWatchError(err) // it was told that its calls are wrong
		sleep(ctx, pauseAfter(failures, 0))
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// patience is how long the client waits between two tries.
type patience struct{}

// NewBackoff implements workloadapi.BackoffStrategy.
func (patience) NewBackoff() workloadapi.Backoff { return &tries{} }

type tries struct{ failures int }

// Next implements workloadapi.Backoff.
func (t *tries) Next() time.Duration {
	t.failures++
	return pauseAfter(t.failures, 0)
}

// Reset implements workloadapi.Backoff.
func (t *tries) Reset() { t.failures = 0 }

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher. An SVID that peers
// would refuse, or of another identity than before, is not taken.
func (b *Borrowed) OnX509ContextUpdate(x *workloadapi.X509Context) {
	svid := x.DefaultSVID()
	peer, err := identity.Verify(svid.Certificates, x.Bundles, b.cfg.Now())
	b.mu.Lock()
	known := b.id
	b.mu.Unlock()
	switch {
	case err != nil:
		err = fmt.Errorf("checking the SVID: %w", err)
	case identity.Reserved(peer.ID):
		err = fmt.Errorf("checking the SVID: %s is not a workload", peer.ID)
	case !known.IsZero() && peer.ID != known:
		err = fmt.Errorf("the socket now gives %s, and this is %s; restart to become that", peer.ID, known)
	}
	if err != nil {
		b.fail(err)
		return
	}
	bundles := identity.Bundles{}
	for _, bundle := range x.Bundles.Bundles() {
		bundles[bundle.TrustDomain()] = spiffebundle.FromX509Bundle(bundle)
	}
	b.live.SetBundles(bundles)
	if known.IsZero() && b.cfg.Trusting != nil {
		b.cfg.Trusting()
	}
	b.install(svid)
}

func (b *Borrowed) install(svid *x509svid.SVID) {
	leaf := svid.Certificates[0]
	if old, err := b.live.GetX509SVID(); err == nil && old.Certificates[0].Equal(leaf) { // the bundles are the news
		svid = old
	}
	b.live.SetSVID(svid)
	b.mu.Lock()
	first := b.id.IsZero()
	if !first && !b.status.NotAfter.Equal(leaf.NotAfter) {
		b.status.Renewals++
	}
	if b.instance = leaf.Subject.SerialNumber; b.instance == "" {
		b.instance = b.name
	}
	b.id, b.life = svid.ID, leaf.NotAfter.Sub(leaf.NotBefore)
	b.status.NotAfter, b.status.Detail, b.status.Since = leaf.NotAfter, "", time.Time{}
	b.mu.Unlock()
	if first {
		b.log.Info("identity received", "spiffe_id", svid.ID, "instance", b.Instance(), "from", b.cfg.WorkloadAPI, "not_after", leaf.NotAfter)
		close(b.ready)
	}
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher.
func (b *Borrowed) OnX509ContextWatchError(err error) {
	b.fail(fmt.Errorf("asking %s: %w", b.cfg.WorkloadAPI, err))
}

func (b *Borrowed) fail(err error) {
	detail := err.Error() + "; retrying"
	b.mu.Lock()
	news := b.status.Detail != detail
	if b.status.Since.IsZero() {
		b.status.Since = b.cfg.Now()
	}
	b.status.Detail = detail
	b.mu.Unlock()
	if news {
		b.log.Warn("no new SVID; retrying", "error", err)
	}
}

// RenewNow does nothing: whoever serves the Workload API renews.
func (b *Borrowed) RenewNow() {}
