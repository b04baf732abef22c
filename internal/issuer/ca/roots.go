package ca

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// In the store: the trust domain, one record per root, JWT key and taint, and a
// counter that every change of them rewrites, so that two replicas cannot rotate
// at once. It is the bundle's sequence number.
const (
	storePrefix    = "ca/"
	keyTrustDomain = storePrefix + "trust-domain"
	keyGeneration  = storePrefix + "generation"
	rootPrefix     = storePrefix + "roots/"
	jwtPrefix      = storePrefix + "jwt/"
	taintPrefix    = storePrefix + "tainted/"
)

// shelf is the keys of one kind, which follow one another by the same rules.
type shelf struct {
	kind    string           // also the beginning of the names of key files
	prefix  string           // of the records in the store
	records map[string]*root // :: name → key
}

// name of a key in key folder and store: by the key, so that no two can have the
// same.
func (s *shelf) name(cert *x509.Certificate) string { return s.kind + "-" + keyHash(cert)[:16] }

// rootRecord is the public side of a root, or of a JWT key. Published says when peers could begin
// to learn it, which is what its activation waits for.
type rootRecord struct {
	Certificate []byte    `json:"certificate"` // DER
	Published   time.Time `json:"published"`
}

// root is a root certificate that is published. A JWT key is kept in the same
// form, in a certificate that nobody is asked to trust.
type root struct {
	cert       *x509.Certificate
	signer     Signer // nil: the key file is not here, which only a retiring root may lack
	published  time.Time
	activeFrom time.Time
	taintedAt  time.Time // zero: it is not
}

// book is what the store holds, as of one reading.
type book struct {
	td         spiffeid.TrustDomain // zero: nothing recorded yet
	roots, jwt shelf
	tainted    map[string]Tainted // :: key hash → who said so
	tdRev, gen int64              // for compare-and-swap; zero: absent
	sequence   uint64             // what the counter says
}

func (c *CA) readBook(ctx context.Context) (*book, error) {
	kvs, _, err := c.cfg.Store.List(ctx, storePrefix)
	if err != nil {
		return nil, fmt.Errorf("reading the CA's records: %w", err)
	}
	b := &book{
		roots:   shelf{"root", rootPrefix, map[string]*root{}},
		jwt:     shelf{"jwt", jwtPrefix, map[string]*root{}},
		tainted: map[string]Tainted{},
	}
	for _, kv := range kvs {
		switch {
		case kv.Key == keyTrustDomain:
			if b.td, err = spiffeid.TrustDomainFromString(string(kv.Value)); err != nil {
				return nil, fmt.Errorf("reading the trust domain from the store: %w", err)
			}
			b.tdRev = kv.Rev
		case kv.Key == keyGeneration:
			b.gen, b.sequence = kv.Rev, sequenceOf(kv)
		case strings.HasPrefix(kv.Key, taintPrefix):
			var t Tainted
			if err := json.Unmarshal(kv.Value, &t); err != nil {
				return nil, fmt.Errorf("reading %s from the store: %w", kv.Key, err)
			}
			b.tainted[t.KeyHash] = t
		default:
			for _, s := range []*shelf{&b.roots, &b.jwt} {
				name, ok := strings.CutPrefix(kv.Key, s.prefix)
				if !ok {
					continue
				}
				if s.records[name], err = decodeRecord(kv.Value); err != nil {
					return nil, fmt.Errorf("reading %s from the store: %w", kv.Key, err)
				}
			}
		}
	}
	b.markTainted()
	return b, nil
}

// sequenceOf reads the counter. An earlier version wrote a name there.
func sequenceOf(kv store.KV) uint64 {
	n, err := strconv.ParseUint(string(kv.Value), 10, 64)
	if err != nil {
		return uint64(kv.Rev)
	}
	return n
}

// change runs a transaction on the CA's records and counts it. The counter
// follows the clock, so that a store restored from a backup does not give a
// number again.
func (c *CA) change(ctx context.Context, b *book, now time.Time, cmps []store.Cmp, ops ...store.Op) error {
	next := max(b.sequence+1, uint64(max(now.UnixMilli(), 0)))
	cmps = append([]store.Cmp{{Key: keyGeneration, Rev: b.gen}}, cmps...)
	ops = append(ops, store.Op{Key: keyGeneration, Value: strconv.AppendUint(nil, next, 10)})
	rev, err := c.cfg.Store.Txn(ctx, cmps, ops)
	if err != nil {
		return err
	}
	b.gen, b.sequence = rev, next
	return nil
}

