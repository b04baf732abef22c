package ca

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// ErrUnknownAuthority says that no authority has that subject or key hash.
var ErrUnknownAuthority = errors.New("no such authority; see: sallyport status")

// Tainted is a key that is not believed any more, although what it signed has not
// expired.
type Tainted struct {
	KeyHash string    `json:"key_hash"` // SHA-256 of the SubjectPublicKeyInfo, lower-case hex
	Kind    string    `json:"kind"`     // root, intermediate or jwt
	Subject string    `json:"subject"`
	At      time.Time `json:"at"`
	Until   time.Time `json:"until"` // when nothing that it signed can be valid
}

func newTaint(kind string, cert *x509.Certificate, now time.Time) *Tainted {
	return &Tainted{Kind: kind, Subject: cert.Subject.CommonName, At: now.UTC(), Until: cert.NotAfter, KeyHash: keyHash(cert)}
}

func (t *Tainted) op() (store.Op, error) {
	value, err := json.Marshal(t)
	if err != nil {
		return store.Op{}, fmt.Errorf("encoding a taint: %w", err)
	}
	return store.Op{Key: taintPrefix + t.KeyHash, Value: value}, nil
}

// keyHash is the SHA-256 of a certificate's SubjectPublicKeyInfo in hex.
func keyHash(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// Taint stops believing in a key, for every replica and over restarts, and
// returns which key signs in its place. The key is named by its subject or hash,
// as [CA.Authorities] lists them.
//
// An intermediate is replaced at once; the name of its successor is empty when
// another replica has to make it. To refuse what it signed is package
// revocation's. A root or JWT key gets a successor at once, which signs after a
// third of Config.TaintGrace, when everybody who is connected can have learnt it;
// the tainted one leaves the bundle after all of it, and nothing under it is
// believed from then on. One that never signed leaves at once.
//
// A new root is also signed by the tainted one, and chains carry that
// certificate: the control plane's for as long as it lives, workloads' for the
// life of an SVID. So a sidecar that was cut off and knows only the old root
// accepts its peers and, whenever it comes back, the control plane, and learns.
//
// [CA.WatchTainted] lists a key from when on what replaces it signs: whoever holds
// an SVID of it can get a better one then. Tainting a key again changes nothing.
// The error is ErrUnknownAuthority, or says what could not be done yet and is
// tried again by Run.
func (c *CA) Taint(ctx context.Context, authority string) (t Tainted, replacedBy string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var s *subject
	err = c.retry(func() (err error) {
		s, err = c.taint(ctx, authority, c.cfg.Now())
		return err
	})
	if err != nil {
		return Tainted{}, "", fmt.Errorf("tainting %.100q: %w", authority, err)
	}
	before := c.state.Load()
	for range 2 { // what was never used is taken away first, and replaced then
		if err := c.advanceLocked(ctx); err != nil {
			return s.Tainted, "", fmt.Errorf("replacing the tainted %s %s; it is tried again: %w", s.Kind, s.Subject, err)
		}
	}
	after := c.state.Load()
	switch {
	case s.Kind == KindRoot:
		replacedBy = after.roots[len(after.roots)-1].cert.Subject.CommonName
	case s.Kind == KindJWT:
		replacedBy = after.jwts[len(after.jwts)-1].cert.Subject.CommonName
	case s.KeyHash == keyHash(before.signer.cert):
		replacedBy = after.signer.cert.Subject.CommonName
	}
	c.log.Warn("authority tainted", "kind", s.Kind, "subject", s.Subject, "replaced_by", replacedBy)
	return s.Tainted, replacedBy, nil
}

// subject is what is to be tainted.
type subject struct {
	Tainted
	cert *x509.Certificate
}

func (b *book) find(name string, now time.Time) *subject {
	is := func(cert *x509.Certificate) bool {
		return cert.Subject.CommonName == name || strings.EqualFold(keyHash(cert), name)
	}
	for _, l := range lines {
		for _, a := range b.anchors[l] {
			if is(a.cert) {
				return &subject{*newTaint(l.kind, a.cert, now), a.cert}
			}
		}
	}
	for _, rec := range b.issuers {
		if is(rec.cert) {
			return &subject{*newTaint(KindIntermediate, rec.cert, now), rec.cert}
		}
	}
	return nil
}

func (c *CA) taint(ctx context.Context, authority string, now time.Time) (*subject, error) {
	b, err := c.readBook(ctx)
	if err != nil {
		return nil, err
	}
	s := b.find(authority, now)
	if s == nil {
		return nil, ErrUnknownAuthority
	}
	if known := b.tainted[s.KeyHash]; known != nil { // goes on where it was interrupted
		s.Tainted = *known
		return s, nil
	}
	op, err := s.op()
	if err != nil {
		return nil, err
	}
	ops := []store.Op{op}
	if s.Kind == KindRoot {
		more, err := b.signedBy(s.cert, now)
		if err != nil {
			return nil, err
		}
		ops = append(ops, more...)
	}
	return s, c.commit(ctx, b, now, []store.Cmp{{Key: op.Key}}, ops)
}

// signedBy taints the intermediates of all replicas that root has signed.
func (b *book) signedBy(root *x509.Certificate, now time.Time) (ops []store.Op, err error) {
	for hash, rec := range b.issuers {
		if b.tainted[hash] != nil || rec.cert.CheckSignatureFrom(root) != nil {
			continue
		}
		op, err := newTaint(KindIntermediate, rec.cert, now).op()
		if err != nil {
			return nil, err
		}
		ops = append(ops, op)
	}
	return ops, nil
}

// spent says that a tainted anchor leaves the bundle: its grace is over and its
// successor signs, or it never signed.
func (c *CA) spent(a *anchor, all []*anchor, now time.Time) bool {
	if a.taint == nil || c.schedule(all, now) == a {
		return false
	}
	for _, next := range all[slices.Index(all, a)+1:] {
		if !next.activeFrom.IsZero() && !now.Before(next.activeFrom) {
			return !now.Before(next.activeFrom.Add(c.cfg.TaintGrace * 2 / 3))
		}
	}
	return now.Before(a.activeFrom.Add(-maxSkew))
}

// introduce signs the successor of a tainted root with that root, once, where
// the successor was there before the taint.
func (c *CA) introduce(ctx context.Context, l *line, old, next *anchor, now time.Time) error {
	if old.taint == nil || next.cross != nil {
		return nil
	}
	if next.cross = c.crossSign(l, old, next, now); next.cross == nil {
		return nil
	}
	value, err := next.encode()
	if err != nil {
		return fmt.Errorf("encoding %s: %w", l.name(next.cert), err)
	}
	key := l.store + l.name(next.cert)
	next.rev, err = c.cfg.Store.Txn(ctx, []store.Cmp{{Key: key, Rev: next.rev}}, []store.Op{{Key: key, Value: value}})
	if err != nil {
		return fmt.Errorf("introducing %s: %w", l.name(next.cert), err)
	}
	return nil
}

// crossSign returns the key of a new root, signed by the old one. Where that
// cannot be had, whoever is not connected during the grace may have to enrol with
// a new join token.
func (c *CA) crossSign(l *line, old, next *anchor, now time.Time) *x509.Certificate {
	if l != rootLine {
		return nil
	}
	cert, err := c.newCross(old, next.cert, now)
	if err != nil {
		c.log.Warn("cannot introduce the new root to sidecars that only know the old one", "error", err)
		return nil
	}
	return cert
}

func (c *CA) newCross(old *anchor, root *x509.Certificate, now time.Time) (*x509.Certificate, error) {
	if old.signer == nil {
		return nil, errors.New("the old root's key is not here")
	}
	tmpl, err := template(c.td.ID(), now, c.cfg.RootTTL)
	if err != nil {
		return nil, err
	}
	tmpl.Subject, tmpl.SubjectKeyId = root.Subject, root.SubjectKeyId
	tmpl.IsCA, tmpl.KeyUsage = true, root.KeyUsage
	cert, err := sign(tmpl, &authority{cert: old.cert, signer: old.signer}, root.PublicKey)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(cert.RawSubject, root.RawSubject) || keyHash(cert) != keyHash(root) {
		return nil, errors.New("certificate withheld: it is not of the same authority")
	}
	if err := lintCA(cert, old.cert, c.td, now, c.cfg.RootTTL); err != nil {
		return nil, fmt.Errorf("certificate withheld: %w", err)
	}
	return cert, nil
}

// TaintGrace is how long everybody has to renew.
func (c *CA) TaintGrace() time.Duration { return c.cfg.TaintGrace }

// Tainted lists the keys that are not believed any more and whose
// replacement signs, in the order of their hashes.
func (c *CA) Tainted() []Tainted { return c.state.Load().tainted }

// TaintedIssuer says that some issuer in a chain, leaf first, is tainted: the
// leaf is due for renewal, and after a while to be refused.
func (c *CA) TaintedIssuer(chain []*x509.Certificate) bool {
	s := c.state.Load()
	return len(chain) > 0 && slices.ContainsFunc(chain[1:], func(cert *x509.Certificate) bool {
		_, found := slices.BinarySearchFunc(s.tainted, keyHash(cert), func(k Tainted, hash string) int { return cmp.Compare(k.KeyHash, hash) })
		return found
	})
}

// WatchTainted calls fn with [CA.Tainted] at once and then whenever they
// change, until ctx ends or fn fails; it returns that error. A slow fn sees only
// the newest.
func (c *CA) WatchTainted(ctx context.Context, fn func([]Tainted) error) error {
	return watch(ctx, c, func(s *state) []Tainted { return s.tainted }, sameTaints, fn)
}

func sameTaints(a, b []Tainted) bool {
	return slices.EqualFunc(a, b, func(x, y Tainted) bool { return x.KeyHash == y.KeyHash })
}

// effective returns what Tainted lists. A key whose successor does not sign
// yet is not in it, nor what it signed: there is nothing better to be had.
func (s *state) effective(b *book) (list []Tainted) {
	for hash, rec := range b.tainted {
		issuer := b.issuers[hash]
		switch {
		case rec.Kind == KindJWT && s.jwt.taint != nil && keyHash(s.jwt.cert) == hash,
			rec.Kind == KindRoot && keyHash(s.active.cert) == hash,
			s.active.taint != nil && issuer != nil && issuer.cert.CheckSignatureFrom(s.active.cert) == nil:
			continue
		}
		list = append(list, *rec)
	}
	slices.SortFunc(list, func(x, y Tainted) int { return cmp.Compare(x.KeyHash, y.KeyHash) })
	return list
}
