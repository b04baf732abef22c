// Package catalog holds the applied sets of policy files: it checks a change,
// lands it whole or not at all, keeps the history and tells who watches.
//
// A change has one path, whether it comes from a watched directory or from an
// operator: merge into the sets in force, parse, compile, test, compare, write
// the new contents as blobs, then move one pointer by compare-and-swap. The
// rules themselves belong to package policy; where the data lies is the store's
// business.
package catalog

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

var (
	// ErrConflict says that somebody else changed the same sets at the same time,
	// or that the store stayed too busy: look again, then apply again.
	ErrConflict = errors.New("somebody else applied a change at the same time: look at the history and apply again")
	// ErrWatched says that a watched directory is the one source of the sets.
	ErrWatched = errors.New("the sets come from a watched directory: edit its files instead")
	// ErrLastWorkload says that an edit would take a set's last Workload.
	ErrLastWorkload = errors.New("the edit takes the last Workload of a set")
	// ErrNoSet says that a set to be removed does not exist.
	ErrNoSet = errors.New("no such set")
	// ErrNoRevision says that the history does not hold a revision.
	ErrNoRevision = errors.New("no such revision in the history")
	// ErrTests says that a policy test fails under the changed sets.
	ErrTests = errors.New("policy tests fail")
	// ErrInvariants says that an Invariant does not hold under the changed sets.
	ErrInvariants = errors.New("invariants do not hold")
	// ErrTooLarge says that the sets together exceed what one revision may hold.
	ErrTooLarge = errors.New("the sets are too large")
)

// Config is what a catalog needs. All fields are required.
type Config struct {
	Store       store.Store
	Audit       *audit.Log
	TrustDomain spiffeid.TrustDomain
	Now         func() time.Time
	Log         hclog.Logger
}

// Rev numbers the states of the sets: N counts from 1 within an epoch, and a
// restore from a backup begins a new epoch. N is zero while nothing was ever
// applied.
type Rev struct{ Epoch, N int64 }

// String gives the form EPOCH.N, as in "1.42".
func (r Rev) String() string { return fmt.Sprintf("%d.%d", r.Epoch, r.N) }

// State is the sets in force at one revision, compiled. It is shared: nobody
// may change what it points to.
type State struct {
	Rev   Rev
	Sets  []*policy.Set // by name, the root set first
	Rules *policy.Ruleset
}

// Change replaces the files of whole sets and removes others; sets that it does
// not name stay as they are.
type Change struct {
	Sets          map[string]map[string][]byte // :: set name ("" is the root set) → file name → content
	Remove        []string                     // names of sets
	Actor, Origin string                       // for the audit log: who, and from where
	DryRun        bool                         // check, test and compare only
}

// Result says what a change did, or with DryRun would do.
type Result struct {
	Epoch, N  int64  // the revision in force afterwards
	Unchanged bool   // the files were in force already
	Diff      string // which files changed and who gains or loses access, for people
	Tests     string // outcome of the policy tests and Invariants, for people; also set with ErrTests and ErrInvariants
}

// Entry is one revision of the history.
type Entry struct {
	Rev           Rev
	Time          time.Time
	Actor, Origin string
	Summary       string // one line
	Current       bool   // the revision in force
}

// Catalog is the applied sets. It is safe for concurrent use, and several
// catalogs may share a store.
type Catalog struct {
	Config
	turn  chan struct{} // one token: held while a change is being applied here
	cache cache
	keep  limits // how much history is kept

	mu      sync.Mutex      // guards what follows
	watched map[string]bool // :: set found in the watched directory; nil: none is watched
	looked  bool            // the watched directory was read once, with whatever result
	rescan  func()          // asks the watcher of the directory to look again
	dirty   string          // why the watched directory is not in force; "" when it is
	broken  string          // why the newest revision cannot be used; "" when it can
}

// New returns a catalog over c.Store. It reads nothing yet.
func New(c Config) *Catalog {
	k := &Catalog{
		Config: c,
		turn:   make(chan struct{}, 1),
		keep:   limits{revisions: 500, bytes: 256 << 20, every: 10, grace: 10 * time.Minute},
	}
	k.turn <- struct{}{}
	return k
}

// Looked reports whether the watched directory was read once: it is in force by
// then, or [Catalog.Problem] says why not.
func (c *Catalog) Looked() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.looked
}

// Problem says, for people, why the watched directory is not in force as it
// stands, or why this version cannot use the newest revision; "" when all is
// well.
func (c *Catalog) Problem() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dirty != "" && c.broken != "" {
		return c.dirty + "\n" + c.broken
	}
	return c.dirty + c.broken
}