func decodeRecord(data []byte) (*root, error) {
	var rec rootRecord
	if err := json.Unmarshal(data, &rec); err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(rec.Certificate)
	if err != nil {
		return nil, err
	}
	return &root{cert: cert, published: rec.Published}, nil
}

// fixTrustDomain settles which trust domain this data belongs to.
func (c *CA) fixTrustDomain(b *book) error {
	want := c.cfg.TrustDomain
	switch {
	case b.td.IsZero() && want.IsZero():
		return errors.New("opening the CA: no trust domain is configured and the data is new; set one, as in shop.example")
	case b.td.IsZero():
	case want.IsZero():
		want = b.td
	case want != b.td:
		return fmt.Errorf("opening the CA: the data belongs to trust domain %s, not to %s; start with %[1]s, or with another data folder for a new mesh", b.td, want)
	}
	if c.td.IsZero() { // once, while Open runs: it is read without a lock afterwards
		c.td = want
	}
	return nil
}

// attachKeys gives each key of a shelf its private half, and publishes those whose
// file was written just before a crash. One that is still to sign must have it.
func (c *CA) attachKeys(ctx context.Context, b *book, s *shelf, now time.Time) error {
	names, err := c.keys.names(s.kind + "-")
	if err != nil {
		return err
	}
	var unpublished []*authority
	for _, name := range names {
		a, err := c.keys.load(name)
		if err != nil {
			return err
		}
		if err := c.checkOwn(a.cert, name); err != nil {
			return err
		}
		r, known := s.records[name]
		switch {
		case known && !r.cert.Equal(a.cert):
			return fmt.Errorf("CA key file %s holds another certificate than the store: restore it from a backup", c.keys.file(name))
		case known:
			r.signer = a.signer
		case now.Before(a.cert.NotAfter) && b.tainted[keyHash(a.cert)].KeyHash == "":
			unpublished = append(unpublished, a)
		}
	}
	// Before anything is added: a replica with the wrong key folder must not
	// publish a root that the others cannot sign with.
	roots, active := c.schedule(s, now)
	if err := c.lostKey(s, roots, active); err != nil {
		return err
	}
	for _, a := range unpublished {
		if err := c.publish(ctx, b, s, a, now); err != nil {
			return err
		}
	}
	return nil
}

// checkOwn refuses a key file that belongs elsewhere.
func (c *CA) checkOwn(cert *x509.Certificate, name string) error {
	if len(cert.URIs) != 1 || cert.URIs[0].String() != c.td.IDString() {
		return fmt.Errorf("CA key file %s is not of trust domain %s: use the key folder and the data that belong together", c.keys.file(name), c.td)
	}
	return nil
}

// publish records a key whose file exists. ErrConflict means that another replica
// changed the records meanwhile.
func (c *CA) publish(ctx context.Context, b *book, s *shelf, a *authority, now time.Time) error {
	name := s.name(a.cert)
	value, err := json.Marshal(rootRecord{Certificate: a.cert.Raw, Published: now.UTC()})
	if err != nil {
		return fmt.Errorf("encoding %s: %w", name, err)
	}
	cmps := []store.Cmp{{Key: keyTrustDomain, Rev: b.tdRev}, {Key: s.prefix + name}}
	ops := []store.Op{{Key: s.prefix + name, Value: value}}
	if b.tdRev == 0 {
		ops = append(ops, store.Op{Key: keyTrustDomain, Value: []byte(c.td.Name())})
	}
	if err := c.change(ctx, b, now, cmps, ops...); err != nil {
		return fmt.Errorf("publishing %s: %w", name, err)
	}
	if b.tdRev == 0 {
		b.tdRev, b.td = b.gen, c.td
	}
	s.records[name] = &root{cert: a.cert, signer: a.signer, published: now}
	return nil
}

