// Package revocation is the list of SVIDs that are refused although they have not
// expired: signed by the control plane, monotonic, checked in every handshake and
// against every live connection. It may come from the control plane or from any
// peer, as it proves itself.
//
// It decides what is refused and which of two lists is newer. It does not say what
// to revoke, which is the registry's, and it carries nothing anywhere.
package revocation

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Limits of a list.
const (
	// MaxEnvelope is the size of a signed list in bytes.
	MaxEnvelope = 4 << 20
	// MaxEntries is how many entries of all kinds a list may hold.
	MaxEntries = 100_000

	maxInstance = 64 // bytes, as in certificates
	maxSerial   = 20 // octets, RFC 5280 section 4.1.2.2
)

// ErrRevoked is in every error that says that an SVID is refused.
var ErrRevoked = errors.New("revoked")

// Version orders the lists of one trust domain. Number counts within an epoch, from
// 0, which is the list of a mesh where nothing was revoked yet.
type Version struct {
	Epoch, Number int64
}

// Less reports whether v is older than o.
func (v Version) Less(o Version) bool {
	return v.Epoch < o.Epoch || v.Epoch == o.Epoch && v.Number < o.Number
}

// String gives the form EPOCH.NUMBER.
func (v Version) String() string { return fmt.Sprintf("%d.%d", v.Epoch, v.Number) }

// List is everything revoked in one trust domain at one moment. It is immutable.
// A nil List refuses nothing.
type List struct {
	td      spiffeid.TrustDomain
	version Version
	issued  time.Time
	content [sha256.Size]byte // of all but the moment of issue
	expires time.Time         // when the first certificate of the signer expires

	ids       map[string]bounds    // :: path → what was issued before
	instances map[string]time.Time // :: instance → certificates issued before
	serials   map[serial]struct{}
	issuers   map[keyHash]time.Time // :: key of a CA → refused from
}

// bounds are the moments before which an ID's SVIDs were issued.
type bounds struct{ x509, jwt time.Time }

type (
	serial  [maxSerial]byte // big endian, padded in front
	keyHash [sha256.Size]byte
)

// TrustDomain is whose SVIDs the list is about.
func (l *List) TrustDomain() spiffeid.TrustDomain { return l.td }

// Version says which list it is; zero for a nil List.
func (l *List) Version() Version {
	if l == nil {
		return Version{}
	}
	return l.version
}

// Issued is when the control plane signed it.
func (l *List) Issued() time.Time { return l.issued }

// Len is the number of entries.
func (l *List) Len() int {
	if l == nil {
		return 0
	}
	return len(l.ids) + len(l.instances) + len(l.serials) + len(l.issuers)
}

// Check returns an error that is [ErrRevoked], and says what was revoked, if the
// list refuses the peer's certificate at now. It looks at the SPIFFE ID, the
// instance (the subject's serial number), the serial, and the key of every
// certificate presented. A root is not presented: it is refused by taking it out of
// the bundle. Peers of another trust domain are not its business. It takes constant
// time and allocates nothing but the error.
func (l *List) Check(p identity.Peer, now time.Time) error {
	if l == nil || p.Leaf == nil || p.ID.TrustDomain() != l.td {
		return nil
	}
	if b, ok := l.ids[p.ID.Path()]; ok && p.Leaf.NotBefore.Before(b.x509) {
		return fmt.Errorf("%w: SVIDs of %s from before %s", ErrRevoked, p.ID, stamp(b.x509))
	}
	if before, ok := l.instances[p.Leaf.Subject.SerialNumber]; ok && p.Leaf.NotBefore.Before(before) {
		return fmt.Errorf("%w: instance %s, SVIDs from before %s", ErrRevoked, p.Leaf.Subject.SerialNumber, stamp(before))
	}
	if len(l.serials) > 0 {
		if _, ok := l.serials[serialOf(p.Leaf)]; ok {
			return fmt.Errorf("%w: certificate with serial %x", ErrRevoked, p.Leaf.SerialNumber)
		}
	}
	if h, ok := l.refusedIssuer(p.Chain, now); ok {
		return fmt.Errorf("%w: issuer with key %x", ErrRevoked, h)
	}
	return nil
}

// refusedIssuer finds a certificate whose key is refused at now.
func (l *List) refusedIssuer(chain []*x509.Certificate, now time.Time) (keyHash, bool) {
	if l == nil || len(l.issuers) == 0 {
		return keyHash{}, false
	}
	for _, c := range chain {
		h := keyHash(sha256.Sum256(c.RawSubjectPublicKeyInfo))
		if from, ok := l.issuers[h]; ok && !now.Before(from) {
			return h, true
		}
	}
	return keyHash{}, false
}

// CheckJWT is Check for a JWT-SVID of id that was issued at iat.
func (l *List) CheckJWT(id spiffeid.ID, iat time.Time) error {
	if l == nil || id.TrustDomain() != l.td {
		return nil
	}
	if b, ok := l.ids[id.Path()]; ok && iat.Before(b.jwt) {
		return fmt.Errorf("%w: JWT-SVIDs of %s from before %s", ErrRevoked, id, stamp(b.jwt))
	}
	return nil
}

// Names reports whether the list holds an issuer of this chain, be it refused
// already or only from a later moment on: whose chain it is has to renew at once.
func (l *List) Names(chain []*x509.Certificate) bool {
	if l == nil || len(l.issuers) == 0 {
		return false
	}
	for _, c := range chain {
		if _, ok := l.issuers[sha256.Sum256(c.RawSubjectPublicKeyInfo)]; ok {
			return true
		}
	}
	return false
}

// next returns the first moment after now from which one more issuer is refused.
func (l *List) next(now time.Time) (first time.Time, ok bool) {
	if l == nil {
		return first, false
	}
	for _, from := range l.issuers {
		if from.After(now) && (!ok || from.Before(first)) {
			first, ok = from, true
		}
	}
	return first, ok
}

