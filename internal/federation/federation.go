// Package federation shares trust between SPIFFE trust domains: it serves the own
// bundle and OIDC discovery, and fetches and keeps the bundles of others (SPIFFE
// Federation, and Trust Domain and Bundle).
//
// It neither signs nor decides who may talk to whom. Bundles are kept apart by
// trust domain and are never merged.
package federation

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Profile is how a bundle endpoint proves who it is (SPIFFE Federation 5.2).
type Profile string

// Profiles.
const (
	HTTPSSPIFFE Profile = "https_spiffe" // by an X509-SVID with one exact ID
	HTTPSWeb    Profile = "https_web"    // by a Web PKI certificate for its host name
)

// Peer is a foreign trust domain and where its bundle comes from. URL, Profile
// and TrustDomain are always configured together (SPIFFE Federation 5.1). Without
// a URL the Bootstrap is all that is ever trusted.
type Peer struct {
	TrustDomain spiffeid.TrustDomain
	URL         string
	Profile     Profile
	EndpointID  spiffeid.ID          // HTTPSSPIFFE: whom the endpoint has to be, exactly
	Bootstrap   *spiffebundle.Bundle // trusted until the first fetch; may be nil for HTTPSWeb
}

// Validate says what is missing or contradicts itself.
func (p Peer) Validate() error {
	switch {
	case p.TrustDomain.IsZero():
		return errors.New("no trust domain")
	case p.Bootstrap != nil && p.Bootstrap.TrustDomain() != p.TrustDomain:
		return fmt.Errorf("the bundle is of %s, not of %s", p.Bootstrap.TrustDomain(), p.TrustDomain)
	case p.URL == "" && p.Bootstrap == nil:
		return errors.New("neither a bundle nor an endpoint to fetch it from")
	case p.URL == "":
		return nil
	}
	if err := CheckURL(p.URL); err != nil {
		return err
	}
	switch p.Profile {
	case HTTPSSPIFFE:
		if p.EndpointID.Path() == "" {
			return errors.New("https_spiffe needs the endpoint's SPIFFE ID, with a path")
		}
		if p.Bootstrap == nil && p.EndpointID.TrustDomain() == p.TrustDomain {
			return errors.New("https_spiffe needs a bundle to verify the endpoint with at first")
		}
	case HTTPSWeb:
	default:
		return fmt.Errorf("profile %q: want https_spiffe or https_web", p.Profile)
	}
	return nil
}

// CheckURL refuses what no bundle endpoint may be at: anything but https, user
// information, no host (SPIFFE Federation 5.2.1.1 and 5.2.2.1).
func CheckURL(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return errors.New("bundle endpoint: not a URL")
	}
	return checkURL(u)
}

// checkURL never repeats the whole URL: user information may be a password.
func checkURL(u *url.URL) error {
	switch {
	case u.Scheme != "https":
		return fmt.Errorf("bundle endpoint at %q: the URL must begin with https://", u.Host)
	case u.User != nil:
		return fmt.Errorf("bundle endpoint at %q: the URL must not hold user information", u.Host)
	case u.Hostname() == "":
		return errors.New("bundle endpoint: the URL names no host")
	case u.Fragment != "":
		return fmt.Errorf("bundle endpoint at %q: the URL must not have a fragment", u.Host)
	}
	return nil
}

// origin names what a kept bundle was fetched on the strength of. A changed
// document begins anew from its own bundle.
func (p Peer) origin() string {
	var bootstrap []byte
	if p.Bootstrap != nil {
		bootstrap, _ = identity.MarshalBundle(p.Bootstrap) // what it cannot say does not count
	}
	data, _ := json.Marshal([]string{p.TrustDomain.Name(), p.URL, string(p.Profile), p.EndpointID.String(), string(bootstrap)}) // strings always can
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
