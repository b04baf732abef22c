package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/agent/endpoint"
	"github.com/sallyport-mesh/sallyport/internal/peercred"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	// maxLeases bounds the identities that one wallet keeps, and maxLeasesOfUser
	// those of one uid: a user may make any number of executables to ask with.
	maxLeases       = 4096
	maxLeasesOfUser = 512
	// maxAsking bounds the requests to the control plane at a time.
	maxAsking = 8
	// linger is how long an identity is kept for somebody who may ask again.
	linger = time.Minute
)

// Evidence is what is known of a process: selectors of kind unix.
type Evidence = map[string][]string // :: selector → values

// WalletConfig says whose identities a [Wallet] keeps.
type WalletConfig struct {
	// Find returns what can be proved of a caller, for whom this agent then
	// vouches. Nil: the callers are this sidecar's own app and have its identity.
	Find func(context.Context, endpoint.Caller) (Evidence, error)
	// AllowUIDs are the users who may ask; nil: every user of the machine.
	AllowUIDs []uint32
	Log       hclog.Logger // nil: discard
}

// Wallet keeps the SVIDs and keys of apps for as long as somebody asks for them:
// it is the [endpoint.Holder] of a sidecar, for its own app, and of a host's
// agent, for every process that a workload names.
//
// Callers whose evidence is the same share one SVID and key, since no rule could
// tell them apart; where anything differs (user, executable, unit, container)
// there is another key, even if the ID is the same. So a key reaches exactly those
// processes that the workload's selectors describe equally, and their number, not
// that of connections, bounds the keys.
type Wallet struct {
	cfg   WalletConfig
	agent *Agent
	log   hclog.Logger
	slots chan struct{}
	line  line

	mu     sync.Mutex
	spawn  func(*lease)      // guarded by mu; nil: not running
	leases map[string]*lease // guarded by mu; :: digest of evidence → identity
	users  map[uint32]int    // guarded by mu; :: uid → leases
}

var _ endpoint.Holder = (*Wallet)(nil)

// NewWallet makes the wallet of an agent. It holds nothing before its Run.
func NewWallet(a *Agent, cfg WalletConfig) *Wallet {
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	w := &Wallet{
		cfg: cfg, agent: a, log: cfg.Log, slots: make(chan struct{}, maxAsking),
		line: line{agent: a}, leases: map[string]*lease{}, users: map[uint32]int{},
	}
	a.onDenied(w.deny)
	return w
}

// deny takes the agent's own identity away from its app. Others, which the agent
// vouches for, are none of the reason.
func (w *Wallet) deny(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.leases {
		if l.process == nil {
			l.deny(err)
		}
	}
}

// Run keeps identities valid until ctx ends, and then forgets their keys.
func (w *Wallet) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	w.mu.Lock()
	w.spawn = func(l *lease) { wg.Go(func() { l.run(ctx) }) }
	w.mu.Unlock()
	<-ctx.Done()
	w.mu.Lock()
	w.spawn = nil
	w.mu.Unlock()
	wg.Wait()
	w.line.close()
	return nil
}

// Hold implements [endpoint.Holder].
func (w *Wallet) Hold(ctx context.Context, c endpoint.Caller) (*endpoint.Feed, error) {
	l, err := w.lease(ctx, c)
	if err != nil {
		return nil, err
	}
	if err := l.usable(); err != nil {
		return nil, err
	}
	return &l.feed, nil
}

// JWT implements [endpoint.Holder].
func (w *Wallet) JWT(ctx context.Context, c endpoint.Caller, id spiffeid.ID, audience []string) (string, error) {
	l, err := w.lease(ctx, c)
	if err != nil {
		return "", err
	}
	return l.jwt(ctx, id, audience)
}

