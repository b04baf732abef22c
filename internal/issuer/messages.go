package issuer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"google.golang.org/protobuf/encoding/protowire"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
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

// hello is a Hello that was checked as far as that goes without the store.
type hello struct {
	csr   []byte
	key   crypto.PublicKey // of the CSR
	token *sallyportv1.JoinToken
	// newKey comes with a token, instance without.
	newKey   *ecdsa.PublicKey
	instance string
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
	h := &hello{csr: m.GetCsr()}
	switch e := m.GetEvidence().(type) {
	case *sallyportv1.Hello_JoinToken:
		if e.JoinToken == nil || len(e.JoinToken.GetSecret()) != attest.SecretSize || len(e.JoinToken.GetId()) > maxName {
			return nil, malformed("join token: an id of at most %d bytes and a secret of %d", maxName, attest.SecretSize)
		}
		key, err := attest.ParseEnrollmentKey(m.GetNewEnrollmentKey())
		if err != nil {
			return nil, malformed("%v", err)
		}
		if err := s.checkClock(m); err != nil {
			return nil, err
		}
		h.token, h.newKey = e.JoinToken, key
	case *sallyportv1.Hello_EnrollmentKey:
		h.instance = e.EnrollmentKey.GetInstance()
		if h.instance == "" || len(h.instance) > maxName {
			return nil, malformed("enrolment key: an instance of 1 to %d bytes", maxName)
		}
	default:
		return nil, malformed("no evidence: this version accepts %s and %s", attest.KindJoinToken, attest.KindEnrollmentKey)
	}
	var err error
	h.key, err = readCSR(h.csr)
	return h, err
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

func readProof(msg *sallyportv1.EnrollRequest) ([]byte, error) {
	if err := checkMessage(msg); err != nil {
		return nil, err
	}
	if msg.GetProof() == nil {
		return nil, malformed("a Challenge is answered by a Proof")
	}
	return msg.GetProof().GetSignature(), nil
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
func checkMessage(m proto.Message) error {
	if m == nil || !m.ProtoReflect().IsValid() {
		return malformed("no message")
	}
	if n := proto.Size(m); n > MaxMessage {
		return malformed("message of %d bytes: at most %d", n, MaxMessage)
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
		if f.Message() != nil && !f.IsList() && !f.IsMap() {
			err = checkUnknown(v.Message())
		}
		return err == nil
	})
	return err
}

// evidence is a claim that a Proof by key will make good.
type evidence struct {
	kind   string
	key    *ecdsa.PublicKey
	accept func(ctx context.Context, origin string) (registry.Instance, error)
}

// evidence finds out which key must answer the challenge. A join token is not
// spent before its sidecar has proved that it holds the key to be registered, but
// nobody without one is waited for.
func (s *Service) evidence(ctx context.Context, h *hello) (*evidence, error) {
	if h.token != nil {
		if err := s.cfg.Registry.CheckToken(ctx, h.token.GetId(), h.token.GetSecret()); err != nil {
			return nil, err
		}
		return &evidence{attest.KindJoinToken, h.newKey, func(ctx context.Context, origin string) (registry.Instance, error) {
			return s.cfg.Registry.Redeem(ctx, registry.Redemption{
				TokenID: h.token.GetId(), Secret: h.token.GetSecret(), Key: h.newKey, Origin: origin,
			})
		}}, nil
	}
	inst, err := s.cfg.Registry.Instance(ctx, h.instance)
	if err != nil {
		return nil, err
	}
	key, err := inst.EnrollmentKey()
	if err != nil {
		return nil, err
	}
	return &evidence{attest.KindEnrollmentKey, key, func(ctx context.Context, _ string) (registry.Instance, error) {
		return inst, s.cfg.Registry.Entitled(ctx, inst.ID, inst.Name)
	}}, nil
}
