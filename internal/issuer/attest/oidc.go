package attest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
)

// KindOIDC is the kind that a Workload's attest list names to admit bearers of
// an ID token of an OpenID Connect issuer: jobs of a build service, machines and
// functions of a cloud.
//
// It proves that the issuer said of the bearer what the token's claims say, for
// this mesh's audience. It proves no more than the issuer means by a claim: many
// issuers serve the whole world, and hand anybody a token for any audience, so
// that only claims which nobody else can have are worth asking for. The presets
// say which. Whoever reads the token before the sidecar uses it can be the
// workload. That the issuer would still issue it is not proved: a token is good
// until it expires.
//
// Replay: a token is redeemed once, under the name Verified.Once, and again only
// together with the same enrolment key.
const KindOIDC = "oidc"

// Presets of known issuers. A preset sets the issuer and nothing else; an issuer
// that is configured too, for a server of one's own, goes before it.
const (
	// PresetGitHub is GitHub Actions, https://token.actions.githubusercontent.com.
	// A job with "permissions: id-token: write" asks for a token with the
	// audience. Claims: repository (acme/shop), repository_id, repository_owner,
	// repository_owner_id, ref (refs/heads/main), ref_type, sha, workflow,
	// workflow_ref, job_workflow_ref, environment, event_name, actor, run_id,
	// runner_environment, sub (repo:acme/shop:ref:refs/heads/main). Anybody's
	// repository gets tokens: ask for repository_id or repository, and for ref or
	// environment, since a pull request runs as its repository too.
	PresetGitHub = "github"
	// PresetGitLab is GitLab CI, https://gitlab.com; a server of one's own is set
	// as the issuer. A job asks by id_tokens with aud. Claims: project_path
	// (acme/shop), project_id, namespace_path, namespace_id, ref, ref_type,
	// ref_protected (true), environment, environment_protected, pipeline_source,
	// user_login, runner_environment, sub
	// (project_path:acme/shop:ref_type:branch:ref:main). Ask for project_id or
	// project_path, and ref_protected.
	PresetGitLab = "gitlab"
	// PresetGoogle is https://accounts.google.com: a Compute Engine instance asks
	// its metadata server at .../service-accounts/default/identity with audience
	// and format=full. Claims: sub and azp (the service account's number), email,
	// email_verified, google.compute_engine.project_id, .project_number, .zone,
	// .instance_id, .instance_name. Every account of Google's gets tokens: ask for
	// sub, or for google.compute_engine.project_id and .instance_id or email.
	PresetGoogle = "google"
	// PresetAzure is a managed identity of one tenant, which must be set:
	// https://sts.windows.net/TENANT/. A machine asks its metadata server for a
	// token whose resource is the audience. Claims: oid and sub (the identity's
	// object), appid, tid (the tenant), idtyp, xms_mirid (the identity's resource
	// path). Ask for oid or xms_mirid. For an application that asks for tokens of
	// version 2, set issuer: https://login.microsoftonline.com/TENANT/v2.0.
	PresetAzure = "azure"
)

// OIDCConfig names one issuer.
type OIDCConfig struct {
	// Name by which Workloads and sidecars refer to it.
	Name string `yaml:"name"`
	// Preset is one of the Preset constants, or empty.
	Preset string `yaml:"preset"`
	// Issuer is the issuer's URL, exactly as in its tokens: https. Its keys are
	// found by discovery (OpenID Connect Discovery 1.0 section 4).
	Issuer string `yaml:"issuer"`
	// Tenant is the Azure tenant's ID, for the preset azure only.
	Tenant string `yaml:"tenant"`
	// Audience that tokens must be for: one that only this mesh uses.
	Audience string `yaml:"audience"`
	// CAFile holds the CA of the issuer's certificate; none for the system's. It
	// is read anew each time.
	CAFile string `yaml:"caFile"`

	Now func() time.Time `yaml:"-"` // nil: time.Now
}

// OIDC checks tokens of one issuer. It is safe for concurrent use.
type OIDC struct {
	cfg    OIDCConfig
	caller *caller
	keys   *keys
}

