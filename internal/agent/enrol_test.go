package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/internal/issuer"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// platform vouches for tokens of the form "shop.NAME.SERIAL", as a cluster or an
// OIDC issuer would; what a real one says is package attest's to test.
type platform struct {
	kind string
	now  func() time.Time
}

func (p platform) Verify(_ context.Context, token string) (attest.Verified, error) {
	part := strings.Split(token, ".")
	if len(part) != 3 || part[0] != "shop" {
		return attest.Verified{}, fmt.Errorf("%w: not mine", attest.ErrBadEvidence)
	}
	once := sha256.Sum256([]byte(token))
	v := attest.Verified{Kind: p.kind, Issuer: "prod", Subject: token, Once: hex.EncodeToString(once[:]), Expires: p.now().Add(time.Hour)}
	if p.kind == policy.OIDC {
		v.Selectors = attest.Selectors{"claims.repository": {part[1]}}
	} else {
		v.Selectors = attest.Selectors{"namespace": {part[0]}, "serviceAccount": {part[1]}}
	}
	return v, nil
}

// evidenced makes the control plane take evidence of every kind: workload NAME by
// the platforms' tokens for NAME, or by a certificate for NAME.example.
func (c *controlPlane) evidenced(t *testing.T, f *factory) {
	t.Helper()
	roots := filepath.Join(t.TempDir(), "factory.pem")
	writePEM(t, roots, "CERTIFICATE", f.root.Raw)
	pop, err := attest.NewX509Pop(attest.X509PopConfig{Name: "factory", CAFile: roots, Now: c.clock.Now})
	require.NoError(t, err)
	kube, oidc := policy.Attest{Kind: policy.Kubernetes}, policy.Attest{Kind: policy.OIDC, Issuer: "prod"}
	var all []policy.CompiledWorkload
	for name, a := range map[string]policy.Attest{"pod": kube, "job": oidc, "machine": {Kind: kindX509Pop}} {
		switch a.Kind {
		case policy.Kubernetes:
			a.Select = map[string]string{"namespace": "shop", "serviceAccount": name}
		case policy.OIDC:
			a.Select = map[string]string{"claims.repository": name}
		default:
			a.Select = map[string]string{"dns": name + ".example"}
		}
		w := workload(name)
		w.Attest = []policy.Attest{a}
		all = append(all, w)
	}
	c.registry.SetWorkloads(all)
	c.stop()
	c.edge.Service = issuer.New(issuer.Config{
		CA: c.ca, Registry: c.registry, Now: c.clock.Now, X509Pop: map[string]*attest.X509Pop{"factory": pop},
		Kubernetes: map[string]issuer.TokenVerifier{"prod": platform{policy.Kubernetes, c.clock.Now}},
		OIDC:       map[string]issuer.TokenVerifier{"prod": platform{policy.OIDC, c.clock.Now}},
	})
	c.listen(c.addr)
}

// trustBundle writes the control plane's roots.
func (c *controlPlane) trustBundle(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bundle.json")
	doc, err := c.ca.Bundle().Marshal()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, doc, 0o600))
	return path
}

