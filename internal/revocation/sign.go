package revocation

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/proto"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// label is signed before the list, so that no other signature of the same key can
// be taken for one of a list.
const label = "sallyport revocation list v1\x00"

// maxChain is how many certificates may come with a list.
const maxChain = 8

var (
	// ErrUnknownSigner says that the signer's certificate does not verify against
	// the bundles held. That may be their fault: they may be older than the
	// signer's CA.
	ErrUnknownSigner = errors.New("the signer is not trusted")
	// ErrExpired says that the signer's certificate has expired since.
	ErrExpired = errors.New("the signer's certificate has expired")
)

// Sign makes an envelope of list with the control plane's SVID, whose key must be
// ECDSA P-256. It puts the entries in order, so that replicas which sign the same
// list differ in the moment of issue only. It refuses what [Open] would refuse.
func Sign(list *sallyportv1.RevocationList, svid *x509svid.SVID) ([]byte, error) {
	if svid.ID.TrustDomain().Name() != list.GetTrustDomain() {
		return nil, fmt.Errorf("signing the revocation list of %q: %s may not", list.GetTrustDomain(), svid.ID)
	}
	if pub, ok := svid.PrivateKey.Public().(*ecdsa.PublicKey); !ok || pub.Curve != elliptic.P256() {
		return nil, errors.New("signing the revocation list: the key is not ECDSA P-256")
	}
	list = proto.CloneOf(list)
	order(list)
	if _, err := parseList(list); err != nil {
		return nil, fmt.Errorf("signing the revocation list: %w", err)
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(list)
	if err != nil {
		return nil, fmt.Errorf("signing the revocation list: %w", err)
	}
	sum := digest(body)
	env := &sallyportv1.SignedRevocationList{List: body}
	if env.Signature, err = svid.PrivateKey.Sign(rand.Reader, sum[:], crypto.SHA256); err != nil {
		return nil, fmt.Errorf("signing the revocation list: %w", err)
	}
	for _, c := range svid.Certificates {
		env.Chain = append(env.Chain, c.Raw)
	}
	out, err := proto.Marshal(env)
	if err == nil && len(out) > MaxEnvelope {
		err = fmt.Errorf("%d bytes, at most %d accepted", len(out), MaxEnvelope)
	}
	if err != nil {
		return nil, fmt.Errorf("signing the revocation list: %w", err)
	}
	return out, nil
}

func order(m *sallyportv1.RevocationList) {
	slices.SortStableFunc(m.Ids, func(a, b *sallyportv1.RevokedID) int { return cmp.Compare(a.GetPath(), b.GetPath()) })
	slices.SortStableFunc(m.Instances, func(a, b *sallyportv1.RevokedInstance) int {
		return cmp.Compare(a.GetInstance(), b.GetInstance())
	})
	slices.SortStableFunc(m.Serials, func(a, b *sallyportv1.RevokedSerial) int { return bytes.Compare(a.GetSerial(), b.GetSerial()) })
	slices.SortStableFunc(m.Issuers, func(a, b *sallyportv1.RevokedIssuer) int { return bytes.Compare(a.GetKeyHash(), b.GetKeyHash()) })
}

func digest(body []byte) [sha256.Size]byte {
	return sha256.Sum256(append([]byte(label), body...))
}

// Open reads an envelope that the control plane of the list's own trust domain,
// [identity.ControlPlanePath], signed, with a certificate that is valid at now by the bundle of that trust
// domain. Errors: [ErrExpired], [ErrUnknownSigner]; any other one means that
// somebody made the envelope up or broke it.
func Open(envelope []byte, bundles x509bundle.Source, now time.Time) (*List, error) {
	l, _, err := open(envelope, bundles, now, spiffeid.ID{})
	return l, err
}

// open returns the signer too. A zero now stands for the moment at which the list
// was issued. expect is who signs the lists of its trust domain, where that is not
// [identity.ControlPlanePath].
func open(envelope []byte, bundles x509bundle.Source, now time.Time, expect spiffeid.ID) (*List, identity.Peer, error) {
	l, signer, err := openEnvelope(envelope, bundles, now, expect)
	if err != nil {
		return nil, identity.Peer{}, fmt.Errorf("opening revocation list: %w", err)
	}
	return l, signer, nil
}

// openEnvelope reads nothing of a list before it knows who signed it, but for its
// moment of issue where that is asked for.
func openEnvelope(envelope []byte, bundles x509bundle.Source, now time.Time, expect spiffeid.ID) (l *List, signer identity.Peer, err error) {
	if len(envelope) > MaxEnvelope {
		return nil, signer, fmt.Errorf("%d bytes, at most %d accepted", len(envelope), MaxEnvelope)
	}
	var env sallyportv1.SignedRevocationList
	var m sallyportv1.RevocationList
	if err := proto.Unmarshal(envelope, &env); err != nil {
		return nil, signer, err
	}
	chain, err := parseChain(env.GetChain())
	if err != nil {
		return nil, signer, err
	}
	if now.IsZero() {
		if err := proto.Unmarshal(env.GetList(), &m); err != nil {
			return nil, signer, err
		}
		now = m.GetIssued().AsTime()
	}
	if signer, err = verifySigner(chain, bundles, now, expect); err != nil {
		return nil, signer, err
	}
	pub, ok := chain[0].PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, signer, errors.New("the signer's key is not ECDSA P-256")
	}
	if sum := digest(env.GetList()); !ecdsa.VerifyASN1(pub, sum[:], env.GetSignature()) {
		return nil, signer, errors.New("the signature is wrong")
	}
	if err := proto.Unmarshal(env.GetList(), &m); err != nil { // resets m first
		return nil, signer, err
	}
	if l, err = parseList(&m); err != nil {
		return nil, signer, err
	}
	if signer.ID.TrustDomain() != l.td {
		return nil, signer, fmt.Errorf("a list of %s signed by %s", l.td, signer.ID)
	}
	l.expires = firstExpiry(chain)
	return l, signer, nil
}

// verifySigner accepts the control plane of any trust domain.
func verifySigner(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time, expect spiffeid.ID) (identity.Peer, error) {
	if expires := firstExpiry(chain); now.After(expires) {
		return identity.Peer{}, fmt.Errorf("%w at %s", ErrExpired, stamp(expires))
	}
	signer, err := identity.Verify(chain, bundles, now)
	if err != nil {
		return signer, fmt.Errorf("%w: %w", ErrUnknownSigner, err)
	}
	is := signer.ID.Path() == identity.ControlPlanePath
	if signer.ID.TrustDomain() == expect.TrustDomain() {
		is = signer.ID == expect
	}
	if !is {
		return signer, fmt.Errorf("signed by %s, which is no control plane", signer.ID)
	}
	return signer, nil
}

func parseChain(ders [][]byte) ([]*x509.Certificate, error) {
	if len(ders) == 0 || len(ders) > maxChain {
		return nil, fmt.Errorf("%d certificates, want 1 to %d", len(ders), maxChain)
	}
	var out []*x509.Certificate
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

func firstExpiry(chain []*x509.Certificate) time.Time {
	first := chain[0].NotAfter
	for _, c := range chain {
		if c.NotAfter.Before(first) {
			first = c.NotAfter
		}
	}
	return first
}
