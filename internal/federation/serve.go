package federation

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"golang.org/x/net/netutil"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	discoveryPath = "/.well-known/openid-configuration"
	keysPath      = "/keys"
)

// BundleHandler serves the own bundle at / (SPIFFE Federation 5): GET and HEAD
// only, to anybody. It asks bundle at each request; nil is answered 503.
func BundleHandler(bundle func() *spiffebundle.Bundle) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		writeDocument(w, r, bundle(), identity.MarshalBundle)
	})
	return mux
}

// WebHandler serves the bundle as [BundleHandler] does and, unless issuer is
// empty, OpenID Connect Discovery 1.0 and the JWT keys (RFC 7517) below it, so
// that a relying party accepts JWT-SVIDs as ID tokens. issuer is an https URL as
// [CheckIssuer] accepts it and the "iss" of the tokens.
func WebHandler(issuer string, bundle func() *spiffebundle.Bundle) (http.Handler, error) {
	mux := http.NewServeMux()
	mux.Handle("/", BundleHandler(bundle))
	if issuer == "" {
		return mux, nil
	}
	if err := CheckIssuer(issuer); err != nil {
		return nil, err
	}
	u, err := url.Parse(issuer)
	if err != nil {
		return nil, err // not possible: CheckIssuer parses it too
	}
	base := strings.TrimSuffix(u.Path, "/")
	mux.HandleFunc("GET "+base+discoveryPath, func(w http.ResponseWriter, r *http.Request) {
		writeDocument(w, r, bundle(), func(b *spiffebundle.Bundle) ([]byte, error) { return discovery(issuer, b) })
	})
	mux.HandleFunc("GET "+base+keysPath, func(w http.ResponseWriter, r *http.Request) {
		writeDocument(w, r, bundle(), keySet)
	})
	return mux, nil
}

// CheckIssuer accepts what OpenID Connect allows as an issuer: an https URL with
// neither query nor fragment nor user information. Its path must be plain.
func CheckIssuer(issuer string) error {
	u, err := url.Parse(issuer)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery ||
		strings.Contains(issuer, "#") || u.RawPath != "" || strings.ContainsAny(u.Path, "{} ") {
		return fmt.Errorf("issuer %q: want https://HOST[:PORT][/PATH]", issuer)
	}
	return nil
}

// keySet is the JWK set of OIDC: JWT keys only, for signatures.
func keySet(b *spiffebundle.Bundle) ([]byte, error) {
	keys := identity.JWTKeys(b, "sig")
	for i := range keys {
		keys[i].Algorithm = algorithm(keys[i].Key)
	}
	return json.Marshal(map[string]any{"keys": keys})
}

// discovery is the provider's metadata (OpenID Connect Discovery 1.0 section 3). The
// empty authorization endpoint is what AWS and others want of an issuer that
// nobody logs in to.
func discovery(issuer string, b *spiffebundle.Bundle) ([]byte, error) {
	var algorithms []string
	for _, key := range b.JWTAuthorities() {
		if a := algorithm(key); a != "" {
			algorithms = append(algorithms, a)
		}
	}
	slices.Sort(algorithms)
	if algorithms = slices.Compact(algorithms); len(algorithms) == 0 {
		algorithms = []string{"ES256"} // what we will sign with; the list must not be empty
	}
	return json.Marshal(map[string]any{
		"issuer":                                issuer,
		"jwks_uri":                              strings.TrimSuffix(issuer, "/") + keysPath,
		"authorization_endpoint":                "",
		"response_types_supported":              []string{"id_token"},
		"subject_types_supported":               []string{"public"},
		"id_token_signing_alg_values_supported": algorithms,
		"claims_supported":                      []string{"iss", "sub", "aud", "exp", "iat"},
	})
}

// writeDocument sends JSON that may be kept but is asked for again each time, which
// costs a 304 while it is the same.
func writeDocument(w http.ResponseWriter, r *http.Request, b *spiffebundle.Bundle, marshal func(*spiffebundle.Bundle) ([]byte, error)) {
	if b == nil {
		http.Error(w, "no bundle yet", http.StatusServiceUnavailable)
		return
	}
	data, err := marshal(b)
	if err != nil {
		http.Error(w, "the bundle cannot be written", http.StatusInternalServerError)
		return
	}
	sum := sha256.Sum256(data)
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-cache")
	h.Set("ETag", `"`+hex.EncodeToString(sum[:16])+`"`)
	h.Set("X-Content-Type-Options", "nosniff")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
}

// SPIFFETLS is the TLS of an https_spiffe endpoint: it presents source's X509-SVID
// and never asks the client for anything (SPIFFE Federation 5.2.2.3).
func SPIFFETLS(source identity.Source, now func() time.Time) *tls.Config {
	t := identity.ServerTLS(identity.TLSConfig{Source: source, OptionalClient: true, Now: now})
	t.ClientAuth = tls.NoClientCert
	return t
}

// Limits of a server that anybody may reach.
const (
	maxConns     = 1000
	requestLimit = 10 * time.Second
	answerLimit  = 30 * time.Second
	idleLimit    = 15 * time.Second
	maxHeader    = 16 << 10 // bytes
)

// Serve answers HTTPS on ln until ctx ends, then lets requests finish for a
// second. It closes ln. The error is nil when ctx ended it.
func Serve(ctx context.Context, ln net.Listener, cfg *tls.Config, h http.Handler, log hclog.Logger) error {
	srv := &http.Server{
		Handler: h, TLSConfig: cfg,
		ReadHeaderTimeout: requestLimit, ReadTimeout: requestLimit, WriteTimeout: answerLimit, IdleTimeout: idleLimit,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}), // a stranger's handshake is not our trouble
	}
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(netutil.LimitListener(ln, maxConns), "", "") }()
	select {
	case err := <-done:
		return fmt.Errorf("serving %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := srv.Shutdown(end); err != nil {
		err = srv.Close()
		<-done
		return err
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving %s: %w", ln.Addr(), err)
	}
	return nil
}
