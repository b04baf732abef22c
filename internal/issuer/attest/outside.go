package attest

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// callTimeout bounds one exchange with an issuer, and the refresh of its keys
	// as a whole.
	callTimeout = 4 * time.Second
	// maxAnswer is the size limit of an issuer's answer in bytes.
	maxAnswer = 256 << 10
)

// caller asks one issuer over HTTPS: within callTimeout and maxAnswer, without
// following redirects, since who is asked was configured. A connection serves
// one exchange; there are few. It is safe for concurrent use.
type caller struct {
	caFile string // PEM; "": the system's CAs. Read anew for each exchange.

	mu     sync.Mutex
	ca     []byte       // guarded by mu: what client trusts
	client *http.Client // guarded by mu
}

// newCaller reads the CA file, so that a wrong one is noticed at the start.
func newCaller(caFile string) (*caller, error) {
	c := &caller{caFile: caFile}
	if caFile == "" {
		c.client = newClient(nil)
		return c, nil
	}
	return c, c.readCA()
}

// readCA takes over a CA file that has changed.
func (c *caller) readCA() error {
	ca, err := readSmall(c.caFile, maxCAFile)
	if err != nil {
		return fmt.Errorf("reading the CA file: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client != nil && bytes.Equal(c.ca, ca) {
		return nil
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return fmt.Errorf("reading the CA file: %s holds no PEM certificate", c.caFile)
	}
	c.ca, c.client = ca, newClient(pool)
	return nil
}

func newClient(roots *x509.CertPool) *http.Client {
	return &http.Client{
		Timeout: callTimeout,
		Transport: capped{&http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			DisableKeepAlives:      true,
			MaxResponseHeaderBytes: 64 << 10,
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("a redirect is not followed") },
	}
}

// current is the client to use now; a CA file that cannot be read leaves the
// last good one.
func (c *caller) current() *http.Client {
	if c.caFile != "" {
		_ = c.readCA() // the handshake tells if the last good one does no longer
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.client
}

// ask sends a request and returns the answer of a status that is wanted.
func (c *caller) ask(req *http.Request, want ...int) ([]byte, error) {
	resp, err := c.current().Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	for _, code := range want {
		if resp.StatusCode == code {
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				return nil, fmt.Errorf("reading the answer of %s: %w", req.URL, err)
			}
			return body, nil
		}
	}
	return nil, &statusError{url: req.URL.String(), code: resp.StatusCode}
}

func (c *caller) get(ctx context.Context, url, token string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return c.ask(req, http.StatusOK)
}

// statusError is an answer of another status than wanted.
type statusError struct {
	url  string
	code int
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%s answers %d %s", e.url, e.code, http.StatusText(e.code))
}

// denied reports whether the asked one does not accept who asks.
func denied(err error) bool {
	var s *statusError
	return errors.As(err, &s) && (s.code == http.StatusUnauthorized || s.code == http.StatusForbidden)
}

// capped ends an answer that is larger than maxAnswer.
type capped struct{ next http.RoundTripper }

// RoundTrip implements [http.RoundTripper].
func (c capped) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := c.next.RoundTrip(req)
	if err == nil {
		resp.Body = &cappedBody{resp.Body, maxAnswer}
	}
	return resp, err
}

type cappedBody struct {
	io.ReadCloser
	left int
}

func (b *cappedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= n; b.left < 0 {
		return 0, fmt.Errorf("an answer of more than %d bytes is not read", maxAnswer)
	}
	return n, err
}

// checkURL refuses all but a plain https URL.
func checkURL(field, s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "" {
		return fmt.Errorf("%s: %q: want an https URL such as https://issuer.example", field, s)
	}
	return nil
}

func readSmall(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes", path, limit)
	}
	return data, nil
}

// readToken reads the control plane's own token, which its platform renews in
// place.
func readToken(path string) (string, error) {
	data, err := readSmall(path, MaxBearer)
	if err != nil {
		return "", fmt.Errorf("reading the control plane's own token: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsAny(token, " \t\r\n") {
		return "", fmt.Errorf("reading the control plane's own token: %s does not hold one token", path)
	}
	return token, nil
}
