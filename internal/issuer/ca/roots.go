package ca

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// In the store: the trust domain, one record per root, and a counter that every
// change of the roots rewrites, so that two replicas cannot rotate at once.
const (
	storePrefix    = "ca/"
	keyTrustDomain = storePrefix + "trust-domain"
	keyGeneration  = storePrefix + "generation"
	rootPrefix     = storePrefix + "roots/"
)

// rootRecord is the public side of a root. Published says when peers could begin
// to learn it, which is what its activation waits for.
type rootRecord struct {
	Certificate []byte    `json:"certificate"` // DER
	Published   time.Time `json:"published"`
}

// root is a root certificate that is published.
type root struct {
	cert       *x509.Certificate
	signer     Signer // nil: the key file is not here, which only a retiring root may lack
	published  time.Time
	activeFrom time.Time
}

// book is what the store holds, as of one reading.
type book struct {
	td         spiffeid.TrustDomain // zero: nothing recorded yet
	records    map[string]*root     // :: name → root
	tdRev, gen int64                // for compare-and-swap; zero: absent
}

func (c *CA) readBook(ctx context.Context) (*book, error) {
	kvs, _, err := c.cfg.Store.List(ctx, storePrefix)
	if err != nil {
		return nil, fmt.Errorf("reading the CA's records: %w", err)
	}
	b := &book{records: map[string]*root{}}
	for _, kv := range kvs {
		switch {
		case kv.Key == keyTrustDomain:
			if b.td, err = spiffeid.TrustDomainFromString(string(kv.Value)); err != nil {
				return nil, fmt.Errorf("reading the trust domain from the store: %w", err)
			}
			b.tdRev = kv.Rev
		case kv.Key == keyGeneration:
			b.gen = kv.Rev
		case strings.HasPrefix(kv.Key, rootPrefix):
			r, err := decodeRecord(kv.Value)
			if err != nil {
				return nil, fmt.Errorf("reading %s from the store: %w", kv.Key, err)
			}
			b.records[strings.TrimPrefix(kv.Key, rootPrefix)] = r
		}
	}
	return b, nil
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

// attachKeys gives each root its key, and publishes roots whose file was written
// just before a crash. A root that is still to sign must have its key.
func (c *CA) attachKeys(ctx context.Context, b *book, now time.Time) error {
	names, err := c.keys.names("root-")
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
		r, known := b.records[name]
		switch {
		case known && !r.cert.Equal(a.cert):
			return fmt.Errorf("CA key file %s holds another certificate than the store: restore it from a backup", c.keys.file(name))
		case known:
			r.signer = a.signer
		case now.Before(a.cert.NotAfter):
			unpublished = append(unpublished, a)
		}
	}
	// Before anything is added: a replica with the wrong key folder must not
	// publish a root that the others cannot sign with.
	if err := c.lostKey(schedule(b.records, now)); err != nil {
		return err
	}
	for _, a := range unpublished {
		if err := c.publish(ctx, b, a, now); err != nil {
			return err
		}
	}
	return nil
}

// checkOwn refuses a key file that belongs elsewhere.
func (c *CA) checkOwn(cert *x509.Certificate, name string) error {
	if len(cert.URIs) != 1 || cert.URIs[0].String() != c.td.IDString() || !cert.IsCA {
		return fmt.Errorf("CA key file %s is not of trust domain %s: use the key folder and the data that belong together", c.keys.file(name), c.td)
	}
	return nil
}

// publish records a root whose key file exists. ErrConflict means that another
// replica changed the roots meanwhile.
func (c *CA) publish(ctx context.Context, b *book, a *authority, now time.Time) error {
	name := rootName(a.cert)
	value, err := json.Marshal(rootRecord{Certificate: a.cert.Raw, Published: now.UTC()})
	if err != nil {
		return fmt.Errorf("encoding root %s: %w", name, err)
	}
	cmps := []store.Cmp{{Key: keyGeneration, Rev: b.gen}, {Key: keyTrustDomain, Rev: b.tdRev}, {Key: rootPrefix + name}}
	ops := []store.Op{{Key: rootPrefix + name, Value: value}, {Key: keyGeneration, Value: []byte(name)}}
	if b.tdRev == 0 {
		ops = append(ops, store.Op{Key: keyTrustDomain, Value: []byte(c.td.Name())})
	}
	rev, err := c.cfg.Store.Txn(ctx, cmps, ops)
	if err != nil {
		return fmt.Errorf("publishing root %s: %w", name, err)
	}
	b.gen = rev
	if b.tdRev == 0 {
		b.tdRev, b.td = rev, c.td
	}
	b.records[name] = &root{cert: a.cert, signer: a.signer, published: now}
	return nil
}