// add makes and publishes a key: first the key file, then the record, so that a
// crash between them leaves a file that the next start publishes. The file stays
// even when publishing fails: another replica may have seen it and published it.
func (c *CA) add(ctx context.Context, b *book, s *shelf, now time.Time) error {
	fresh := c.newRoot
	if s.kind == b.jwt.kind {
		fresh = c.newJWTKey
	}
	a, key, err := fresh(now)
	if err != nil {
		return err
	}
	if err := c.keys.save(s.name(a.cert), a.cert, key); err != nil {
		return err
	}
	if err := c.publish(ctx, b, s, a, now); err != nil {
		return err
	}
	c.log.Info("published a new key", "kind", s.kind, "subject", a.cert.Subject.CommonName, "not_after", a.cert.NotAfter)
	return nil
}

// forgetExpired drops the records of keys that nothing can chain to any more, and
// of tainted roots that are out of the bundle. Their key files stay: were it only
// the clock that was wrong for a while, they are published again.
func (c *CA) forgetExpired(ctx context.Context, b *book, now time.Time) error {
	forget := func(key, what string) error {
		if err := c.change(ctx, b, now, nil, store.Op{Key: key, Delete: true}); err != nil {
			return fmt.Errorf("forgetting %s: %w", what, err)
		}
		return nil
	}
	for _, s := range []*shelf{&b.roots, &b.jwt} {
		for name, r := range s.records {
			if now.Before(r.cert.NotAfter) && !c.withdrawn(s, r, now) {
				continue
			}
			if err := forget(s.prefix+name, name); err != nil {
				return err
			}
			delete(s.records, name)
			c.log.Info("forgot a key", "kind", s.kind, "subject", r.cert.Subject.CommonName)
		}
	}
	for hash, t := range b.tainted {
		if now.Before(t.Until) {
			continue
		}
		if err := forget(taintPrefix+hash, "a taint"); err != nil {
			return err
		}
		delete(b.tainted, hash)
	}
	return nil
}

// schedule orders the unexpired roots and says from when on each one signs. All
// replicas compute the same from the same records.
//
// A root becomes active at five sixths of its predecessor's life, but not before
// it has been published for a twelfth of that life, for a control plane that was
// down at the time; and at the latest when its predecessor ends.
//
// The successor of a tainted root signs as soon as everybody can have learnt it,
// that of a tainted JWT key at once.
func (c *CA) schedule(s *shelf, now time.Time) (roots []*root, active *root) {
	for _, r := range s.records {
		if now.Before(r.cert.NotAfter) && !c.withdrawn(s, r, now) {
			roots = append(roots, r)
		}
	}
	slices.SortFunc(roots, func(a, b *root) int {
		if a, b := a.taintedAt.IsZero(), b.taintedAt.IsZero(); a != b { // whatever the clocks said
			if a {
				return 1
			}
			return -1
		}
		if d := a.published.Compare(b.published); d != 0 {
			return d
		}
		return strings.Compare(keyHash(a.cert), keyHash(b.cert))
	})
	for i, r := range roots {
		r.activeFrom = r.published
		if i > 0 {
			r.activeFrom = c.handover(roots[i-1], r)
		}
		if i == 0 || !now.Before(r.activeFrom) {
			active = r
		}
	}
	return roots, active
}

func (c *CA) handover(from, to *root) time.Time {
	l := life(from.cert)
	at := made(from.cert).Add(l * 5 / 6)
	if known := to.published.Add(l / 12); known.After(at) {
		at = known
	}
	if at.After(from.cert.NotAfter) {
		at = from.cert.NotAfter
	}
	if !from.taintedAt.IsZero() {
		if early := to.published.Add(c.cfg.TaintGrace / 3); early.Before(at) {
			at = early
		}
	}
	return at
}

// lostKey names a key that has to sign and cannot. Only retiring ones may do
// without their file.
func (c *CA) lostKey(s *shelf, roots []*root, active *root) error {
	i := slices.Index(roots, active)
	if i < 0 {
		return nil
	}
	for _, r := range roots[i:] {
		if r.signer == nil {
			return fmt.Errorf("CA key file %s is missing, and %s %q (until %s) is in use: restore the file from a backup: %w",
				c.keys.file(s.name(r.cert)), s.kind, r.cert.Subject.CommonName, r.cert.NotAfter.Format(time.DateOnly), fs.ErrNotExist)
		}
	}
	return nil
}
