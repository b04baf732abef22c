package ca

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// anchor is a published key that peers trust: a root, or a key that signs
// JWT-SVIDs. The latter has a certificate too, self-signed and never given to
// anybody: it ties the key file to its trust domain and says how long the key
// lives, so that one kind of file, of record and of schedule serves both.
type anchor struct {
	cert       *x509.Certificate
	signer     Signer // nil: the key file is not here, which only a retiring anchor may lack
	published  time.Time
	activeFrom time.Time
	cross      *x509.Certificate // see anchorRecord
	taint      *Tainted          // nil: believed
	rev        int64             // of the record, for compare-and-swap
}

// line is a succession of anchors, of which one signs at a time.
type line struct {
	what  string // for people
	file  string // prefix of key files
	store string // prefix of records
	kind  string // of Authority
	isCA  bool   // what the certificates say
	// make makes an anchor with a new key. It writes nothing.
	make func(c *CA, now time.Time) (*authority, *pem.Block, error)
}

var (
	rootLine = &line{what: "root", file: "root-", store: storePrefix + "roots/", kind: KindRoot, isCA: true, make: (*CA).newRoot}
	jwtLine  = &line{what: "JWT key", file: "jwt-", store: storePrefix + "jwt/", kind: KindJWT, make: (*CA).newJWTKey}
	lines    = [...]*line{rootLine, jwtLine}
)

// name is what key folder and store call an anchor: by its key, so that no two
// have the same name.
func (l *line) name(cert *x509.Certificate) string {
	return l.file + keyHash(cert)[:16]
}

// attachKeys gives each anchor its key, and publishes anchors whose file was
// written just before a crash. An anchor that is still to sign must have its key.
func (c *CA) attachKeys(ctx context.Context, b *book, l *line, now time.Time) error {
	names, err := c.keys.names(l.file)
	if err != nil {
		return err
	}
	var unpublished []*authority
	for _, name := range names {
		a, err := c.keys.load(name)
		if err != nil {
			return err
		}
		if err := c.checkOwn(a.cert, name, l.isCA); err != nil {
			return err
		}
		r, known := b.anchors[l][name]
		switch {
		case known && !r.cert.Equal(a.cert):
			return fmt.Errorf("CA key file %s holds another certificate than the store: restore it from a backup", c.keys.file(name))
		case known:
			r.signer = a.signer
		case now.Before(a.cert.NotAfter) && b.tainted[keyHash(a.cert)] == nil:
			unpublished = append(unpublished, a)
		}
	}
	// Before anything is added: a replica with the wrong key folder must not
	// publish an anchor that the others cannot sign with.
	if err := c.lostKey(l, b.of(l), now); err != nil {
		return err
	}
	for _, a := range unpublished {
		if err := c.publish(ctx, b, l, &anchor{cert: a.cert, signer: a.signer}, now); err != nil {
			return err
		}
	}
	return nil
}

// checkOwn refuses a key file that belongs elsewhere.
func (c *CA) checkOwn(cert *x509.Certificate, name string, isCA bool) error {
	if len(cert.URIs) != 1 || cert.URIs[0].String() != c.td.IDString() || cert.IsCA != isCA {
		return fmt.Errorf("CA key file %s is not of trust domain %s: use the key folder and the data that belong together", c.keys.file(name), c.td)
	}
	return nil
}

// publish records an anchor whose key file exists, as the youngest of its line
// even where another replica's clock is a little ahead.
func (c *CA) publish(ctx context.Context, b *book, l *line, a *anchor, now time.Time) error {
	name := l.name(a.cert)
	a.published = now
	for _, other := range b.anchors[l] {
		if d := other.published.Sub(a.published); d >= 0 && d < maxSkew {
			a.published = other.published.Add(1)
		}
	}
	value, err := a.encode()
	if err != nil {
		return fmt.Errorf("encoding %s: %w", name, err)
	}
	key := l.store + name
	if err := c.commit(ctx, b, now, []store.Cmp{{Key: key}}, []store.Op{{Key: key, Value: value}}); err != nil {
		return fmt.Errorf("publishing %s: %w", name, err)
	}
	a.rev = b.gen
	b.anchors[l][name] = a
	return nil
}

