// Package runner runs a whole mesh on one machine, as `sallyport up DIR` does:
// it reads DIR/mesh.yaml, starts a control plane, then a sidecar and an app for
// each workload, shows their output, and stops them all again.
//
// It is for development and demonstrations. It supervises nothing: a process
// that ends is reported and stays down. All processes run as the calling user,
// so the sidecars' local listeners protect nothing from each other.
package runner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// Names of the programs that a mesh needs; both are looked up in
// [Config.BinDir] first and in PATH second.
const (
	controlPlaneProgram = "sallyport-controlplane"
	proxyProgram        = "sallyport-proxy"
)

// Config says which mesh to run and where its output goes.
type Config struct {
	// Dir is the folder that holds mesh.yaml.
	Dir string
	// State is the folder for keys, tokens, sockets and the control plane's
	// data; made if missing, 0700. Default: .sallyport in Dir.
	State string
	// PortOffset is added to every port in mesh.yaml.
	PortOffset int
	// BinDir is where programs are looked up before PATH. Default: the folder
	// of the running executable.
	BinDir string
	// Stdout gets the processes' output and what becomes ready; Stderr gets
	// what needs a person: a process that ended by itself.
	Stdout, Stderr io.Writer
	// Color prints each process's name in a colour of its own.
	Color bool
	// StartTimeout bounds how long one process may take to become ready.
	// Default: 30 s.
	StartTimeout time.Duration
	// StopTimeout bounds the orderly stop of all processes together; what is
	// left then is killed. Default: 10 s.
	StopTimeout time.Duration
}

// withDefaults returns c with absolute paths and every default filled in.
func (c Config) withDefaults() (Config, error) {
	var err error
	if c.Dir, err = filepath.Abs(c.Dir); err != nil {
		return c, fmt.Errorf("locating %s: %w", c.Dir, err)
	}
	if c.State == "" {
		c.State = defaultState(c.Dir)
	}
	if c.State, err = filepath.Abs(c.State); err != nil {
		return c, fmt.Errorf("locating %s: %w", c.State, err)
	}
	if c.BinDir == "" {
		exe, err := os.Executable()
		if err != nil {
			return c, fmt.Errorf("locating the running program: %w", err)
		}
		c.BinDir = filepath.Dir(exe)
	}
	if c.BinDir, err = filepath.Abs(c.BinDir); err != nil {
		return c, fmt.Errorf("locating %s: %w", c.BinDir, err)
	}
	if c.Stdout == nil {
		c.Stdout = io.Discard
	}
	if c.Stderr == nil {
		c.Stderr = io.Discard
	}
	if c.StartTimeout <= 0 {
		c.StartTimeout = 30 * time.Second
	}
	if c.StopTimeout <= 0 {
		c.StopTimeout = 10 * time.Second
	}
	return c, nil
}

// defaultState is the state folder of the mesh in dir.
func defaultState(dir string) string { return filepath.Join(dir, ".sallyport") }

// errAllEnded ends a run that has nothing left to run.
var errAllEnded = errors.New("every process of the mesh has ended; their last lines are above")

// Run starts the mesh in cfg.Dir and keeps it until ctx is done; that is the
// ordinary end and gives nil. It fails when something cannot start, and when
// every process has ended by itself. It returns only after every process is
// gone. Linux only.
func Run(ctx context.Context, cfg Config) (err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return err
	}
	mesh, err := load(cfg.Dir, cfg.PortOffset)
	if err != nil {
		return err
	}
	if err := checkPolicies(mesh); err != nil {
		return err
	}
	plan, err := newPlan(cfg, mesh)
	if err != nil {
		return err
	}
	unlock, err := lockState(cfg.State)
	if err != nil {
		return err
	}
	defer unlock()
	if err := plan.checkPortsFree(ctx); err != nil {
		return err
	}
	if err := plan.writeFiles(); err != nil {
		return err
	}
	g := newGroup(cfg, plan.names())
	defer g.stop()
	if err := plan.start(ctx, g); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	g.phase.Store(running)
	g.console.block(plan.summary())
	select {
	case <-ctx.Done():
		g.console.note("stopping")
		return nil
	case <-g.allEnded():
		return errAllEnded
	}
}
