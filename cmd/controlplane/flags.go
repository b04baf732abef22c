package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/controlplane"
)

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
