//go:build kubernetes

// Package kubernetes starts a real Kubernetes API server with a real etcd, for
// the suite beside it: `make kubernetes`. There is no kubelet and no controller,
// so a pod is what its object says, and its tokens are asked for as a kubelet
// does.
package kubernetes

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// Cluster is a running API server. The test's end stops it.
type Cluster struct {
	T      testing.TB
	URL    string // of the API server, https
	CAFile string // that issued its certificate
	Issuer string // of service-account tokens

	// SigningKey makes service-account tokens, so that a test can make those that
	// the API server would not.
	SigningKey *ecdsa.PrivateKey

	client *http.Client // an administrator's
}

// Start starts a cluster and waits until it is ready.
func Start(t testing.TB) *Cluster {
	t.Helper()
	dir := t.TempDir()
	addr := realmesh.FreeAddr(t)
	c := &Cluster{T: t, URL: "https://" + addr, Issuer: "https://" + addr, CAFile: filepath.Join(dir, "ca.crt")}
	c.certificates(dir)
	_, port, err := net.SplitHostPort(addr)
	require.NoError(t, err)
	file := func(name string) string { return filepath.Join(dir, name) }
	server := realmesh.Start(t, "kube-apiserver", exec.Command(binary(t),
		"--etcd-servers="+startEtcd(t, file("etcd")),
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--secure-port="+port,
		"--tls-cert-file="+file("server.crt"), "--tls-private-key-file="+file("server.key"),
		"--client-ca-file="+c.CAFile, "--authorization-mode=RBAC", "--service-cluster-ip-range=10.0.0.0/24",
		"--service-account-issuer="+c.Issuer,
		"--service-account-signing-key-file="+file("tokens.key"), "--service-account-key-file="+file("tokens.crt"),
		"--endpoint-reconciler-type=none", "--profiling=false"))
	// A first start beside other work on two cores takes a while.
	realmesh.EventuallyWithin(t, 3*time.Minute, "kube-apiserver ready", func() error {
		select {
		case <-server.Done():
			t.Fatalf("kube-apiserver ended: %s", server.Log())
		default:
		}
		_, err := c.request(http.MethodGet, "/readyz", nil)
		return err
	})
	return c
}

// binary is the API server, built if there is none yet.
func binary(t testing.TB) string {
	t.Helper()
	stdout, stderr, code := realmesh.Run(t, exec.Command(filepath.Join(realmesh.Root(t), "test/kubernetes/apiserver/build.sh")))
	require.Zero(t, code, stderr)
	return strings.TrimSpace(stdout)
}

// startEtcd runs etcd in this process and returns its URL.
func startEtcd(t testing.TB, dir string) string {
	t.Helper()
	client, peer := url.URL{Scheme: "http", Host: realmesh.FreeAddr(t)}, url.URL{Scheme: "http", Host: realmesh.FreeAddr(t)}
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.UnsafeNoFsync = true // nothing outlives the test
	etcd, err := embed.StartEtcd(cfg)
	require.NoError(t, err)
	t.Cleanup(etcd.Close)
	select {
	case <-etcd.Server.ReadyNotify():
	case <-time.After(realmesh.Deadline):
		t.Fatalf("etcd is not ready after %v", realmesh.Deadline)
	}
	return client.String()
}

// certificates makes a CA, the server's certificate, the administrator's and the
// key that signs tokens.
func (c *Cluster) certificates(dir string) {
	c.T.Helper()
	caKey, caCert := c.certificate(dir, "ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, nil)
	c.certificate(dir, "server", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, caKey, caCert)
	admin := &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	admin.Subject.Organization = []string{"system:masters"}
	adminKey, adminCert := c.certificate(dir, "admin", admin, caKey, caCert)
	c.SigningKey, _ = c.certificate(dir, "tokens", &x509.Certificate{}, caKey, caCert)
	roots := x509.NewCertPool()
	roots.AddCert(caCert)
	transport := &http.Transport{TLSClientConfig: &tls.Config{
		RootCAs:      roots,
		Certificates: []tls.Certificate{{Certificate: [][]byte{adminCert.Raw}, PrivateKey: adminKey}},
	}}
	c.client = &http.Client{Timeout: realmesh.Deadline, Transport: transport}
	c.T.Cleanup(transport.CloseIdleConnections)
}

// certificate makes a key and a certificate for it, NAME.key and NAME.crt.
func (c *Cluster) certificate(dir, name string, tmpl *x509.Certificate, caKey *ecdsa.PrivateKey, ca *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	c.T.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(c.T, err)
	if ca == nil {
		caKey, ca = key, tmpl
	}
	tmpl.Subject.CommonName = name
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca, key.Public(), caKey)
	require.NoError(c.T, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(c.T, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(c.T, err)
	for file, block := range map[string]*pem.Block{".crt": {Type: "CERTIFICATE", Bytes: der}, ".key": {Type: "PRIVATE KEY", Bytes: private}} {
		require.NoError(c.T, os.WriteFile(filepath.Join(dir, name+file), pem.EncodeToMemory(block), 0o600))
	}
	return key, cert
}

// request sends one to the API server, as its administrator, and returns the
// answer if it is a good one.
func (c *Cluster) request(method, path string, body any) ([]byte, error) {
	data, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), realmesh.Deadline)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, c.URL+path, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, answer)
	}
	return answer, err
}

