package etcd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

const (
	readyTimeout = 30 * time.Second
	// quota bounds the database file. What the control plane keeps is bounded
	// well below it: history, audit log and the sets in force.
	quota = 1 << 30
	// walSegment replaces etcd's 64 MB, of which it preallocates two.
	walSegment = 8 << 20
)

// EmbeddedConfig says where the embedded server keeps its data.
type EmbeddedConfig struct {
	Dir string // etcd's own folder; made with mode 0700 where missing
	Log hclog.Logger
}

// walOnce guards the one write to wal.SegmentSizeBytes, a variable of etcd's
// that has no configuration field.
var walOnce sync.Once

// Embedded starts etcd inside this process, on c.Dir, and returns when it is
// ready, usually within a second. It opens no socket of any kind: this process
// is its only client. A second server on the same folder is refused at once.
func Embedded(ctx context.Context, c EmbeddedConfig) (store.Store, error) {
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("starting etcd in %s: %w", c.Dir, err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	core := newLogCore(c.Log)
	server, err := start(ctx, dir, core)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("starting etcd in %s: %w", dir, err)
	}
	cli := v3client.New(server.Server)
	s := newClient(cli, DefaultPrefix, c.Log, func() error {
		core.quiet()
		err := cli.Close()
		server.Close()
		return errors.Join(err, lock.Close())
	})
	if err := s.disarm(ctx, server); err != nil {
		s.Close()
		return nil, fmt.Errorf("starting etcd in %s: %w", dir, err)
	}
	return s, nil
}

// lockDir makes dir and holds a lock in it for as long as the file is open; the
// kernel lets go of it however the process ends.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the data folder: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("closing the data folder to others: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the data folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("data folder %s is in use by another control plane: stop it, or choose another folder: %w", dir, err)
	}
	return f, nil
}

// start runs the server and waits until it serves.
func start(ctx context.Context, dir string, core *logCore) (*embed.Etcd, error) {
	walOnce.Do(func() { wal.SegmentSizeBytes = walSegment })
	server, err := embed.StartEtcd(embedConfig(dir, core))
	if err != nil {
		return nil, err
	}
	timer := time.NewTimer(readyTimeout)
	defer timer.Stop()
	select {
	case <-server.Server.ReadyNotify():
		return server, nil
	case <-server.Server.StopNotify():
		err = errors.New("the server stopped by itself; the log above says why")
	case <-ctx.Done():
		err = ctx.Err()
	case <-timer.C:
		err = fmt.Errorf("not ready after %s", readyTimeout)
	}
	core.quiet()
	server.Close()
	return nil, err
}

// embedConfig is a single member that listens nowhere.
func embedConfig(dir string, core *logCore) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name = "sallyport"
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name) // a name only: nothing listens there
	cfg.Dir = dir
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(core))
	cfg.AuthToken = "" // no etcd users, so no tokens to sign

	// One member elects itself: short ticks make it ready sooner and allow
	// leases of a second.
	cfg.TickMs, cfg.ElectionMs = 50, 500
	cfg.PreVote = false

	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModePeriodic, "10m"
	cfg.QuotaBackendBytes = quota
	cfg.BootstrapDefragThresholdMegabytes = 64
	cfg.MaxTxnOps = store.MaxOps + 1
	cfg.MaxRequestBytes = 2 * store.MaxValue
	// Nobody has to catch up, so little of the log is kept in memory and on disk.
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = 1000, 10
	cfg.MaxSnapFiles, cfg.MaxWalFiles = 2, 2
	cfg.WarningApplyDuration = time.Second
	return cfg
}

// disarm clears the alarm that a full database leaves behind: the start
// defragmented it and compaction goes on, so writes may be tried again.
func (c *client) disarm(ctx context.Context, server *embed.Etcd) error {
	for _, alarm := range server.Server.Alarms() {
		if alarm.Alarm != etcdserverpb.AlarmType_NOSPACE {
			return fmt.Errorf("the database reports %s: restore it from a backup", alarm.Alarm)
		}
		c.log.Warn("the database was full; trying again", "quota_bytes", quota)
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		_, err := c.etcd.AlarmDisarm(ctx, (*clientv3.AlarmMember)(alarm))
		cancel()
		if err != nil {
			return fmt.Errorf("clearing the alarm of a full database: %w", err)
		}
	}
	return nil
}
