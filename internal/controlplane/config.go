package controlplane

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/configfile"
)

// Config configures one control-plane replica. Unknown keys are errors; paths
// that are not absolute are relative to the configuration file, or to the
// working directory where there is none.
type Config struct {
	// TrustDomain of the mesh, as in shop.example. It is fixed in the data on
	// first start; a later start may leave it out, and is refused with another.
	TrustDomain string `yaml:"trustDomain"`
	// DataDir holds keys (0600) and, without external etcd, all state. Required.
	DataDir string `yaml:"dataDir"`
	Listen  Listen `yaml:"listen"`
	// AdminSocket is the operator's API, 0600. Default: DataDir/admin.sock.
	AdminSocket string `yaml:"adminSocket"`
	// PolicyDir is watched and is then the only source of policy: apply and
	// rollback are refused. Empty: `sallyport apply` is the source.
	PolicyDir string   `yaml:"policyDir"`
	Etcd      Etcd     `yaml:"etcd"`
	Announce  Announce `yaml:"announce"`
	Attest    Attest   `yaml:"attest"`
	CA        CA       `yaml:"ca"`
	Web       Web      `yaml:"web"`
	// JWTIssuer is the https URL under which relying parties of OIDC reach
	// listen.web, and the "iss" of JWT-SVIDs. Empty: no OIDC discovery.
	JWTIssuer  string     `yaml:"jwtIssuer"`
	Federation Federation `yaml:"federation"`
	// ExternalIssuer takes the place of the own CA. It needs trustDomain.
	ExternalIssuer ExternalIssuer `yaml:"externalIssuer"`
	Log            Log            `yaml:"log"`
}

// Listen holds addresses, host:port. Port 0 picks a free one.
type Listen struct {
	GRPC    string `yaml:"grpc"`    // enrolment, ADS, announce, access log. Default 0.0.0.0:8443
	Metrics string `yaml:"metrics"` // health and metrics, plain HTTP. Default 127.0.0.1:9901
	Bundle  string `yaml:"bundle"`  // our bundle for foreign trust domains, https_spiffe, usually 0.0.0.0:8444. Default: closed
	// Names are the DNS names and IP addresses under which gRPC applications without
	// sidecar reach listen.grpc: they check a server's name, not its SPIFFE ID.
	// Default: the host of listen.grpc, where it is one.
	Names []string `yaml:"names"`
	Web   string   `yaml:"web"` // the same by https_web, and OIDC discovery, usually 0.0.0.0:8445. Default: closed
}

// Etcd names an external cluster. No Endpoints: etcd runs inside this process.
type Etcd struct {
	Endpoints []string `yaml:"endpoints"`
	Prefix    string   `yaml:"prefix"` // default /sallyport/
	CAFile    string   `yaml:"caFile"`
	CertFile  string   `yaml:"certFile"`
	KeyFile   string   `yaml:"keyFile"`
}

// Announce says which addresses a sidecar may announce besides the one its
// connection comes from.
type Announce struct {
	Ranges []netip.Prefix `yaml:"ranges"`
}

// CA holds lifetimes, and says where the keys above the intermediates are. Each
// authority must live at least six times as long as what it signs.
type CA struct {
	RootTTL         time.Duration `yaml:"rootTTL"`         // default 10 years
	IntermediateTTL time.Duration `yaml:"intermediateTTL"` // default 90 days
	SVIDTTL         time.Duration `yaml:"svidTTL"`         // default 24 h
	JWTKeyTTL       time.Duration `yaml:"jwtTTL"`          // of a key that signs JWT-SVIDs; default 30 days

	Signer   string   `yaml:"signer"` // file, pkcs11, upstream. Default file
	PKCS11   PKCS11   `yaml:"pkcs11"`
	Upstream Upstream `yaml:"upstream"`
}

// PKCS11 names a token; all are required with signer pkcs11.
type PKCS11 struct {
	Helper  string `yaml:"helper"`  // the program sallyport-pkcs11
	Module  string `yaml:"module"`  // the token's library
	Token   string `yaml:"token"`   // its label
	PINFile string `yaml:"pinFile"` // 0600
}

