package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const endpointID = "spiffe://partner.example/spire/server"

func spiffePeer(e *endpoint, bootstrap *spiffebundle.Bundle) Peer {
	return Peer{TrustDomain: partner, URL: e.URL, Profile: HTTPSSPIFFE, EndpointID: spiffeid.RequireFromString(endpointID), Bootstrap: bootstrap}
}

func fetchOnce(t *testing.T, p Peer, roots *x509.CertPool, trust ...*spiffebundle.Bundle) (*spiffebundle.Bundle, error) {
	t.Helper()
	f := &fetcher{trust: spiffebundle.NewSet(trust...), webRoots: roots, now: time.Now}
	data, err := f.fetch(t.Context(), p)
	if err != nil {
		return nil, err
	}
	return identity.ParseBundle(p.TrustDomain, data)
}

func wantError(t *testing.T, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want an error with %q", err, text)
	}
}

// TestF5_1_AllOfItConfigured: URL, profile and trust domain go together, and
// https_spiffe needs the endpoint's ID and a bundle to begin with.
func TestF5_1_AllOfItConfigured(t *testing.T) {
	b := newIssuer(t, partner).bundle()
	good := Peer{TrustDomain: partner, URL: "https://a.example", Profile: HTTPSSPIFFE, EndpointID: spiffeid.RequireFromString(endpointID), Bootstrap: b}
	require.NoError(t, good.Validate())
	require.NoError(t, Peer{TrustDomain: partner, Bootstrap: b}.Validate())
	require.NoError(t, Peer{TrustDomain: partner, URL: "https://a.example", Profile: HTTPSWeb}.Validate())
	for want, change := range map[string]func(*Peer){
		"no trust domain":        func(p *Peer) { p.TrustDomain = spiffeid.TrustDomain{} },
		"neither a bundle":       func(p *Peer) { p.URL, p.Bootstrap = "", nil },
		"profile":                func(p *Peer) { p.Profile = "" },
		"profile \"https\"":      func(p *Peer) { p.Profile = "https" },
		"the endpoint's SPIFFE":  func(p *Peer) { p.EndpointID = spiffeid.ID{} },
		"with a path":            func(p *Peer) { p.EndpointID = partner.ID() },
		"needs a bundle":         func(p *Peer) { p.Bootstrap = nil },
		"is of own.example, not": func(p *Peer) { p.Bootstrap = newIssuer(t, own).bundle() },
		"https://":               func(p *Peer) { p.URL = "http://a.example" },
	} {
		p := good
		change(&p)
		wantError(t, p.Validate(), want)
	}
}

// TestF5_2_1_1_URL and its twin 5.2.2.1: https only, no user information; what is
// refused is never dialled and a password never repeated.
func TestF5_2_1_1_URL(t *testing.T) {
	for url, want := range map[string]string{
		"http://a.example/":            "https://",
		"ftp://a.example/":             "https://",
		"a.example/bundle":             "https://",
		"":                             "https://",
		"https://":                     "no host",
		"https:///bundle":              "no host",
		"https://user@a.example/":      "user information",
		"https://user:hush@a.example/": "user information",
		"https://a.example/#x":         "fragment",
		"https://a example/":           "not a URL",
	} {
		for _, profile := range []Profile{HTTPSWeb, HTTPSSPIFFE} { // F 5.2.2.1 says the same
			_, err := fetchOnce(t, Peer{TrustDomain: partner, URL: url, Profile: profile, EndpointID: spiffeid.RequireFromString(endpointID)}, nil)
			wantError(t, err, want)
			if err != nil && strings.Contains(err.Error(), "hush") {
				t.Errorf("the error holds the password: %v", err)
			}
		}
	}
	wantError(t, CheckURL("https://u@a.example"), "user information")
}