// NewOIDC checks the configuration. It asks nobody yet, since a control plane
// must be able to start while an issuer is away.
func NewOIDC(cfg OIDCConfig) (*OIDC, error) {
	o, err := newOIDC(cfg)
	if err != nil {
		return nil, fmt.Errorf("issuer %q: %w", cfg.Name, err)
	}
	return o, nil
}

func newOIDC(cfg OIDCConfig) (*OIDC, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if err := cfg.usePreset(); err != nil {
		return nil, err
	}
	if err := checkURL("issuer", cfg.Issuer); err != nil {
		return nil, err
	}
	if cfg.Audience == "" {
		return nil, errors.New("audience is missing: what tokens must be made for, such as sallyport")
	}
	c, err := newCaller(cfg.CAFile)
	if err != nil {
		return nil, err
	}
	o := &OIDC{cfg: cfg, caller: c}
	o.keys = newKeys(cfg.Now, o.discover)
	return o, nil
}

// usePreset fills in the issuer.
func (c *OIDCConfig) usePreset() error {
	var issuer string
	switch c.Preset {
	case "":
		if c.Issuer == "" {
			return errors.New("want an issuer, or a preset")
		}
	case PresetGitHub:
		issuer = "https://token.actions.githubusercontent.com"
	case PresetGitLab:
		issuer = "https://gitlab.com"
	case PresetGoogle:
		issuer = "https://accounts.google.com"
	case PresetAzure:
		if c.Issuer == "" && !isTenant(c.Tenant) {
			return fmt.Errorf("the preset %s needs the tenant's ID: tenant: 00000000-0000-0000-0000-000000000000", PresetAzure)
		}
		issuer = "https://sts.windows.net/" + c.Tenant + "/"
	default:
		return fmt.Errorf("preset %q: want %s, %s, %s or %s", c.Preset, PresetGitHub, PresetGitLab, PresetGoogle, PresetAzure)
	}
	if c.Tenant != "" && (c.Preset != PresetAzure || c.Issuer != "") {
		return fmt.Errorf("tenant belongs to the preset %s without an issuer", PresetAzure)
	}
	if c.Issuer == "" {
		c.Issuer = issuer
	}
	return nil
}

// isTenant reports whether s is a UUID in lower case, as it stands in tokens.
func isTenant(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, r := range s {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		if dash != (r == '-') || !dash && !strings.ContainsRune("0123456789abcdef", r) {
			return false
		}
	}
	return true
}

// discover fetches the issuer's keys from where it says that they are.
func (o *OIDC) discover(ctx context.Context) ([]byte, error) {
	p, err := oidc.NewProvider(oidc.ClientContext(ctx, o.caller.current()), o.cfg.Issuer)
	if err != nil {
		return nil, errors.New(forPeople(err.Error())) // it may quote the answer
	}
	var found struct {
		Keys string `json:"jwks_uri"`
	}
	if err := p.Claims(&found); err != nil {
		return nil, fmt.Errorf("reading the discovery document: %w", err)
	}
	if err := checkURL("jwks_uri of the discovery document", found.Keys); err != nil {
		return nil, err
	}
	return o.caller.get(ctx, found.Keys, "")
}

// Verify checks a token. It is [ErrBadEvidence] if it will never be accepted, and
// [ErrUnreachable] if the issuer's keys could not be had.
func (o *OIDC) Verify(ctx context.Context, token string) (Verified, error) {
	b, err := readBearer(token)
	if err != nil {
		return Verified{}, bad(err)
	}
	want := expected{issuer: o.cfg.Issuer, audience: o.cfg.Audience, now: o.cfg.Now}
	// First what costs nothing, so that the issuer is not asked about junk.
	if _, err := b.claim(ctx, want); err != nil {
		return Verified{}, bad(err)
	}
	found, err := o.keys.find(ctx, b.kid)
	if err != nil {
		return Verified{}, err
	}
	t, err := b.verify(ctx, found, want)
	if err != nil {
		return Verified{}, bad(err)
	}
	s, err := claimSelectors(b.payload)
	if err != nil {
		return Verified{}, bad(err)
	}
	return Verified{
		Kind: KindOIDC, Issuer: o.cfg.Name, Selectors: s,
		Subject: forPeople(t.Subject) + ", issuer " + o.cfg.Issuer,
		Once:    b.once(), Expires: t.Expiry,
	}, nil
}
