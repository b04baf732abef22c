// Package ca is the certificate authority of one trust domain: it keeps the
// signing keys, issues X.509-SVIDs and JWT-SVIDs, rotates itself by the clock and
// says which keys to trust.
//
// A root signs one intermediate per replica of the control plane, and the
// intermediate signs SVIDs. Who may have which SVID is not decided here: package
// registry knows that, and package issuer asks it first.
package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Config configures a [CA].
type Config struct {
	// TrustDomain is fixed in the store on first start. The zero value means
	// whatever the store says.
	TrustDomain spiffeid.TrustDomain
	// KeyDir holds the private keys. Replicas of one control plane share it.
	KeyDir string
	// Store holds the trust domain and what is public of the anchors.
	Store store.Store
	// Replica names this replica's intermediate: letters, digits, '.', '_' and
	// '-', at most 64. Empty: "0".
	Replica string
	// RootTTL, IntermediateTTL and SVIDTTL are lifetimes. Each must be at least
	// six times the next. Zero: 10 years, 90 days, 24 hours.
	RootTTL, IntermediateTTL, SVIDTTL time.Duration
	// JWTKeyTTL is the lifetime of a key that signs JWT-SVIDs: at least an hour.
	// Zero: 30 days.
	JWTKeyTTL time.Duration
	// TaintGrace is how long after its taint a root or JWT key leaves the bundle.
	// Its successor signs after a third of it; in the rest, whoever is connected
	// renews. Zero: 30 seconds.
	TaintGrace time.Duration
	// JWTIssuer is the claim iss of JWT-SVIDs: an https URL where OpenID Connect
	// discovery is served. Empty: no such claim.
	JWTIssuer string
	// ServerNames are DNS names and IP addresses under which the control plane is
	// reached by clients that know no SPIFFE IDs: they are in its own SVID, and in
	// no other.
	ServerNames []string

	// Signer says where the keys above the intermediates are.
	Signer SignerConfig

	Now func() time.Time // nil: time.Now
	Log hclog.Logger     // nil: discard
}

const (
	defaultRootTTL         = 10 * 365 * 24 * time.Hour
	defaultIntermediateTTL = 90 * 24 * time.Hour
	defaultSVIDTTL         = 24 * time.Hour
	defaultJWTKeyTTL       = 30 * 24 * time.Hour
	defaultTaintGrace      = 30 * time.Second
	minJWTKeyTTL           = time.Hour

	// Backdate is how far a certificate's NotBefore lies in the past, for peers
	// whose clocks are a little slow. Certificates have whole seconds, so the
	// distance is between Backdate and Backdate plus one second.
	Backdate = 29 * time.Second
)

var replicaName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$`)

var dnsName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*$`)

func (cfg Config) withDefaults() Config {
	setDefault(&cfg.RootTTL, defaultRootTTL)
	setDefault(&cfg.IntermediateTTL, defaultIntermediateTTL)
	setDefault(&cfg.SVIDTTL, defaultSVIDTTL)
	setDefault(&cfg.JWTKeyTTL, defaultJWTKeyTTL)
	setDefault(&cfg.TaintGrace, defaultTaintGrace)
	setDefault(&cfg.Replica, "0")
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	return cfg
}

func setDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func (cfg Config) validate() error {
	switch {
	case cfg.Store == nil || cfg.KeyDir == "":
		return errors.New("opening the CA: a store and a key folder are required")
	case !replicaName.MatchString(cfg.Replica):
		return fmt.Errorf("opening the CA: replica name %q: use letters, digits, '.', '_' and '-', at most 64", cfg.Replica)
	case cfg.SVIDTTL < time.Second:
		return fmt.Errorf("opening the CA: SVIDs must live at least 1s, not %v", cfg.SVIDTTL)
	case cfg.IntermediateTTL < 6*cfg.SVIDTTL:
		return fmt.Errorf("opening the CA: intermediates must live at least six times as long as SVIDs (%v), not %v", cfg.SVIDTTL, cfg.IntermediateTTL)
	case cfg.RootTTL < 6*cfg.IntermediateTTL:
		return fmt.Errorf("opening the CA: roots must live at least six times as long as intermediates (%v), not %v", cfg.IntermediateTTL, cfg.RootTTL)
	case cfg.JWTKeyTTL < minJWTKeyTTL:
		return fmt.Errorf("opening the CA: JWT keys must live at least %v, not %v", minJWTKeyTTL, cfg.JWTKeyTTL)
	case cfg.TaintGrace < 0:
		return fmt.Errorf("opening the CA: a taint grace of %v", cfg.TaintGrace)
	}
	for _, n := range cfg.ServerNames {
		if ip := net.ParseIP(n); ip != nil && ip.String() != n || ip == nil && !dnsName.MatchString(n) {
			return fmt.Errorf("opening the CA: %q is neither a DNS name in lower case nor an IP address", n)
		}
	}
	if err := cfg.Signer.validate(); err != nil {
		return err
	}
	return cfg.validateIssuer()
}

func (cfg Config) validateIssuer() error {
	if cfg.JWTIssuer == "" {
		return nil
	}
	u, err := url.Parse(cfg.JWTIssuer)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return fmt.Errorf("opening the CA: JWT issuer %q: want an https URL without query and fragment, as in https://identity.shop.example", cfg.JWTIssuer)
	}
	return nil
}

// CA issues the SVIDs of one trust domain. Its methods are safe for concurrent
// use.
type CA struct {
	cfg  Config
	keys keyDir
	td   spiffeid.TrustDomain
	live identity.Live
	log  hclog.Logger

	state atomic.Pointer[state]
	// problem is what the last Advance returned.
	problem atomic.Pointer[error]

	mu      sync.Mutex  // held while the state is advanced
	server  *serverSVID // the SVID in live; guarded by mu
	checked time.Time   // when the token was last asked; guarded by mu
	token   error       // what it said; guarded by mu
}

// state is an immutable snapshot of what the CA signs with and publishes.
type state struct {
	roots  []*anchor            // in the order they were published; never empty
	active *anchor              // the root that signs intermediates
	jwts   []*anchor            // as roots
	jwt    *anchor              // the key that signs JWT-SVIDs
	bundle *spiffebundle.Bundle // what the store says, with its sequence number
	signer *authority           // this replica's intermediate
	// cross is the active root signed by a tainted one; see Taint. Workloads
	// present it for the life of an SVID, the control plane longer.
	cross, serverCross []*x509.Certificate
	tainted            []Tainted
	authorities        []Authority
	superseded         chan struct{} // closed when a newer state has been set
}

// Open loads the CA, making keys and certificates on first start. Its errors are
// one line each and say what to do: another trust domain than the data's, a lost
// or corrupt key file, permissions that let others read keys.
func Open(ctx context.Context, cfg Config) (*CA, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	c := &CA{cfg: cfg, keys: keyDir{path: cfg.KeyDir, replica: cfg.Replica, token: cfg.Signer.PKCS11}, log: cfg.Log.Named("ca")}
	if err := c.keys.prepare(); err != nil {
		return nil, err
	}
	// What could not be done and did not have to be is no reason not to start.
	if err := c.Advance(ctx); err != nil && c.state.Load() == nil {
		return nil, err
	}
	return c, nil
}

// TrustDomain is the one that the data was made for.
func (c *CA) TrustDomain() spiffeid.TrustDomain { return c.td }
