package ca

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// offline is a root kept elsewhere, with a policy CA below it.
type offline struct {
	t          *testing.T
	clk        *clock
	dir        string
	root, mid  *authority
	bundleFile string
}

func newOffline(t *testing.T, clk *clock) *offline {
	t.Helper()
	o := &offline{t: t, clk: clk, dir: t.TempDir()}
	o.bundleFile = filepath.Join(o.dir, "bundle.pem")
	o.renew("1")
	o.writeBundle(o.root.cert)
	return o
}

func (o *offline) renew(name string) {
	o.root = o.sign(nil, "root "+name, newECKey(o.t), 3600*time.Hour, nil)
	o.mid = o.sign(o.root, "policy "+name, newECKey(o.t), 1800*time.Hour, nil)
}

func (o *offline) sign(by *authority, name string, key *ecdsa.PrivateKey, ttl time.Duration, spoil func(*x509.Certificate)) *authority {
	serial, err := newSerial()
	require.NoError(o.t, err)
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: o.clk.Now().Add(-time.Minute), NotAfter: o.clk.Now().Add(ttl),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, URIs: []*url.URL{td.ID().URL()},
	}
	if spoil != nil {
		spoil(tmpl)
	}
	if by == nil {
		by = &authority{cert: tmpl, signer: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.cert, key.Public(), by.signer)
	require.NoError(o.t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(o.t, err)
	return &authority{cert: cert, signer: key}
}

func (o *offline) writeBundle(certs ...*x509.Certificate) {
	o.write(o.bundleFile, "CERTIFICATE", certs...)
}

func (o *offline) write(path, kind string, certs ...*x509.Certificate) {
	var data []byte
	for _, c := range certs {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: c.Raw})...)
	}
	require.NoError(o.t, os.WriteFile(path, data, 0o600))
}

// replica signs an intermediate for one replica and writes its files.
func (o *offline) replica(name string) Upstream {
	return o.replicaWith(name, nil)
}

