package federation

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

func (m *Manager) key(td spiffeid.TrustDomain) string { return m.cfg.Prefix + td.Name() }

// record is the newest bundle of a trust domain, as stored for restarts and for
// other replicas.
type record struct {
	Origin  string          `json:"origin"` // of the Peer that it was fetched for
	Fetched time.Time       `json:"fetched"`
	Bundle  json.RawMessage `json:"bundle"` // as Marshal writes it
}

// kept is a record that has been read.
type kept struct {
	origin  string
	fetched time.Time
	bundle  *spiffebundle.Bundle
}

func (m *Manager) readRecord(kv store.KV) (spiffeid.TrustDomain, kept, error) {
	td, err := spiffeid.TrustDomainFromString(strings.TrimPrefix(kv.Key, m.cfg.Prefix))
	if err != nil {
		return td, kept{}, fmt.Errorf("reading %s from the store: %w", kv.Key, err)
	}
	var r record
	if err := json.Unmarshal(kv.Value, &r); err != nil {
		return td, kept{}, fmt.Errorf("reading %s from the store: %w", kv.Key, err)
	}
	b, err := identity.ParseBundle(td, r.Bundle)
	if err != nil {
		return td, kept{}, fmt.Errorf("reading %s from the store: %w", kv.Key, err)
	}
	return td, kept{r.Origin, r.Fetched, b}, nil
}

// keep stores a fetched bundle unless what is held is as new. It fails, and
// changes nothing, where b is older.
func (m *Manager) keep(ctx context.Context, p Peer, b *spiffebundle.Bundle) error {
	data, err := identity.MarshalBundle(b)
	if err != nil {
		return err
	}
	value, err := json.Marshal(record{Origin: p.origin(), Fetched: m.cfg.Now().UTC(), Bundle: data})
	if err != nil {
		return fmt.Errorf("keeping the bundle of %s: %w", p.TrustDomain, err)
	}
	for range 5 { // other replicas keep it too
		kv, err := m.cfg.Store.Get(ctx, m.key(p.TrustDomain))
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return fmt.Errorf("keeping the bundle of %s: %w", p.TrustDomain, err)
		}
		held := p.Bootstrap
		if err == nil {
			if _, k, err := m.readRecord(kv); err == nil && k.origin == p.origin() {
				held = k.bundle
			}
		}
		if newer, err := supersedes(held, b); err != nil || !newer {
			return err
		}
		ops := []store.Op{{Key: m.key(p.TrustDomain), Value: value}}
		if m.cfg.Audit != nil {
			ops = append(ops, m.cfg.Audit(p.TrustDomain, keyChanges(held, b)))
		}
		_, err = m.cfg.Store.Txn(ctx, []store.Cmp{{Key: m.key(p.TrustDomain), Rev: kv.Rev}}, ops)
		if !errors.Is(err, store.ErrConflict) {
			if err != nil {
				return fmt.Errorf("keeping the bundle of %s: %w", p.TrustDomain, err)
			}
			m.log.Info("foreign bundle changed", "trust_domain", p.TrustDomain.Name(), "x509_authorities", len(b.X509Authorities()))
			return nil
		}
	}
	return fmt.Errorf("keeping the bundle of %s: %w", p.TrustDomain, store.ErrConflict)
}

// supersedes reports whether b says something else than held. By their sequence
// numbers, where both have one, an older document is refused, and so is a second
// one of the same number: the number changes with every change of content (Trust
// Domain and Bundle 4.1.1).
func supersedes(held, b *spiffebundle.Bundle) (bool, error) {
	if held == nil {
		return true, nil
	}
	if held.Equal(b) {
		return false, nil
	}
	have, ok1 := held.SequenceNumber()
	got, ok2 := b.SequenceNumber()
	switch {
	case !ok1 || !ok2 || got > have:
		return true, nil
	case got < have:
		return false, fmt.Errorf("the endpoint answers with sequence %d, and %d is held: it is behind", got, have)
	case !sameKeys(held, b):
		return false, fmt.Errorf("the endpoint changed its keys without a new spiffe_sequence (%d)", have)
	}
	return true, nil // another order, or refresh hint
}

func sameKeys(a, b *spiffebundle.Bundle) bool {
	as, bs := a.X509Authorities(), b.X509Authorities()
	if len(as) != len(bs) {
		return false
	}
	for _, cert := range bs {
		if !a.HasX509Authority(cert) {
			return false
		}
	}
	return a.JWTBundle().Equal(b.JWTBundle())
}

// watchStore keeps m.records as the store is.
func (m *Manager) watchStore(ctx context.Context) error {
	for {
		kvs, rev, err := m.cfg.Store.List(ctx, m.cfg.Prefix)
		if err != nil {
			return fmt.Errorf("listing foreign bundles: %w", err)
		}
		records := map[spiffeid.TrustDomain]kept{}
		for _, kv := range kvs {
			m.readInto(records, kv)
		}
		m.update(func() { m.records = records })
		err = m.cfg.Store.Watch(ctx, m.cfg.Prefix, rev, func(_ int64, events []store.Event) error {
			m.update(func() {
				for _, ev := range events {
					if !ev.Deleted {
						m.readInto(m.records, ev.KV)
					} else if td, err := spiffeid.TrustDomainFromString(strings.TrimPrefix(ev.Key, m.cfg.Prefix)); err == nil {
						delete(m.records, td)
					}
				}
			})
			return nil
		})
		if !errors.Is(err, store.ErrCompacted) {
			return err
		}
	}
}

// readInto leaves the last good state of what cannot be read.
func (m *Manager) readInto(records map[spiffeid.TrustDomain]kept, kv store.KV) {
	td, k, err := m.readRecord(kv)
	if err != nil {
		m.log.Error("ignoring a stored bundle", "error", err)
		return
	}
	records[td] = k
}

// forget removes a bundle whose document is gone.
func (m *Manager) forget(ctx context.Context, td spiffeid.TrustDomain) {
	if _, err := m.cfg.Store.Txn(ctx, nil, []store.Op{{Key: m.key(td), Delete: true}}); err != nil && ctx.Err() == nil {
		m.log.Warn("removing a foreign bundle from the store; nobody uses it", "trust_domain", td.Name(), "error", err)
	}
}

// keyChanges says which keys came (+) and went (-), the roots by the SHA-256 of
// their public key and JWT keys by their kid, and the sequence number.
func keyChanges(was, is *spiffebundle.Bundle) string {
	var out []string
	if was == nil {
		was = spiffebundle.New(is.TrustDomain())
	}
	if n, ok := is.SequenceNumber(); ok {
		out = append(out, fmt.Sprintf("sequence %d", n))
	}
	for _, side := range []struct {
		sign     string
		has, not *spiffebundle.Bundle
	}{{"+", is, was}, {"-", was, is}} {
		for _, cert := range side.has.X509Authorities() {
			if !side.not.HasX509Authority(cert) {
				sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
				out = append(out, fmt.Sprintf("%sroot %x until %s", side.sign, sum[:8], cert.NotAfter.UTC().Format(time.RFC3339)))
			}
		}
		for _, kid := range slices.Sorted(maps.Keys(side.has.JWTAuthorities())) {
			if key, ok := side.not.FindJWTAuthority(kid); !ok || !samePublicKey(key, side.has.JWTAuthorities()[kid]) {
				out = append(out, fmt.Sprintf("%sJWT key %.64q", side.sign, kid))
			}
		}
	}
	return strings.Join(out, ", ")
}

func samePublicKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
