package ca

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// ErrUnknownAuthority says that no signing key has the name.
var ErrUnknownAuthority = errors.New("no such authority; see: sallyport status")

// Tainted is a signing key that may be in the wrong hands.
type Tainted struct {
	KeyHash string    `json:"key_hash"` // SHA-256 of the SubjectPublicKeyInfo, lower-case hex
	Kind    string    `json:"kind"`     // root, intermediate or jwt
	Subject string    `json:"subject"`
	At      time.Time `json:"at"`
	Until   time.Time `json:"until"` // when nothing that it signed can be valid
}

// Taint stops using one key, by its subject or the hash of its key as
// [CA.Authorities] lists them, and returns which key signs in its place.
//
// An intermediate is replaced at once. A JWT key leaves the bundle at once, so
// that its tokens are refused. A root gets a successor at once, which signs after
// a third of Config.TaintGrace, when everybody can have learnt it; the tainted
// one leaves the bundle after all of it, and everything under it is refused from
// then on. To refuse what an intermediate has signed is package revocation's.
//
// A key hash that is not known here is taken for another replica's intermediate.
// Tainting a key again changes nothing.
func (c *CA) Taint(ctx context.Context, authority string) (t Tainted, replacedBy string, err error) {
	if t, err = c.findAuthority(authority); err != nil {
		return Tainted{}, "", err
	}
	// Another replica may change the records at this moment: look again.
	for range 3 {
		if err = c.recordTaint(ctx, t); !errors.Is(err, store.ErrConflict) {
			break
		}
	}
	if err != nil {
		return Tainted{}, "", fmt.Errorf("tainting %s: %w", t.Subject, err)
	}
	if err := c.Advance(ctx); err != nil {
		return t, "", fmt.Errorf("replacing the tainted %s %s; it is tried again: %w", t.Kind, t.Subject, err)
	}
	return t, c.replacement(t.Kind), nil
}

func (c *CA) replacement(kind string) string {
	s := c.state.Load()
	switch kind {
	case "root":
		return s.roots[len(s.roots)-1].cert.Subject.CommonName
	case "jwt":
		return s.jwtActive.cert.Subject.CommonName
	}
	return s.signer.cert.Subject.CommonName
}

func (c *CA) findAuthority(name string) (Tainted, error) {
	now := c.cfg.Now().UTC()
	for _, a := range c.Authorities() {
		if a.Subject == name || a.KeyHash == name {
			return Tainted{KeyHash: a.KeyHash, Kind: a.Kind, Subject: a.Subject, At: now, Until: a.NotAfter}, nil
		}
	}
	if b, err := hex.DecodeString(name); err == nil && len(b) == 32 {
		return Tainted{KeyHash: name, Kind: "intermediate", Subject: name, At: now, Until: now.Add(c.cfg.IntermediateTTL)}, nil
	}
	return Tainted{}, fmt.Errorf("%.100q: %w", name, ErrUnknownAuthority)
}

func (c *CA) recordTaint(ctx context.Context, t Tainted) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := c.readBook(ctx)
	if err != nil {
		return err
	}
	if b.tainted[t.KeyHash].KeyHash != "" {
		return nil
	}
	value, err := json.Marshal(t)
	if err != nil {
		return fmt.Errorf("encoding: %w", err)
	}
	return c.change(ctx, b, t.At, nil, store.Op{Key: taintPrefix + t.KeyHash, Value: value})
}

// markTainted tells keys that they are tainted.
func (b *book) markTainted() {
	for _, s := range []*shelf{&b.roots, &b.jwt} {
		for _, r := range s.records {
			r.taintedAt = b.tainted[keyHash(r.cert)].At
		}
	}
}

// withdrawn reports whether a tainted key is out of the bundle.
func (c *CA) withdrawn(s *shelf, r *root, now time.Time) bool {
	if r.taintedAt.IsZero() {
		return false
	}
	if s.prefix == jwtPrefix {
		return true
	}
	return !now.Before(r.taintedAt.Add(c.cfg.TaintGrace))
}

func (s *state) taintedKeys() map[string]bool {
	out := make(map[string]bool, len(s.tainted))
	for _, t := range s.tainted {
		out[t.KeyHash] = true
	}
	return out
}

// Tainted lists the keys that may be in the wrong hands, until nothing that they
// signed can be valid.
func (c *CA) Tainted() []Tainted { return c.state.Load().tainted }

// WatchTainted calls fn with what is tainted at once and after each change, until
// ctx ends or fn fails; it returns that error.
func (c *CA) WatchTainted(ctx context.Context, fn func([]Tainted) error) error {
	for {
		s := c.state.Load()
		if err := fn(s.tainted); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.superseded:
		}
	}
}