func (o *offline) replicaWith(name string, spoil func(*x509.Certificate)) Upstream {
	u := Upstream{CertFile: filepath.Join(o.dir, name+".pem"), KeyFile: filepath.Join(o.dir, name+".key"), BundleFile: o.bundleFile}
	key := newECKey(o.t)
	a := o.sign(o.mid, "replica "+name, key, 600*time.Hour, spoil)
	o.write(u.CertFile, "CERTIFICATE", a.cert, o.mid.cert)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(o.t, err)
	require.NoError(o.t, os.WriteFile(u.KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	return u
}

func TestUpstreamFilesAreReplaced(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	o := newOffline(t, clk)
	cfg.Signer.Upstream = o.replica("0")
	c := open(t, cfg)
	first := issue(t, c)
	known := c.X509Roots()
	clk.Add(501 * time.Hour) // 600 h; a sixth is 100 h
	require.NoError(t, c.Advance(t.Context()))
	if list := c.Health(); len(list) != 1 || !strings.Contains(list[0].Error(), "have a new one signed") {
		t.Errorf("health: %v", list)
	}
	o.replica("0") // the same root: at once
	require.NoError(t, c.Advance(t.Context()))
	second := issue(t, c)
	if second.Chain[1].Equal(first.Chain[1]) || len(c.Health()) != 0 {
		t.Errorf("not taken over; health: %v", c.Health())
	}
	if err := verify(second.Chain, known, clk.Now()); err != nil {
		t.Errorf("a peer of before: %v", err)
	}

	old := o.root.cert // another root: once peers know it
	o.renew("2")
	o.writeBundle(old, o.root.cert)
	o.replica("0")
	err := c.Advance(t.Context())
	require.ErrorContains(t, err, "takes over in")
	if err := verify(issue(t, c).Chain, known, clk.Now()); err != nil {
		t.Errorf("signed under a root that nobody can know yet: %v", err)
	}
	clk.Add(settle)
	require.NoError(t, c.Advance(t.Context()))
	if err := verify(issue(t, c).Chain, []*x509.Certificate{o.root.cert}, clk.Now()); err != nil {
		t.Errorf("not under the new root: %v", err)
	}
	if sha256.Sum256(o.root.cert.RawSubjectPublicKeyInfo) != c.RootHash() {
		t.Error("join tokens name another root")
	}
}

// What is wrong with the files is said, and changes nothing while the CA runs.
func TestUpstreamSaysWhatIsWrong(t *testing.T) {
	for _, row := range []struct {
		name  string
		spoil func(t *testing.T, o *offline, u Upstream)
		want  string
	}{
		{"no CA", func(_ *testing.T, o *offline, _ Upstream) {
			o.replicaWith("0", func(x *x509.Certificate) { x.IsCA = false })
		}, "cA true"},
		{"another trust domain", func(_ *testing.T, o *offline, _ Upstream) {
			o.replicaWith("0", func(x *x509.Certificate) { x.URIs = []*url.URL{{Scheme: "spiffe", Host: "other.example"}} })
		}, "its URI SAN is"},
		{"an ID with a path", func(_ *testing.T, o *offline, _ Upstream) {
			o.replicaWith("0", func(x *x509.Certificate) { x.URIs = []*url.URL{payments.URL()} })
		}, "its URI SAN is"},
		{"no ID", func(_ *testing.T, o *offline, _ Upstream) {
			o.replicaWith("0", func(x *x509.Certificate) { x.URIs = nil })
		}, "its URI SAN is"},
		{"no key usage", func(_ *testing.T, o *offline, _ Upstream) {
			o.replicaWith("0", func(x *x509.Certificate) { x.KeyUsage = x509.KeyUsageDigitalSignature })
		}, "key usage"},
		{"expired", func(_ *testing.T, o *offline, _ Upstream) {
			o.replicaWith("0", func(x *x509.Certificate) { x.NotAfter = o.clk.Now() })
		}, "have a new one signed"},
		{"another root", func(t *testing.T, o *offline, _ Upstream) { o.renew("2"); o.replica("0") }, "no root of"},
		{"another key", func(t *testing.T, o *offline, u Upstream) {
			require.NoError(t, os.Rename(o.replica("x").KeyFile, u.KeyFile))
		}, "they belong together"},
		{"readable key", func(t *testing.T, _ *offline, u Upstream) { require.NoError(t, os.Chmod(u.KeyFile, 0o644)) }, "run chmod 600"},
		{"no key", func(t *testing.T, _ *offline, u Upstream) { require.NoError(t, os.Remove(u.KeyFile)) }, "no such file"},
		{"empty certificate", func(t *testing.T, _ *offline, u Upstream) { require.NoError(t, os.Truncate(u.CertFile, 0)) }, "holds no certificate"},
		{"empty bundle", func(t *testing.T, o *offline, _ Upstream) { require.NoError(t, os.Truncate(o.bundleFile, 0)) }, "holds no certificate"},
		{"intermediate in the bundle", func(_ *testing.T, o *offline, _ Upstream) { o.writeBundle(o.root.cert, o.mid.cert) }, "only roots belong there"},
	} {
		t.Run(row.name, func(t *testing.T) {
			clk := newClock()
			cfg := config(t, clk)
			o := newOffline(t, clk)
			cfg.Signer.Upstream = o.replica("0")
			c := open(t, cfg)
			first := issue(t, c)
			row.spoil(t, o, cfg.Signer.Upstream)
			err := c.Advance(t.Context())
			require.ErrorContains(t, err, row.want)
			if again := issue(t, c); !again.Chain[1].Equal(first.Chain[1]) {
				t.Error("the running CA signs with something else")
			}
			if len(c.Health()) == 0 {
				t.Error("health says nothing")
			}
			_, err = Open(t.Context(), cfg)
			require.ErrorContains(t, err, row.want)
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
		})
	}
}

func TestUpstreamTaint(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	o := newOffline(t, clk)
	cfg.Signer.Upstream = o.replica("0")
	c := open(t, cfg)
	old := issue(t, c)
	_, _, err := c.Taint(t.Context(), old.Chain[1].Subject.CommonName)
	require.ErrorContains(t, err, "have one signed for a new key")
	o.replica("0")
	require.NoError(t, c.Advance(t.Context()))
	if !c.TaintedIssuer(old.Chain) || c.TaintedIssuer(issue(t, c).Chain) {
		t.Error("not replaced")
	}
}

func TestUpstreamReplicas(t *testing.T) {
	clk := newClock()
	cfg := config(t, clk)
	o := newOffline(t, clk)
	var all []*CA
	for _, name := range []string{"0", "1"} {
		cfg.Replica, cfg.Signer.Upstream = name, o.replica(name)
		all = append(all, open(t, cfg))
	}
	if a, b := issue(t, all[0]).Chain[1], issue(t, all[1]).Chain[1]; a.Equal(b) || a.Subject.String() == b.Subject.String() {
		t.Error("replicas share an intermediate")
	}
	require.NoError(t, all[0].Advance(t.Context()))
	if !all[0].Bundle().Equal(all[1].Bundle()) {
		t.Error("replicas publish different bundles")
	}
	if id, err := identity.Verify(issue(t, all[1]).Chain, all[0].Bundle(), clk.Now()); err != nil || id.ID != payments {
		t.Errorf("got %v, %v", id.ID, err)
	}
}
