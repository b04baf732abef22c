package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"
)

// KindX509Pop is the kind that a Workload's attest list names to admit holders
// of a certificate of another PKI.
//
// It proves that the bearer holds the private key of a certificate that chains
// to a configured CA and is valid now. It does not prove that the PKI would
// still issue it: its revocation lists are not read, and what became of the
// certificate after the enrolment is not noticed. A certificate and key that can
// be copied from a disk prove no more than that somebody copied them.
//
// Replay: the certificate's key signs a nonce that the server drew for this one
// stream, together with the hash of the CSR that is to be signed; a recorded
// proof fits no other stream and no other key. A certificate may be shown any
// number of times: each enrolment is an instance of its own.
const KindX509Pop = "x509pop"

// Limits on a presented chain. They hold before any signature is checked.
const (
	// MaxChain is how many certificates a chain may have, the root not counted.
	MaxChain = 8
	// MaxCertificate is the size limit of one certificate in bytes.
	MaxCertificate = 16 << 10

	maxSANs    = 16 // names in one certificate
	minRSABits = 2048
	maxRSABits = 4096
	maxSubject = 256 // bytes of Verified.Subject
	maxCAFile  = 1 << 20

	popContext = "sallyport x509pop v1\x00"
)

// X509PopConfig names one CA of another PKI.
type X509PopConfig struct {
	// Name by which Workloads and sidecars refer to it.
	Name string `yaml:"name"`
	// CAFile holds the PKI's roots, PEM, at most 1 MiB. It is read once.
	CAFile string `yaml:"caFile"`

	Now func() time.Time `yaml:"-"` // nil: time.Now
}

// X509Pop checks certificates against one CA. It is safe for concurrent use.
type X509Pop struct {
	cfg   X509PopConfig
	roots *x509.CertPool
}

// NewX509Pop reads the CA file.
func NewX509Pop(cfg X509PopConfig) (*X509Pop, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	roots, err := readRoots(cfg.CAFile)
	if err != nil {
		return nil, fmt.Errorf("reading the CA %q: %w", cfg.Name, err)
	}
	v := &X509Pop{cfg: cfg, roots: x509.NewCertPool()}
	for _, c := range roots {
		v.roots.AddCert(c)
	}
	return v, nil
}

func readRoots(path string) ([]*x509.Certificate, error) {
	if st, err := os.Stat(path); err == nil && st.Size() > maxCAFile {
		return nil, fmt.Errorf("%s: %d bytes, at most %d accepted", path, st.Size(), maxCAFile)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var roots []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: holds a %s; only certificates belong there", path, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if !c.BasicConstraintsValid || !c.IsCA {
			return nil, fmt.Errorf("%s: %s is no CA certificate", path, forPeople(c.Subject.String()))
		}
		roots = append(roots, c)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("%s: holds no PEM certificate", path)
	}
	return roots, nil
}

// ProveX509Pop signs a challenge for one CSR with the key of a certificate:
// ECDSA or RSA-PSS over SHA-256, or Ed25519.
func ProveX509Pop(key crypto.Signer, nonce, csr []byte) ([]byte, error) {
	if len(nonce) != NonceSize {
		return nil, fmt.Errorf("challenge of %d bytes: want %d", len(nonce), NonceSize)
	}
	msg, opts := popMessage(nonce, csr), crypto.SignerOpts(crypto.SHA256)
	digest := sha256.Sum256(msg)
	in := digest[:]
	switch key.Public().(type) {
	case ed25519.PublicKey:
		in, opts = msg, crypto.Hash(0)
	case *rsa.PublicKey:
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
	case *ecdsa.PublicKey:
	default:
		return nil, fmt.Errorf("signing the challenge: key type %T: use ECDSA, RSA or Ed25519", key.Public())
	}
	sig, err := key.Sign(rand.Reader, in, opts)
	if err != nil {
		return nil, fmt.Errorf("signing the challenge: %w", err)
	}
	return sig, nil
}

func popMessage(nonce, csr []byte) []byte {
	sum := sha256.Sum256(csr)
	return slices.Concat([]byte(popContext), nonce, sum[:])
}

// Verify checks a chain, DER, leaf first, and that the leaf's key signed this
// nonce and CSR. Whatever is wrong is [ErrBadEvidence].
func (v *X509Pop) Verify(chain [][]byte, nonce, csr, signature []byte) (Verified, error) {
	certs, err := readChain(chain)
	if err != nil {
		return Verified{}, bad(err)
	}
	// First, since it is one signature where the chain has several.
	if len(nonce) != NonceSize || !signed(certs[0].PublicKey, popMessage(nonce, csr), signature) {
		return Verified{}, bad(errors.New("the proof does not fit the certificate's key and the challenge"))
	}
	return v.verify(certs)
}

// Inspect checks a chain as Verify does, but for the proof that its bearer holds
// the key: it is for explaining, never for admitting. The result has selectors
// also where the error says that the certificate is not accepted, if it can be
// read at all.
func (v *X509Pop) Inspect(chain [][]byte) (Verified, error) {
	certs, err := readChain(chain)
	if err != nil {
		return Verified{}, bad(err)
	}
	ver, err := v.verify(certs)
	if err != nil {
		ver = v.verified(certs[0], nil)
	}
	return ver, err
}

