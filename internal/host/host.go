// Package host composes the agent of one host: it enrols like a sidecar, and then
// gives every process of the host the identity that its evidence proves, at a
// Workload API socket and in files.
//
// It carries no traffic and decides nothing: which process is which workload is
// decided by the control plane, from what the agent says of it. docs/agent.md is
// its manual.
package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/user"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/agent/endpoint"
	"github.com/sallyport-mesh/sallyport/internal/agent/pemfile"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// enrollWithin is how long a first start waits for the control plane. One that has
// enrolled before waits for ever.
const enrollWithin = 30 * time.Second

// Options are an agent's surroundings.
type Options struct {
	Log     hclog.Logger     // required
	Now     func() time.Time // nil: time.Now
	Version string           // shown in the metrics
}

// Host is one host's agent. Make it with [New], let it work with Run.
type Host struct {
	cfg Config
	log hclog.Logger
	now func() time.Time

	agent    *agent.Agent
	book     *revocation.Book // what is refused, to renew it
	keeper   *revocation.Keeper
	wallet   *agent.Wallet
	endpoint *endpoint.Server // nil: no socket
	files    []*agent.Files

	health      *admin.Health
	metrics     *prometheus.Registry
	stopping    atomic.Bool
	adminHTTP   net.Listener // nil: none
	adminSocket net.Listener // nil: none
}

// New opens every listener and folder and reads the state, so that what is wrong
// shows at once; it contacts nobody. An error is one line that says what to do.
// cfg comes from [Load].
func New(ctx context.Context, cfg Config, opts Options) (*Host, error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	h := &Host{cfg: cfg, log: opts.Log, now: opts.Now, metrics: prometheus.NewRegistry()}
	if err := h.open(ctx, opts); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

func (h *Host) open(ctx context.Context, opts Options) (err error) {
	h.agent, err = agent.New(agent.Config{
		ControlPlane: h.cfg.ControlPlane, Evidence: h.cfg.evidence(), TrustBundle: h.cfg.TrustBundle,
		StateDir: h.cfg.StateDir, Now: h.now, Log: h.log, EnrollWithin: enrollWithin, Check: h.check,
	})
	if err != nil {
		return err
	}
	h.book = revocation.NewBook(h.agent.Source(), h.now)
	h.keeper = revocation.NewKeeper(h.cfg.StateDir, h.log.Named("revocation"))
	h.keeper.Restore(h.book)
	h.book.Watch(h.refused)
	log := h.log.Named("workload-api")
	h.wallet = agent.NewWallet(h.agent, agent.WalletConfig{Find: evidenceOf, Log: log})
	if h.cfg.WorkloadAPI.Socket != "" {
		if h.endpoint, err = endpoint.New(endpoint.Config{Path: h.cfg.WorkloadAPI.Socket, Holder: h.wallet, CheckJWT: h.book.CheckJWT, Log: log}); err != nil {
			return fmt.Errorf("workloadAPI.socket: %w", err)
		}
	}
	for i, file := range h.cfg.Files {
		if err := h.openFiles(file); err != nil {
			return fmt.Errorf("files[%d]: %w", i, err)
		}
	}
	h.openHealth()
	admin.NewMetrics(h.metrics, opts.Version, h.sources())
	if h.cfg.Admin.Listen != "" {
		if h.adminHTTP, err = admin.Listen(ctx, h.cfg.Admin.Listen); err != nil {
			return fmt.Errorf("admin.listen: %w", err)
		}
	}
	if h.cfg.Admin.Socket != "" {
		if h.adminSocket, err = admin.ListenUnix(ctx, h.cfg.Admin.Socket); err != nil {
			return fmt.Errorf("admin.socket: %w", err)
		}
	}
	return nil
}

// check refuses a control plane that is revoked. There is a book before anything is
// dialled.
func (h *Host) check(p identity.Peer) error { return h.book.Check(p) }

func (h *Host) openFiles(cfg pemfile.Config) error {
	of := pemfile.Config{User: cfg.User} // the group is who may read, not who it is
	uid, gid, err := of.Owner()
	if err != nil {
		return err
	}
	w, err := pemfile.New(cfg, h.log.Named("files"))
	if err != nil {
		return err
	}
	if cfg.GRPC {
		if err := xds.AddBootstrap(w, h.cfg.ControlPlane); err != nil {
			return errors.Join(err, w.Close())
		}
	}
	evidence := userEvidence(uint32(uid), uint32(max(gid, 0)))
	h.files = append(h.files, agent.NewFiles(h.wallet, w, evidence, uint32(uid)))
	return nil
}

// close gives back what New opened, where Run will not.
func (h *Host) close() {
	var errs []error
	if h.endpoint != nil {
		errs = append(errs, h.endpoint.Close())
	}
	for _, f := range h.files {
		errs = append(errs, f.Close())
	}
	for _, ln := range []net.Listener{h.adminHTTP, h.adminSocket} {
		if ln != nil {
			errs = append(errs, ln.Close())
		}
	}
	if err := errors.Join(errs...); err != nil {
		h.log.Debug("closing after an error", "error", err)
	}
}

// AdminAddr is the address of health and metrics; nil when there is none.
func (h *Host) AdminAddr() net.Addr {
	if h.adminHTTP == nil {
		return nil
	}
	return h.adminHTTP.Addr()
}

// evidenceOf is what is known of a caller.
func evidenceOf(ctx context.Context, c endpoint.Caller) (agent.Evidence, error) {
	p, err := c.Process(ctx)
	if err != nil {
		return nil, err
	}
	return attest.ProcessSelectors(p), nil
}

// userEvidence is what is known of any process of a user.
func userEvidence(uid, gid uint32) agent.Evidence {
	e := agent.Evidence{"uid": {strconv.FormatUint(uint64(uid), 10)}, "gid": {strconv.FormatUint(uint64(gid), 10)}}
	if u, err := user.LookupId(e["uid"][0]); err == nil {
		e["user"] = []string{u.Username}
	}
	if g, err := user.LookupGroupId(e["gid"][0]); err == nil {
		e["group"] = []string{g.Name}
	}
	return e
}
