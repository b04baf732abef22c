//go:build kubernetes

package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// cluster is the one document that names every service account.
const cluster = `apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: cluster, labels: {ns: "{namespace}"}}
spec:
  id: /ns/{namespace}/sa/{serviceAccount}
  attest: [{kind: kubernetes}]
`

// mesh is a control plane that believes a cluster.
type mesh struct {
	*realmesh.Mesh
	*Cluster
	bundle string // file with its roots
}

// newMesh starts one that checks tokens in the way that a line of its
// configuration says.
func newMesh(t *testing.T, c *Cluster, way string) *mesh {
	t.Helper()
	config := filepath.Join(t.TempDir(), "controlplane.yaml")
	realmesh.WriteFile(t, config, fmt.Sprintf("attest:\n  kubernetes:\n    - {name: prod, audience: %s, issuer: %q, %s}\n", audience, c.Issuer, way))
	m := &mesh{
		Mesh:    realmesh.New(t, map[string]string{"workloads.yaml": cluster}, "-config", config),
		Cluster: c, bundle: filepath.Join(t.TempDir(), "bundle.json"),
	}
	bundle, stderr, code := m.CLI("bundle", "show")
	require.Zero(t, code, stderr)
	realmesh.WriteFile(t, m.bundle, bundle)
	return m
}

// sidecar starts one that enrols with a projected token.
func (m *mesh) sidecar(name, token string) (s *realmesh.Sidecar, socket string) {
	m.Mesh.T.Helper()
	file := filepath.Join(m.Mesh.T.TempDir(), "token")
	realmesh.WriteFile(m.Mesh.T, file, token)
	socket = filepath.Join(m.Dir, name+".sock")
	return m.Sidecar(realmesh.SidecarConfig{
		Name: name, NoWait: true,
		Evidence: fmt.Sprintf("evidence: {kind: kubernetes, tokenFile: %q}\ntrustBundle: %q\n", file, m.bundle),
		Extra:    fmt.Sprintf("workloadAPI: {socket: %q}\n", socket),
	}), socket
}

// TestPodEnrols: a pod gets the name of its service account by its projected
// token and one templated Workload, whichever way the token is checked.
func TestPodEnrols(t *testing.T) {
	c := Start(t)
	for _, namespace := range []string{"shop", "bank"} {
		c.Namespace(namespace)
		c.Account(namespace, "payments")
	}
	c.Node("n1")
	own := c.OwnToken()
	for name, way := range map[string]string{
		"TokenReview": fmt.Sprintf("tokenReview: {server: %q, caFile: %q, tokenFile: %q}", c.URL, c.CAFile, own),
		"JWKS":        fmt.Sprintf("jwksURL: %q, caFile: %q, tokenFile: %q", c.URL+"/openid/v1/jwks", c.CAFile, own),
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, c, way)
			for _, namespace := range []string{"shop", "bank"} {
				pod := strings.ToLower("payments-" + name)
				token := c.Token(namespace, "payments", audience, pod, c.Pod(namespace, pod, "payments", "n1"))
				m.named(namespace, token, fmt.Sprintf("spiffe://test.example/ns/%s/sa/payments", namespace))
				m.refused(namespace+"-thief", token, "redeemed already")
			}
			m.refused("other-audience", c.Token("shop", "payments", "vault", "", ""), "audience")
			if name == "TokenReview" {
				pod := c.Pod("shop", "gone", "payments", "n1")
				token := c.Token("shop", "payments", audience, "gone", pod)
				c.Delete("/api/v1/namespaces/shop/pods/gone")
				m.refused("gone", token, "API server refuses the token")
			}
			listed, stderr, code := m.CLI("identity", "list")
			if code != 0 || strings.Count(listed, "/sa/payments") != 2 || !strings.Contains(listed, "kubernetes") {
				t.Errorf("identity list: %s%s", listed, stderr)
			}
		})
	}
}

// named checks that a sidecar with the token gets an identity, and which.
func (m *mesh) named(name, token, want string) {
	t := m.Mesh.T
	t.Helper()
	s, socket := m.sidecar(name, token)
	s.WaitReady()
	ctx, cancel := context.WithTimeout(t.Context(), realmesh.Deadline)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil || svid.ID.String() != want {
		t.Errorf("%s: got %v, %v; want %s", name, svid, err, want)
	}
}

// refused checks that a sidecar with the token gets none, and is told why.
func (m *mesh) refused(name, token, says string) {
	t := m.Mesh.T
	t.Helper()
	s, _ := m.sidecar(name, token)
	realmesh.Eventually(t, name+" refused", func() error {
		if realmesh.Ready(s.Admin) == nil {
			t.Fatalf("%s is ready", name)
		}
		if log := s.Log(); !strings.Contains(log, says) {
			return errors.New(log)
		}
		return nil
	})
	if strings.Contains(s.Log()+m.CP.Log(), token[len(token)-40:]) {
		t.Errorf("%s: a log shows the token", name)
	}
}