// advanceLine makes the first anchor, or the next one when half of the active
// one's life is over or it is tainted, and returns the active one.
func (c *CA) advanceLine(ctx context.Context, b *book, l *line, now time.Time) (*anchor, error) {
	all := b.of(l)
	active := c.schedule(all, now)
	if active != nil {
		due := active.taint != nil || !now.Before(made(active.cert).Add(life(active.cert)/2))
		if last := all[len(all)-1]; last != active {
			return active, c.introduce(ctx, l, active, last, now)
		} else if !due {
			return active, nil
		}
	}
	if active == nil && len(all) > 0 && l == rootLine {
		c.log.Error("every root has expired while no control plane ran; all sidecars need new join tokens")
	}
	if err := c.add(ctx, b, l, active, now); err != nil {
		if active == nil || errors.Is(err, store.ErrConflict) {
			return nil, err
		}
		b.problems = append(b.problems, err)
		return active, nil
	}
	return c.schedule(b.of(l), now), nil
}

// add makes and publishes an anchor: first the key file, then the record, so
// that a crash between them leaves a file that the next start publishes. The
// file stays even when publishing fails: another replica may have seen it and
// published it.
func (c *CA) add(ctx context.Context, b *book, l *line, active *anchor, now time.Time) error {
	a, key, err := l.make(c, now)
	if err != nil {
		return err
	}
	if err := c.keys.save(l.name(a.cert), a.cert, key); err != nil {
		return err
	}
	fresh := &anchor{cert: a.cert, signer: a.signer}
	if active != nil && active.taint != nil {
		fresh.cross = c.crossSign(l, active, fresh, now)
	}
	if err := c.publish(ctx, b, l, fresh, now); err != nil {
		return err
	}
	c.log.Info("published a new "+l.what, "subject", a.cert.Subject.CommonName, "not_after", a.cert.NotAfter)
	return nil
}

// forget drops the records of anchors that nothing can rest on any more. The key
// files of roots stay: were it only the clock that was wrong for a while, they
// are published again. Tainted ones are not. Those of JWT keys, of which there
// are many, go.
func (c *CA) forget(ctx context.Context, b *book, now time.Time) error {
	for _, l := range lines {
		for _, r := range b.of(l) {
			if now.Before(r.cert.NotAfter.Add(maxSkew)) && !c.spent(r, b.of(l), now) {
				continue
			}
			name := l.name(r.cert)
			if err := c.commit(ctx, b, now, nil, []store.Op{{Key: l.store + name, Delete: true}}); err != nil {
				return fmt.Errorf("forgetting %s: %w", name, err)
			}
			delete(b.anchors[l], name)
			if l == jwtLine {
				if err := removeIfThere(c.keys.file(name)); err != nil {
					return fmt.Errorf("removing the key file of %s: %w", name, err)
				}
			}
			c.log.Info("took out of the bundle: "+l.what, "subject", r.cert.Subject.CommonName, "tainted", r.taint != nil)
		}
	}
	return c.forgetIssuers(ctx, b, now)
}

// lostKey names an anchor that has to sign and cannot. Only retiring anchors may
// do without their key.
func (c *CA) lostKey(l *line, all []*anchor, now time.Time) error {
	i := slices.Index(all, c.schedule(all, now))
	if i < 0 {
		return nil
	}
	for _, r := range all[i:] {
		if r.signer == nil {
			return fmt.Errorf("CA key file %s is missing, and %s %q (until %s) is in use: restore the file from a backup: %w",
				c.keys.file(l.name(r.cert)), l.what, r.cert.Subject.CommonName, r.cert.NotAfter.Format(time.DateOnly), fs.ErrNotExist)
		}
	}
	return nil
}
