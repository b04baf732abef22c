package controlplane

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/sallyport-mesh/sallyport/internal/federation"
)

// Web is the Web PKI certificate of listen.web. Both files are PEM and are read
// again when they change.
type Web struct {
	CertFile string `yaml:"certFile"` // the chain, leaf first
	KeyFile  string `yaml:"keyFile"`
}

// Federation says how foreign bundles are fetched; which ones, the TrustDomain
// documents say.
type Federation struct {
	CAFile string `yaml:"caFile"` // PEM: whom https_web endpoints are verified with; default: the system's roots
}

// trustFiles are the paths that may be relative.
func (c *Config) trustFiles() []*string {
	return []*string{&c.Web.CertFile, &c.Web.KeyFile, &c.Federation.CAFile}
}

// validateTrust checks what has to do with other trust domains and relying parties.
func (c Config) validateTrust() error {
	var errs []error
	for key, addr := range map[string]string{"listen.bundle": c.Listen.Bundle, "listen.web": c.Listen.Web} {
		if addr == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			errs = append(errs, fmt.Errorf("%s %q: want host:port", key, addr))
		}
	}
	switch {
	case c.Listen.Web != "" && (c.Web.CertFile == "" || c.Web.KeyFile == ""):
		errs = append(errs, errors.New("listen.web: needs web.certFile and web.keyFile, a certificate that its callers know"))
	case c.Listen.Web == "" && (c.Web.CertFile != "" || c.Web.KeyFile != ""):
		errs = append(errs, errors.New("web.certFile: of no use without listen.web"))
	}
	if c.JWTIssuer != "" {
		if err := federation.CheckIssuer(c.JWTIssuer); err != nil {
			errs = append(errs, fmt.Errorf("jwtIssuer: %w", err))
		}
	}
	return errors.Join(errs...)
}

// roots are what https_web endpoints are verified with; nil: the system's.
func (f Federation) roots() (*x509.CertPool, error) {
	if f.CAFile == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(f.CAFile)
	if err != nil {
		return nil, fmt.Errorf("reading federation.caFile: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("federation.caFile %s: holds no certificate", f.CAFile)
	}
	return pool, nil
}
