// Package etcd is the durable [store.Store]: etcd inside this process, or an
// external cluster, through one client and one code path.
//
// It adds what etcd leaves to its users: all keys live under one prefix, every
// call has a deadline, a watch survives whatever the connection goes through,
// and errors are those of package store.
package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

const (
	// DefaultPrefix is where the keys live unless told otherwise.
	DefaultPrefix = "/sallyport/"
	// callTimeout bounds one call, on top of the caller's own deadline.
	callTimeout = 10 * time.Second
	dialTimeout = 5 * time.Second
	keepAlive   = 10 * time.Second // how soon a dead connection is noticed; etcd refuses less than 5 s
)

// Config says how to reach an external cluster.
type Config struct {
	Endpoints []string    // host:port, or URLs with http, https or unix
	TLS       *tls.Config // nil: plain TCP
	Prefix    string      // empty: DefaultPrefix; a final slash is added, so that no two prefixes overlap by accident
	Log       hclog.Logger
}

// client is a store on any etcd client.
type client struct {
	etcd   *clientv3.Client
	prefix string
	log    hclog.Logger
	close  func() error // ends etcd, and the server where it is ours

	once sync.Once
	done chan struct{} // closed by Close
}

// Dial connects to an external cluster and checks that it answers.
func Dial(ctx context.Context, c Config) (store.Store, error) {
	where := strings.Join(c.Endpoints, ", ")
	if len(c.Endpoints) == 0 {
		return nil, errors.New("connecting to etcd: no endpoints given")
	}
	prefix, err := cleanPrefix(c.Prefix)
	if err != nil {
		return nil, fmt.Errorf("connecting to etcd at %s: %w", where, err)
	}
	cli, err := clientv3.New(clientv3.Config{
		Endpoints:            c.Endpoints,
		TLS:                  c.TLS,
		DialTimeout:          dialTimeout,
		DialKeepAliveTime:    keepAlive,
		DialKeepAliveTimeout: keepAlive / 2,
		PermitWithoutStream:  true,
		Logger:               zap.New(newLogCore(c.Log)),
	})
	if err != nil {
		return nil, fmt.Errorf("connecting to etcd at %s: %w", where, err)
	}
	s := newClient(cli, prefix, c.Log, cli.Close)
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if _, err := s.Get(ctx, "reachable"); err != nil && !errors.Is(err, store.ErrNotFound) {
		s.Close()
		return nil, fmt.Errorf("connecting to etcd at %s: no answer (check the endpoints, TLS files and that the cluster has a leader): %w", where, err)
	}
	return s, nil
}

func cleanPrefix(p string) (string, error) {
	if p == "" {
		p = DefaultPrefix
	}
	p = strings.TrimRight(p, "/") + "/"
	if len(p) > 256 {
		return "", fmt.Errorf("prefix of %d bytes, of at most 256", len(p))
	}
	return p, nil
}

func newClient(cli *clientv3.Client, prefix string, log hclog.Logger, closeAll func() error) *client {
	return &client{etcd: cli, prefix: prefix, log: log, close: closeAll, done: make(chan struct{})}
}

