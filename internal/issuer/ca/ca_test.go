package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	td       = spiffeid.RequireTrustDomainFromString("shop.example")
	payments = spiffeid.RequireFromPath(td, "/shop/payments")
)

// clock is an injected clock.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// lifetimes small enough that all numbers in the tests are easy: a root lives
// 360 h, so half is 180 h and five sixths are 300 h.
func config(t *testing.T, c *clock) Config {
	s := store.NewMemory()
	t.Cleanup(func() { s.Close() })
	return Config{
		TrustDomain: td, KeyDir: filepath.Join(t.TempDir(), "keys"), Store: s, Now: c.Now,
		RootTTL: 360 * time.Hour, IntermediateTTL: 60 * time.Hour, SVIDTTL: 10 * time.Hour, JWTKeyTTL: 120 * time.Hour,
	}
}

func open(t *testing.T, cfg Config) *CA {
	t.Helper()
	c, err := Open(t.Context(), cfg)
	require.NoError(t, err)
	return c
}

func newECKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

func issue(t *testing.T, c *CA) *Issued {
	t.Helper()
	issued, err := c.Issue(t.Context(), Request{ID: payments, Key: newECKey(t).Public(), Instance: "i1"})
	require.NoError(t, err)
	return issued
}

func verify(chain, roots []*x509.Certificate, now time.Time) error {
	_, err := identity.Verify(chain, x509bundle.FromX509Authorities(td, roots), now)
	return err
}

func TestIssueKeepsTheX509SVIDProfile(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	for _, instance := range []string{"", "0123456789abcdef0123"} {
		key := newECKey(t)
		issued, err := c.Issue(t.Context(), Request{ID: payments, Key: key.Public(), Instance: instance})
		require.NoError(t, err)
		leaf := issued.Chain[0]
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != payments.String() {
			t.Errorf("X 2: got URI SANs %v, want %s", leaf.URIs, payments)
		}
		if instance == "" && !critical(leaf, oidSubjectAltName) {
			t.Error("X 3.1: empty subject and SAN not critical")
		}
		if leaf.IsCA || !leaf.BasicConstraintsValid {
			t.Error("X 4.1: leaf does not say cA false")
		}
		if leaf.KeyUsage != x509.KeyUsageDigitalSignature || !critical(leaf, oidKeyUsage) {
			t.Errorf("X 4.3: got key usage %b", leaf.KeyUsage)
		}
		if len(leaf.ExtKeyUsage) != 2 {
			t.Errorf("X 4.4: got %v", leaf.ExtKeyUsage)
		}
		if got := clk.Now().Sub(leaf.NotBefore); got > 30*time.Second || got <= 0 {
			t.Errorf("backdated by %v", got)
		}
		if got := leaf.NotAfter.Sub(clk.Now()); got != 10*time.Hour {
			t.Errorf("lives %v, want 10h", got)
		}
		if got := Instance(leaf); got != instance {
			t.Errorf("got instance %q, want %q", got, instance)
		}
		if err := verify(issued.Chain, issued.Bundle, clk.Now()); err != nil {
			t.Error(err)
		}
		for _, signer := range []*x509.Certificate{issued.Chain[1], issued.Bundle[0]} {
			if signer.URIs[0].String() != "spiffe://shop.example" || !signer.IsCA {
				t.Errorf("X 3.2, 4.1: signing certificate %s: %v", signer.Subject, signer.URIs)
			}
		}
	}
}

