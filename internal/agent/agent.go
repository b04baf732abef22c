// Package agent obtains an identity and keeps it valid: it enrols with the control
// plane, renews the SVID with a fresh key long before it ends, and remembers just
// enough on disk to come back after a restart; or it borrows the identity from a
// Workload API. A [Wallet] does the same for apps, for which an agent vouches.
//
// What it gets, it puts into an [identity.Source]; it carries no traffic and
// decides nothing. SVID keys stay in memory. On disk are the enrolment key, which
// is good only for re-enrolling this very instance, and the trust bundles.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Config configures an [Agent].
type Config struct {
	// ControlPlane is the control plane's gRPC address, host:port.
	ControlPlane string
	// Token is a join token, as printed by "sallyport token create". It is needed
	// for the first start only, and may stay where it is afterwards. It excludes
	// Evidence.
	Token string
	// Evidence is what to enrol with: needed at the first start, and used again
	// when the control plane no longer knows this instance and the evidence is
	// another one than before.
	Evidence EvidenceConfig
	// TrustBundle is a file with the roots that the control plane must be of,
	// before any evidence is sent to it: PEM certificates or a SPIFFE bundle. It is
	// read at each attempt. Required with evidence that is no join token, which
	// names the root itself.
	TrustBundle string
	// StateDir is a folder of this instance alone. It is made if missing.
	StateDir string
	// EnrollWithin is how long the first enrolment, which has no saved state to
	// come back with, puts up with a control plane that cannot be reached. Zero:
	// for ever.
	EnrollWithin time.Duration
	// Check may refuse a control plane whose certificate is valid, as
	// identity.TLSConfig.Check does; nil refuses none.
	Check func(identity.Peer) error

	Now func() time.Time // nil: time.Now
	Log hclog.Logger     // nil: discard
}

// Agent keeps one identity. Its methods are safe for concurrent use.
type Agent struct {
	cfg   Config
	log   hclog.Logger
	live  identity.Live
	ready chan struct{} // closed with the first SVID
	poll  time.Duration // longest sleep between two looks at the clock
	hurry chan struct{} // cap 1: renew now

	save sync.Mutex // one writer of the state file; never held on the network

	mu     sync.Mutex
	state  state // guarded by mu; what is on disk
	status Status
	deny   func(error)   // guarded by mu; told when this identity is refused; nil: nobody asks
	news   chan struct{} // guarded by mu; closed when the bundles change
}

// State says how an identity is doing.
type State string

// States.
const (
	Enrolling State = "enrolling" // there is no SVID yet
	Valid     State = "valid"
	Degraded  State = "degraded" // the SVID is valid, but renewing it does not work
	Expired   State = "expired"  // peers refuse the SVID; renewing goes on
)

// Status is an agent's health.
type Status struct {
	State    State
	Detail   string    // what is wrong and what happens next; empty when Valid
	Since    time.Time // when Detail began; zero when Valid
	NotAfter time.Time // of the present SVID
	Renewals uint64    // SVIDs obtained since start, the first not counted
}

// New prepares an agent and reads its state folder. It contacts nobody. Without
// a token and without state of an earlier enrolment there is nothing to enrol
// with, which is an error that says what to do.
func New(cfg Config) (*Agent, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if _, _, err := net.SplitHostPort(cfg.ControlPlane); err != nil {
		return nil, fmt.Errorf("control plane address %q: want host:port", cfg.ControlPlane)
	}
	if cfg.StateDir == "" {
		return nil, errors.New("a state folder is required")
	}
	a := &Agent{cfg: cfg, log: cfg.Log.Named("agent"), ready: make(chan struct{}), poll: maxSleep, news: make(chan struct{})}
	var err error
	a.hurry = make(chan struct{}, 1)
	if a.state, err = loadState(cfg.StateDir); err != nil {
		return nil, err
	}
	if err := a.checkEvidence(); err != nil {
		return nil, err
	}
	if a.state.enrolled() {
		a.live.SetBundles(a.state.bundles)
	}
	a.status = Status{State: Enrolling, Detail: "not enrolled yet", Since: cfg.Now()}
	return a, nil
}

// checkEvidence reads what there is to enrol with, so that a mistake shows at
// once. Whoever has enrolled before can do without.
func (a *Agent) checkEvidence() error {
	if a.cfg.Evidence.IsZero() && a.cfg.Token == "" {
		if a.state.enrolled() {
			return nil
		}
		return fmt.Errorf("no join token, and no earlier enrolment in %s; make a token on the control plane: sallyport token create --workload NAME", a.cfg.StateDir)
	}
	p, err := a.proof()
	if err == nil && p.token == nil {
		_, err = readTrustBundle(a.cfg.TrustBundle)
	}
	switch {
	case err == nil:
	case !a.state.enrolled():
		return a.cfg.Evidence.missing(err, a.cfg.StateDir)
	case !errors.Is(err, fs.ErrNotExist):
		a.log.Warn("ignoring the evidence; this instance is enrolled already", "error", err)
	}
	return nil
}

// proof reads the evidence as it is now.
func (a *Agent) proof() (proof, error) {
	if a.cfg.Token != "" {
		return joinToken(a.cfg.Token)
	}
	return a.cfg.Evidence.read()
}

// Source is the identity to present and what to trust. It answers
// [identity.ErrNoIdentity] before the first SVID.
func (a *Agent) Source() identity.Source { return &a.live }

