package ca

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// signerKind is one way to keep the keys above the intermediates.
type signerKind struct {
	name  string
	setUp func(t *testing.T, clk *clock, cfg *Config)
}

var signerKinds = []signerKind{
	{"file", func(*testing.T, *clock, *Config) {}},
	{"pkcs11", func(t *testing.T, _ *clock, cfg *Config) { cfg.Signer.PKCS11 = newToken(t).config }},
	{"upstream", func(t *testing.T, clk *clock, cfg *Config) { cfg.Signer.Upstream = newOffline(t, clk).replica("0") }},
}

// Every kind of signer passes the same tests.
func TestSigners(t *testing.T) {
	for _, kind := range signerKinds {
		t.Run(kind.name, func(t *testing.T) {
			clk := newClock()
			cfg := config(t, clk)
			kind.setUp(t, clk, &cfg)
			c := open(t, cfg)
			issued := issue(t, c)
			if err := verify(issued.Chain, c.X509Roots(), clk.Now()); err != nil {
				t.Errorf("its SVID: %v", err)
			}
			if err := verifyJWT(issueJWT(t, c), c.Bundle(), clk.Now()); err != nil {
				t.Errorf("its token: %v", err)
			}
			server, err := c.ServerSVID().GetX509SVID()
			require.NoError(t, err)
			if err := verify(server.Certificates, c.X509Roots(), clk.Now()); err != nil {
				t.Errorf("its own SVID: %v", err)
			}
			if last := server.Certificates[len(server.Certificates)-1]; sha256.Sum256(last.RawSubjectPublicKeyInfo) != c.RootHash() {
				t.Error("the chain does not end with the root that join tokens name")
			}
			if list := c.Health(); len(list) != 0 {
				t.Errorf("health: %v", list)
			}
			signer := issued.Chain[1]
			if !signer.IsCA || len(signer.URIs) != 1 || signer.URIs[0].String() != td.IDString() || signer.KeyUsage&x509.KeyUsageCertSign == 0 {
				t.Errorf("X 3.2, 4.1, 4.3: signing certificate %v %v", signer.URIs, signer.KeyUsage)
			}

			clk.Add(time.Hour)
			again := open(t, cfg)
			if !again.state.Load().signer.cert.Equal(signer) || !again.Bundle().Equal(c.Bundle()) {
				t.Error("a restart changes who signs, or the bundle")
			}
			if err := verify(issue(t, again).Chain, issued.Bundle, clk.Now()); err != nil {
				t.Errorf("after a restart, a peer of before: %v", err)
			}
			files, err := filepath.Glob(filepath.Join(cfg.KeyDir, "root-*"))
			require.NoError(t, err)
			for _, f := range files {
				data, err := os.ReadFile(f)
				require.NoError(t, err)
				if kind.name != "file" && strings.Contains(string(data), "PRIVATE") {
					t.Errorf("%s holds the key itself", f)
				}
			}
			if kind.name == "upstream" && len(files) != 0 {
				t.Errorf("a root was made: %v", files)
			}
		})
	}
}

// token is a SoftHSM2 token of this test alone.
type token struct {
	config PKCS11
	dir    string // of the token's objects
}

