package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Limits of one fetch.
const (
	fetchLimit   = 20 * time.Second // all of it, redirects included
	stepLimit    = 8 * time.Second  // connecting, TLS, the answer's first byte: each
	maxRedirects = 3
)

// fetcher gets documents from bundle endpoints. It holds nothing between two
// fetches: each one proves the endpoint anew.
type fetcher struct {
	trust    x509bundle.Source // asked in each handshake, so that the latest bundle counts
	webRoots *x509.CertPool    // nil: the system's
	now      func() time.Time
}

// anonymous is a Source that trusts and presents nothing: an endpoint must not
// need to know who asks (SPIFFE Federation 5.2.1.3 and 5.2.2.3).
type anonymous struct{ x509bundle.Source }

// GetX509SVID always says that there is none.
func (anonymous) GetX509SVID() (*x509svid.SVID, error) { return nil, identity.ErrNoIdentity }

// fetch returns what p's endpoint answers, at most identity.MaxBundle bytes. A redirect
// is followed to https URLs only, and the server there has to prove the same.
func (f *fetcher) fetch(ctx context.Context, p Peer) ([]byte, error) {
	if err := CheckURL(p.URL); err != nil {
		return nil, err
	}
	cfg, err := f.tls(p)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchLimit)
	defer cancel()
	client := &http.Client{
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: stepLimit}).DialContext,
			TLSClientConfig:     cfg,
			TLSHandshakeTimeout: stepLimit, ResponseHeaderTimeout: stepLimit,
			DisableKeepAlives: true, DisableCompression: true,
			MaxResponseHeaderBytes: maxHeader,
		},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > maxRedirects {
				return fmt.Errorf("more than %d redirects", maxRedirects)
			}
			return checkURL(r.URL)
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.URL, http.NoBody)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "sallyport")
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answered %d", resp.Request.URL.Redacted(), resp.StatusCode)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, identity.MaxBundle+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the answer: %w", err)
	case len(data) > identity.MaxBundle:
		return nil, fmt.Errorf("%s answered with more than %d bytes", resp.Request.URL.Redacted(), identity.MaxBundle)
	}
	return data, nil
}

func (f *fetcher) tls(p Peer) (*tls.Config, error) {
	switch p.Profile {
	case HTTPSSPIFFE:
		return identity.ClientTLS(identity.TLSConfig{Source: anonymous{f.trust}, OptionalClient: true, Now: f.now},
			identity.ExactPattern(p.EndpointID)), nil
	case HTTPSWeb:
		return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: f.webRoots, Time: f.now}, nil
	}
	return nil, errors.New("no profile")
}