// lease finds or makes the lease of a caller, who follows it until ctx ends.
func (w *Wallet) lease(ctx context.Context, c endpoint.Caller) (*lease, error) {
	if w.cfg.AllowUIDs != nil && !slices.Contains(w.cfg.AllowUIDs, c.UID) {
		return nil, fmt.Errorf("%w: user %d is not one of allowUIDs", endpoint.ErrDenied, c.UID)
	}
	if w.cfg.Find == nil {
		return w.take(ctx, nil, c.UID)
	}
	evidence, err := w.cfg.Find(ctx, c)
	if errors.Is(err, peercred.ErrBusy) {
		return nil, fmt.Errorf("looking at process %d: %w; try again", c.PID, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: looking at process %d: %w", endpoint.ErrDenied, c.PID, err)
	}
	if len(evidence) == 0 { // nothing proves nothing
		return nil, endpoint.ErrDenied
	}
	return w.take(ctx, evidence, c.UID)
}

// take finds or makes the lease of evidence, nil being the agent's own app, which
// is followed until ctx ends.
func (w *Wallet) take(ctx context.Context, evidence Evidence, uid uint32) (*lease, error) {
	select {
	case <-w.agent.Ready():
	default:
		return nil, endpoint.ErrStarting
	}
	key := ""
	if evidence != nil {
		key = digestOf(evidence)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.spawn == nil {
		return nil, endpoint.ErrStarting
	}
	l := w.leases[key]
	if l == nil {
		if len(w.leases) >= maxLeases || w.users[uid] >= maxLeasesOfUser {
			return nil, errors.New("too many different processes ask for identities; try again later")
		}
		l = &lease{wallet: w, key: key, uid: uid, hurry: make(chan struct{}, 1)}
		if evidence != nil {
			l.process = processOf(evidence)
		}
		w.leases[key] = l
		w.users[uid]++
		w.spawn(l)
	}
	l.followers++
	context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		l.followers--
		l.left = w.agent.cfg.Now()
	})
	return l, nil
}

// drop forgets a lease that nobody has followed for a while, and says so.
func (w *Wallet) drop(l *lease) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.spawn != nil && (l.followers > 0 || w.agent.cfg.Now().Sub(l.left) < linger) {
		return false
	}
	delete(w.leases, l.key)
	if w.users[l.uid]--; w.users[l.uid] == 0 {
		delete(w.users, l.uid)
	}
	return true
}

// RenewIf renews at once whatever refused says that peers refuse, or soon will: an
// app whose issuer is tainted gets another SVID, one that is revoked none, and its
// streams end. It does not wait.
func (w *Wallet) RenewIf(refused func(identity.Peer) bool) {
	w.line.renew() // the control plane at its other end may be refused, too
	w.mu.Lock()
	leases := slices.Collect(maps.Values(w.leases))
	w.mu.Unlock()
	for _, l := range leases {
		l.renewIf(refused)
	}
}

// Identity is how one app's identity is doing.
type Identity struct {
	ID       spiffeid.ID // zero: none yet
	UID      uint32      // of who asked first
	NotAfter time.Time   // zero: none yet
	Detail   string      // why there is none or no newer one; empty when all is well
	Denied   bool        // the control plane knows no workload of this evidence
	Late     bool        // half of its life has passed without a renewal
}

// Identities lists what the wallet keeps, those that end first at the front.
func (w *Wallet) Identities() []Identity {
	w.mu.Lock()
	leases := slices.Collect(maps.Values(w.leases))
	w.mu.Unlock()
	out := make([]Identity, 0, len(leases))
	for _, l := range leases {
		out = append(out, l.identity())
	}
	slices.SortFunc(out, func(a, b Identity) int { return a.NotAfter.Compare(b.NotAfter) })
	return out
}

// digestOf names evidence: equal evidence has one name, other evidence another.
func digestOf(e Evidence) string {
	h := sha256.New()
	for _, k := range slices.Sorted(maps.Keys(e)) {
		fmt.Fprintf(h, "%q=%q\n", k, slices.Sorted(slices.Values(e[k])))
	}
	return hex.EncodeToString(h.Sum(nil))
}

func processOf(e Evidence) *sallyportv1.Process {
	p := &sallyportv1.Process{Selectors: make(map[string]*sallyportv1.Values, len(e))}
	for k, v := range e {
		p.Selectors[k] = &sallyportv1.Values{Values: v}
	}
	return p
}
