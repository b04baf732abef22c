package controlplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/internal/xds"
)

const (
	endpointPrefix = "endpoints/"
	// leaseTTL is how long endpoints outlive the replica that wrote them. A
	// restart within it loses none; a sidecar that died meanwhile is gone after it.
	leaseTTL   = 5 * time.Minute
	leaseRenew = leaseTTL / 5
)

// endpoints publishes where instances listen and tells the reconciler. What is
// published lives in the store under this replica's lease.
type endpoints struct {
	store store.Store
	log   hclog.Logger
	renew time.Duration // between two renewals of the lease

	mu    sync.Mutex
	lease store.LeaseID // guarded by mu; zero until the first grant
}

// record is an endpoint as stored.
type record struct {
	ID       string
	Instance string
	Addr     netip.AddrPort
	Ports    []uint16
}

func (r record) key() string { return endpointPrefix + r.ID + "|" + r.Instance }

func parseRecord(kv store.KV) (spiffeid.ID, xds.Endpoint, error) {
	var r record
	if err := json.Unmarshal(kv.Value, &r); err != nil {
		return spiffeid.ID{}, xds.Endpoint{}, fmt.Errorf("reading endpoint %s: %w", kv.Key, err)
	}
	id, err := spiffeid.FromString(r.ID)
	if err != nil {
		return spiffeid.ID{}, xds.Endpoint{}, fmt.Errorf("reading endpoint %s: %w", kv.Key, err)
	}
	return id, xds.Endpoint{Instance: r.Instance, Addr: r.Addr, Ports: r.Ports}, nil
}

// publish writes an endpoint and returns a token for withdraw.
func (e *endpoints) publish(ctx context.Context, r record) (rev int64, err error) {
	lease, err := e.currentLease(ctx)
	if err != nil {
		return 0, err
	}
	value, err := json.Marshal(r)
	if err != nil {
		return 0, err
	}
	return e.store.Txn(ctx, nil, []store.Op{{Key: r.key(), Value: value, Lease: lease}})
}

// withdraw deletes an endpoint unless somebody published it again since rev: a
// restarted instance must not lose its endpoint to the end of its old stream.
func (e *endpoints) withdraw(ctx context.Context, r record, rev int64) error {
	_, err := e.store.Txn(ctx, []store.Cmp{{Key: r.key(), Rev: rev}}, []store.Op{{Key: r.key(), Delete: true}})
	switch {
	case errors.Is(err, store.ErrConflict):
		return nil
	case err == nil:
		e.log.Info("endpoint withdrawn", "id", r.ID, "instance", r.Instance, "address", r.Addr)
	}
	return err
}

func (e *endpoints) currentLease(ctx context.Context) (store.LeaseID, error) {
	e.mu.Lock()
	lease := e.lease
	e.mu.Unlock()
	if lease != 0 {
		return lease, nil
	}
	lease, err := e.store.Grant(ctx, leaseTTL)
	if err != nil {
		return 0, fmt.Errorf("granting the endpoint lease: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.lease == 0 {
		e.lease = lease
	}
	return e.lease, nil
}

// keepLease renews the lease until ctx ends. onLost is called when the lease
// had ended, with everything published under it: sidecars must announce again.
func (e *endpoints) keepLease(ctx context.Context, onLost func()) error {
	tick := time.NewTicker(e.renew)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		e.mu.Lock()
		lease := e.lease
		e.mu.Unlock()
		if lease == 0 {
			continue
		}
		err := e.store.KeepAlive(ctx, lease)
		if errors.Is(err, store.ErrNotFound) {
			e.log.Warn("endpoint lease ended; asking sidecars to announce again")
			e.mu.Lock()
			e.lease = 0
			e.mu.Unlock()
			onLost()
			continue
		}
		if err != nil && ctx.Err() == nil {
			e.log.Warn("renewing the endpoint lease", "error", err)
		}
	}
}

// table is the set of published endpoints. Immutable once handed out.
type table map[spiffeid.ID][]xds.Endpoint // :: workload → endpoints by instance

// watch calls fn with the whole table at once and after every change.
func (e *endpoints) watch(ctx context.Context, fn func(table)) error {
	for {
		kvs, rev, err := e.store.List(ctx, endpointPrefix)
		if err != nil {
			return fmt.Errorf("listing endpoints: %w", err)
		}
		live := map[string]store.KV{} // :: key → endpoint
		for _, kv := range kvs {
			live[kv.Key] = kv
		}
		fn(e.table(live))
		err = e.store.Watch(ctx, endpointPrefix, rev, func(_ int64, events []store.Event) error {
			for _, ev := range events {
				if ev.Deleted {
					delete(live, ev.Key)
				} else {
					live[ev.Key] = ev.KV
				}
			}
			fn(e.table(live))
			return nil
		})
		if !errors.Is(err, store.ErrCompacted) {
			return err
		}
	}
}

func (e *endpoints) table(live map[string]store.KV) table {
	t := table{}
	for _, kv := range live {
		id, ep, err := parseRecord(kv)
		if err != nil {
			e.log.Error("ignoring a stored endpoint", "error", err)
			continue
		}
		t[id] = append(t[id], ep)
	}
	for _, eps := range t {
		slices.SortFunc(eps, func(a, b xds.Endpoint) int { return strings.Compare(a.Instance, b.Instance) })
	}
	return t
}
