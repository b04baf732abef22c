package ca

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// issuerRecord is the public side of an intermediate. It is written before the
// intermediate signs, so that every replica knows whom it must not believe when
// a root is tainted.
type issuerRecord struct {
	Replica     string `json:"replica"`
	Certificate []byte `json:"certificate"` // DER

	cert *x509.Certificate
}

func decodeIssuer(data []byte) (*issuerRecord, error) {
	var rec issuerRecord
	if err := json.Unmarshal(data, &rec); err != nil {
		return nil, err
	}
	var err error
	rec.cert, err = x509.ParseCertificate(rec.Certificate)
	return &rec, err
}

// advanceIntermediate returns this replica's intermediate and the root above it:
// the one on disk while the active root signed it, it is believed and half of its
// life is not over, else a new one. Peers learn it from each chain, so it needs
// no publication. While no new one can be made, the present one goes on.
func (c *CA) advanceIntermediate(ctx context.Context, b *book, active *anchor, now time.Time) (*authority, *anchor, error) {
	name := "intermediate-" + c.cfg.Replica
	have, err := c.keys.load(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, nil, err
	default:
		if err := c.checkOwn(have.cert, name, true); err != nil {
			return nil, nil, err
		}
		if c.usable(b, have, active, now) {
			return have, active, c.recordIssuer(ctx, b, have, active, now)
		}
	}
	fresh, err := c.makeIntermediate(name, active, now)
	if err == nil {
		return fresh, active, c.recordIssuer(ctx, b, fresh, active, now)
	}
	if root := b.stillGood(have, now); root != nil {
		b.problems = append(b.problems, err)
		return have, root, nil
	}
	return nil, nil, err
}

func (c *CA) makeIntermediate(name string, active *anchor, now time.Time) (*authority, error) {
	fresh, key, err := c.newIntermediate(&authority{cert: active.cert, signer: active.signer}, now)
	if err != nil {
		return nil, err
	}
	if err := c.keys.save(name, fresh.cert, key); err != nil {
		return nil, err
	}
	c.log.Info("made a new intermediate", "subject", fresh.cert.Subject.CommonName, "not_after", fresh.cert.NotAfter)
	return fresh, nil
}

// stillGood returns the root above an intermediate that is valid and believed;
// else nil.
func (b *book) stillGood(a *authority, now time.Time) *anchor {
	if a == nil || b.tainted[keyHash(a.cert)] != nil {
		return nil
	}
	return a.rootAmong(b.of(rootLine), now)
}

func (c *CA) usable(b *book, a *authority, active *anchor, now time.Time) bool {
	if a.cert.CheckSignatureFrom(active.cert) != nil {
		return false
	}
	// While a tainted root still signs, a new intermediate would be no better.
	if b.tainted[keyHash(a.cert)] != nil && active.taint == nil {
		return false
	}
	// A configuration with longer SVIDs needs a longer intermediate, as far as
	// its root can give one.
	short := a.cert.NotAfter.Sub(now) < 2*c.cfg.SVIDTTL && a.cert.NotAfter.Before(active.cert.NotAfter)
	return !short && now.Before(made(a.cert).Add(life(a.cert)/2))
}

// recordIssuer writes what is public of an intermediate, once; what a tainted
// root has signed is tainted from the start.
func (c *CA) recordIssuer(ctx context.Context, b *book, a *authority, by *anchor, now time.Time) error {
	hash := keyHash(a.cert)
	if b.issuers[hash] != nil {
		return nil
	}
	rec := &issuerRecord{Replica: c.cfg.Replica, Certificate: a.cert.Raw, cert: a.cert}
	value, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encoding an intermediate: %w", err)
	}
	key := issuerPrefix + hash
	// An unchanged generation: the root was not tainted meanwhile.
	cmps := []store.Cmp{{Key: key}, {Key: keyGeneration, Rev: b.gen}}
	ops := []store.Op{{Key: key, Value: value}}
	if by.taint != nil && b.tainted[hash] == nil {
		op, err := newTaint(KindIntermediate, a.cert, now).op()
		if err != nil {
			return err
		}
		ops = append(ops, op)
	}
	if _, err := c.cfg.Store.Txn(ctx, cmps, ops); err != nil {
		return fmt.Errorf("recording an intermediate: %w", err)
	}
	b.issuers[hash] = rec
	return nil
}

// forgetIssuers drops the records of intermediates and taints that have expired.
func (c *CA) forgetIssuers(ctx context.Context, b *book, now time.Time) error {
	var ops []store.Op
	for hash, rec := range b.issuers {
		if !now.Before(rec.cert.NotAfter.Add(maxSkew)) {
			ops = append(ops, store.Op{Key: issuerPrefix + hash, Delete: true})
			delete(b.issuers, hash)
		}
	}
	for hash, rec := range b.tainted {
		if !now.Before(rec.Until.Add(maxSkew)) {
			ops = append(ops, store.Op{Key: taintPrefix + hash, Delete: true})
			delete(b.tainted, hash)
		}
	}
	for len(ops) > 0 {
		n := min(len(ops), store.MaxOps)
		if _, err := c.cfg.Store.Txn(ctx, nil, ops[:n]); err != nil {
			return fmt.Errorf("forgetting expired intermediates: %w", err)
		}
		ops = ops[n:]
	}
	return nil
}