// Object is what is in JSON.
type Object = map[string]any

// Do sends a request to the API server that must succeed, as its administrator:
// Do("POST", "/api/v1/namespaces", …).
func (c *Cluster) Do(method, path string, body any) []byte {
	c.T.Helper()
	answer, err := c.request(method, path, body)
	require.NoError(c.T, err)
	return answer
}

// create makes an object and returns its UID.
func (c *Cluster) create(path string, body Object) string {
	c.T.Helper()
	var made struct {
		Metadata struct{ UID string } `json:"metadata"`
	}
	require.NoError(c.T, json.Unmarshal(c.Do(http.MethodPost, path, body), &made))
	return made.Metadata.UID
}

func metadata(name string) Object { return Object{"name": name} }

// Namespace makes a namespace.
func (c *Cluster) Namespace(name string) {
	c.T.Helper()
	c.create("/api/v1/namespaces", Object{"metadata": metadata(name)})
}

// Account makes a service account.
func (c *Cluster) Account(namespace, name string) {
	c.T.Helper()
	c.create("/api/v1/namespaces/"+namespace+"/serviceaccounts", Object{"metadata": metadata(name)})
}

// Node makes a node.
func (c *Cluster) Node(name string) {
	c.T.Helper()
	c.create("/api/v1/nodes", Object{"metadata": metadata(name)})
}

// Pod makes a pod of a service account on a node and returns its UID.
func (c *Cluster) Pod(namespace, name, account, node string) string {
	c.T.Helper()
	return c.create("/api/v1/namespaces/"+namespace+"/pods", Object{"metadata": metadata(name), "spec": Object{
		"serviceAccountName": account, "nodeName": node,
		"containers": []Object{{"name": "app", "image": "app"}},
	}})
}

// Token asks for a service account's token, as a kubelet does for a pod; without
// a pod the token is bound to nothing. It is valid for an hour.
func (c *Cluster) Token(namespace, account, audience, pod, podUID string) string {
	c.T.Helper()
	spec := Object{"audiences": []string{audience}, "expirationSeconds": 3600}
	if pod != "" {
		spec["boundObjectRef"] = Object{"kind": "Pod", "apiVersion": "v1", "name": pod, "uid": podUID}
	}
	var answer struct {
		Status struct{ Token string }
	}
	require.NoError(c.T, json.Unmarshal(c.Do(http.MethodPost, "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+account+"/token",
		Object{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}), &answer))
	return answer.Status.Token
}

// Grant binds a ClusterRole to a service account or, with a name that begins with
// "system:", to a group.
func (c *Cluster) Grant(role, namespace, name string) {
	c.T.Helper()
	subject := Object{"kind": "ServiceAccount", "namespace": namespace, "name": name}
	if strings.HasPrefix(name, "system:") {
		subject = Object{"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": name}
	}
	c.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", Object{
		"metadata": Object{"generateName": "test-"},
		"roleRef":  Object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
		"subjects": []Object{subject},
	})
}

// OwnToken makes a service account for the control plane, which may ask for
// TokenReviews and for the keys of tokens, and returns a file with its token.
func (c *Cluster) OwnToken() string {
	c.T.Helper()
	const namespace, name = "sallyport", "controlplane"
	c.Namespace(namespace)
	c.Account(namespace, name)
	c.Grant("system:auth-delegator", namespace, name)
	c.Grant("system:service-account-issuer-discovery", namespace, name)
	file := filepath.Join(c.T.TempDir(), "token")
	require.NoError(c.T, os.WriteFile(file, []byte(c.Token(namespace, name, c.Issuer, "", "")), 0o600))
	return file
}

// Delete removes an object and waits until it is gone.
func (c *Cluster) Delete(path string) {
	c.T.Helper()
	c.Do(http.MethodDelete, path, Object{"gracePeriodSeconds": 0})
	realmesh.Eventually(c.T, path+" gone", func() error {
		if answer, err := c.request(http.MethodGet, path, nil); err == nil {
			return errors.New(string(answer))
		}
		return nil
	})
}
