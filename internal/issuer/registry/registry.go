// Package registry knows which evidence may be which workload: the join tokens
// that operators made, and the instances that enrolled with them.
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
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/audit"
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
	// ErrBadTTL says that a join token's lifetime is out of bounds.
	ErrBadTTL = errors.New("bad lifetime")
	// ErrUnknownInstance says that the instance never enrolled or was removed.
	ErrUnknownInstance = errors.New("unknown instance; enrol again with a new join token: sallyport token create")
)

// IsRequestError reports whether err is an answer to what was asked, so that the
// asker can do better or ask again later; all others are failures of the control
// plane's own.
func IsRequestError(err error) bool {
	return slices.ContainsFunc([]error{
		ErrNotReady, ErrUnknownToken, ErrTokenUsed, ErrTokenExpired, ErrUnknownWorkload, ErrNotAttested, ErrBadTTL, ErrUnknownInstance,
	}, func(kind error) bool { return errors.Is(err, kind) })
}

// Config configures a [Registry].
type Config struct {
	Store store.Store
	Audit *audit.Log
	// RootHash gives the hash that new tokens carry: ca.CA.RootHash.
	RootHash func() [sha256.Size]byte
	Now      func() time.Time // nil: time.Now
	Log      hclog.Logger     // nil: discard
}

// Registry is safe for concurrent use.
type Registry struct {
	cfg       Config
	log       hclog.Logger
	workloads atomic.Pointer[workloads]
}

type workloads struct {
	byName map[string]*policy.CompiledWorkload      // :: metadata.name → workload
	byID   map[spiffeid.ID]*policy.CompiledWorkload // :: SPIFFE ID → workload
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
	w := &workloads{
		byName: make(map[string]*policy.CompiledWorkload, len(list)),
		byID:   make(map[spiffeid.ID]*policy.CompiledWorkload, len(list)),
	}
	for i := range list {
		w.byName[list[i].Name] = &list[i]
		w.byID[list[i].ID] = &list[i]
	}
	r.workloads.Store(w)
}

// admits returns the workload with this ID if evidence of kind may be it.
func (r *Registry) admits(id spiffeid.ID, kind string) (*policy.CompiledWorkload, error) {
	all := r.workloads.Load()
	if all == nil {
		return nil, ErrNotReady
	}
	w, ok := all.byID[id]
	if !ok {
		return nil, fmt.Errorf("%s: %w", id, ErrUnknownWorkload)
	}
	if !slices.ContainsFunc(w.Attest, func(a policy.Attest) bool { return a.Kind == kind }) {
		return nil, fmt.Errorf("workload %s, attest kind %s: %w", w.Name, kind, ErrNotAttested)
	}
	return w, nil
}

// Keys are flat: whatever a client names stays below the prefix it is put after.
const (
	prefix         = "registry/"
	tokenPrefix    = prefix + "tokens/"
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
