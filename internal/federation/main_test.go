package federation

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const deadline = 10 * time.Second

var (
	own     = spiffeid.RequireTrustDomainFromString("own.example")
	partner = spiffeid.RequireTrustDomainFromString("partner.example")
	broker  = spiffeid.RequireTrustDomainFromString("broker.example")
)

// issuer is a trust domain that knows nothing of this package.
type issuer struct {
	t  testing.TB
	td spiffeid.TrustDomain

	mu       sync.Mutex
	roots    []*x509.Certificate // guarded by mu; the last one signs
	key      crypto.Signer       // guarded by mu
	jwt      map[string]crypto.PublicKey
	sequence uint64 // guarded by mu
}

func newIssuer(t testing.TB, td spiffeid.TrustDomain) *issuer {
	i := &issuer{t: t, td: td, jwt: map[string]crypto.PublicKey{"k1": newKey(t).Public()}, sequence: 10}
	i.addRoot()
	return i
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

// addRoot publishes one more root, which signs from now on.
func (i *issuer) addRoot() {
	i.t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.key = newKey(i.t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: fmt.Sprintf("%s %d", i.td.Name(), len(i.roots))},
		URIs: []*url.URL{i.td.ID().URL()}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	i.roots = append(i.roots, sign(i.t, tmpl, tmpl, i.key.Public(), i.key))
	i.sequence++
}

// dropOldRoot ends the overlap.
func (i *issuer) dropOldRoot() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.roots = i.roots[1:]
	i.sequence++
}

func (i *issuer) bundle() *spiffebundle.Bundle {
	i.mu.Lock()
	defer i.mu.Unlock()
	b := spiffebundle.FromX509Authorities(i.td, i.roots)
	b.SetJWTAuthorities(i.jwt)
	b.SetSequenceNumber(i.sequence)
	b.SetRefreshHint(0) // as often as the reader likes
	return b
}

// svid is signed by the newest root.
func (i *issuer) svid(id string) *x509svid.SVID {
	i.t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	key := newKey(i.t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{spiffeid.RequireFromString(id).URL()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	leaf := sign(i.t, tmpl, i.roots[len(i.roots)-1], key.Public(), i.key)
	return &x509svid.SVID{ID: spiffeid.RequireFromString(id), Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return cert
}

// endpoint is a server whose certificate and answers the test chooses.
type endpoint struct {
	URL  string
	live identity.Live // what an https_spiffe endpoint presents

	mu       sync.Mutex
	handler  http.Handler // guarded by mu
	requests int          // guarded by mu
}

func (e *endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	e.requests++
	h := e.handler
	e.mu.Unlock()
	h.ServeHTTP(w, r)
}

func (e *endpoint) answer(h http.Handler) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.handler = h
}

func (e *endpoint) asked() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.requests
}

// spiffeEndpoint serves i's bundle as id, whose issuer is by.
func spiffeEndpoint(t *testing.T, i, by *issuer, id string) *endpoint {
	t.Helper()
	e := &endpoint{handler: BundleHandler(i.bundle)}
	e.live.SetSVID(by.svid(id))
	e.URL = serve(t, SPIFFETLS(&e.live, time.Now), e)
	return e
}

// serve starts an HTTPS server and returns its URL by address.
func serve(t *testing.T, cfg *tls.Config, h http.Handler) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	run(t, func(ctx context.Context) error { return Serve(ctx, ln, cfg, h, hclog.NewNullLogger()) })
	return "https://" + ln.Addr().String() + "/"
}

// run runs fn until the test ends and returns how to end it earlier.
func run(t *testing.T, fn func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- fn(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil && ctx.Err() == nil {
					t.Errorf("ended with: %v", err)
				}
			case <-time.After(deadline):
				t.Error("did not end")
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

// webFiles writes a Web PKI certificate for host and returns its files and root.
func webFiles(t *testing.T, dir, host string) (certFile, keyFile string, roots *x509.CertPool) {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "web"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	if ip := net.ParseIP(host); ip != nil {
		tmpl.IPAddresses = []net.IP{ip}
	} else {
		tmpl.DNSNames = []string{host}
	}
	cert := sign(t, tmpl, tmpl, key.Public(), key)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	require.NoError(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600))
	require.NoError(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	roots = x509.NewCertPool()
	roots.AddCert(cert)
	return certFile, keyFile, roots
}

func webEndpoint(t *testing.T, i *issuer, host string) (*endpoint, *x509.CertPool) {
	t.Helper()
	certFile, keyFile, roots := webFiles(t, t.TempDir(), host)
	w, err := LoadWebCert(certFile, keyFile, time.Now, hclog.NewNullLogger())
	require.NoError(t, err)
	e := &endpoint{handler: BundleHandler(i.bundle)}
	e.URL = serve(t, w.TLS(), e)
	return e, roots
}

// eventually waits until cond returns nil.
func eventually(t testing.TB, what string, cond func() error) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		err := cond()
		if err == nil {
			return
		}
		if time.Since(start) > deadline {
			t.Fatalf("%s: %v", what, err)
		}
	}
}
