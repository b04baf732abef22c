// Package ca is the certificate authority of one trust domain: it keeps the
// signing keys, issues X.509-SVIDs, rotates itself by the clock and says which
// roots to trust.
//
// A root signs one intermediate per replica of the control plane, and the
// intermediate signs SVIDs. Who may have which SVID is not decided here: package
// registry knows that, and package issuer asks it first.
package ca

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
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

// Signer is all that the CA asks of a private key, so that a key may live in a
// file, in a PKCS#11 token or in a key service. This package has the file form.
type Signer interface{ crypto.Signer }

// Config configures a [CA].
type Config struct {
	// TrustDomain is fixed in the store on first start. The zero value means
	// whatever the store says.
	TrustDomain spiffeid.TrustDomain
	// KeyDir holds the private keys. Replicas of one control plane share it.
	KeyDir string
	// Store holds the trust domain and the root certificates.
	Store store.Store
	// Replica names this replica's intermediate: letters, digits, '.', '_' and
	// '-', at most 64. Empty: "0".
	Replica string
	// RootTTL, IntermediateTTL and SVIDTTL are lifetimes. Each must be at least
	// six times the next. Zero: 10 years, 90 days, 24 hours.
	RootTTL, IntermediateTTL, SVIDTTL time.Duration
	// JWTKeyTTL is how long a JWT signing key lives, from publication to
	// withdrawal: at least an hour. Zero: 30 days.
	JWTKeyTTL time.Duration
	// JWTIssuer is the iss claim of JWT-SVIDs, a URL; empty: none.
	JWTIssuer string
	// TaintGrace is how long a tainted root stays in the bundle, for everybody to
	// renew. Zero: 30 s.
	TaintGrace time.Duration

	Now func() time.Time // nil: time.Now
	Log hclog.Logger     // nil: discard
}

const (
	defaultRootTTL         = 10 * 365 * 24 * time.Hour
	defaultIntermediateTTL = 90 * 24 * time.Hour
	defaultSVIDTTL         = 24 * time.Hour
	defaultJWTKeyTTL       = 30 * 24 * time.Hour
	minJWTKeyTTL           = time.Hour
	defaultTaintGrace      = 30 * time.Second
	maxRefreshHint         = 5 * time.Minute

	// Backdate is how far a certificate's NotBefore lies in the past, for peers
	// whose clocks are a little slow. Certificates have whole seconds, so the
	// distance is between Backdate and Backdate plus one second.
	Backdate = 29 * time.Second
)

var replicaName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$`)

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
	case cfg.JWTKeyTTL < minJWTKeyTTL:
		return fmt.Errorf("opening the CA: JWT keys must live at least %v, not %v", minJWTKeyTTL, cfg.JWTKeyTTL)
	case cfg.RootTTL < 6*cfg.IntermediateTTL:
		return fmt.Errorf("opening the CA: roots must live at least six times as long as intermediates (%v), not %v", cfg.IntermediateTTL, cfg.RootTTL)
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

	state  atomic.Pointer[state]
	mu     sync.Mutex  // held while the state is advanced
	server *serverSVID // the SVID in live; guarded by mu
}

// state is an immutable snapshot of what the CA signs with and publishes.
type state struct {
	roots      []*root // unexpired, in the order they were published; never empty
	active     *root
	signer     *authority // this replica's intermediate
	jwt        []*root    // JWT keys, as roots
	jwtActive  *root
	tainted    []Tainted
	sequence   uint64               // of the bundle
	published  *spiffebundle.Bundle // of roots and jwt
	superseded chan struct{}        // closed when a newer state has been set
}

// Open loads the CA, making keys and certificates on first start. Its errors are
// one line each and say what to do: another trust domain than the data's, a lost
// or corrupt key file, permissions that let others read keys.
func Open(ctx context.Context, cfg Config) (*CA, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	c := &CA{cfg: cfg, keys: keyDir{path: cfg.KeyDir, replica: cfg.Replica}, log: cfg.Log.Named("ca")}
	if err := c.keys.prepare(); err != nil {
		return nil, err
	}
	if err := c.Advance(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// TrustDomain is the one that the data was made for.
func (c *CA) TrustDomain() spiffeid.TrustDomain { return c.td }

// X509Roots returns the roots to trust, oldest first: active, next and retiring
// ones. The caller must not change them.
func (c *CA) X509Roots() []*x509.Certificate { return c.state.Load().bundle() }

// Bundle returns what to trust: roots and JWT keys, with a sequence number that
// grows with every change of the content (SPIFFE Trust Domain and Bundle 4.1.1)
// and a refresh hint. The caller must not change it.
func (c *CA) Bundle() *spiffebundle.Bundle { return c.state.Load().published }

func (s *state) bundle() []*x509.Certificate {
	certs := make([]*x509.Certificate, len(s.roots))
	for i, r := range s.roots {
		certs[i] = r.cert
	}
	return certs
}

// RootHash is the SHA-256 of the active root's public key (PKIX, DER), which a
// join token carries so that a sidecar can authenticate the control plane.
func (c *CA) RootHash() [sha256.Size]byte {
	return sha256.Sum256(c.state.Load().active.cert.RawSubjectPublicKeyInfo)
}

// WatchBundle calls fn with the current bundle at once and then with each new
// one, until ctx ends or fn fails; it returns that error. A slow fn sees only the
// newest.
func (c *CA) WatchBundle(ctx context.Context, fn func(*spiffebundle.Bundle) error) error {
	var last *spiffebundle.Bundle
	for {
		s := c.state.Load()
		if last == nil || !last.Equal(s.published) {
			if err := fn(s.published); err != nil {
				return err
			}
			last = s.published
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.superseded:
		}
	}
}

func sameCerts(a, b []*x509.Certificate) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !a[i].Equal(b[i]) {
			return false
		}
	}
	return true
}

// Authority is one signing key, for status output.
type Authority struct {
	Kind     string // root, intermediate or jwt
	Subject  string // of a JWT key: its key id
	State    string // next, active, retiring or tainted
	KeyHash  string // SHA-256 of the SubjectPublicKeyInfo, lower-case hex
	NotAfter time.Time
}

// Authorities lists the roots, this replica's intermediate and the JWT keys.
func (c *CA) Authorities() []Authority {
	s := c.state.Load()
	list := s.authorities("root", s.roots, s.active)
	list = append(list, Authority{"intermediate", s.signer.cert.Subject.CommonName, "active", keyHash(s.signer.cert), s.signer.cert.NotAfter})
	return append(list, s.authorities("jwt", s.jwt, s.jwtActive)...)
}

func (s *state) authorities(kind string, all []*root, active *root) []Authority {
	var list []Authority
	phase := "retiring"
	for _, r := range all {
		switch {
		case r == active:
			phase = "active"
		case phase != "retiring":
			phase = "next"
		}
		a := Authority{kind, r.cert.Subject.CommonName, phase, keyHash(r.cert), r.cert.NotAfter}
		if !r.taintedAt.IsZero() {
			a.State = "tainted"
		}
		list = append(list, a)
	}
	return list
}