func TestIssueRefuses(t *testing.T) {
	c := open(t, config(t, newClock()))
	key := newECKey(t).Public()
	for name, req := range map[string]Request{
		"another trust domain":  {ID: spiffeid.RequireFromString("spiffe://other.example/a"), Key: key},
		"no path":               {ID: td.ID(), Key: key},
		"zero ID":               {Key: key},
		"control plane":         {ID: spiffeid.RequireFromPath(td, identity.ControlPlanePath), Key: key},
		"reserved":              {ID: spiffeid.RequireFromPath(td, "/sallyport/x"), Key: key},
		"no key":                {ID: payments},
		"instance with newline": {ID: payments, Key: key, Instance: "a\nb"},
		"long instance":         {ID: payments, Key: key, Instance: strings.Repeat("a", 65)},
	} {
		_, err := c.Issue(t.Context(), req)
		if err == nil || strings.Contains(err.Error(), "withheld") { // by the linter only
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestCheckKey(t *testing.T) {
	ec := func(curve elliptic.Curve) crypto.PublicKey {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		require.NoError(t, err)
		return k.Public()
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	giant := rsa.PublicKey{N: rsaKey.N, E: 65537}
	giant.N = giant.N.Lsh(rsaKey.N, 4096)
	for _, c := range []struct {
		name string
		key  crypto.PublicKey
		ok   bool
	}{
		{"P-256", ec(elliptic.P256()), true},
		{"P-384", ec(elliptic.P384()), true},
		{"P-521", ec(elliptic.P521()), false},
		{"P-224", ec(elliptic.P224()), false},
		{"Ed25519", ed, true},
		{"RSA", &rsa.PublicKey{N: giant.N, E: 65537}, false},
		{"string", "key", false},
	} {
		if err := CheckKey(c.key); (err == nil) != c.ok {
			t.Errorf("%s: got %v, want ok=%v", c.name, err, c.ok)
		}
	}
	small, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	if err := CheckKey(small.Public()); err != nil {
		t.Errorf("RSA 2048: %v", err)
	}
}

func TestLintWithholds(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	s := c.state.Load()
	key := newECKey(t)
	for name, spoil := range map[string]func(*x509.Certificate){
		"two URI SANs": func(x *x509.Certificate) { x.URIs = append(x.URIs, td.ID().URL()) },
		"another URI SAN": func(x *x509.Certificate) {
			x.URIs = x.URIs[:0:0]
			x.URIs = append(x.URIs, spiffeid.RequireFromPath(td, "/x").URL())
		},
		"a DNS SAN":        func(x *x509.Certificate) { x.DNSNames = []string{"payments"} },
		"cA true":          func(x *x509.Certificate) { x.IsCA = true },
		"keyEncipherment":  func(x *x509.Certificate) { x.KeyUsage |= x509.KeyUsageKeyEncipherment },
		"keyCertSign":      func(x *x509.Certificate) { x.KeyUsage |= x509.KeyUsageCertSign },
		"no server auth":   func(x *x509.Certificate) { x.ExtKeyUsage = x.ExtKeyUsage[1:] },
		"too long a life":  func(x *x509.Certificate) { x.NotAfter = x.NotAfter.Add(time.Hour) },
		"backdated a day":  func(x *x509.Certificate) { x.NotBefore = x.NotBefore.Add(-24 * time.Hour) },
		"not valid yet":    func(x *x509.Certificate) { x.NotBefore = clk.Now().Add(time.Hour) },
		"another instance": func(x *x509.Certificate) { x.Subject.SerialNumber = "i2" },
		"a common name":    func(x *x509.Certificate) { x.Subject.CommonName = "payments" },
		"nothing":          func(*x509.Certificate) {},
	} {
		tmpl, err := template(payments, clk.Now(), c.cfg.SVIDTTL)
		require.NoError(t, err)
		tmpl.Subject.SerialNumber = "i1"
		tmpl.KeyUsage = x509.KeyUsageDigitalSignature
		tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		spoil(tmpl)
		leaf, err := sign(tmpl, s.signer, key.Public())
		require.NoError(t, err)
		issued := &Issued{Chain: []*x509.Certificate{leaf, s.signer.cert}, Bundle: s.certs()}
		err = c.lintSVID(issued, Request{ID: payments, Key: key.Public(), Instance: "i1"}, clk.Now())
		if (err == nil) != (name == "nothing") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	issued := issue(t, c)
	if err := c.lintSVID(issued, Request{ID: payments, Key: key.Public(), Instance: "i1"}, clk.Now()); err == nil {
		t.Error("another key: released")
	}
}

func TestServerSVIDPresentsTheRoot(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	svid, err := c.ServerSVID().GetX509SVID()
	require.NoError(t, err)
	if got := svid.ID.Path(); got != identity.ControlPlanePath {
		t.Errorf("got %s", got)
	}
	last := svid.Certificates[len(svid.Certificates)-1]
	if sha256.Sum256(last.RawSubjectPublicKeyInfo) != c.RootHash() {
		t.Error("the chain does not end with the active root")
	}
	if err := verify(svid.Certificates, c.X509Roots(), clk.Now()); err != nil {
		t.Error(err)
	}
	clk.Add(time.Hour)
	require.NoError(t, c.Advance(t.Context()))
	next, err := c.ServerSVID().GetX509SVID()
	require.NoError(t, err)
	if bytes.Equal(next.Certificates[0].RawSubjectPublicKeyInfo, svid.Certificates[0].RawSubjectPublicKeyInfo) {
		t.Error("not renewed with a fresh key after an hour of ten")
	}
}

func TestOpenAgainGoesOnWithTheSameKeys(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	first := open(t, cfg)
	issued := issue(t, first)
	clk.Add(time.Hour)
	cfg.TrustDomain = spiffeid.TrustDomain{}
	second := open(t, cfg)
	if second.TrustDomain() != td || second.RootHash() != first.RootHash() {
		t.Error("another trust domain or root after a restart")
	}
	if !second.state.Load().signer.cert.Equal(first.state.Load().signer.cert) {
		t.Error("another intermediate after a restart")
	}
	if err := verify(issued.Chain, second.X509Roots(), clk.Now()); err != nil {
		t.Error(err)
	}
}

func TestKeysAreReadableByTheOwnerOnly(t *testing.T) {
	cfg := config(t, newClock())
	open(t, cfg)
	files, err := filepath.Glob(filepath.Join(cfg.KeyDir, "*"))
	require.NoError(t, err)
	if len(files) != 3 {
		t.Errorf("got %v, want a root, an intermediate and a JWT key", files)
	}
	for _, f := range files {
		st, err := os.Stat(f)
		require.NoError(t, err)
		if st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v", f, st.Mode())
		}
	}
	st, err := os.Stat(cfg.KeyDir)
	require.NoError(t, err)
	if st.Mode().Perm() != 0o700 {
		t.Errorf("%s: mode %v", cfg.KeyDir, st.Mode())
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	rootFile := func(cfg Config) string {
		files, err := filepath.Glob(filepath.Join(cfg.KeyDir, "root-*.pem"))
		require.NoError(t, err)
		require.Len(t, files, 1)
		return files[0]
	}
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, cfg *Config)
		want  string
	}{
		{"another trust domain", func(_ *testing.T, cfg *Config) {
			cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.example")
		}, "the data belongs to trust domain shop.example, not to other.example; start with shop.example"},
		{"lost root key", func(t *testing.T, cfg *Config) { require.NoError(t, os.Remove(rootFile(*cfg))) }, "is missing, and root"},
		{"lost key folder", func(t *testing.T, cfg *Config) { cfg.KeyDir = filepath.Join(t.TempDir(), "new") }, "restore the file from a backup"},
		{"truncated root key", func(t *testing.T, cfg *Config) { require.NoError(t, os.Truncate(rootFile(*cfg), 40)) }, "is corrupt"},
		{"empty root key", func(t *testing.T, cfg *Config) { require.NoError(t, os.Truncate(rootFile(*cfg), 0)) }, "is corrupt"},
		{"corrupt intermediate", func(t *testing.T, cfg *Config) {
			require.NoError(t, os.WriteFile(filepath.Join(cfg.KeyDir, "intermediate-0.pem"), []byte("x"), 0o600))
		}, "restore it from a backup"},
		{"key of another certificate", func(t *testing.T, cfg *Config) {
			data, err := os.ReadFile(filepath.Join(cfg.KeyDir, "intermediate-0.pem"))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(rootFile(*cfg), data, 0o600))
		}, "another certificate"},
		{"key and certificate that do not fit", func(t *testing.T, cfg *Config) {
			mine, err := os.ReadFile(rootFile(*cfg))
			require.NoError(t, err)
			other, err := os.ReadFile(filepath.Join(cfg.KeyDir, "intermediate-0.pem"))
			require.NoError(t, err)
			end := []byte("-----END PRIVATE KEY-----\n")
			key, _, _ := bytes.Cut(other, end)
			_, cert, _ := bytes.Cut(mine, end)
			require.NoError(t, os.WriteFile(rootFile(*cfg), bytes.Join([][]byte{key, cert}, end), 0o600))
		}, "the certificate is for another key"},
		{"readable key", func(t *testing.T, cfg *Config) { require.NoError(t, os.Chmod(rootFile(*cfg), 0o640)) }, "run chmod 600"},
		{"open key folder", func(t *testing.T, cfg *Config) { require.NoError(t, os.Chmod(cfg.KeyDir, 0o755)) }, "run chmod 700"},
		{"lost JWT key", func(t *testing.T, cfg *Config) {
			files, err := filepath.Glob(filepath.Join(cfg.KeyDir, "jwt-*.pem"))
			require.NoError(t, err)
			require.Len(t, files, 1)
			require.NoError(t, os.Remove(files[0]))
		}, "is missing, and JWT key"},
		{"short JWT key", func(_ *testing.T, cfg *Config) { cfg.JWTKeyTTL = 59 * time.Minute }, "at least 1h"},
		{"issuer without TLS", func(_ *testing.T, cfg *Config) { cfg.JWTIssuer = "http://id.shop.example" }, "want an https URL"},
		{"issuer with query", func(_ *testing.T, cfg *Config) { cfg.JWTIssuer = "https://id.shop.example/?a=b" }, "want an https URL"},
		{"short root", func(_ *testing.T, cfg *Config) { cfg.RootTTL = 359 * time.Hour }, "six times"},
		{"short intermediate", func(_ *testing.T, cfg *Config) { cfg.IntermediateTTL = 59 * time.Hour }, "six times"},
		{"bad replica", func(_ *testing.T, cfg *Config) { cfg.Replica = "../x" }, "replica name"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := config(t, newClock())
			open(t, cfg)
			c.spoil(t, &cfg)
			_, err := Open(t.Context(), cfg)
			require.ErrorContains(t, err, c.want)
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
		})
	}
	cfg := config(t, newClock())
	cfg.TrustDomain = spiffeid.TrustDomain{}
	_, err := Open(t.Context(), cfg)
	require.ErrorContains(t, err, "no trust domain is configured")
}

func TestWatchBundle(t *testing.T) {
	clk := newClock()
	c := open(t, config(t, clk))
	ctx, cancel := context.WithCancel(t.Context())
	seen := make(chan int)
	done := make(chan error)
	go func() {
		done <- c.WatchBundle(ctx, func(b *spiffebundle.Bundle) error {
			seen <- len(b.X509Authorities())
			return nil
		})
	}()
	if got := <-seen; got != 1 {
		t.Errorf("at once: got %d roots, want 1", got)
	}
	clk.Add(180 * time.Hour)
	require.NoError(t, c.Advance(t.Context()))
	if got := <-seen; got != 2 {
		t.Errorf("after half of the root's life: got %d roots, want 2", got)
	}
	cancel()
	if err := <-done; err != context.Canceled {
		t.Errorf("got %v", err)
	}
	stop := fmt.Errorf("stop")
	if err := c.WatchBundle(t.Context(), func(*spiffebundle.Bundle) error { return stop }); err != stop {
		t.Errorf("got %v, want fn's error", err)
	}
}