// TestF5_2_2_ExactEndpointID: the endpoint has to be the one that is configured,
// by an SVID that the bundle of its own trust domain verifies.
func TestF5_2_2_ExactEndpointID(t *testing.T) {
	p, o := newIssuer(t, partner), newIssuer(t, own)
	for name, tt := range map[string]struct {
		by      *issuer
		id      string
		problem string
	}{
		"right":                                  {p, endpointID, ""},
		"below it":                               {p, endpointID + "/x", "server is"},
		"a workload's":                           {p, "spiffe://partner.example/shop", "server is"},
		"own trust domain's":                     {o, "spiffe://own.example/spire/server", "server is"},
		"C7 signed by another trust domain's CA": {o, endpointID, "verifying"},
	} {
		t.Run(name, func(t *testing.T) {
			e := spiffeEndpoint(t, p, tt.by, tt.id)
			b, err := fetchOnce(t, spiffePeer(e, p.bundle()), nil, p.bundle(), o.bundle())
			if tt.problem != "" {
				wantError(t, err, tt.problem)
				return
			}
			if err != nil || !b.Equal(p.bundle()) {
				t.Errorf("bundle %v, %v", b, err)
			}
		})
	}
	t.Run("a Web PKI certificate", func(t *testing.T) {
		e, roots := webEndpoint(t, p, "127.0.0.1")
		_, err := fetchOnce(t, spiffePeer(e, p.bundle()), roots, p.bundle())
		wantError(t, err, "SPIFFE ID")
	})
	t.Run("no bundle for the endpoint", func(t *testing.T) {
		e := spiffeEndpoint(t, p, p, endpointID)
		_, err := fetchOnce(t, spiffePeer(e, p.bundle()), nil, o.bundle())
		wantError(t, err, "partner.example")
	})
	t.Run("a stock server", func(t *testing.T) {
		h, err := federation.NewHandler(partner, p.bundle())
		require.NoError(t, err)
		e := spiffeEndpoint(t, p, p, endpointID)
		e.answer(h)
		if b, err := fetchOnce(t, spiffePeer(e, p.bundle()), nil, p.bundle()); err != nil || !b.Equal(p.bundle()) {
			t.Errorf("%v, %v", b, err)
		}
	})
}

// TestF5_2_1_2_HostName: https_web holds the certificate to the URL's host name
// (RFC 6125) and to the configured roots.
func TestF5_2_1_2_HostName(t *testing.T) {
	i := newIssuer(t, partner)
	e, roots := webEndpoint(t, i, "127.0.0.1")
	peer := Peer{TrustDomain: partner, URL: e.URL, Profile: HTTPSWeb}
	if b, err := fetchOnce(t, peer, roots); err != nil || !b.Equal(i.bundle()) {
		t.Errorf("%v, %v", b, err)
	}
	_, err := fetchOnce(t, peer, nil)
	wantError(t, err, "unknown authority") // the system's roots
	peer.URL = strings.Replace(e.URL, "127.0.0.1", "localhost", 1)
	_, err = fetchOnce(t, peer, roots)
	wantError(t, err, "localhost")
	s := spiffeEndpoint(t, i, i, endpointID) // an SVID is no Web PKI certificate
	peer.URL = s.URL
	_, err = fetchOnce(t, peer, roots)
	wantError(t, err, "certificate")
}

// TestF5_2_1_3_NoClientAuthentication: neither profile presents a certificate,
// even to a server that asks for one.
func TestF5_2_1_3_NoClientAuthentication(t *testing.T) {
	i := newIssuer(t, partner)
	var live identity.Live
	live.SetSVID(i.svid(endpointID))
	seen := make(chan int, 2)
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen <- len(r.TLS.PeerCertificates)
		BundleHandler(i.bundle).ServeHTTP(w, r)
	})
	asks := SPIFFETLS(&live, time.Now)
	asks.ClientAuth = tls.RequestClientCert
	e := &endpoint{URL: serve(t, asks, h)}
	if _, err := fetchOnce(t, spiffePeer(e, i.bundle()), nil, i.bundle()); err != nil {
		t.Error(err)
	}
	certFile, keyFile, roots := webFiles(t, t.TempDir(), "127.0.0.1")
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	require.NoError(t, err)
	web := &endpoint{URL: serve(t, &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert}, h)}
	if _, err := fetchOnce(t, Peer{TrustDomain: partner, URL: web.URL, Profile: HTTPSWeb}, roots); err != nil {
		t.Error(err)
	}
	for range 2 {
		if n := <-seen; n != 0 {
			t.Errorf("%d certificates presented", n)
		}
	}
}