// Every kind enrols, comes back without its evidence, and sends nothing to another
// control plane.
func TestEnrolByEveryKind(t *testing.T) {
	cp, other, f := newControlPlane(t, time.Hour), newControlPlane(t, time.Hour), newFactory(t)
	cp.evidenced(t, f)
	dir := t.TempDir()
	token := func(name string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte("shop."+name+".1\n"), 0o600))
		return path
	}
	cert := f.issue(t, dir, "machine.example")
	for want, e := range map[string]EvidenceConfig{
		"/shop/pod":     {Kind: kindKubernetes, TokenFile: token("pod")},
		"/shop/job":     {Kind: kindOIDC, TokenFile: token("job"), Issuer: "prod"},
		"/shop/machine": cert,
	} {
		t.Run(e.Kind, func(t *testing.T) {
			cfg := Config{ControlPlane: cp.addr, Evidence: e, TrustBundle: other.trustBundle(t), StateDir: t.TempDir(), Now: cp.clock.Now}
			before := cp.issues.Load()
			a, err := New(cfg)
			require.NoError(t, err)
			if err := runBriefly(t, a); err == nil || !strings.Contains(err.Error(), "not trusting the control plane") || cp.issues.Load() != before {
				t.Errorf("a control plane that is not of trustBundle: got %v, %d enrolments", err, cp.issues.Load()-before)
			}
			cfg.TrustBundle = cp.trustBundle(t)
			one, stop := start(t, cfg)
			stop()
			if one.ID().Path() != want {
				t.Errorf("got %s, want %s", one.ID(), want)
			}
			cfg.Evidence, cfg.TrustBundle = EvidenceConfig{}, ""
			two, stop := start(t, cfg)
			stop()
			if two.Instance() != one.Instance() {
				t.Error("it came back as another instance")
			}
		})
	}
}

// An instance that the control plane no longer knows comes back by itself: with the
// platform's next token, read from the same file, or with its certificate.
func TestFreshEvidenceAfterRemoval(t *testing.T) {
	cp, f := newControlPlane(t, 24*time.Hour), newFactory(t)
	cp.evidenced(t, f)
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte("shop.pod.1"), 0o600))
	for name, e := range map[string]EvidenceConfig{
		"token": {Kind: kindKubernetes, TokenFile: file}, "certificate": f.issue(t, t.TempDir(), "machine.example"),
	} {
		t.Run(name, func(t *testing.T) {
			a, _ := start(t, Config{ControlPlane: cp.addr, Evidence: e, TrustBundle: cp.trustBundle(t), StateDir: t.TempDir(), Now: cp.clock.Now})
			first := a.Instance()
			require.NoError(t, cp.registry.Remove(t.Context(), first, "alice"))
			if name == "token" {
				cp.advance(time.Minute, "refused", func() bool { return strings.Contains(a.Status().Detail, "unknown instance") })
				if a.Instance() != first {
					t.Error("the token was redeemed twice")
				}
				require.NoError(t, os.WriteFile(file, []byte("shop.pod.2"), 0o600))
			}
			cp.advance(time.Minute, "back", func() bool { return a.Instance() != first && a.Status().State == Valid })
		})
	}
}

// Losing the answer does not lose a token that can be redeemed once.
func TestTokenIsRepeatedWithTheSameKey(t *testing.T) {
	cp, f := newControlPlane(t, time.Hour), newFactory(t)
	cp.evidenced(t, f)
	file, dir := filepath.Join(t.TempDir(), "token"), t.TempDir()
	require.NoError(t, os.WriteFile(file, []byte("shop.pod.1"), 0o600))
	cfg := Config{ControlPlane: cp.addr, Evidence: EvidenceConfig{Kind: kindKubernetes, TokenFile: file}, TrustBundle: cp.trustBundle(t), StateDir: dir, Now: cp.clock.Now}
	a, err := New(cfg)
	require.NoError(t, err)
	p, err := a.proof()
	require.NoError(t, err)
	_, err = a.pendingKey(p.name)
	require.NoError(t, err)
	pending, err := os.ReadFile(filepath.Join(dir, stateFile))
	require.NoError(t, err)
	first, stop := start(t, cfg)
	stop()
	require.NoError(t, os.WriteFile(filepath.Join(dir, stateFile), pending, 0o600)) // as if the answer never came
	again, stop := start(t, cfg)
	stop()
	if again.Instance() != first.Instance() {
		t.Errorf("got instance %s, want %s", again.Instance(), first.Instance())
	}
	cfg.StateDir = t.TempDir()
	thief, err := New(cfg)
	require.NoError(t, err)
	if err := runBriefly(t, thief); err == nil {
		t.Error("another key redeemed the same token")
	}
}
