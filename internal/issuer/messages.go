package issuer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"google.golang.org/protobuf/encoding/protowire"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
)

const (
	// MaxMessage is the size limit of one enrolment message in bytes.
	MaxMessage = 16 << 10
	maxCSR     = 8 << 10
	maxName    = 64
	// maxSkew is how far the client's clock may be off at a first enrolment, when
	// somebody is there to mend it. Later ones are not refused for it: an outage
	// would be worse than a clock that is a minute off.
	maxSkew = 30 * time.Second
)

// kinds lists the evidence that Enroll takes.
var kinds = []string{attest.KindJoinToken, attest.KindEnrollmentKey, attest.KindX509Pop, attest.KindKubernetes, attest.KindOIDC}

// hello is a Hello that was checked as far as that goes without the store.
type hello struct {
	csr      []byte
	key      crypto.PublicKey // of the CSR
	evidence any              // one of the protocol's, never empty
	// newKey comes with every evidence but an enrolment key.
	newKey *ecdsa.PublicKey
}

// readHello refuses whatever is not exactly one Hello of this version.
func (s *Service) readHello(msg *sallyportv1.EnrollRequest) (*hello, error) {
	if err := checkMessage(msg); err != nil {
		return nil, err
	}
	m := msg.GetHello()
	if m == nil {
		return nil, malformed("an enrolment begins with Hello")
	}
	if err := checkEvidence(m); err != nil {
		return nil, err
	}
	h := &hello{csr: m.GetCsr(), evidence: m.GetEvidence()}
	if m.GetEnrollmentKey() == nil {
		key, err := attest.ParseEnrollmentKey(m.GetNewEnrollmentKey())
		if err != nil {
			return nil, malformed("%v", err)
		}
		if err := s.checkClock(m); err != nil {
			return nil, err
		}
		h.newKey = key
	}
	var err error
	h.key, err = readCSR(h.csr)
	return h, err
}

func checkEvidence(m *sallyportv1.Hello) error {
	switch e := m.GetEvidence().(type) {
	case *sallyportv1.Hello_JoinToken:
		if len(e.JoinToken.GetSecret()) != attest.SecretSize || len(e.JoinToken.GetId()) > maxName {
			return malformed("join token: an id of at most %d bytes and a secret of %d", maxName, attest.SecretSize)
		}
	case *sallyportv1.Hello_EnrollmentKey:
		if n := len(e.EnrollmentKey.GetInstance()); n == 0 || n > maxName {
			return malformed("enrolment key: an instance of 1 to %d bytes", maxName)
		}
	case *sallyportv1.Hello_X509Pop:
		if n := len(e.X509Pop.GetChain()); n == 0 || n > attest.MaxChain || len(e.X509Pop.GetCa()) > maxName {
			return malformed("x509pop: a chain of 1 to %d certificates, and a CA's name of at most %d bytes", attest.MaxChain, maxName)
		}
	case *sallyportv1.Hello_Kubernetes:
		return checkBearer(attest.KindKubernetes, e.Kubernetes)
	case *sallyportv1.Hello_Oidc:
		return checkBearer(attest.KindOIDC, e.Oidc)
	default:
		return malformed("no evidence: this version accepts %s", strings.Join(kinds, ", "))
	}
	return nil
}

func checkBearer(kind string, t *sallyportv1.BearerToken) error {
	if n := len(t.GetToken()); n == 0 || n > attest.MaxBearer || len(t.GetIssuer()) > maxName {
		return malformed("%s: a token of 1 to %d bytes, and an issuer's name of at most %d", kind, attest.MaxBearer, maxName)
	}
	return nil
}

func (s *Service) checkClock(m *sallyportv1.Hello) error {
	if m.GetClientTime() == nil {
		return nil
	}
	now := s.cfg.Now()
	skew := m.GetClientTime().AsTime().Sub(now)
	if skew.Abs() <= maxSkew {
		return nil
	}
	word := "ahead of"
	if skew < 0 {
		word = "behind"
	}
	return fmt.Errorf("%w: this machine's clock is %v %s the control plane's (%s); set it (NTP) and start again",
		errClock, skew.Abs().Round(time.Second), word, now.UTC().Format(time.RFC3339))
}

func readProof(msg *sallyportv1.EnrollRequest, kind string) (*sallyportv1.Proof, error) {
	if err := checkMessage(msg); err != nil {
		return nil, err
	}
	p := msg.GetProof()
	if p == nil {
		return nil, malformed("a Challenge is answered by a Proof")
	}
	if kind != attest.KindX509Pop && len(p.GetEvidenceSignature()) > 0 {
		return nil, malformed("an evidence signature belongs to %s only", attest.KindX509Pop)
	}
	return p, nil
}

// readCSR returns the public key of a CSR whose signature proves possession of
// the private one. Whatever else the CSR asks for is not looked at.
func readCSR(der []byte) (crypto.PublicKey, error) {
	if len(der) == 0 || len(der) > maxCSR {
		return nil, malformed("CSR of %d bytes: want 1 to %d", len(der), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, malformed("parsing the CSR: %v", err)
	}
	// Before the signature: checking one of a giant key would be work for nothing.
	if err := ca.CheckKey(csr.PublicKey); err != nil {
		return nil, malformed("CSR: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, malformed("checking the CSR's signature: %v", err)
	}
	return csr.PublicKey, nil
}

// checkMessage refuses messages that are too large and fields that this version
// does not know: a client that relies on them must not be half understood.
func checkMessage(m proto.Message) error { return checkMessageUpTo(m, MaxMessage) }

func checkMessageUpTo(m proto.Message, limit int) error {
	if m == nil || !m.ProtoReflect().IsValid() {
		return malformed("no message")
	}
	if n := proto.Size(m); n > limit {
		return malformed("message of %d bytes: at most %d", n, limit)
	}
	return checkUnknown(m.ProtoReflect())
}

func checkUnknown(m protoreflect.Message) error {
	if raw := m.GetUnknown(); len(raw) > 0 {
		num, _, _ := protowire.ConsumeTag(raw)
		return malformed("field %d of %s is not supported by this version", num, m.Descriptor().Name())
	}
	var err error
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			if f.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					err = checkUnknown(v.Message())
					return err == nil
				})
			}
		case f.Message() != nil && !f.IsList(): // no message has a list of messages
			err = checkUnknown(v.Message())
		}
		return err == nil
	})
	return err
}

// readProcess takes an agent's word for a process.
func readProcess(p *sallyportv1.Process) (attest.Verified, error) {
	v := attest.Verified{Kind: attest.KindUnix, Selectors: attest.Selectors{}}
	for key, values := range p.GetSelectors() {
		v.Selectors[key] = values.GetValues()
	}
	if err := attest.CheckProcess(v.Selectors); err != nil {
		return attest.Verified{}, malformed("%v", err)
	}
	var subject []string
	for _, key := range []string{"uid", "user", "unit", "container", "path"} {
		for _, value := range v.Selectors[key] {
			subject = append(subject, fmt.Sprintf("%s %.128s", key, value))
		}
	}
	v.Subject = strings.Join(subject, ", ")
	return v, nil
}