func (v *X509Pop) verify(certs []*x509.Certificate) (Verified, error) {
	leaf := certs[0]
	if err := checkLeaf(leaf); err != nil {
		return Verified{}, bad(err)
	}
	between := x509.NewCertPool()
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	now := v.cfg.Now()
	paths, err := leaf.Verify(x509.VerifyOptions{
		Roots: v.roots, Intermediates: between, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		for _, c := range certs { // crypto/x509 reports an expired issuer as an unknown one
			if now.Before(c.NotBefore) || now.After(c.NotAfter) {
				err = fmt.Errorf("%s is valid from %s to %s, and now is %s", forPeople(c.Subject.String()),
					c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
			}
		}
		return Verified{}, bad(fmt.Errorf("verifying the certificate against the CA %q: %w", v.cfg.Name, err))
	}
	return v.verified(leaf, paths), nil
}

func bad(err error) error { return fmt.Errorf("%w: %w", ErrBadEvidence, err) }

// readChain parses a chain and holds it to the limits. Each certificate must be
// issued by the next, and no two issuers bear one name, so that there is one path
// to check and not all that a stranger may think of.
func readChain(chain [][]byte) ([]*x509.Certificate, error) {
	if len(chain) == 0 || len(chain) > MaxChain {
		return nil, fmt.Errorf("chain of %d certificates: want 1 to %d", len(chain), MaxChain)
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		if len(der) > MaxCertificate {
			return nil, fmt.Errorf("certificate of %d bytes, at most %d accepted", len(der), MaxCertificate)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parsing certificate %d of the chain: %w", i+1, err)
		}
		if err := withinLimits(c); err != nil {
			return nil, err
		}
		for _, before := range certs[min(i, 1):i] {
			if bytes.Equal(before.RawSubject, c.RawSubject) {
				return nil, fmt.Errorf("chain with two issuers called %s", forPeople(c.Subject.String()))
			}
		}
		if i > 0 && !bytes.Equal(certs[i-1].RawIssuer, c.RawSubject) {
			return nil, errors.New("chain out of order: each certificate must be issued by the next, and the root be left out")
		}
		certs[i] = c
	}
	return certs, nil
}

func withinLimits(c *x509.Certificate) error {
	if n := len(c.DNSNames) + len(c.EmailAddresses) + len(c.IPAddresses) + len(c.URIs); n > maxSANs {
		return fmt.Errorf("certificate with %d names, at most %d accepted", n, maxSANs)
	}
	switch key := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if n := key.N.BitLen(); n < minRSABits || n > maxRSABits {
			return fmt.Errorf("certificate with an RSA key of %d bits, %d to %d accepted", n, minRSABits, maxRSABits)
		}
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P224() {
			return errors.New("certificate with a P-224 key: use P-256, P-384 or P-521")
		}
	case ed25519.PublicKey:
	default:
		return fmt.Errorf("certificate with a key of type %T: use ECDSA, RSA or Ed25519", key)
	}
	return nil
}

func checkLeaf(leaf *x509.Certificate) error {
	switch {
	case leaf.IsCA, leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("a certificate authority's certificate is no evidence")
	case leaf.KeyUsage != 0 && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("the certificate's key usage lacks digital signature")
	case len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0 && !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth):
		return errors.New("the certificate's extended key usage lacks client authentication")
	}
	return nil
}

func signed(pub crypto.PublicKey, msg, signature []byte) bool {
	digest := sha256.Sum256(msg)
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, digest[:], signature)
	case *rsa.PublicKey:
		opts := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
		return rsa.VerifyPSS(key, crypto.SHA256, digest[:], signature, opts) == nil
	case ed25519.PublicKey:
		return ed25519.Verify(key, msg, signature)
	}
	return false
}

func (v *X509Pop) verified(leaf *x509.Certificate, paths [][]*x509.Certificate) Verified {
	s := Selectors{}
	add := func(key string, values ...string) {
		for _, value := range values {
			if value != "" && !slices.Contains(s[key], value) {
				s[key] = append(s[key], value)
			}
		}
	}
	add("commonName", leaf.Subject.CommonName)
	add("organization", leaf.Subject.Organization...)
	add("organizationalUnit", leaf.Subject.OrganizationalUnit...)
	add("dns", leaf.DNSNames...)
	add("email", leaf.EmailAddresses...)
	add("uri", uris(leaf)...)
	for _, ip := range leaf.IPAddresses {
		add("ip", ip.String())
	}
	add("fingerprint", fingerprint(leaf))
	for _, path := range paths {
		if len(path) > 1 {
			add("issuerFingerprint", fingerprint(path[1]))
		}
	}
	subject := fmt.Sprintf("%s, serial %x, fingerprint %s", forPeople(leaf.Subject.String()), leaf.SerialNumber, s["fingerprint"][0])
	return Verified{Kind: KindX509Pop, Issuer: v.cfg.Name, Selectors: s, Subject: subject}
}

// uris gives the URI names as they stand in the certificate (RFC 5280 section
// 4.2.1.6, tag 6). Package net/url would give some that differ the same form.
func uris(c *x509.Certificate) (out []string) {
	for _, ext := range c.Extensions {
		var names []asn1.RawValue
		if !ext.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			continue
		}
		if _, err := asn1.Unmarshal(ext.Value, &names); err != nil {
			return nil // impossible: the certificate was parsed
		}
		for _, n := range names {
			if n.Class == asn1.ClassContextSpecific && n.Tag == 6 {
				out = append(out, string(n.Bytes))
			}
		}
	}
	return out
}

func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// forPeople makes what a stranger wrote fit for a log: printable and short.
func forPeople(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
	if len(s) <= maxSubject {
		return s
	}
	return strings.ToValidUTF8(s[:maxSubject], "") + "…"
}
