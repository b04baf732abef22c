package identity

import (
	"crypto/x509"
	"errors"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/stretchr/testify/require"
)

func TestLive(t *testing.T) {
	root := newAuthority(t, shop)
	var l Live
	if _, err := l.GetX509SVID(); !errors.Is(err, ErrNoIdentity) {
		t.Errorf("zero value: got %v", err)
	}
	if _, err := l.GetX509BundleForTrustDomain(shop); !errors.Is(err, ErrNoIdentity) {
		t.Errorf("zero value: got %v", err)
	}
	if got := l.Generation(); got != 0 {
		t.Errorf("zero value: generation %d", got)
	}

	svid := root.svid(ordersID, nil)
	l.SetSVID(svid)
	if got, err := l.GetX509SVID(); err != nil || got != svid {
		t.Errorf("got %v, %v", got, err)
	}
	if got := l.Generation(); got != 1 {
		t.Errorf("generation %d, want 1", got)
	}

	authorities := Bundles{shop: spiffebundle.FromX509Authorities(shop, []*x509.Certificate{root.cert}), other: spiffebundle.FromX509Authorities(other, nil)}
	l.SetBundles(authorities)
	authorities[shop].SetX509Authorities(nil) // the caller's bundle is the caller's
	b, err := l.GetX509BundleForTrustDomain(shop)
	require.NoError(t, err)
	if got := b.X509Authorities(); len(got) != 1 || got[0] != root.cert {
		t.Errorf("got %v", got)
	}
	if _, err := l.GetX509BundleForTrustDomain(other); err == nil {
		t.Error("an empty bundle is trusted")
	}
	if got, err := l.GetX509SVID(); err != nil || got != svid {
		t.Errorf("after SetBundles: got %v, %v", got, err)
	}
	if got := l.Generation(); got != 2 {
		t.Errorf("generation %d, want 2", got)
	}
	l.SetSVID(nil)
	if _, err := l.GetX509SVID(); !errors.Is(err, ErrNoIdentity) {
		t.Errorf("withdrawn: got %v", err)
	}
}

// TestLiveLosesNoUpdate sets SVID and bundles at once from many goroutines while
// others read.
func TestLiveLosesNoUpdate(t *testing.T) {
	root := newAuthority(t, shop)
	svid, trust := root.svid(ordersID, nil), trusting(root)
	const writers, rounds = 4, 100
	var l Live
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range rounds {
				l.SetSVID(svid)
				l.SetBundles(trust)
				if _, err := l.GetX509SVID(); err != nil {
					t.Errorf("SVID lost: %v", err)
				}
				if _, err := l.GetX509BundleForTrustDomain(shop); err != nil {
					t.Errorf("bundle lost: %v", err)
				}
			}
		})
	}
	wg.Wait()
	if got, want := l.Generation(), uint64(2*writers*rounds); got != want {
		t.Errorf("generation %d, want %d", got, want)
	}
}
