package agent

import (
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
)

// Kinds of evidence that an agent can enrol with. They are those that a Workload's
// attest list names.
const (
	kindJoinToken  = attest.KindJoinToken
	kindX509Pop    = attest.KindX509Pop
	kindKubernetes = "kubernetes"
	kindOIDC       = "oidc"
)

const (
	maxJoinToken = 4 << 10
	maxBearer    = 12 << 10 // api/sallyport/v1, BearerToken
	maxPEM       = 1 << 20
	maxPopChain  = 8 // api/sallyport/v1, X509Pop
)

// EvidenceConfig says what an agent proves its identity with at its first start,
// and again whenever the control plane no longer knows it. Files are read anew at
// each attempt: platforms replace tokens while we run.
type EvidenceConfig struct {
	Kind string `yaml:"kind"` // join-token, x509pop, kubernetes or oidc
	// TokenFile holds the join token, the projected service-account token, or the
	// token of the OIDC issuer.
	TokenFile string `yaml:"tokenFile"`
	CertFile  string `yaml:"certFile"` // x509pop: PEM chain, leaf first
	KeyFile   string `yaml:"keyFile"`  // x509pop: PEM key of the leaf
	// Issuer, Cluster and CA name what the control plane calls the OIDC issuer,
	// the Kubernetes cluster and the CA of x509pop; "" is the only one.
	Issuer  string `yaml:"issuer"`
	Cluster string `yaml:"cluster"`
	CA      string `yaml:"ca"`
}

// Resolve makes the paths relative to dir, where they are not absolute.
func (e *EvidenceConfig) Resolve(dir string) {
	for _, p := range []*string{&e.TokenFile, &e.CertFile, &e.KeyFile} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
}

// IsZero reports whether nothing is configured.
func (e EvidenceConfig) IsZero() bool { return e == EvidenceConfig{} }

// Check reports each mistake with the key that it is in: "kind".
func (e EvidenceConfig) Check(fail func(key string, err error)) {
	want := map[string]map[string]string{ // :: kind → keys that it takes; "!" required
		kindJoinToken:  {"tokenFile": "!"},
		kindKubernetes: {"tokenFile": "!", "cluster": ""},
		kindOIDC:       {"tokenFile": "!", "issuer": ""},
		kindX509Pop:    {"certFile": "!", "keyFile": "!", "ca": ""},
	}
	keys, ok := want[e.Kind]
	if !ok {
		fail("kind", fmt.Errorf("%q: want join-token, x509pop, kubernetes or oidc", e.Kind))
		return
	}
	for _, f := range []struct{ key, value string }{
		{"tokenFile", e.TokenFile}, {"certFile", e.CertFile}, {"keyFile", e.KeyFile},
		{"issuer", e.Issuer}, {"cluster", e.Cluster}, {"ca", e.CA},
	} {
		need, takes := keys[f.key]
		switch {
		case f.value != "" && !takes:
			fail(f.key, fmt.Errorf("not for evidence of kind %s", e.Kind))
		case f.value == "" && need == "!":
			fail(f.key, fmt.Errorf("required for evidence of kind %s", e.Kind))
		}
	}
}

// proof is one piece of evidence, ready to be sent.
type proof struct {
	// name tells it from other evidence, without giving it away: the one that was
	// redeemed is of no use with another enrolment key.
	name string
	// again: it may be shown any number of times.
	again bool
	token *attest.Token // of a join token: it also authenticates the server
	fill  func(*sallyportv1.Hello)
	key   crypto.Signer // signs the challenge too; nil: not needed
}

// read takes the evidence as it is now.
func (e EvidenceConfig) read() (proof, error) {
	switch e.Kind {
	case kindX509Pop:
		return e.readCertificate()
	case kindKubernetes, kindOIDC:
		return e.readBearer()
	}
	text, err := readFile(e.TokenFile, maxPEM)
	if err != nil {
		return proof{}, fmt.Errorf("reading the join token: %w", err)
	}
	if len(text) > maxJoinToken {
		return proof{}, fmt.Errorf("tokenFile %s: more than %d bytes; this is not a join token", e.TokenFile, maxJoinToken)
	}
	return joinToken(text)
}

func joinToken(text string) (proof, error) {
	t, err := attest.ParseToken(text)
	if err != nil {
		return proof{}, err
	}
	return proof{name: t.ID, token: &t, fill: func(h *sallyportv1.Hello) {
		h.Evidence = &sallyportv1.Hello_JoinToken{JoinToken: &sallyportv1.JoinToken{Id: t.ID, Secret: t.Secret[:]}}
	}}, nil
}

func (e EvidenceConfig) readBearer() (proof, error) {
	text, err := readFile(e.TokenFile, maxBearer)
	if err != nil {
		return proof{}, fmt.Errorf("reading the %s token: %w", e.Kind, err)
	}
	if strings.Count(text, ".") != 2 {
		return proof{}, fmt.Errorf("tokenFile %s holds no token in compact form", e.TokenFile)
	}
	return proof{name: nameOf(e.Kind, []byte(text)), fill: func(h *sallyportv1.Hello) {
		if e.Kind == kindOIDC {
			h.Evidence = &sallyportv1.Hello_Oidc{Oidc: &sallyportv1.BearerToken{Token: text, Issuer: e.Issuer}}
		} else {
			h.Evidence = &sallyportv1.Hello_Kubernetes{Kubernetes: &sallyportv1.BearerToken{Token: text, Issuer: e.Cluster}}
		}
	}}, nil
}

func (e EvidenceConfig) readCertificate() (proof, error) {
	chain, err := readFile(e.CertFile, maxPEM)
	if err != nil {
		return proof{}, fmt.Errorf("reading the certificate: %w", err)
	}
	key, err := readFile(e.KeyFile, maxPEM)
	if err != nil {
		return proof{}, fmt.Errorf("reading the certificate's key: %w", err)
	}
	pair, err := tls.X509KeyPair([]byte(chain), []byte(key)) // they belong together
	if err != nil {
		return proof{}, fmt.Errorf("reading %s and %s: %w", e.CertFile, e.KeyFile, err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return proof{}, fmt.Errorf("the key in %s cannot sign", e.KeyFile)
	}
	if len(pair.Certificate) > maxPopChain {
		return proof{}, fmt.Errorf("%s holds %d certificates: want the leaf and its intermediates, %d at most", e.CertFile, len(pair.Certificate), maxPopChain)
	}
	return proof{name: nameOf(e.Kind, pair.Certificate[0]), again: true, key: signer, fill: func(h *sallyportv1.Hello) {
		h.Evidence = &sallyportv1.Hello_X509Pop{X509Pop: &sallyportv1.X509Pop{Chain: pair.Certificate, Ca: e.CA}}
	}}, nil
}

func nameOf(kind string, content []byte) string {
	sum := sha256.Sum256(content)
	return kind + ":" + hex.EncodeToString(sum[:])
}

// readFile reads a small text file whose content is secret: errors name the file
// and never quote it.
func readFile(path string, limit int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return "", err
	}
	if int64(len(b)) > limit {
		return "", fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return strings.TrimSpace(string(b)), nil
}

// missing says what to do where there is nothing to enrol with.
func (e EvidenceConfig) missing(err error, stateDir string) error {
	if e.Kind != kindJoinToken || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return fmt.Errorf("tokenFile %s does not exist, and there is no earlier enrolment in %s; on the control plane: sallyport token create --workload NAME, and put its output there", e.TokenFile, stateDir)
}