// addRoot makes and publishes a root: first the key file, then the record, so
// that a crash between them leaves a file that the next start publishes. The
// file stays even when publishing fails: another replica may have seen it and
// published it.
func (c *CA) addRoot(ctx context.Context, b *book, now time.Time) error {
	a, key, err := c.newRoot(now)
	if err != nil {
		return err
	}
	if err := c.keys.save(rootName(a.cert), a.cert, key); err != nil {
		return err
	}
	if err := c.publish(ctx, b, a, now); err != nil {
		return err
	}
	c.log.Info("published a new root", "subject", a.cert.Subject.CommonName, "not_after", a.cert.NotAfter)
	return nil
}

// forgetExpired drops the records of roots that nothing can chain to any more.
// Their key files stay: were it only the clock that was wrong for a while, they
// are published again.
func (c *CA) forgetExpired(ctx context.Context, b *book, now time.Time) error {
	for name, r := range b.records {
		if now.Before(r.cert.NotAfter) {
			continue
		}
		cmps := []store.Cmp{{Key: keyGeneration, Rev: b.gen}}
		ops := []store.Op{{Key: rootPrefix + name, Delete: true}, {Key: keyGeneration, Value: []byte(name)}}
		rev, err := c.cfg.Store.Txn(ctx, cmps, ops)
		if err != nil {
			return fmt.Errorf("forgetting root %s: %w", name, err)
		}
		b.gen = rev
		delete(b.records, name)
		c.log.Info("forgot an expired root", "subject", r.cert.Subject.CommonName)
	}
	return nil
}

// schedule orders the unexpired roots and says from when on each one signs. All
// replicas compute the same from the same records.
//
// A root becomes active at five sixths of its predecessor's life, but not before
// it has been published for a twelfth of that life, for a control plane that was
// down at the time; and at the latest when its predecessor ends.
func schedule(records map[string]*root, now time.Time) (roots []*root, active *root) {
	for _, r := range records {
		if now.Before(r.cert.NotAfter) {
			roots = append(roots, r)
		}
	}
	slices.SortFunc(roots, func(a, b *root) int {
		if d := a.published.Compare(b.published); d != 0 {
			return d
		}
		return strings.Compare(rootName(a.cert), rootName(b.cert))
	})
	for i, r := range roots {
		r.activeFrom = r.published
		if i > 0 {
			r.activeFrom = handover(roots[i-1], r)
		}
		if i == 0 || !now.Before(r.activeFrom) {
			active = r
		}
	}
	return roots, active
}

func handover(from, to *root) time.Time {
	l := life(from.cert)
	at := made(from.cert).Add(l * 5 / 6)
	if known := to.published.Add(l / 12); known.After(at) {
		at = known
	}
	if at.After(from.cert.NotAfter) {
		at = from.cert.NotAfter
	}
	return at
}

// lostKey names a root that has to sign and cannot. Only retiring roots may do
// without their key.
func (c *CA) lostKey(roots []*root, active *root) error {
	i := slices.Index(roots, active)
	if i < 0 {
		return nil
	}
	for _, r := range roots[i:] {
		if r.signer == nil {
			name := rootName(r.cert)
			return fmt.Errorf("CA key file %s is missing, and root %q (until %s) is in use: restore the file from a backup: %w",
				c.keys.file(name), r.cert.Subject.CommonName, r.cert.NotAfter.Format(time.DateOnly), fs.ErrNotExist)
		}
	}
	return nil
}
