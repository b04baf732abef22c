package controlplane

import (
	"errors"
	"fmt"
	"regexp"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/issuer"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// Attest names who may vouch for workloads, besides operators with their join
// tokens. A kind of which nobody is named is refused.
type Attest struct {
	Kubernetes []attest.KubernetesConfig `yaml:"kubernetes"`
	OIDC       []attest.OIDCConfig       `yaml:"oidc"`
	X509Pop    []attest.X509PopConfig    `yaml:"x509pop"`
}

// issuerName is what a Workload can name: a lower-case DNS label.
var issuerName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// files gives the paths that are relative to the configuration file.
func (a *Attest) files() []*string {
	var out []*string
	for i := range a.Kubernetes {
		k := &a.Kubernetes[i]
		out = append(out, &k.JWKSFile, &k.CAFile, &k.TokenFile, &k.TokenReview.CAFile, &k.TokenReview.TokenFile)
	}
	for i := range a.OIDC {
		out = append(out, &a.OIDC[i].CAFile)
	}
	for i := range a.X509Pop {
		out = append(out, &a.X509Pop[i].CAFile)
	}
	return out
}

func (a Attest) validate() error {
	var errs []error
	taken := map[string]bool{}
	name := func(kind string, i int, name string) string {
		key := fmt.Sprintf("attest.%s[%d]", kind, i)
		switch {
		case !issuerName.MatchString(name):
			errs = append(errs, fmt.Errorf("%s.name %q: want a name of a-z, 0-9 and -, at most 63, by which Workloads refer to it", key, name))
		case taken[kind+"/"+name]:
			errs = append(errs, fmt.Errorf("%s.name %q: is there twice", key, name))
		}
		taken[kind+"/"+name] = true
		return key
	}
	for i, c := range a.Kubernetes {
		name(policy.Kubernetes, i, c.Name)
	}
	for i, c := range a.OIDC {
		name(policy.OIDC, i, c.Name)
	}
	for i, c := range a.X509Pop {
		if key := name(policy.X509Pop, i, c.Name); c.CAFile == "" {
			errs = append(errs, fmt.Errorf("%s.caFile: required", key))
		}
	}
	return errors.Join(errs...)
}

// verifiers are what Attest describes, each by its name.
type verifiers struct {
	x509pop          map[string]*attest.X509Pop
	kubernetes, oidc map[string]issuer.TokenVerifier
}

// openVerifiers checks what the configuration says of those who vouch, and asks
// none of them.
func (c *ControlPlane) openVerifiers() error {
	v := &c.verifiers
	v.kubernetes, v.oidc, v.x509pop = map[string]issuer.TokenVerifier{}, map[string]issuer.TokenVerifier{}, map[string]*attest.X509Pop{}
	for i, cfg := range c.cfg.Attest.Kubernetes {
		cfg.Now = c.opts.Now
		k, err := attest.NewKubernetes(cfg)
		if err != nil {
			return fmt.Errorf("attest.kubernetes[%d]: %w", i, err)
		}
		v.kubernetes[cfg.Name] = k
	}
	for i, cfg := range c.cfg.Attest.OIDC {
		cfg.Now = c.opts.Now
		o, err := attest.NewOIDC(cfg)
		if err != nil {
			return fmt.Errorf("attest.oidc[%d]: %w", i, err)
		}
		v.oidc[cfg.Name] = o
	}
	for i, cfg := range c.cfg.Attest.X509Pop {
		cfg.Now = c.opts.Now
		var err error
		if v.x509pop[cfg.Name], err = attest.NewX509Pop(cfg); err != nil {
			return fmt.Errorf("attest.x509pop[%d]: %w", i, err)
		}
	}
	return nil
}

// count says how many issuers of each kind there are, for Workloads that name none.
func (v verifiers) count() map[string]int {
	return map[string]int{policy.X509Pop: len(v.x509pop), policy.Kubernetes: len(v.kubernetes), policy.OIDC: len(v.oidc)}
}

func (c *ControlPlane) issuerService() *issuer.Service {
	return issuer.New(issuer.Config{
		CA: c.ca, Registry: c.registry, Now: c.opts.Now, Log: c.log, ShortLived: c.shortLived,
		X509Pop: c.verifiers.x509pop, Kubernetes: c.verifiers.kubernetes, OIDC: c.verifiers.oidc,
	})
}

// shortLived reports whether gRPC without sidecar, which receives no revocations,
// verifies the SVIDs of an ID: of those whose direct ports it calls, and of those
// who may call it.
func (c *ControlPlane) shortLived(id spiffeid.ID) bool {
	state := c.reconciler.current()
	if state == nil {
		return true
	}
	w, _ := state.Rules.Workload(id)
	if slices.ContainsFunc(w.Ports, func(p policy.Port) bool { return p.Direct != 0 }) {
		return true
	}
	return slices.ContainsFunc(state.Rules.Reach(id), func(dst spiffeid.ID) bool {
		d, _ := state.Rules.Workload(dst)
		return len(d.Endpoints) > 0
	})
}