// call bounds ctx by callTimeout, and refuses when the store is closed.
func (c *client) call(ctx context.Context) (context.Context, context.CancelFunc, error) {
	select {
	case <-c.done:
		return nil, nil, store.ErrClosed
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	return ctx, cancel, ctx.Err()
}

// fail gives err the name that package store has for it.
func (c *client) fail(doing string, err error) error {
	select {
	case <-c.done:
		return fmt.Errorf("%s: %w", doing, store.ErrClosed)
	default:
	}
	known := map[error]error{
		rpctypes.ErrLeaseNotFound:   store.ErrNotFound,
		rpctypes.ErrRequestTooLarge: store.ErrTooLarge,
		rpctypes.ErrTooManyOps:      store.ErrTooLarge,
		rpctypes.ErrCompacted:       store.ErrCompacted,
	}
	plain := rpctypes.Error(err)
	for theirs, ours := range known {
		if errors.Is(plain, theirs) {
			return fmt.Errorf("%s: %w", doing, ours)
		}
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// Get implements [store.Store].
func (c *client) Get(ctx context.Context, key string) (store.KV, error) {
	ctx, cancel, err := c.call(ctx)
	if err != nil {
		return store.KV{}, err
	}
	defer cancel()
	resp, err := c.etcd.Get(ctx, c.prefix+key)
	if err != nil {
		return store.KV{}, c.fail("reading "+key, err)
	}
	if len(resp.Kvs) == 0 {
		return store.KV{}, fmt.Errorf("reading %s: %w", key, store.ErrNotFound)
	}
	return store.KV{Key: key, Value: resp.Kvs[0].Value, Rev: resp.Kvs[0].ModRevision}, nil
}

// List implements [store.Store].
func (c *client) List(ctx context.Context, prefix string) ([]store.KV, int64, error) {
	ctx, cancel, err := c.call(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer cancel()
	resp, err := c.etcd.Get(ctx, c.prefix+prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, 0, c.fail("listing "+prefix, err)
	}
	kvs := make([]store.KV, len(resp.Kvs))
	for i, kv := range resp.Kvs {
		kvs[i] = store.KV{Key: string(kv.Key[len(c.prefix):]), Value: kv.Value, Rev: kv.ModRevision}
	}
	return kvs, resp.Header.Revision, nil
}

// Txn implements [store.Store]. An error other than those that package store
// names, a timeout for one, leaves open whether the transaction was applied.
func (c *client) Txn(ctx context.Context, cmps []store.Cmp, ops []store.Op) (int64, error) {
	if err := store.CheckTxn(cmps, ops); err != nil {
		return 0, err
	}
	ctx, cancel, err := c.call(ctx)
	if err != nil {
		return 0, err
	}
	defer cancel()
	ifs := make([]clientv3.Cmp, len(cmps))
	for i, cmp := range cmps {
		ifs[i] = clientv3.Compare(clientv3.ModRevision(c.prefix+cmp.Key), "=", cmp.Rev)
	}
	thens := make([]clientv3.Op, len(ops))
	for i, op := range ops {
		thens[i] = c.op(op)
	}
	resp, err := c.etcd.Txn(ctx).If(ifs...).Then(thens...).Commit()
	if err != nil {
		return 0, c.fail("writing", err)
	}
	if !resp.Succeeded {
		return 0, fmt.Errorf("writing: %w", store.ErrConflict)
	}
	return resp.Header.Revision, nil
}

func (c *client) op(op store.Op) clientv3.Op {
	if op.Delete {
		return clientv3.OpDelete(c.prefix + op.Key)
	}
	var opts []clientv3.OpOption
	if op.Lease != 0 {
		opts = append(opts, clientv3.WithLease(clientv3.LeaseID(op.Lease)))
	}
	return clientv3.OpPut(c.prefix+op.Key, string(op.Value), opts...)
}

// Grant implements [store.Store].
func (c *client) Grant(ctx context.Context, ttl time.Duration) (store.LeaseID, error) {
	if ttl <= 0 {
		return 0, fmt.Errorf("granting a lease: ttl %s is not positive", ttl)
	}
	ctx, cancel, err := c.call(ctx)
	if err != nil {
		return 0, err
	}
	defer cancel()
	resp, err := c.etcd.Grant(ctx, int64((ttl+time.Second-1)/time.Second))
	if err != nil {
		return 0, c.fail("granting a lease", err)
	}
	return store.LeaseID(resp.ID), nil
}

// KeepAlive implements [store.Store].
func (c *client) KeepAlive(ctx context.Context, id store.LeaseID) error {
	ctx, cancel, err := c.call(ctx)
	if err != nil {
		return err
	}
	defer cancel()
	if _, err := c.etcd.KeepAliveOnce(ctx, clientv3.LeaseID(id)); err != nil {
		return c.fail(fmt.Sprintf("renewing lease %d", id), err)
	}
	return nil
}

// Revoke implements [store.Store].
func (c *client) Revoke(ctx context.Context, id store.LeaseID) error {
	ctx, cancel, err := c.call(ctx)
	if err != nil {
		return err
	}
	defer cancel()
	if _, err := c.etcd.Revoke(ctx, clientv3.LeaseID(id)); err != nil {
		return c.fail(fmt.Sprintf("revoking lease %d", id), err)
	}
	return nil
}

// Close implements [store.Store].
func (c *client) Close() error {
	var err error
	c.once.Do(func() {
		close(c.done)
		if err = c.close(); errors.Is(err, context.Canceled) {
			err = nil // how etcd's client says that it was closed
		}
	})
	return err
}
