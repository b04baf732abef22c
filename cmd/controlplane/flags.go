package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-mesh/sallyport/internal/completion"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
)

// options are what the command line says.
type options struct {
	file         string
	dev, version bool
	cfg          controlplane.Config
	overrides    []func() error // of cfg, in the order written
}

// flags declares all flags.
func (o *options) flags() *flag.FlagSet {
	fs := flag.NewFlagSet("sallyport-controlplane", flag.ContinueOnError)
	fs.StringVar(&o.file, "config", "", "configuration `file` (YAML)")
	fs.BoolVar(&o.dev, "dev", false, "run on this machine without any configuration; state in .sallyport/")
	fs.BoolVar(&o.version, "version", false, "print the version")
	defineOverrides(&o.cfg, func(name, usage string, set func(string) error) {
		fs.Func(name, usage, func(v string) error {
			o.overrides = append(o.overrides, func() error { return set(v) })
			return nil
		})
	})
	return fs
}

// commands is the command line for completion.
func commands() *cobra.Command {
	return completion.Program("sallyport-controlplane", new(options).flags())
}

// parse reads flags and the file they name; flags override the file.
func parse(args []string, stderr io.Writer) (cfg controlplane.Config, showVersion bool, err error) {
	var o options
	fs := o.flags()
	fs.SetOutput(stderr)
	if err := fs.Parse(args); err != nil {
		return o.cfg, false, err
	}
	if fs.NArg() > 0 {
		return o.cfg, false, fmt.Errorf("unexpected argument %q; flags only", fs.Arg(0))
	}
	switch {
	case o.dev && o.file != "":
		return o.cfg, false, errors.New("-dev and -config exclude each other")
	case o.dev:
		o.cfg = controlplane.Dev()
	case o.file != "":
		if o.cfg, err = controlplane.LoadConfig(o.file); err != nil {
			return o.cfg, false, err
		}
	}
	for _, apply := range o.overrides {
		err = errors.Join(err, apply())
	}
	return o.cfg, o.version, err
}

// defineOverrides declares one flag for each key that an operator sets by hand.
func defineOverrides(c *controlplane.Config, define func(name, usage string, set func(string) error)) {
	text := func(name string, p *string, usage string) {
		define(name, usage, func(v string) error { *p = v; return nil })
	}
	text("trust-domain", &c.TrustDomain, "trust domain, as in shop.example; fixed on first start")
	text("data-dir", &c.DataDir, "`folder` for keys and state")
	text("listen", &c.Listen.GRPC, "`address` for sidecars (default 0.0.0.0:8443)")
	text("metrics-listen", &c.Listen.Metrics, "`address` for health and metrics (default 127.0.0.1:9901)")
	text("admin-socket", &c.AdminSocket, "unix socket `path` of the operator's API (default DATA/admin.sock)")
	text("policy-dir", &c.PolicyDir, "`folder` of policy files to watch; apply and rollback are then refused")
	text("etcd-prefix", &c.Etcd.Prefix, "key prefix in an external etcd (default /sallyport/)")
	text("etcd-ca", &c.Etcd.CAFile, "PEM `file`: CA of the external etcd")
	text("etcd-cert", &c.Etcd.CertFile, "PEM `file`: client certificate for the external etcd")
	text("etcd-key", &c.Etcd.KeyFile, "PEM `file`: client key for the external etcd")
	text("log-level", &c.Log.Level, "debug, info, warn or error")
	define("etcd-endpoints", "comma-separated `URLs` of an external etcd (default: embedded)", func(v string) error {
		c.Etcd.Endpoints = strings.Split(v, ",")
		return nil
	})
	define("svid-ttl", "lifetime of X.509-SVIDs (default 24h)", func(v string) error {
		d, err := time.ParseDuration(v)
		if err != nil {
			return fmt.Errorf("-svid-ttl: %w", err)
		}
		c.CA.SVIDTTL = d
		return nil
	})
}
