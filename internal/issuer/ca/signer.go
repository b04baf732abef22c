package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"
)

// Signer is all that the CA asks of a private key, so that a key may live in a
// file, in a PKCS#11 token or in a key service.
type Signer interface{ crypto.Signer }

// SignerConfig says where the keys above the intermediates are. The zero value:
// roots are made here and kept in files of the key folder.
type SignerConfig struct {
	PKCS11   PKCS11   // roots are made and kept in a token
	Upstream Upstream // there is no root here: another CA has signed the intermediate
}

// PKCS11 keeps the keys of roots in a PKCS#11 token. The token is reached by a
// program of its own, sallyport-pkcs11, which runs for one signature at a time:
// so the CA needs no C library, and the PIN is in nobody's memory for longer.
// The zero value: no token.
type PKCS11 struct {
	Helper  string // path of sallyport-pkcs11
	Module  string // path of the token's library
	Token   string // label
	PINFile string // 0600; its first line is the user's PIN
}

// Types of the first PEM block of a key file.
const (
	blockPrivateKey = "PRIVATE KEY"
	blockTokenKey   = "PKCS11 KEY ID" // the key is in the token, under this CKA_ID
)

// helperTimeout bounds one run of the helper program.
const helperTimeout = 20 * time.Second

func (cfg SignerConfig) validate() error {
	p, u := cfg.PKCS11, cfg.Upstream
	switch {
	case p != (PKCS11{}) && u != (Upstream{}):
		return errors.New("opening the CA: a PKCS#11 token keeps roots, and an upstream CA leaves none to keep: configure one of them")
	case p != (PKCS11{}) && (p.Helper == "" || p.Module == "" || p.Token == "" || p.PINFile == ""):
		return errors.New("opening the CA: a PKCS#11 token needs helper, module, token label and PIN file")
	case u != (Upstream{}) && (u.CertFile == "" || u.KeyFile == "" || u.BundleFile == ""):
		return errors.New("opening the CA: an upstream CA needs certificate, key and bundle file")
	}
	return nil
}

// newRootKey makes the key of a root where the configuration says, and returns
// the block that its key file begins with.
func (c *CA) newRootKey() (Signer, *pem.Block, error) {
	if p := c.cfg.Signer.PKCS11; p != (PKCS11{}) {
		return p.generate()
	}
	return newFileKey()
}

func newFileKey() (Signer, *pem.Block, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return key, &pem.Block{Type: blockPrivateKey, Bytes: der}, nil
}

// tokenKey is a P-256 key in a token. It is looked for when it is to sign.
type tokenKey struct {
	token PKCS11
	id    []byte
	pub   *ecdsa.PublicKey
}

// helperRequest and helperResponse are what the helper program reads and writes,
// one JSON object each. Its exit code is not looked at.
type helperRequest struct {
	Op     string `json:"op"`               // generate, public or sign
	ID     []byte `json:"id,omitempty"`     // CKA_ID
	Digest []byte `json:"digest,omitempty"` // SHA-256, to sign with ECDSA
}

type helperResponse struct {
	ID        []byte `json:"id,omitempty"`
	Public    []byte `json:"public,omitempty"`    // PKIX, DER
	Signature []byte `json:"signature,omitempty"` // ASN.1
	Error     string `json:"error,omitempty"`
}

func (p PKCS11) generate() (Signer, *pem.Block, error) {
	resp, err := p.ask(helperRequest{Op: "generate"})
	if err != nil {
		return nil, nil, err
	}
	pub, err := x509.ParsePKIXPublicKey(resp.Public)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the key that PKCS#11 token %q made: %w", p.Token, err)
	}
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() || len(resp.ID) == 0 {
		return nil, nil, fmt.Errorf("PKCS#11 token %q made another key than ECDSA P-256", p.Token)
	}
	return &tokenKey{p, resp.ID, key}, &pem.Block{Type: blockTokenKey, Bytes: resp.ID}, nil
}

// Public returns the key that the certificate has.
func (k *tokenKey) Public() crypto.PublicKey { return k.pub }

// Sign has the token sign a SHA-256 digest. What comes back is verified before it
// is returned.
func (k *tokenKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, fmt.Errorf("PKCS#11 token %q is asked to sign with %v: only SHA-256 is supported", k.token.Token, opts.HashFunc())
	}
	resp, err := k.token.ask(helperRequest{Op: "sign", ID: k.id, Digest: digest})
	if err != nil {
		return nil, err
	}
	if !ecdsa.VerifyASN1(k.pub, digest, resp.Signature) {
		return nil, fmt.Errorf("PKCS#11 token %q signs with another key than key %x should be: is it the right token?", k.token.Token, k.id)
	}
	return resp.Signature, nil
}

// reachable says whether the token answers and has the key.
func (k *tokenKey) reachable() error {
	resp, err := k.token.ask(helperRequest{Op: "public", ID: k.id})
	if err != nil {
		return err
	}
	if pub, err := x509.ParsePKIXPublicKey(resp.Public); err != nil || !k.pub.Equal(pub) {
		return fmt.Errorf("PKCS#11 token %q has another key under %x: is it the right token?", k.token.Token, k.id)
	}
	return nil
}

// ask runs the helper once. The PIN reaches it by the name of its file only.
func (p PKCS11) ask(req helperRequest) (helperResponse, error) {
	if p.Helper == "" {
		return helperResponse{}, fmt.Errorf("key %x is in a PKCS#11 token, and none is configured", req.ID)
	}
	in, err := json.Marshal(req)
	if err != nil {
		return helperResponse{}, fmt.Errorf("asking PKCS#11 token %q: %w", p.Token, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), helperTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.Helper, "-module", p.Module, "-token", p.Token, "-pin-file", p.PINFile)
	cmd.Stdin = strings.NewReader(string(in))
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	var resp helperResponse
	switch bad := json.Unmarshal(out, &resp); {
	case ctx.Err() != nil:
		return resp, fmt.Errorf("PKCS#11 token %q did not answer within %v", p.Token, helperTimeout)
	case bad != nil && err != nil:
		return resp, fmt.Errorf("PKCS#11 token %q: running %s: %w", p.Token, p.Helper, err)
	case bad != nil:
		return resp, fmt.Errorf("PKCS#11 token %q: %s gave no answer that can be read", p.Token, p.Helper)
	case resp.Error != "":
		return resp, fmt.Errorf("PKCS#11 token %q: %.300s", p.Token, resp.Error)
	}
	return resp, nil
}
