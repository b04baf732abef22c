package ca

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// In the store: the trust domain, one record per anchor, per intermediate of any
// replica and per key that is not believed any more, and the bundle's sequence
// number, which every change of the anchors rewrites, so that two
// replicas cannot rotate at once.
const (
	storePrefix    = "ca/"
	keyTrustDomain = storePrefix + "trust-domain"
	keyGeneration  = storePrefix + "generation"
	issuerPrefix   = storePrefix + "intermediates/"
	taintPrefix    = storePrefix + "tainted/"
)

// maxSkew is how far the clocks of two replicas may be apart. One that is behind
// would publish again what another has just forgotten.
const maxSkew = time.Minute

// anchorRecord is the public side of an anchor. Published says when peers could
// begin to learn it, which is what its activation waits for.
type anchorRecord struct {
	Certificate []byte    `json:"certificate"` // DER
	Published   time.Time `json:"published"`
	// Cross is the same key signed by the tainted root that it replaces, DER.
	Cross []byte `json:"cross,omitempty"`
}

// book is what the store holds, as of one reading.
type book struct {
	td         spiffeid.TrustDomain         // zero: nothing recorded yet
	anchors    map[*line]map[string]*anchor // :: line → name → anchor
	issuers    map[string]*issuerRecord     // :: key hash → intermediate of any replica
	tainted    map[string]*Tainted          // :: key hash → why it is not believed
	problems   []error                      // what could not be done, and did not have to be yet
	seq        uint64                       // of the bundle that the anchors make
	tdRev, gen int64                        // for compare-and-swap; zero: absent
}

func (c *CA) readBook(ctx context.Context) (*book, error) {
	kvs, _, err := c.cfg.Store.List(ctx, storePrefix)
	if err != nil {
		return nil, fmt.Errorf("reading the CA's records: %w", err)
	}
	b := &book{anchors: map[*line]map[string]*anchor{}, issuers: map[string]*issuerRecord{}, tainted: map[string]*Tainted{}}
	for _, l := range lines {
		b.anchors[l] = map[string]*anchor{}
	}
	for _, kv := range kvs {
		if err := b.read(kv); err != nil {
			return nil, fmt.Errorf("reading %s from the store: %w", kv.Key, err)
		}
	}
	for _, l := range lines {
		for _, a := range b.anchors[l] {
			a.taint = b.tainted[keyHash(a.cert)]
		}
	}
	return b, nil
}

func (b *book) read(kv store.KV) (err error) {
	switch kv.Key {
	case keyTrustDomain:
		b.tdRev = kv.Rev
		b.td, err = spiffeid.TrustDomainFromString(string(kv.Value))
		return err
	case keyGeneration:
		b.gen = kv.Rev
		b.seq, _ = strconv.ParseUint(string(kv.Value), 10, 64) // an earlier version wrote a name
		return nil
	}
	for _, l := range lines {
		if name, ok := strings.CutPrefix(kv.Key, l.store); ok {
			b.anchors[l][name], err = decodeRecord(kv)
		}
	}
	if hash, ok := strings.CutPrefix(kv.Key, issuerPrefix); ok {
		b.issuers[hash], err = decodeIssuer(kv.Value)
	}
	if hash, ok := strings.CutPrefix(kv.Key, taintPrefix); ok {
		b.tainted[hash] = &Tainted{}
		err = json.Unmarshal(kv.Value, b.tainted[hash])
	}
	return err
}

func decodeRecord(kv store.KV) (*anchor, error) {
	var rec anchorRecord
	if err := json.Unmarshal(kv.Value, &rec); err != nil {
		return nil, err
	}
	a := &anchor{published: rec.Published, rev: kv.Rev}
	var err error
	if a.cert, err = x509.ParseCertificate(rec.Certificate); err != nil {
		return nil, err
	}
	if len(rec.Cross) > 0 {
		a.cross, err = x509.ParseCertificate(rec.Cross)
	}
	return a, err
}

func (a *anchor) encode() ([]byte, error) {
	rec := anchorRecord{Certificate: a.cert.Raw, Published: a.published.UTC()}
	if a.cross != nil {
		rec.Cross = a.cross.Raw
	}
	return json.Marshal(rec)
}

// of returns the anchors of a line in the order they were published.
func (b *book) of(l *line) []*anchor {
	return slices.SortedFunc(maps.Values(b.anchors[l]), func(x, y *anchor) int {
		if d := x.published.Compare(y.published); d != 0 {
			return d
		}
		return strings.Compare(l.name(x.cert), l.name(y.cert))
	})
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

// commit writes a change of what is published, and the trust domain with the
// first one. The new sequence number is the time, where the clock allows: so it
// grows even when the store was restored from a backup. ErrConflict means that
// another replica changed the anchors meanwhile.
func (c *CA) commit(ctx context.Context, b *book, now time.Time, cmps []store.Cmp, ops []store.Op) error {
	seq := max(b.seq+1, uint64(max(now.UnixMilli(), 0)))
	cmps = append(cmps, store.Cmp{Key: keyGeneration, Rev: b.gen}, store.Cmp{Key: keyTrustDomain, Rev: b.tdRev})
	ops = append(ops, store.Op{Key: keyGeneration, Value: strconv.AppendUint(nil, seq, 10)})
	if b.tdRev == 0 {
		ops = append(ops, store.Op{Key: keyTrustDomain, Value: []byte(c.td.Name())})
	}
	rev, err := c.cfg.Store.Txn(ctx, cmps, ops)
	if err != nil {
		return err
	}
	b.gen, b.seq = rev, seq
	if b.tdRev == 0 {
		b.tdRev, b.td = rev, c.td
	}
	return nil
}