// Generation changes with each new SVID and bundle; see [identity.Live].
func (a *Agent) Generation() uint64 { return a.live.Generation() }

// Ready is closed when the first SVID is there.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// ID is this workload's SPIFFE ID; zero until it has enrolled for the first time.
func (a *Agent) ID() spiffeid.ID {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state.ID
}

// Instance is the name that the control plane gave to this sidecar, kept over
// restarts; empty until it has enrolled for the first time.
func (a *Agent) Instance() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state.Instance
}

// Status reports the identity's health as of now.
func (a *Agent) Status() Status {
	a.mu.Lock()
	s := a.status
	a.mu.Unlock()
	return s.at(a.cfg.Now())
}

// at fills in the state.
func (s Status) at(now time.Time) Status {
	switch {
	case s.NotAfter.IsZero():
		s.State = Enrolling
	case !now.Before(s.NotAfter):
		s.State = Expired
	case s.Detail != "":
		s.State = Degraded
	default:
		s.State = Valid
	}
	return s
}

// onDenied has fn called whenever the control plane, which has proved itself, says
// that this identity may not be had: it is revoked, or no more.
func (a *Agent) onDenied(fn func(error)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.deny = fn
}

// failed notes why there is no newer SVID. The same reason again is logged at
// debug only.
func (a *Agent) failed(err error) {
	detail := err.Error() + "; retrying"
	a.mu.Lock()
	deny := a.deny
	news := a.status.Detail != detail
	if a.status.Detail == "" {
		a.status.Since = a.cfg.Now()
	}
	a.status.Detail = detail
	a.mu.Unlock()
	if deny != nil && codeOf(err) == codes.PermissionDenied {
		deny(err)
	}
	level := hclog.Debug
	if news {
		level = hclog.Warn
	}
	hint := "if this lasts, the control plane's log says why"
	if isUnreachable(err) {
		hint = checkAddress
	}
	a.log.Log(level, "no new SVID; retrying", "error", err, "hint", hint)
}

// SetBundles replaces what is trusted, of every trust domain at once, and
// remembers it for the next start. It refuses bundles without the own trust
// domain's, which would lock this sidecar out. A state folder that cannot be
// written is logged: the bundles are in force all the same.
func (a *Agent) SetBundles(bundles identity.Bundles) error {
	td := a.ID().TrustDomain()
	if td.IsZero() {
		return identity.ErrNoIdentity
	}
	if b := bundles[td]; b == nil || len(b.X509Authorities()) == 0 {
		return fmt.Errorf("bundles without trust domain %s, which is this sidecar's own", td)
	}
	if err := a.setBundles(bundles); err != nil {
		a.log.Warn("the new trust bundles are in force, but not saved for the next start", "error", err)
	}
	return nil
}

// watchBundles returns what is trusted, which must not be changed, and a channel
// that is closed when that is replaced.
func (a *Agent) watchBundles() (identity.Bundles, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state.bundles, a.news
}

func (a *Agent) setBundles(bundles identity.Bundles) error {
	return a.update(func(s *state) {
		if !sameBundles(s.bundles, bundles) {
			s.bundles = maps.Clone(bundles)
			a.live.SetBundles(bundles)
		}
	})
}

// update changes the state and saves it if it is another one then.
func (a *Agent) update(change func(*state)) error {
	a.save.Lock()
	defer a.save.Unlock()
	a.mu.Lock()
	before := a.state
	change(&a.state)
	after := a.state
	if !sameBundles(before.bundles, after.bundles) {
		close(a.news)
		a.news = make(chan struct{})
	}
	a.mu.Unlock()
	if before.equal(after) && before.saved {
		return nil
	}
	err := after.store(a.cfg.StateDir)
	a.mu.Lock()
	a.state.saved = err == nil
	a.mu.Unlock()
	return err
}

// Run enrols and renews until ctx ends, and returns nil then. It fails only
// before the first SVID, with one line that says what to do: a join token that is
// wrong, used or expired, another trust domain, a control plane that is not the
// token's, clocks too far apart, an instance that the control plane no longer
// knows, a state folder that cannot be written, or, where no state was saved yet,
// a control plane that cannot be reached within Config.EnrollWithin. Whatever may
// pass by itself is retried and shown by [Agent.Status].
func (a *Agent) Run(ctx context.Context) error {
	within := a.cfg.EnrollWithin
	if !a.ID().IsZero() { // there is saved state
		within = 0
	}
	if err := a.first(ctx, within); err != nil || ctx.Err() != nil {
		return err
	}
	a.keep(ctx)
	return nil
}

// first gets the first SVID. It returns nil when ctx ends, and gives up when the
// control plane was unreachable for as long as within; zero is for ever. Real
// time counts: the clock of a machine that starts may jump.
func (a *Agent) first(ctx context.Context, within time.Duration) error {
	reached := time.Now()
	for failures := 1; ; failures++ {
		err := a.enroll(ctx)
		if err == nil || ctx.Err() != nil {
			return nil
		}
		if isPermanent(err) {
			return err
		}
		pause := a.backoff(failures)
		if !isUnreachable(err) {
			reached = time.Now()
		} else if within > 0 {
			left := within - time.Since(reached)
			if left <= 0 {
				return gaveUp(err, within)
			}
			pause = min(pause, left)
		}
		a.failed(err)
		if !a.wait(ctx, pause) {
			return nil
		}
	}
}
