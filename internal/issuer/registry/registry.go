// Package registry knows which evidence may be which workload: what the applied
// Workloads admit, the join tokens that operators made, and the instances that
// enrolled with either.
//
// It issues nothing and speaks no protocol; package issuer asks it. All state is
// in the store, so any replica can answer.
package registry

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// What callers distinguish. Each text says what to do; wrapped errors add names.
var (
	// ErrNotReady says that no workloads are known yet.
	ErrNotReady = errors.New("the control plane is starting and has no workloads yet; try again")
	// ErrUnknownToken covers wrong secrets too, so that nobody learns which
	// token ids exist.
	ErrUnknownToken = errors.New("unknown join token; make a new one with: sallyport token create")
	// ErrTokenUsed says that another sidecar redeemed the token.
	ErrTokenUsed = errors.New("join token already used; each sidecar needs its own: sallyport token create")
	// ErrTokenExpired says that the token's time is over.
	ErrTokenExpired = errors.New("join token expired; make a new one with: sallyport token create")
	// ErrUnknownWorkload says that no Workload has the name or ID.
	ErrUnknownWorkload = errors.New("no such workload in the applied policy files")
	// ErrNotAttested says that the Workload does not list the kind of evidence.
	ErrNotAttested = errors.New("the workload does not admit this evidence; add it to the Workload's attest list")
	// ErrNoMatch says that evidence is good and proves no workload.
	ErrNoMatch = errors.New("no workload admits this evidence; where the control plane runs, sallyport identity explain says which come close")
	// ErrAmbiguous says that evidence proves more than one workload.
	ErrAmbiguous = errors.New("the evidence proves more than one workload; make their attest lists exclude each other")
	// ErrEvidenceUsed says that another sidecar redeemed the same token.
	ErrEvidenceUsed = errors.New("the token was redeemed already; let the platform issue a new one to each sidecar")
	// ErrVouched says that an instance is an agent's process, which has nothing
	// to ask for itself.
	ErrVouched = errors.New("an agent vouches for this process; its SVIDs come through the agent")
	// ErrBadTTL says that a join token's lifetime is out of bounds.
	ErrBadTTL = errors.New("bad lifetime")
	// ErrUnknownInstance says that the instance never enrolled or was removed.
	ErrUnknownInstance = errors.New("unknown instance; enrol again, with a new join token if it takes one: sallyport token create")
)

// IsRequestError reports whether err is an answer to what was asked, so that the
// asker can do better or ask again later; all others are failures of the control
// plane's own.
func IsRequestError(err error) bool {
	return slices.ContainsFunc([]error{
		ErrNotReady, ErrUnknownToken, ErrTokenUsed, ErrTokenExpired, ErrUnknownWorkload, ErrNotAttested, ErrBadTTL, ErrUnknownInstance,
		ErrNoMatch, ErrAmbiguous, ErrEvidenceUsed, ErrVouched, ErrRevoked, ErrReadmitting,
	}, func(kind error) bool { return errors.Is(err, kind) })
}

// Config configures a [Registry].
type Config struct {
	Store store.Store
	Audit *audit.Log
	// RootHash gives the hash that new tokens carry: ca.CA.RootHash.
	RootHash func() [sha256.Size]byte
	// Issuers counts who may vouch. Where a Workload names no issuer, the only
	// one is meant; with several it is nobody.
	Issuers map[string]int // :: kind of evidence → issuers configured
	// SVIDTTL is the life of SVIDs: for how long a revocation is remembered.
	SVIDTTL time.Duration
	Now     func() time.Time // nil: time.Now
	Log     hclog.Logger     // nil: discard
}

// Registry is safe for concurrent use.
type Registry struct {
	cfg       Config
	log       hclog.Logger
	workloads atomic.Pointer[workloads]
}

// New makes a Registry. It answers [ErrNotReady] until SetWorkloads was called.
func New(cfg Config) *Registry {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	return &Registry{cfg: cfg, log: cfg.Log.Named("registry")}
}

// SetWorkloads replaces the workloads that may enrol. Instances of others keep
// their records but get no more SVIDs.
func (r *Registry) SetWorkloads(list []policy.CompiledWorkload) {
	r.workloads.Store(index(list, r.cfg.Issuers))
}

// admits returns the instance's workload if it still admits the evidence that the
// instance enrolled with.
func (r *Registry) admits(inst Instance) (*policy.CompiledWorkload, error) {
	all := r.workloads.Load()
	if all == nil {
		return nil, ErrNotReady
	}
	w, ok := all.workload(inst.ID)
	if !ok {
		return nil, fmt.Errorf("%s: %w", inst.ID, ErrUnknownWorkload)
	}
	v := inst.evidence()
	for _, a := range w.Attest {
		if v.Kind == attest.KindJoinToken { // it names its workload by itself
			if a.Kind == v.Kind && w.ID == inst.ID {
				return w, nil
			}
			continue
		}
		if id, missed := all.id(claim{w, a}, v, inst.Via); missed == "" && id == inst.ID {
			return w, nil
		}
	}
	return nil, fmt.Errorf("workload %s, %s: %w", w.Name, Describe(v), ErrNotAttested)
}

// Keys are flat: whatever a client names stays below the prefix it is put after.
const (
	prefix         = "registry/"
	tokenPrefix    = prefix + "tokens/"
	oncePrefix     = prefix + "once/"
	instancePrefix = prefix + "instances/"
)

func decode[T any](kv store.KV) (T, error) {
	var v T
	if err := json.Unmarshal(kv.Value, &v); err != nil {
		return v, fmt.Errorf("reading %s from the store: %w", kv.Key, err)
	}
	return v, nil
}

func put(key string, v any) (store.Op, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return store.Op{}, fmt.Errorf("encoding %s: %w", key, err)
	}
	return store.Op{Key: key, Value: data}, nil
}

// Run forgets old tokens and instances every cleanupEvery, until ctx ends. It
// returns nil then.
func (r *Registry) Run(ctx context.Context) error {
	tick := time.NewTicker(cleanupEvery)
	defer tick.Stop()
	for {
		if n, err := r.Clean(ctx); err != nil && ctx.Err() == nil {
			r.log.Warn("forgetting old tokens and instances", "error", err)
		} else if n > 0 {
			r.log.Debug("forgot old tokens and instances", "count", n)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
