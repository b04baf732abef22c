package ca

import (
	"crypto/x509"
	"fmt"
	"time"
)

// tokenCheck is how often a token that answers is asked again whether it has the
// active root's key, so that its loss is known long before it is needed.
const tokenCheck = 10 * time.Minute

// checkToken notes a token that does not answer. It is called with mu held.
func (c *CA) checkToken(b *book, s *state, now time.Time) {
	key, ok := s.active.signer.(*tokenKey)
	if !ok {
		c.token = nil
		return
	}
	if c.token != nil || now.Sub(c.checked).Abs() >= tokenCheck {
		c.token, c.checked = key.reachable(), now
	}
	if c.token != nil {
		b.problems = append(b.problems, fmt.Errorf("the key of %s cannot be reached: %w", s.active.cert.Subject.CommonName, c.token))
	}
}

// Health returns what somebody has to look at before anything expires, one line
// each: a rotation that fails, a root's key that cannot be reached, and an
// authority in use that has less than a sixth of its life left and no successor,
// which an upstream intermediate comes to when nobody replaces its files.
func (c *CA) Health() []error {
	var list []error
	if p := c.problem.Load(); p != nil && *p != nil {
		if m, ok := (*p).(interface{ Unwrap() []error }); ok {
			list = append(list, m.Unwrap()...)
		} else {
			list = append(list, *p)
		}
	}
	s, now := c.state.Load(), c.cfg.Now()
	old := func(what string, cert *x509.Certificate, advice string) {
		from := made(cert)
		if left := cert.NotAfter.Sub(now); left < cert.NotAfter.Sub(from)/6 {
			list = append(list, fmt.Errorf("%s %s ends at %s, in %v, and nothing replaces it: %s",
				what, cert.Subject.CommonName, cert.NotAfter.Format(time.RFC3339), left.Round(time.Second), advice))
		}
	}
	own := "see why rotation fails"
	if f := c.cfg.Signer.Upstream; f != (Upstream{}) {
		old("intermediate", s.signer.cert, fmt.Sprintf("have a new one signed and put it into %s and %s", f.CertFile, f.KeyFile))
		own = fmt.Sprintf("put the upstream CA's next root into %s", f.BundleFile)
	} else {
		old("intermediate", s.signer.cert, own)
	}
	if s.roots[len(s.roots)-1] == s.active {
		old("root", s.active.cert, own)
	}
	if s.jwts[len(s.jwts)-1] == s.jwt {
		old("JWT key", s.jwt.cert, "see why rotation fails")
	}
	return list
}
