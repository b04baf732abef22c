package controlplane

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/sallyport-mesh/sallyport/internal/federation"
	"github.com/sallyport-mesh/sallyport/internal/issuer/external"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
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
	e := &c.ExternalIssuer
	return []*string{&c.Web.CertFile, &c.Web.KeyFile, &c.Federation.CAFile, &e.CertFile, &e.KeyFile, &e.Bundle.File, &e.Bundle.BootstrapFile}
}

// ExternalIssuer says where the control plane's own SVID and the bundle of its
// trust domain come from when another SPIFFE issuer, such as SPIRE, signs.
type ExternalIssuer struct {
	ID          string         `yaml:"id"`          // of the control plane; default /sallyport/controlplane
	WorkloadAPI string         `yaml:"workloadAPI"` // unix:///path; or certFile and keyFile
	CertFile    string         `yaml:"certFile"`    // PEM: the SVID's chain; read again when it changes
	KeyFile     string         `yaml:"keyFile"`     // PEM: its key, PKCS #8
	Bundle      ExternalBundle `yaml:"bundle"`
}

// ExternalBundle is a file, or an endpoint as in a TrustDomain document.
type ExternalBundle struct {
	File          string `yaml:"file"` // SPIFFE bundle, JSON; read again when it changes
	URL           string `yaml:"url"`
	Profile       string `yaml:"profile"`       // https_spiffe, https_web
	EndpointID    string `yaml:"endpointID"`    // https_spiffe
	BootstrapFile string `yaml:"bootstrapFile"` // SPIFFE bundle, JSON; https_spiffe
}

func (e ExternalIssuer) configured() bool { return e != ExternalIssuer{} }

// config reads what is configured into the form of package external.
func (e ExternalIssuer) config(trustDomain string) (external.Config, error) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil || trustDomain == "" {
		return external.Config{}, errors.New("externalIssuer: needs trustDomain")
	}
	out := external.Config{BundleFile: e.Bundle.File, WorkloadAPI: e.WorkloadAPI, CertFile: e.CertFile, KeyFile: e.KeyFile}
	id := e.ID
	if id == "" {
		id = identity.ControlPlanePath
	}
	if out.ID, err = identity.ParseRef(td, id); err != nil || out.ID.TrustDomain() != td {
		return out, fmt.Errorf("externalIssuer.id %q: want a SPIFFE ID of %s with a path", e.ID, td.Name())
	}
	switch {
	case (e.WorkloadAPI == "") == (e.CertFile == ""):
		return out, errors.New("externalIssuer: wants either workloadAPI, or certFile and keyFile")
	case (e.CertFile == "") != (e.KeyFile == ""):
		return out, errors.New("externalIssuer: certFile and keyFile go together")
	case e.WorkloadAPI != "" && workloadapi.ValidateAddress(e.WorkloadAPI) != nil:
		return out, fmt.Errorf("externalIssuer.workloadAPI %q: want unix:///path/to/the.sock", e.WorkloadAPI)
	case (e.Bundle.File == "") == (e.Bundle.URL == ""):
		return out, errors.New("externalIssuer.bundle: wants either file or url")
	case e.Bundle.File != "":
		return out, nil
	}
	return out, e.Bundle.peer(td, &out.Peer)
}

func (b ExternalBundle) peer(td spiffeid.TrustDomain, p *federation.Peer) (err error) {
	p.TrustDomain, p.URL, p.Profile = td, b.URL, federation.Profile(b.Profile)
	if b.EndpointID != "" {
		if p.EndpointID, err = spiffeid.FromString(b.EndpointID); err != nil {
			return fmt.Errorf("externalIssuer.bundle.endpointID: %w", err)
		}
	}
	if b.BootstrapFile != "" {
		data, err := os.ReadFile(b.BootstrapFile)
		if err == nil {
			p.Bootstrap, err = identity.ParseBundle(td, data)
		}
		if err != nil {
			return fmt.Errorf("externalIssuer.bundle.bootstrapFile: %w", err)
		}
	}
	if err := p.Validate(); err != nil {
		return fmt.Errorf("externalIssuer.bundle: %w", err)
	}
	return nil
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
	if c.ExternalIssuer.configured() {
		if _, err := c.ExternalIssuer.config(c.TrustDomain); err != nil {
			errs = append(errs, err)
		}
		if c.JWTIssuer != "" {
			errs = append(errs, errors.New("jwtIssuer: not together with externalIssuer, whose OIDC discovery says where its keys are"))
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
