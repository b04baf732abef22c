package sidecar

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
	"github.com/sallyport-mesh/sallyport/internal/xds"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

const abcx = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: %[1]s}
spec:
  attest: [{kind: join-token}]
  ports: [{name: tcp, port: 7000, protocol: tcp}]
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: to-%[1]s}
spec:
  to: {workload: %[1]s}
  allow: [{from: [{id: "/**"}], ports: [tcp]}]
`

// B is cut off from the control plane, X is revoked, C learns it by push, and B
// still talks to C: B refuses X too, and goes on refusing it after a restart.
func TestF6CutOffSidecarLearnsFromNeighbours(t *testing.T) {
	files := map[string]string{}
	for _, name := range []string{"a", "b", "c", "x"} {
		files[name+".yaml"] = fmt.Sprintf(abcx, name)
	}
	s := newStories(t, files)
	way := newLink(t, s.mesh.GRPC)
	b := s.start("b", way.ln.Addr().String(), "c")
	c := s.start("c", s.mesh.GRPC, "b")
	a := s.start("a", s.mesh.GRPC, "b")
	x := s.start("x", s.mesh.GRPC, "b", "c")
	sign := func(n int64, revoked ...string) []byte {
		return s.sign(n, func(m *sallyportv1.RevocationList) {
			for _, path := range revoked {
				m.Ids = append(m.Ids, &sallyportv1.RevokedID{Path: path, NotBefore: timestamppb.Now()})
			}
		})
	}
	push := func(to *Sidecar, envelope []byte) error {
		return to.apply(xds.Update{Kind: xds.Revocations, Revocations: envelope})
	}
	for _, sidecar := range []*Sidecar{a, b, c, x} {
		require.NoError(t, push(sidecar, sign(1)))
	}
	xb, xc, ab, bc := s.call(x, 0), s.call(x, 1), s.call(a, 0), s.call(b, 0)
	for _, conn := range []net.Conn{xb, xc, ab, bc} {
		require.NoError(t, echoes(conn))
	}

	way.cut()
	meshtest.Eventually(t, "b is cut off", func() error {
		if b.health.Get(componentLink).Status == admin.OK {
			return errors.New("connected")
		}
		return nil
	})
	if d := b.stale(); d <= 0 || d > meshtest.Deadline {
		t.Errorf("cut off a moment ago, b believes that it has heard nothing for %v", d)
	}
	if d := c.stale(); d != 0 {
		t.Errorf("connected, c believes that it has heard nothing for %v", d)
	}
	second := sign(2, "/x")
	start := time.Now()
	require.NoError(t, push(c, second))
	s.reset(xc)
	s.reset(xb)
	t.Logf("b cut x after %v", time.Since(start))
	require.Error(t, handshake(t, x, b))
	require.NoError(t, handshake(t, a, b))
	require.NoError(t, echoes(ab))
	require.NoError(t, echoes(bc))
	require.NoError(t, echoes(s.call(b, 0)))
	meshtest.Eventually(t, "a learns it from b", func() error {
		if v := a.book.List(a.agent.ID().TrustDomain()).Version(); v != (revocation.Version{Epoch: 1, Number: 2}) {
			return fmt.Errorf("holds %s", v)
		}
		return nil
	})
	require.NoError(t, push(x, second))
	if status, why := x.revocationHealth(); status != admin.Down {
		t.Errorf("x knows and does not say that it is revoked: %v %s", status, why)
	}

	// Nothing goes back.
	for what, envelope := range map[string][]byte{"older": sign(1), "older, signed later": sign(1), "the same number without x": sign(2)} {
		for name, sidecar := range map[string]*Sidecar{"b": b, "c": c} {
			if err := push(sidecar, envelope); err == nil {
				t.Errorf("%s accepted a list that is %s", name, what)
			}
			require.Error(t, handshake(t, x, sidecar))
		}
	}
	require.NoError(t, push(c, nil), "withdrawn")
	require.Error(t, handshake(t, x, c))
	s.refused(x, 1)

	// It survives b's end.
	meshtest.Eventually(t, "the list is saved", func() error {
		saved, err := os.ReadFile(filepath.Join(b.cfg.StateDir, "revocations.pb"))
		if err == nil && string(saved) != string(second) {
			err = errors.New("not yet")
		}
		return err
	})
	info, err := os.Stat(filepath.Join(b.cfg.StateDir, "revocations.pb"))
	require.NoError(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %o", info.Mode().Perm())
	}
	again := b.cfg
	again.Admin.Listen, again.Admin.Socket, again.TokenFile = "", "", ""
	restarted, err := New(t.Context(), again, Options{Log: meshtest.Log(t)})
	require.NoError(t, err)
	defer restarted.close()
	if v := restarted.book.List(b.agent.ID().TrustDomain()).Version(); v.Number != 2 {
		t.Errorf("after a restart list %s is in force", v)
	}
	for _, c := range []struct {
		after time.Duration
		limit policy.MaxStale
		want  admin.Status
	}{
		{0, policy.MaxStale{After: time.Hour, Refuse: true}, admin.OK},
		{2 * time.Hour, policy.MaxStale{After: time.Hour, Refuse: true}, admin.Down},
		{2 * time.Hour, policy.MaxStale{After: time.Hour}, admin.Degraded},
		{2 * time.Hour, policy.MaxStale{After: 3 * time.Hour}, admin.OK},
		{staleAfter / 2, policy.MaxStale{}, admin.OK},
		{2 * staleAfter, policy.MaxStale{}, admin.Degraded},
	} {
		restarted.now = func() time.Time { return time.Now().Add(c.after) }
		restarted.book = revocation.NewBook(restarted.agent.Source(), restarted.now)
		_, err := restarted.book.Restore(second)
		require.NoError(t, err)
		restarted.views.Apply(xds.Update{Kind: xds.Rules, Rules: policy.NewRuleset(nil), MaxStale: c.limit})
		if got, why := restarted.revocationHealth(); got != c.want {
			t.Errorf("%v without news, limit %+v: got %v (%s), want %v", c.after, c.limit, got, why, c.want)
		}
	}
}

// Whose issuer is on the list renews at once, before it is refused.
func TestNamedIssuerRenews(t *testing.T) {
	s := newStories(t, map[string]string{"a.yaml": fmt.Sprintf(abcx, "a")})
	a := s.start("a", s.mesh.GRPC)
	chain := func() []*x509.Certificate {
		svid, err := a.agent.Source().GetX509SVID()
		require.NoError(t, err)
		return svid.Certificates
	}
	before := chain()
	issuer := sha256.Sum256(before[1].RawSubjectPublicKeyInfo)
	for n, hash := range [][32]byte{{1}, issuer} {
		envelope := s.sign(int64(n)+1, func(m *sallyportv1.RevocationList) {
			m.Issuers = append(m.Issuers, &sallyportv1.RevokedIssuer{KeyHash: hash[:], From: timestamppb.New(time.Now().Add(time.Hour))})
		})
		if n == 1 && a.agent.Status().Renewals != 0 {
			t.Error("renewed for somebody else's issuer")
		}
		require.NoError(t, a.apply(xds.Update{Kind: xds.Revocations, Revocations: envelope}))
	}
	meshtest.Eventually(t, "a renews", func() error {
		if chain()[0].Equal(before[0]) {
			return errors.New("not yet")
		}
		return nil
	})
	if status, why := a.revocationHealth(); status != admin.OK {
		t.Errorf("refused before its time: %v %s", status, why)
	}
}

// A control plane is a peer like any other: one below a refused issuer is not
// believed.
func TestRevokedControlPlaneIsRefused(t *testing.T) {
	s := newStories(t, map[string]string{"a.yaml": fmt.Sprintf(abcx, "a")})
	a := s.start("a", s.mesh.GRPC)
	dial := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		conn, err := a.agent.Dial(ctx)
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	require.NoError(t, dial())
	require.NoError(t, a.apply(xds.Update{Kind: xds.Revocations, Revocations: s.sign(1, func(m *sallyportv1.RevocationList) {
		m.Ids = []*sallyportv1.RevokedID{{Path: identity.ControlPlanePath, NotBefore: timestamppb.New(time.Now().Add(time.Minute))}}
	})}))
	if err := dial(); err == nil || !strings.Contains(err.Error(), "revoked: SVIDs of spiffe://test.example/sallyport/controlplane") {
		t.Errorf("got %v", err)
	}
}
