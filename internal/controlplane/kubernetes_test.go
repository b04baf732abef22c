package controlplane_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/meshtest"
)

// cluster stands for an API server that signs service-account tokens; a real one
// is in test/kubernetes.
type cluster struct {
	keys   string // file with its public keys
	signer jose.Signer
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	jwk := jose.JSONWebKey{Key: key, KeyID: "1", Algorithm: "ES256"}
	c := &cluster{keys: filepath.Join(t.TempDir(), "jwks.json")}
	c.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jwk}, nil)
	require.NoError(t, err)
	data, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{jwk.Public()}})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(c.keys, data, 0o600))
	return c
}

func (c *cluster) token(t *testing.T, namespace, account string, until time.Time) string {
	t.Helper()
	claims, err := json.Marshal(map[string]any{
		"iss": "https://kubernetes.test", "sub": "system:serviceaccount:" + namespace + ":" + account, "aud": "sallyport",
		"exp": until.Unix(), "iat": time.Now().Unix(),
		"kubernetes.io": map[string]any{"namespace": namespace, "serviceaccount": map[string]string{"name": account, "uid": "1"}},
	})
	require.NoError(t, err)
	jws, err := c.signer.Sign(claims)
	require.NoError(t, err)
	token, err := jws.CompactSerialize()
	require.NoError(t, err)
	return token
}

const pods = `
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: cluster}
spec:
  id: /ns/{namespace}/sa/{serviceAccount}
  attest: [{kind: kubernetes, cluster: prod}]
---
apiVersion: sallyport.dev/v1
kind: Workload
metadata: {name: payments}
spec:
  attest: [{kind: join-token}]
`

func clusterMesh(t *testing.T, c *cluster) *meshtest.Mesh {
	m := meshtest.New(t, meshtest.Config{
		Files: map[string]string{"mesh.yaml": pods},
		Change: func(cfg *controlplane.Config) {
			cfg.Attest.Kubernetes = []attest.KubernetesConfig{{Name: "prod", Audience: "sallyport", Issuer: "https://kubernetes.test", JWKSFile: c.keys}}
		},
	})
	m.Token("payments") // the files are in force
	return m
}

// enroll conducts an enrolment as a sidecar does.
func enroll(t *testing.T, m *meshtest.Mesh, token string) (*sallyportv1.SVID, error) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	require.NoError(t, err)
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	require.NoError(t, err)
	stream, err := sallyportv1.NewEnrollmentClient(dialTLS(t, m.GRPC)).Enroll(t.Context())
	require.NoError(t, err)
	require.NoError(t, stream.Send(&sallyportv1.EnrollRequest{Message: &sallyportv1.EnrollRequest_Hello{Hello: &sallyportv1.Hello{
		Evidence: &sallyportv1.Hello_Kubernetes{Kubernetes: &sallyportv1.BearerToken{Token: token}}, Csr: csr, NewEnrollmentKey: pub,
	}}}))
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	signature, err := attest.Prove(key, resp.GetChallenge().GetNonce(), csr)
	require.NoError(t, err)
	require.NoError(t, stream.Send(&sallyportv1.EnrollRequest{Message: &sallyportv1.EnrollRequest_Proof{Proof: &sallyportv1.Proof{Signature: signature}}}))
	if resp, err = stream.Recv(); err != nil {
		return nil, err
	}
	return resp.GetIssued(), nil
}

// One document serves a whole cluster, and a token one pod.
func TestEnrollByKubernetesThroughATemplate(t *testing.T) {
	c := newCluster(t)
	m := clusterMesh(t, c)
	token := c.token(t, "shop", "web", time.Now().Add(time.Hour))
	svid, err := enroll(t, m, token)
	require.NoError(t, err)
	if got, want := svid.GetSpiffeId(), "spiffe://test.example/ns/shop/sa/web"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if _, err := enroll(t, m, token); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "redeemed already") {
		t.Errorf("the same token by another key: got %v", err)
	}
	if _, err := enroll(t, m, newCluster(t).token(t, "shop", "web", time.Now().Add(time.Hour))); status.Code(err) != codes.Unauthenticated {
		t.Errorf("E3 another cluster's token: got %v", err)
	}
	if _, err := enroll(t, m, c.token(t, "shop", "web", time.Now().Add(-time.Hour))); status.Code(err) != codes.Unauthenticated {
		t.Errorf("expired token: got %v", err)
	}
	list, err := m.Admin.Identities(t.Context(), &sallyportv1.IdentitiesRequest{Workload: "cluster"})
	require.NoError(t, err)
	if len(list.GetIdentities()) != 1 || list.GetIdentities()[0].GetEvidence() != attest.KindKubernetes || list.GetIdentities()[0].GetWorkload() != "cluster" {
		t.Errorf("got %v", list.GetIdentities())
	}
}

func TestExplainIdentityOfAToken(t *testing.T) {
	c := newCluster(t)
	m := clusterMesh(t, c)
	for name, tt := range map[string]struct{ token, problem string }{
		"good":            {c.token(t, "shop", "web", time.Now().Add(time.Hour)), ""},
		"expired":         {c.token(t, "shop", "web", time.Now().Add(-time.Hour)), "expired at"},
		"another cluster": {newCluster(t).token(t, "shop", "web", time.Now().Add(time.Hour)), "evidence is not accepted"},
	} {
		resp, err := m.Admin.ExplainIdentity(t.Context(), &sallyportv1.ExplainIdentityRequest{Evidence: []byte(tt.token + "\n")})
		require.NoError(t, err, name)
		if (resp.GetProblem() == "") != (tt.problem == "") || !strings.Contains(resp.GetProblem(), tt.problem) {
			t.Errorf("%s: got problem %q", name, resp.GetProblem())
		}
		if len(resp.GetMatches()) != 1 || resp.GetMatches()[0].GetSpiffeId() != "spiffe://test.example/ns/shop/sa/web" {
			t.Errorf("%s: got %v", name, resp.GetMatches())
		}
	}
	_, err := enroll(t, m, c.token(t, "shop", "web", time.Now().Add(time.Hour)))
	require.NoError(t, err)
	for evidence, want := range map[string]string{"noise": "neither PEM nor a token", "a.b.c": "neither PEM nor a token"} {
		if _, err := m.Admin.ExplainIdentity(t.Context(), &sallyportv1.ExplainIdentityRequest{Evidence: []byte(evidence)}); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v", evidence, err)
		}
	}
}
