package issuer

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
)

const (
	// outsideTimeout bounds what a verifier may ask of others for one token.
	outsideTimeout = 5 * time.Second
)

// TokenVerifier checks a platform's tokens. What it says of a token that will
// never be good is [attest.ErrBadEvidence]; all else may be better later.
type TokenVerifier interface {
	Verify(ctx context.Context, token string) (attest.Verified, error)
}

// evidence is a claim that a Proof by key will make good.
type evidence struct {
	kind    string
	checked bool             // it is good as far as that is known before the Proof
	key     *ecdsa.PublicKey // answers the challenge
	// accept is called when it was answered. Whatever costs the control plane
	// more than some signatures waits until then.
	accept func(ctx context.Context, p answer) (registry.Instance, error)
}

// answer is a client's Proof, of which signature has been checked.
type answer struct {
	origin    string
	nonce     []byte
	signature []byte // by the certificate's key; with x509pop only
}

// evidence finds out which key must answer the challenge. A join token is not
// spent before its sidecar has proved that it holds the key to be registered, but
// nobody without one is waited for.
func (s *Service) evidence(ctx context.Context, h *hello) (*evidence, error) {
	switch e := h.evidence.(type) {
	case *sallyportv1.Hello_JoinToken:
		return s.joinToken(ctx, h, e.JoinToken)
	case *sallyportv1.Hello_EnrollmentKey:
		return s.enrollmentKey(ctx, e.EnrollmentKey.GetInstance())
	case *sallyportv1.Hello_X509Pop:
		v, err := pick(attest.KindX509Pop, s.cfg.X509Pop, e.X509Pop.GetCa())
		if err != nil {
			return nil, err
		}
		return &evidence{attest.KindX509Pop, false, h.newKey, func(ctx context.Context, a answer) (registry.Instance, error) {
			got, err := v.Verify(e.X509Pop.GetChain(), a.nonce, h.csr, a.signature)
			if err != nil {
				return registry.Instance{}, err
			}
			return s.admit(ctx, got, h.newKey, a.origin)
		}}, nil
	case *sallyportv1.Hello_Kubernetes:
		return s.bearer(attest.KindKubernetes, s.cfg.Kubernetes, h, e.Kubernetes)
	case *sallyportv1.Hello_Oidc:
		return s.bearer(attest.KindOIDC, s.cfg.OIDC, h, e.Oidc)
	}
	return nil, malformed("evidence of type %T", h.evidence) // impossible: readHello looked
}

func (s *Service) joinToken(ctx context.Context, h *hello, token *sallyportv1.JoinToken) (*evidence, error) {
	if err := s.cfg.Registry.CheckToken(ctx, token.GetId(), token.GetSecret()); err != nil {
		return nil, err
	}
	return &evidence{attest.KindJoinToken, true, h.newKey, func(ctx context.Context, a answer) (registry.Instance, error) {
		return s.cfg.Registry.Redeem(ctx, registry.Redemption{
			TokenID: token.GetId(), Secret: token.GetSecret(), Key: h.newKey, Origin: a.origin,
		})
	}}, nil
}

func (s *Service) enrollmentKey(ctx context.Context, instance string) (*evidence, error) {
	inst, err := s.cfg.Registry.Instance(ctx, instance)
	if err != nil {
		return nil, err
	}
	key, err := inst.EnrollmentKey()
	if err != nil {
		return nil, err
	}
	return &evidence{attest.KindEnrollmentKey, true, key, func(ctx context.Context, _ answer) (registry.Instance, error) {
		return s.cfg.Registry.Entitlement(ctx, inst.ID, inst.Name)
	}}, nil
}

func (s *Service) bearer(kind string, verifiers map[string]TokenVerifier, h *hello, token *sallyportv1.BearerToken) (*evidence, error) {
	v, err := pick(kind, verifiers, token.GetIssuer())
	if err != nil {
		return nil, err
	}
	return &evidence{kind, false, h.newKey, func(ctx context.Context, a answer) (registry.Instance, error) {
		got, err := s.verify(ctx, v, token.GetToken(), a.origin)
		if err != nil {
			return registry.Instance{}, err
		}
		if got.Once == "" {
			return registry.Instance{}, errors.New("a bearer's token that may be redeemed any number of times") // impossible
		}
		return s.admit(ctx, got, h.newKey, a.origin)
	}}, nil
}

// verify asks a verifier, which may ask others: so few at a time, and of one host
// fewer, whatever strangers send.
func (s *Service) verify(ctx context.Context, v TokenVerifier, token, origin string) (attest.Verified, error) {
	ctx, cancel := context.WithTimeout(ctx, outsideTimeout)
	defer cancel()
	leave, err := s.outside.enter(ctx, hostOf(origin))
	if err != nil {
		return attest.Verified{}, err
	}
	defer leave()
	return v.Verify(ctx, token)
}

// admit registers an instance. One bearer cannot fill the store with them.
func (s *Service) admit(ctx context.Context, v attest.Verified, key *ecdsa.PublicKey, origin string) (registry.Instance, error) {
	if !s.newcomers.allow(registry.Describe(v), s.cfg.Now()) {
		return registry.Instance{}, fmt.Errorf("%s: %w", registry.Describe(v), errTooOften)
	}
	return s.cfg.Registry.Admit(ctx, registry.Admission{Evidence: v, Key: key, Origin: origin})
}

// pick finds a configured issuer by name, or the only one where none is named.
func pick[V any](kind string, all map[string]V, name string) (v V, err error) {
	if len(all) == 0 {
		return v, fmt.Errorf("%w: attest kind %s is not configured on this control plane: attest.%s in its configuration", errConfig, kind, kind)
	}
	names := strings.Join(slices.Sorted(maps.Keys(all)), ", ")
	if name == "" {
		if len(all) > 1 {
			return v, fmt.Errorf("%w: attest kind %s has several issuers on this control plane; name one of %s", errConfig, kind, names)
		}
		for _, v = range all {
			return v, nil
		}
	}
	v, ok := all[name]
	if !ok {
		return v, fmt.Errorf("%w: attest kind %s has no issuer %.64q on this control plane; it has %s", errConfig, kind, name, names)
	}
	return v, nil
}