// Upstream names what another CA signed; all are required with signer upstream.
type Upstream struct {
	CertFile   string `yaml:"certFile"`   // PEM: the intermediate, and those above it
	KeyFile    string `yaml:"keyFile"`    // PEM, 0600
	BundleFile string `yaml:"bundleFile"` // PEM: the roots
}

// Kinds of CA.Signer.
const (
	signerFile     = "file"
	signerPKCS11   = "pkcs11"
	signerUpstream = "upstream"
)

func (c *CA) files() []*string {
	return []*string{&c.PKCS11.Helper, &c.PKCS11.Module, &c.PKCS11.PINFile, &c.Upstream.CertFile, &c.Upstream.KeyFile, &c.Upstream.BundleFile}
}

func (c CA) validate() error {
	var errs []error
	need := func(key, value string) {
		if value == "" {
			errs = append(errs, fmt.Errorf("%s: required with ca.signer %s", key, c.Signer))
		}
	}
	switch c.Signer {
	case signerFile:
	case signerPKCS11:
		need("ca.pkcs11.helper", c.PKCS11.Helper)
		need("ca.pkcs11.module", c.PKCS11.Module)
		need("ca.pkcs11.token", c.PKCS11.Token)
		need("ca.pkcs11.pinFile", c.PKCS11.PINFile)
	case signerUpstream:
		need("ca.upstream.certFile", c.Upstream.CertFile)
		need("ca.upstream.keyFile", c.Upstream.KeyFile)
		need("ca.upstream.bundleFile", c.Upstream.BundleFile)
	default:
		errs = append(errs, fmt.Errorf("ca.signer %q: want file, pkcs11 or upstream", c.Signer))
	}
	if c.PKCS11 != (PKCS11{}) && c.Signer != signerPKCS11 {
		errs = append(errs, fmt.Errorf("ca.pkcs11: not used with ca.signer %s", c.Signer))
	}
	if c.Upstream != (Upstream{}) && c.Signer != signerUpstream {
		errs = append(errs, fmt.Errorf("ca.upstream: not used with ca.signer %s", c.Signer))
	}
	return errors.Join(errs...)
}

// Log says what is logged and how.
type Log struct {
	Level  string `yaml:"level"`  // debug, info, warn, error. Default info
	Format string `yaml:"format"` // text, json. Default text
}

// LoadConfig reads a configuration file. The error is [configfile.Mistakes]
// where the content is to blame: every mistake, each with FILE:LINE:COL and the
// line. It does not validate: flags may still override it.
func LoadConfig(path string) (Config, error) {
	f, err := configfile.Open(path)
	if err != nil {
		return Config{}, err
	}
	var c Config
	f.Decode(&c)
	if err := f.Err(); err != nil {
		return Config{}, err
	}
	dir := filepath.Dir(path)
	files := []*string{&c.DataDir, &c.AdminSocket, &c.PolicyDir, &c.Etcd.CAFile, &c.Etcd.CertFile, &c.Etcd.KeyFile}
	for _, p := range slices.Concat(files, c.Attest.files(), c.trustFiles(), c.CA.files()) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	return c, nil
}

// Dev returns the configuration of `sallyport-controlplane -dev`: loopback
// only, state below the working directory.
func Dev() Config {
	return Config{
		TrustDomain: "dev.example",
		DataDir:     filepath.Join(".sallyport", "data"),
		AdminSocket: filepath.Join(".sallyport", "admin.sock"),
		Listen:      Listen{GRPC: "127.0.0.1:8443"},
	}
}

// WithDefaults fills in what was left out.
func (c Config) WithDefaults() Config {
	setDefault(&c.Listen.GRPC, "0.0.0.0:8443")
	setDefault(&c.Listen.Metrics, "127.0.0.1:9901")
	setDefault(&c.Etcd.Prefix, "/sallyport/")
	setDefault(&c.CA.RootTTL, 10*365*24*time.Hour)
	setDefault(&c.CA.IntermediateTTL, 90*24*time.Hour)
	setDefault(&c.CA.SVIDTTL, 24*time.Hour)
	setDefault(&c.CA.JWTKeyTTL, 30*24*time.Hour)
	setDefault(&c.CA.Signer, signerFile)
	setDefault(&c.Log.Level, "info")
	setDefault(&c.Log.Format, "text")
	if c.AdminSocket == "" && c.DataDir != "" {
		c.AdminSocket = filepath.Join(c.DataDir, "admin.sock")
	}
	return c
}

func setDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// Validate reports every mistake at once, each naming its key.
func (c Config) Validate() error {
	var errs []error
	if c.DataDir == "" {
		errs = append(errs, errors.New("dataDir: required (flag -data-dir), or use -dev"))
	}
	if c.TrustDomain != "" {
		if _, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil {
			errs = append(errs, fmt.Errorf("trustDomain %q: %w", c.TrustDomain, err))
		}
	}
	for key, addr := range map[string]string{"listen.grpc": c.Listen.GRPC, "listen.metrics": c.Listen.Metrics} {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			errs = append(errs, fmt.Errorf("%s %q: want host:port", key, addr))
		}
	}
	if len(c.AdminSocket) > maxSocketPath {
		errs = append(errs, fmt.Errorf("adminSocket: the path has %d bytes and a unix socket allows %d; choose a shorter one", len(c.AdminSocket), maxSocketPath))
	}
	if c.PolicyDir != "" {
		if st, err := os.Stat(c.PolicyDir); err != nil || !st.IsDir() {
			errs = append(errs, fmt.Errorf("policyDir %s: not a folder that can be read", c.PolicyDir))
		}
	}
	if (c.Etcd.CertFile == "") != (c.Etcd.KeyFile == "") {
		errs = append(errs, errors.New("etcd: certFile and keyFile go together"))
	}
	if err := c.Attest.validate(); err != nil {
		errs = append(errs, err)
	}
	if hclog.LevelFromString(c.Log.Level) == hclog.NoLevel {
		errs = append(errs, fmt.Errorf("log.level %q: want debug, info, warn or error", c.Log.Level))
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		errs = append(errs, fmt.Errorf("log.format %q: want text or json", c.Log.Format))
	}
	if c.Etcd.CAFile != "" || c.Etcd.CertFile != "" {
		for _, e := range c.Etcd.Endpoints {
			if strings.HasPrefix(e, "http://") {
				errs = append(errs, fmt.Errorf("etcd.endpoints: %s would not use the TLS files that are configured; write https://", e))
			}
		}
	}
	errs = append(errs, c.CA.validate())
	if c.CA.SVIDTTL < time.Second {
		errs = append(errs, fmt.Errorf("ca.svidTTL %v: at least 1s", c.CA.SVIDTTL))
	}
	if c.CA.JWTKeyTTL < time.Hour {
		errs = append(errs, fmt.Errorf("ca.jwtTTL %v: at least 1h", c.CA.JWTKeyTTL))
	}
	if c.CA.IntermediateTTL < 6*c.CA.SVIDTTL {
		errs = append(errs, fmt.Errorf("ca.intermediateTTL %v: at least six times ca.svidTTL (%v)", c.CA.IntermediateTTL, c.CA.SVIDTTL))
	}
	if c.CA.RootTTL < 6*c.CA.IntermediateTTL {
		errs = append(errs, fmt.Errorf("ca.rootTTL %v: at least six times ca.intermediateTTL (%v)", c.CA.RootTTL, c.CA.IntermediateTTL))
	}
	return errors.Join(append(errs, c.validateTrust())...)
}

// maxSocketPath is sun_path without its final NUL (unix(7)).
const maxSocketPath = 107

func (e Etcd) tlsConfig() (*tls.Config, error) {
	if e.CAFile == "" && e.CertFile == "" {
		return nil, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if e.CAFile != "" {
		pem, err := os.ReadFile(e.CAFile)
		if err != nil {
			return nil, fmt.Errorf("reading etcd.caFile: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("etcd.caFile %s: holds no certificate", e.CAFile)
		}
	}
	if e.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(e.CertFile, e.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("loading etcd.certFile: %w", err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	return cfg, nil
}
