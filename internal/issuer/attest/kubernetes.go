package attest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// KindKubernetes is the kind that a Workload's attest list names to admit pods
// by a projected service-account token, which the kubelet puts into the pod for
// an audience of the operator's choice.
//
// It proves that the cluster's API server issued the token for this mesh and
// this service account, and, where the token is bound to a pod, for that pod on
// that node. It does not prove that the bearer is the pod: whoever reads the
// token first can be it, and that is every container of the pod that mounts it,
// the node, and whoever may create pods or tokens in the namespace. Nor does it
// say what the pod executes.
//
// With a TokenReview the API server is asked each time, and refuses a token
// whose service account, pod or node has been deleted. With its public keys alone
// that is not seen: such a token is good until it expires.
//
// Replay: a token is redeemed once, under the name Verified.Once, and again only
// together with the same enrolment key. The kubelet renews tokens in time.
const KindKubernetes = "kubernetes"

// Service accounts as users, and what the API server adds to them
// (k8s.io/apiserver/pkg/authentication/serviceaccount).
const (
	accountPrefix = "system:serviceaccount:"
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
)

// KubernetesConfig names one cluster, and by which one of JWKSFile, JWKSURL and
// TokenReview its tokens are checked.
type KubernetesConfig struct {
	// Name by which Workloads and sidecars refer to it.
	Name string `yaml:"name"`
	// Audience that tokens must be for. It must not be the API server's own, for
	// which any pod has a token and hands it to others.
	Audience string `yaml:"audience"`
	// Issuer is the API server's --service-account-issuer, exactly. Required but
	// with a TokenReview, where the API server knows it.
	Issuer string `yaml:"issuer"`
	// JWKSFile holds the issuer's public keys (kubectl get --raw
	// /openid/v1/jwks). It is read again when an unknown key is asked for.
	JWKSFile string `yaml:"jwksFile"`
	// JWKSURL is where the issuer publishes them: https.
	JWKSURL string `yaml:"jwksURL"`
	// CAFile and TokenFile belong to JWKSURL: the CA of its certificate, none for
	// the system's, and a token to show there, none for none. Both are read anew
	// each time.
	CAFile    string `yaml:"caFile"`
	TokenFile string `yaml:"tokenFile"`
	// TokenReview asks the API server about every token.
	TokenReview TokenReviewConfig `yaml:"tokenReview"`

	Now func() time.Time `yaml:"-"` // nil: time.Now
}

// TokenReviewConfig is where and as whom to ask. The zero value is none.
type TokenReviewConfig struct {
	// Server is the API server's URL: https.
	Server string `yaml:"server"`
	// CAFile holds the CA of its certificate; none for the system's.
	CAFile string `yaml:"caFile"`
	// TokenFile holds the control plane's own token, which needs the ClusterRole
	// system:auth-delegator. It is read anew each time, as it is renewed in place.
	TokenFile string `yaml:"tokenFile"`
}

// Kubernetes checks tokens of one cluster. It is safe for concurrent use.
type Kubernetes struct {
	cfg    KubernetesConfig
	keys   *keys         // nil with a TokenReview
	review *tokenReviews // nil with keys
}

// NewKubernetes checks the configuration. It asks nobody yet, since a control
// plane must be able to start before what it runs on.
func NewKubernetes(cfg KubernetesConfig) (*Kubernetes, error) {
	k, err := newKubernetes(cfg)
	if err != nil {
		return nil, fmt.Errorf("cluster %q: %w", cfg.Name, err)
	}
	return k, nil
}

func newKubernetes(cfg KubernetesConfig) (*Kubernetes, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	reviewed := cfg.TokenReview != TokenReviewConfig{}
	ways := 0
	for _, set := range []bool{cfg.JWKSFile != "", cfg.JWKSURL != "", reviewed} {
		if set {
			ways++
		}
	}
	switch {
	case cfg.Audience == "":
		return nil, errors.New("audience is missing: the audience of the projected tokens, such as sallyport")
	case cfg.Audience == cfg.Issuer:
		return nil, errors.New("audience is the issuer, for which any pod has a token: choose one of its own, such as sallyport")
	case ways != 1:
		return nil, errors.New("want exactly one of jwksFile, jwksURL and tokenReview")
	case cfg.Issuer == "" && !reviewed:
		return nil, errors.New("issuer is missing: the API server's --service-account-issuer")
	case cfg.JWKSURL == "" && (cfg.CAFile != "" || cfg.TokenFile != ""):
		return nil, errors.New("caFile and tokenFile belong to jwksURL, or into tokenReview")
	}
	k := &Kubernetes{cfg: cfg}
	var err error
	switch {
	case reviewed:
		k.review, err = newTokenReviews(cfg.TokenReview)
	case cfg.JWKSURL != "":
		k.keys, err = keysByURL(cfg)
	default:
		k.keys = newKeys(cfg.Now, func(context.Context) ([]byte, error) { return readSmall(cfg.JWKSFile, maxAnswer) })
	}
	return k, err
}

