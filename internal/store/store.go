// Package store is the control plane's memory: keys and values with revisions,
// compare-and-swap transactions, leases and watches, which is what etcd offers
// and what xDS needs.
//
// It knows nothing of what is stored. The in-memory form is here; package
// store/etcd has the durable one; package store/storetest holds both to the
// same contract.
package store

import (
	"context"
	"errors"
	"fmt"
	"time"
)

var (
	// ErrNotFound says that a key does not exist.
	ErrNotFound = errors.New("key not found")
	// ErrConflict says that a comparison of a transaction did not hold; nothing
	// was written and the caller may read again and retry.
	ErrConflict = errors.New("conflicting change")
	// ErrCompacted says that a watch asked for revisions the store no longer
	// holds, or fell too far behind: list again and watch from there.
	ErrCompacted = errors.New("revision compacted")
	// ErrTooLarge says that a value or transaction exceeds MaxValue or MaxOps.
	ErrTooLarge = errors.New("too large for one transaction")
	// ErrClosed says that the store was closed, or closed while the call waited.
	ErrClosed = errors.New("store is closed")
)

const (
	// MaxOps is the number of comparisons and of operations a transaction may hold.
	MaxOps = 100
	// MaxValue is the size of one value in bytes. The sum of one transaction's
	// values must not exceed it either.
	MaxValue = 1 << 20
	// MaxKey is the length of one key in bytes.
	MaxKey = 1 << 10
)

// KV is one key with its value.
type KV struct {
	Key   string
	Value []byte
	Rev   int64 // the store revision that last wrote it; > 0
}

// Cmp is a condition of a transaction: Key was last written at Rev. Rev zero:
// the key does not exist.
type Cmp struct {
	Key string
	Rev int64
}

// Op writes Value under Key, or deletes Key. A put under a Lease vanishes with
// the lease; zero is no lease.
type Op struct {
	Key    string
	Value  []byte
	Lease  LeaseID
	Delete bool
}

// LeaseID names a lease; zero names none.
type LeaseID int64

// Event is one change. A deleted key has an empty Value.
type Event struct {
	KV
	Deleted bool
}

// CheckTxn reports why a transaction cannot be run: ErrTooLarge, or a key that
// is empty or written twice. Every [Store] asks it first, so that what the
// memory form accepts, etcd accepts.
func CheckTxn(cmps []Cmp, ops []Op) error {
	if len(cmps) > MaxOps || len(ops) > MaxOps {
		return fmt.Errorf("running a transaction of %d comparisons and %d operations, of at most %d each: %w", len(cmps), len(ops), MaxOps, ErrTooLarge)
	}
	for _, c := range cmps {
		if err := checkKey(c.Key); err != nil {
			return err
		}
	}
	size := 0
	seen := make(map[string]bool, len(ops))
	for _, op := range ops {
		if err := checkKey(op.Key); err != nil {
			return err
		}
		if seen[op.Key] {
			return fmt.Errorf("running a transaction: key %s is written twice", op.Key)
		}
		seen[op.Key] = true
		if !op.Delete {
			size += len(op.Value)
		}
	}
	if size > MaxValue {
		return fmt.Errorf("running a transaction with %d bytes of values, of at most %d: %w", size, MaxValue, ErrTooLarge)
	}
	return nil
}

func checkKey(key string) error {
	if key == "" {
		return errors.New("running a transaction: empty key")
	}
	if len(key) > MaxKey {
		return fmt.Errorf("running a transaction: key of %d bytes, of at most %d: %w", len(key), MaxKey, ErrTooLarge)
	}
	return nil
}

// Store is implemented by [Memory] and by package store/etcd. All methods are
// safe for concurrent use and honour ctx.
type Store interface {
	// Get returns one key, or ErrNotFound.
	Get(ctx context.Context, key string) (KV, error)
	// List returns all keys under prefix in key order, and the revision at which
	// that was the state: watch from there and nothing is missed.
	List(ctx context.Context, prefix string) ([]KV, int64, error)
	// Txn applies all ops if every cmp holds, atomically, and returns the new
	// revision; ErrConflict, ErrTooLarge otherwise. A key may occur once in ops.
	Txn(ctx context.Context, cmps []Cmp, ops []Op) (int64, error)
	// Watch calls fn for each revision after rev that touched prefix, in order,
	// with all of that revision's events at once. It returns fn's error, ctx's
	// error, or ErrCompacted; it survives reconnects to the store by itself.
	Watch(ctx context.Context, prefix string, rev int64, fn func(rev int64, events []Event) error) error
	// Grant makes a lease that ends ttl after its last KeepAlive. etcd counts in
	// full seconds: ttl is rounded up, and the end may come up to a second late.
	Grant(ctx context.Context, ttl time.Duration) (LeaseID, error)
	// KeepAlive renews a lease once; ErrNotFound when it has ended.
	KeepAlive(ctx context.Context, id LeaseID) error
	// Revoke ends a lease and deletes its keys; ErrNotFound when it has ended.
	Revoke(ctx context.Context, id LeaseID) error
	// Close releases the store's resources. Calls after it fail.
	Close() error
}