// TestF5_2_2_3_Redirect: a redirect's target has to be an https URL without user
// information and to prove the same as the first server.
func TestF5_2_2_3_Redirect(t *testing.T) {
	i, foe := newIssuer(t, partner), newIssuer(t, partner)
	good := spiffeEndpoint(t, i, i, endpointID)
	otherID := spiffeEndpoint(t, i, i, "spiffe://partner.example/other")
	impostor := spiffeEndpoint(t, foe, foe, endpointID)
	web, roots := webEndpoint(t, foe, "127.0.0.1")
	first := spiffeEndpoint(t, i, i, endpointID)
	loop := spiffeEndpoint(t, i, i, endpointID)
	loop.answer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, loop.URL, http.StatusFound) }))
	plain := strings.Replace(good.URL, "https", "http", 1)
	for name, tt := range map[string]struct{ to, problem string }{
		"to the same identity":      {good.URL, ""},
		"to another identity":       {otherID.URL, "server is"},
		"to an impostor":            {impostor.URL, "verifying"},
		"to a Web PKI server":       {web.URL, "SPIFFE ID"},
		"to http":                   {plain, "https://"},
		"to user information":       {strings.Replace(good.URL, "https://", "https://u:hush@", 1), "user information"},
		"to a loop":                 {loop.URL, "redirects"},
		"to another scheme":         {"file:///etc/passwd", "https://"},
		"to nowhere that is a host": {"https://", "no host"},
	} {
		t.Run(name, func(t *testing.T) {
			first.answer(http.RedirectHandler(tt.to, http.StatusFound))
			b, err := fetchOnce(t, spiffePeer(first, i.bundle()), roots, i.bundle())
			if tt.problem != "" {
				wantError(t, err, tt.problem)
				return
			}
			if err != nil || !b.Equal(i.bundle()) {
				t.Errorf("%v, %v", b, err)
			}
		})
	}
	if n := loop.asked(); n > maxRedirects+1 {
		t.Errorf("%d redirects followed", n)
	}
}

// TestF5_2_1_3_WebRedirect: https_web checks the target of a redirect too.
func TestF5_2_1_3_WebRedirect(t *testing.T) {
	i := newIssuer(t, partner)
	first, roots := webEndpoint(t, i, "127.0.0.1")
	stranger, _ := webEndpoint(t, i, "127.0.0.1")
	for to, problem := range map[string]string{
		stranger.URL: "unknown authority",
		strings.Replace(first.URL, "127.0.0.1", "localhost", 1): "localhost",
		strings.Replace(first.URL, "https", "http", 1):          "https://",
	} {
		first.answer(http.RedirectHandler(to, http.StatusTemporaryRedirect))
		_, err := fetchOnce(t, Peer{TrustDomain: partner, URL: first.URL, Profile: HTTPSWeb}, roots)
		wantError(t, err, problem)
	}
	if n := stranger.asked(); n != 0 {
		t.Errorf("a stranger was asked %d times", n)
	}
}

// TestFetchLimits: what an endpoint can make us hold or wait for is bounded; its
// content type is not insisted on.
func TestFetchLimits(t *testing.T) {
	i := newIssuer(t, partner)
	e := spiffeEndpoint(t, i, i, endpointID)
	data, err := identity.MarshalBundle(i.bundle())
	require.NoError(t, err)
	write := func(code int, body string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(code)
			_, _ = w.Write([]byte(body))
		})
	}
	for _, tt := range []struct {
		name    string
		h       http.Handler
		problem string
	}{
		{"another content type", write(200, string(data)), ""},
		{"not found, with a bundle", write(404, string(data)), "answered 404"},
		{"no content", write(204, ""), "answered 204"},
		{"garbage", write(200, "<html>"), "not a JWK set"},
		{"too large", write(200, string(data)+strings.Repeat(" ", identity.MaxBundle)), "more than"},
		{"large header", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 2*maxHeader))
			_, _ = w.Write(data)
		}), "server"},
		{"ends early", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(data)+1))
			_, _ = w.Write(data)
		}), "EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e.answer(tt.h)
			_, err := fetchOnce(t, spiffePeer(e, i.bundle()), nil, i.bundle())
			if tt.problem == "" && err != nil {
				t.Error(err)
			} else if tt.problem != "" {
				wantError(t, err, tt.problem)
			}
		})
	}
	t.Run("never ends", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		release := make(chan struct{})
		defer close(release) // not with the request, whose end the server may see first
		e.answer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
		f := &fetcher{trust: i.bundle(), now: time.Now}
		_, err := f.fetch(ctx, spiffePeer(e, i.bundle()))
		wantError(t, err, "deadline")
	})
}