func keysByURL(cfg KubernetesConfig) (*keys, error) {
	if err := checkURL("jwksURL", cfg.JWKSURL); err != nil {
		return nil, err
	}
	c, err := newCaller(cfg.CAFile)
	if err != nil {
		return nil, err
	}
	return newKeys(cfg.Now, func(ctx context.Context) (document []byte, err error) {
		token := ""
		if cfg.TokenFile != "" {
			if token, err = readToken(cfg.TokenFile); err != nil {
				return nil, err
			}
		}
		if document, err = c.get(ctx, cfg.JWKSURL, token); denied(err) {
			err = fmt.Errorf("%w: who asks needs the ClusterRole system:service-account-issuer-discovery", err)
		}
		return document, err
	}), nil
}

// Verify checks a token. It is [ErrBadEvidence] if it will never be accepted, and
// [ErrUnreachable] if the cluster could not be asked.
func (k *Kubernetes) Verify(ctx context.Context, token string) (Verified, error) {
	b, err := readBearer(token)
	if err != nil {
		return Verified{}, bad(err)
	}
	want := expected{issuer: k.cfg.Issuer, audience: k.cfg.Audience, now: k.cfg.Now}
	// First what costs nothing, so that the cluster is not asked about junk.
	t, err := b.claim(ctx, want)
	if err != nil {
		return Verified{}, bad(err)
	}
	var who account
	if k.review != nil {
		who, err = k.review.ask(ctx, b.token, k.cfg.Audience)
	} else {
		who, err = k.check(ctx, b, want)
	}
	if err != nil {
		return Verified{}, err
	}
	return Verified{
		Kind: KindKubernetes, Issuer: k.cfg.Name, Selectors: who.selectors(), Subject: who.String(),
		Once: b.once(), Expires: t.Expiry,
	}, nil
}

// check verifies a token by the issuer's keys.
func (k *Kubernetes) check(ctx context.Context, b *bearer, want expected) (account, error) {
	found, err := k.keys.find(ctx, b.kid)
	if err != nil {
		return account{}, err
	}
	t, err := b.verify(ctx, found, want)
	if err != nil {
		return account{}, bad(err)
	}
	who, err := accountOfClaims(t.Subject, b.payload)
	if err != nil {
		return account{}, bad(err)
	}
	return who, nil
}

// account is whom a token was issued for. What is bound to no pod has no pod, and
// a pod may not be on a node yet.
type account struct {
	namespace, name string
	pod, podUID     string
	node            string
}

// accountOfClaims reads the private claims of a token
// (k8s.io/kubernetes/pkg/serviceaccount/claims.go).
func accountOfClaims(subject string, payload []byte) (account, error) {
	type object struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	}
	var claims struct {
		Kubernetes struct {
			Namespace      string `json:"namespace"`
			ServiceAccount object `json:"serviceaccount"`
			Pod            object `json:"pod"`
			Node           object `json:"node"`
		} `json:"kubernetes.io"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		return account{}, errors.New("the claim kubernetes.io is not as Kubernetes writes it")
	}
	c := claims.Kubernetes
	who := account{namespace: c.Namespace, name: c.ServiceAccount.Name, pod: c.Pod.Name, podUID: c.Pod.UID, node: c.Node.Name}
	if subject != accountPrefix+who.namespace+":"+who.name {
		return account{}, fmt.Errorf("the token's subject %s is not the service account of its claim kubernetes.io", forPeople(subject))
	}
	return who, who.check()
}

// check refuses what Kubernetes gives no name to.
func (a account) check() error {
	if a.namespace == "" || a.name == "" {
		return errors.New("the token is not a service account's")
	}
	for _, s := range []string{a.namespace, a.name, a.pod, a.podUID, a.node} {
		if len(s) > 253 || strings.ContainsFunc(s, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.'
		}) {
			return fmt.Errorf("%.64q is no name that Kubernetes gives", s)
		}
	}
	return nil
}

func (a account) selectors() Selectors {
	s := Selectors{}
	for key, value := range map[string]string{
		"namespace": a.namespace, "serviceAccount": a.name, "podName": a.pod, "podUID": a.podUID, "node": a.node,
	} {
		if value != "" {
			s[key] = []string{value}
		}
	}
	return s
}

// String gives the account for people.
func (a account) String() string {
	s := accountPrefix + a.namespace + ":" + a.name
	if a.pod != "" {
		s += fmt.Sprintf(", pod %s (%s)", a.pod, a.podUID)
	}
	if a.node != "" {
		s += ", node " + a.node
	}
	return s
}