func newToken(t *testing.T) *token {
	t.Helper()
	module := ""
	for _, f := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so", "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so"} {
		if _, err := os.Stat(f); err == nil {
			module = f
		}
	}
	util, err := exec.LookPath("softhsm2-util")
	if _, gcc := exec.LookPath("gcc"); module == "" || err != nil || gcc != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("needs softhsm2 and gcc, and CI has them")
		}
		t.Skip("needs softhsm2 and gcc")
	}
	dir := t.TempDir()
	k := &token{dir: filepath.Join(dir, "tokens")}
	require.NoError(t, os.Mkdir(k.dir, 0o700))
	conf := filepath.Join(dir, "softhsm2.conf")
	require.NoError(t, os.WriteFile(conf, []byte("directories.tokendir = "+k.dir+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600))
	t.Setenv("SOFTHSM2_CONF", conf)
	run(t, util, "--init-token", "--free", "--label", "mesh", "--so-pin", "12345678", "--pin", "4321")
	k.config = PKCS11{Helper: filepath.Join(dir, "sallyport-pkcs11"), Module: module, Token: "mesh", PINFile: filepath.Join(dir, "pin")}
	require.NoError(t, os.WriteFile(k.config.PINFile, []byte("4321\n"), 0o600))
	cmd := exec.Command("go", "build", "-tags", "pkcs11", "-o", k.config.Helper, "./pkcs11")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return k
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// A token that is gone stops nothing before it has to sign, and is not needed to
// start; when it is back, what was due is done.
func TestTokenGoesAndComesBack(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	k := newToken(t)
	cfg.Signer.PKCS11 = k.config
	c := open(t, cfg)
	known, before := c.X509Roots(), issue(t, c)

	away := k.dir + "-away"
	require.NoError(t, os.Rename(k.dir, away))
	require.NoError(t, os.Mkdir(k.dir, 0o700))
	clk.Add(tokenCheck) // nothing is due: health says it all the same
	require.ErrorContains(t, c.Advance(t.Context()), "cannot be reached")
	if list := c.Health(); len(list) != 1 {
		t.Errorf("health: %v", list)
	}
	clk.Add(31 * time.Hour) // past half of the intermediate's life of 60 h
	err := c.Advance(t.Context())
	require.ErrorContains(t, err, `PKCS#11 token "mesh"`)
	list := c.Health()
	if len(list) == 0 || !strings.Contains(list[0].Error(), `PKCS#11 token "mesh"`) {
		t.Errorf("health: %v", list)
	}
	for _, w := range list {
		if strings.Contains(w.Error(), "\n") || strings.Contains(w.Error(), "4321") {
			t.Errorf("more than one line, or the PIN: %v", w)
		}
	}
	after := issue(t, c)
	if !after.Chain[1].Equal(before.Chain[1]) {
		t.Error("another intermediate without the root's key")
	}
	if err := verify(after.Chain, known, clk.Now()); err != nil {
		t.Errorf("without the token: %v", err)
	}
	server, err := c.ServerSVID().GetX509SVID()
	require.NoError(t, err)
	if !server.Certificates[0].NotAfter.After(clk.Now()) {
		t.Error("the control plane's own SVID was not renewed")
	}
	restarted := open(t, cfg)
	if err := verify(issue(t, restarted).Chain, known, clk.Now()); err != nil {
		t.Errorf("started without the token: %v", err)
	}

	require.NoError(t, os.Remove(k.dir))
	require.NoError(t, os.Rename(away, k.dir))
	require.NoError(t, c.Advance(t.Context()))
	if issue(t, c).Chain[1].Equal(before.Chain[1]) {
		t.Error("the token is back and the old intermediate signs")
	}
	if list := c.Health(); len(list) != 0 {
		t.Errorf("health: %v", list)
	}
}

// A root of the token follows a root of the token, or of a file: the signer may
// be changed while a root lives.
func TestTokenTakesOverFromFile(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	c := open(t, cfg)
	known := c.X509Roots()
	cfg.Signer.PKCS11 = newToken(t).config
	c = open(t, cfg)
	if err := verify(issue(t, c).Chain, known, clk.Now()); err != nil {
		t.Errorf("right after the change: %v", err)
	}
	clk.Add(181 * time.Hour)
	require.NoError(t, c.Advance(t.Context()))
	published := c.X509Roots()
	clk.Add(125 * time.Hour)
	require.NoError(t, c.Advance(t.Context()))
	if _, ok := c.state.Load().active.signer.(*tokenKey); !ok {
		t.Error("the root of the token does not sign")
	}
	if err := verify(issue(t, c).Chain, published[1:], clk.Now()); err != nil {
		t.Errorf("under the root of the token: %v", err)
	}
}

func TestTokenErrorsAreClear(t *testing.T) {
	k := newToken(t)
	other := filepath.Join(t.TempDir(), "pin")
	require.NoError(t, os.WriteFile(other, []byte("9999\n"), 0o600))
	open := filepath.Join(t.TempDir(), "open")
	require.NoError(t, os.WriteFile(open, []byte("4321\n"), 0o644))
	script := filepath.Join(t.TempDir(), "dies")
	require.NoError(t, os.WriteFile(script, []byte("#!/bin/sh\nkill -9 $$\n"), 0o700))
	for _, row := range []struct {
		name  string
		spoil func(*Config)
		want  string
	}{
		{"wrong PIN", func(c *Config) { c.Signer.PKCS11.PINFile = other }, "PIN"},
		{"readable PIN", func(c *Config) { c.Signer.PKCS11.PINFile = open }, "run chmod 600"},
		{"no PIN file", func(c *Config) { c.Signer.PKCS11.PINFile = "/nowhere" }, "/nowhere"},
		{"another token", func(c *Config) { c.Signer.PKCS11.Token = "other" }, `PKCS#11 token "other"`},
		{"no module", func(c *Config) { c.Signer.PKCS11.Module = "/nowhere.so" }, "opening the token"},
		{"no helper", func(c *Config) { c.Signer.PKCS11.Helper = "/nowhere" }, "/nowhere"},
		{"helper that dies", func(c *Config) { c.Signer.PKCS11.Helper = script }, "signal: killed"},
		{"no label", func(c *Config) { c.Signer.PKCS11.Token = "" }, "needs helper, module"},
		{"two signers", func(c *Config) { c.Signer.Upstream.CertFile = "x" }, "configure one of them"},
	} {
		cfg := config(t, newClock())
		cfg.Signer.PKCS11 = k.config
		row.spoil(&cfg)
		_, err := Open(t.Context(), cfg)
		if err == nil || !strings.Contains(err.Error(), row.want) || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "4321") {
			t.Errorf("%s: got %v, want one line with %q", row.name, err, row.want)
		}
	}
	// A key of the token, and no token configured.
	cfg := config(t, newClock())
	cfg.Signer.PKCS11 = k.config
	_, err := Open(t.Context(), cfg)
	require.NoError(t, err)
	cfg.Signer.PKCS11, cfg.Replica = PKCS11{}, "1"
	_, err = Open(t.Context(), cfg)
	require.ErrorContains(t, err, "and none is configured")
}

// A token that signs with another key than its certificate says is not believed.
func TestTokenSignatureIsVerified(t *testing.T) {
	p := newToken(t).config
	key, _, err := p.generate()
	require.NoError(t, err)
	other, _, err := p.generate()
	require.NoError(t, err)
	wrong := &tokenKey{p, key.(*tokenKey).id, other.Public().(*ecdsa.PublicKey)}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1)}
	if _, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key); err != nil {
		t.Error(err)
	}
	if _, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, wrong.Public(), wrong); err == nil || !strings.Contains(err.Error(), "right token") {
		t.Errorf("got %v", err)
	}
	if err := wrong.reachable(); err == nil {
		t.Error("reachable with another key")
	}
}
