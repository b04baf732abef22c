package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
)

// tokenLife is how long a login is good for.
const tokenLife = 5 * time.Minute

// storeConfig is what an operator tells Vault with `vault write`.
type storeConfig struct {
	listen   string
	issuer   string // auth/jwt/config: oidc_discovery_url
	issuerCA string // auth/jwt/config: oidc_discovery_ca_pem, as a file
	role     string // auth/jwt/role/ROLE
	audience string // its bound_audiences
	subject  string // its bound_subject
	path     string // what its policy lets it read, below /v1/
	file     string // where the secret is: {"password": …}
}

func storeFlags(f *flag.FlagSet) *storeConfig {
	c := &storeConfig{}
	f.StringVar(&c.listen, "listen", "127.0.0.1:8200", "`address`")
	f.StringVar(&c.issuer, "issuer", "", "the control plane's jwtIssuer, an https `URL`")
	f.StringVar(&c.issuerCA, "issuer-ca", "", "PEM `file`: who signed its web certificate (default: the system's roots)")
	f.StringVar(&c.role, "role", "payments", "the role")
	f.StringVar(&c.audience, "audience", "vault", "audience that its tokens must have")
	f.StringVar(&c.subject, "subject", "", "SPIFFE ID that may log in with it")
	f.StringVar(&c.path, "path", "secret/data/payments/db", "what it may read")
	f.StringVar(&c.file, "secret", "", "JSON `file` with the secret")
	return c
}

// store stands in for Vault.
type store struct {
	cfg    storeConfig
	client *http.Client // towards the issuer
	secret json.RawMessage
	now    func() time.Time

	mu       sync.Mutex
	verifier *oidc.IDTokenVerifier // guarded by mu; nil before the first login
	tokens   map[string]time.Time  // guarded by mu :: client token → its end
}

func newStore(cfg storeConfig) (*store, error) {
	if cfg.issuer == "" || cfg.subject == "" {
		return nil, errors.New("the store needs -issuer and -subject")
	}
	secret, err := os.ReadFile(cfg.file)
	if err != nil {
		return nil, fmt.Errorf("reading the secret: %w", err)
	}
	if !json.Valid(secret) {
		return nil, fmt.Errorf("%s is not JSON", cfg.file)
	}
	trust := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.issuerCA != "" {
		pem, err := os.ReadFile(cfg.issuerCA)
		if err != nil {
			return nil, fmt.Errorf("reading -issuer-ca: %w", err)
		}
		if trust.RootCAs = x509.NewCertPool(); !trust.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate", cfg.issuerCA)
		}
	}
	return &store{
		cfg: cfg, secret: secret, now: time.Now, tokens: map[string]time.Time{},
		client: &http.Client{Transport: &http.Transport{TLSClientConfig: trust, DisableKeepAlives: true}, Timeout: 10 * time.Second},
	}, nil
}

// serveStore answers until ctx is done.
func serveStore(ctx context.Context, cfg storeConfig) error {
	s, err := newStore(cfg)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", cfg.listen)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: s, ReadTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// ServeHTTP is POST /v1/auth/jwt/login and GET /v1/PATH.
func (s *store) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch path := strings.TrimPrefix(r.URL.Path, "/v1/"); {
	case r.Method == http.MethodPost && path == "auth/jwt/login":
		s.login(w, r)
	case r.Method == http.MethodGet:
		s.read(w, r, path)
	default:
		fail(w, http.StatusMethodNotAllowed, "unsupported operation")
	}
}

func (s *store) login(w http.ResponseWriter, r *http.Request) {
	var in struct{ Role, JWT string }
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&in); err != nil || in.JWT == "" {
		fail(w, http.StatusBadRequest, "missing token")
		return
	}
	if in.Role != s.cfg.role {
		fail(w, http.StatusBadRequest, fmt.Sprintf("role %q could not be found", in.Role))
		return
	}
	if err := s.verify(r.Context(), in.JWT); err != nil {
		fail(w, http.StatusBadRequest, "error validating token: "+err.Error())
		return
	}
	token := "hvs." + rand.Text()
	s.mu.Lock()
	s.tokens[token] = s.now().Add(tokenLife)
	s.mu.Unlock()
	answer(w, map[string]any{"auth": map[string]any{
		"client_token": token, "lease_duration": int(tokenLife.Seconds()), "renewable": false,
		"policies": []string{s.cfg.role}, "metadata": map[string]string{"role": s.cfg.role},
	}})
}

// verify checks a JWT-SVID as any OIDC relying party checks an ID token: the
// issuer's keys by discovery, issuer, audience, expiry; and whose it is.
func (s *store) verify(ctx context.Context, token string) error {
	v, err := s.oidc(ctx)
	if err != nil {
		return err
	}
	id, err := v.Verify(ctx, token)
	if err != nil {
		return err
	}
	if id.Subject != s.cfg.subject {
		return fmt.Errorf("sub claim does not match bound subject: %s", id.Subject)
	}
	return nil
}

func (s *store) oidc(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.verifier == nil {
		// The provider fetches keys when it meets a new one: not in this request's
		// context.
		provider, err := oidc.NewProvider(oidc.ClientContext(context.WithoutCancel(ctx), s.client), s.cfg.issuer)
		if err != nil {
			return nil, err
		}
		s.verifier = provider.Verifier(&oidc.Config{ClientID: s.cfg.audience, SupportedSigningAlgs: []string{oidc.ES256}, Now: s.now})
	}
	return s.verifier, nil
}

func (s *store) read(w http.ResponseWriter, r *http.Request, path string) {
	token := r.Header.Get("X-Vault-Token")
	s.mu.Lock()
	end, ok := s.tokens[token]
	if ok && !s.now().Before(end) {
		delete(s.tokens, token)
		ok = false
	}
	s.mu.Unlock()
	if !ok || path != s.cfg.path {
		fail(w, http.StatusForbidden, "permission denied")
		return
	}
	answer(w, map[string]any{"data": map[string]any{"data": s.secret, "metadata": map[string]any{"version": 1}}})
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(v) // whoever asked has gone: nothing to do
}

func fail(w http.ResponseWriter, code int, problem string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string][]string{"errors": {problem}})
}