// serialOf pads a serial; one that is too long is nobody's here.
func serialOf(c *x509.Certificate) (s serial) {
	if c.SerialNumber != nil && c.SerialNumber.BitLen() <= 8*maxSerial {
		c.SerialNumber.FillBytes(s[:])
	}
	return s
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// parseList reads and checks a list. Whatever is wrong makes the whole list bad.
func parseList(m *sallyportv1.RevocationList) (*List, error) {
	n := len(m.GetIds()) + len(m.GetInstances()) + len(m.GetSerials()) + len(m.GetIssuers())
	if n > MaxEntries {
		return nil, fmt.Errorf("%d entries, at most %d accepted", n, MaxEntries)
	}
	td, err := spiffeid.TrustDomainFromString(m.GetTrustDomain())
	if err != nil || td.Name() != m.GetTrustDomain() {
		return nil, fmt.Errorf("%.100q is not a trust domain", m.GetTrustDomain())
	}
	l := &List{
		td: td, version: Version{m.GetEpoch(), m.GetNumber()},
		ids: make(map[string]bounds, len(m.GetIds())), instances: make(map[string]time.Time, len(m.GetInstances())),
		serials: make(map[serial]struct{}, len(m.GetSerials())), issuers: make(map[keyHash]time.Time, len(m.GetIssuers())),
	}
	if l.version.Epoch < 0 || l.version.Number < 0 {
		return nil, fmt.Errorf("version %s: epoch and number are never negative", l.version)
	}
	if l.issued, err = moment("issued", m.GetIssued()); err != nil {
		return nil, err
	}
	if err := l.addSubjects(m); err != nil {
		return nil, err
	}
	if err := l.addKeys(m); err != nil {
		return nil, err
	}
	l.content, err = contentOf(m)
	return l, err
}

// addSubjects reads IDs and instances. Of two entries for one, the later bound
// counts.
func (l *List) addSubjects(m *sallyportv1.RevocationList) error {
	for _, e := range m.GetIds() {
		if err := spiffeid.ValidatePath(e.GetPath()); err != nil || e.GetPath() == "" {
			return fmt.Errorf("revoked ID %.100q: want the path of a SPIFFE ID", e.GetPath())
		}
		b, err := boundsOf(e)
		if err != nil {
			return fmt.Errorf("revoked ID %s: %w", e.GetPath(), err)
		}
		old := l.ids[e.GetPath()]
		l.ids[e.GetPath()] = bounds{later(old.x509, b.x509), later(old.jwt, b.jwt)}
	}
	for _, e := range m.GetInstances() {
		if n := len(e.GetInstance()); n == 0 || n > maxInstance {
			return fmt.Errorf("revoked instance of %d bytes: want 1 to %d", n, maxInstance)
		}
		before, err := moment("not_before", e.GetNotBefore())
		if err != nil {
			return fmt.Errorf("revoked instance %q: %w", e.GetInstance(), err)
		}
		l.instances[e.GetInstance()] = later(l.instances[e.GetInstance()], before)
	}
	return nil
}

// boundsOf takes the bound of JWTs, where there is none, from the certificates'.
func boundsOf(e *sallyportv1.RevokedID) (b bounds, err error) {
	if b.x509, err = moment("not_before", e.GetNotBefore()); err != nil {
		return b, err
	}
	b.jwt = b.x509
	if e.GetIssuedAt() != nil {
		b.jwt, err = moment("issued_at", e.GetIssuedAt())
	}
	return b, err
}

// addKeys reads serials and issuers. Of two entries for one issuer, the earlier
// moment counts.
func (l *List) addKeys(m *sallyportv1.RevocationList) error {
	for _, e := range m.GetSerials() {
		b := e.GetSerial()
		if len(b) == 0 || len(b) > maxSerial || b[0] == 0 {
			return fmt.Errorf("revoked serial %.50x: want 1 to %d octets, the first not zero", b, maxSerial)
		}
		var s serial
		copy(s[maxSerial-len(b):], b)
		l.serials[s] = struct{}{}
	}
	for _, e := range m.GetIssuers() {
		if len(e.GetKeyHash()) != sha256.Size {
			return fmt.Errorf("revoked issuer %.50x: want a SHA-256 of a public key", e.GetKeyHash())
		}
		var from time.Time // zero: at once
		if e.GetFrom() != nil {
			var err error
			if from, err = moment("from", e.GetFrom()); err != nil {
				return fmt.Errorf("revoked issuer %x: %w", e.GetKeyHash(), err)
			}
		}
		h := keyHash(e.GetKeyHash())
		if old, twice := l.issuers[h]; !twice || from.Before(old) {
			l.issuers[h] = from
		}
	}
	return nil
}

func moment(name string, t *timestamppb.Timestamp) (time.Time, error) {
	if err := t.CheckValid(); err != nil {
		return time.Time{}, fmt.Errorf("%s: %s", name, strings.TrimSpace(strings.TrimPrefix(err.Error(), "proto:")))
	}
	return t.AsTime(), nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// contentOf tells lists apart that say different things. When they were issued is
// not part of that.
func contentOf(m *sallyportv1.RevocationList) ([sha256.Size]byte, error) {
	bare := &sallyportv1.RevocationList{
		TrustDomain: m.GetTrustDomain(), Epoch: m.GetEpoch(), Number: m.GetNumber(),
		Ids: m.GetIds(), Instances: m.GetInstances(), Serials: m.GetSerials(), Issuers: m.GetIssuers(),
	}
	bare.ProtoReflect().SetUnknown(m.ProtoReflect().GetUnknown())
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(bare)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	return sha256.Sum256(b), nil
}
